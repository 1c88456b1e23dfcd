"""Options that `ckpt-jax prune` and `simulate` share: which steps to keep, and what storage costs."""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ckpt_jax.config import Config, load_config
from ckpt_jax.config.units import count, size_text

if TYPE_CHECKING:
  from ckpt_jax.planning.simulate import StorageUse
  from ckpt_jax.policies.retention import Retention

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class RetentionOptions:
  """The rules and the price of a configuration file, with those of the command line in their place."""

  last: Annotated[int | None, typer.Option("--keep-last", help="Keep the newest N steps.")] = None
  hourly: Annotated[
    int | None, typer.Option("--keep-hourly", help="Keep the newest step of each of the last N hours.")
  ] = None
  daily: Annotated[int | None, typer.Option("--keep-daily", help="... of the last N days.")] = None
  weekly: Annotated[int | None, typer.Option("--keep-weekly", help="... of the last N ISO weeks.")] = None
  monthly: Annotated[int | None, typer.Option("--keep-monthly", help="... of the last N months.")] = None
  within: Annotated[str | None, typer.Option("--keep-within", help="Keep steps younger than this: 2d6h.")] = None
  every_steps: Annotated[
    int | None, typer.Option("--keep-every-steps", help="Keep multiples of N (`simulate` counts saves).")
  ] = None
  budget: Annotated[str | None, typer.Option(help="Bytes that all steps may take, e.g. 2TiB.")] = None
  thin: Annotated[
    str | None,
    typer.Option(metavar="AGE[:PATH,...]", help="Leave only these leaves (default: params) of older steps, e.g. 1d."),
  ] = None
  config: Annotated[
    str | None, typer.Option(help="A YAML file whose rules and price apply where no option is given.")
  ] = None
  price: Annotated[float | None, typer.Option(help="Price of a GiB-month of storage, in your currency.")] = None
  currency: Annotated[str, typer.Option(help="Printed behind prices, e.g. EUR.")] = ""

  @property
  def _settings(self) -> Config:
    return Config() if self.config is None else load_config(self.config)

  def rules(self, best: str | None = None) -> Retention:
    """The retention that applies; `best` is METRIC, METRIC:max or METRIC:max:3.

    Raises:
      ConfigError: if a value is wrong.
    """
    from ckpt_jax.policies.retention import Retention

    given: dict[str, Any] = {
      name: getattr(self, name) for name in vars(self) if name not in ("config", "price", "currency")
    }
    if best is not None:
      match = re.fullmatch(r"(.*?)(?::(min|max))?(?::(\d+))?", best, re.DOTALL)
      assert match is not None
      given["best"] = {"metric": match[1], "mode": match[2] or "min", "n": int(match[3] or 1)}
    if self.thin is not None:
      after, _, paths = self.thin.partition(":")
      given["thin"] = {"after": after} | ({"keep": paths.split(",")} if paths else {})
    given = {name: value for name, value in given.items() if value is not None}
    return dataclasses.replace(Retention.from_config(self._settings.retention), **given)

  def monthly_cost(self, nbytes: float) -> float | None:
    """The price of storing bytes for a month; None if no price is known."""
    price = self._settings.storage.price_per_gib_month if self.price is None else self.price
    return None if price is None else nbytes / _GIB * price

  def use_text(self, use: StorageUse, days: float) -> str:
    """What the kept steps of `days` take, and cost if a price is known."""
    cost = self.monthly_cost(use.mean_nbytes)
    money = "" if cost is None else f", {self.money(cost)} a month"
    return (
      f"storage over {days:g} days: {count(use.steps[-1] if use.steps else 0)} at the end, "
      f"{size_text(use.mean_nbytes)} on average, {size_text(use.peak_nbytes)} at most{money}"
    )

  def money(self, amount: float) -> str:
    """`12.50 EUR`."""
    return f"{amount:,.2f} {self.currency}".rstrip()
