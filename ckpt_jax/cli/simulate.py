"""`ckpt-jax simulate`: how often to save and what to keep, before the cluster is rented."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import typer

from ckpt_jax.cli.common import console, print_json
from ckpt_jax.config import parse_bytes, parse_duration
from ckpt_jax.config.units import duration_text, size_text
from ckpt_jax.errors import ConfigError

_TRAINING_BYTES_A_PARAM = 12  # float32 weights and Adam's two moments
_FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)


def simulate(
  params: Annotated[float | None, typer.Option(help="Parameters; a state is 12 bytes for each.")] = None,
  nbytes: Annotated[str | None, typer.Option("--bytes", help="Bytes of the whole state, e.g. 782GiB.")] = None,
  hosts: Annotated[int, typer.Option(min=1, help="Hosts; one failing stops the job.")] = 1,
  copies: Annotated[int | None, typer.Option(min=1, help="Replicas of the state (default: one on each host).")] = None,
  node_mtti: Annotated[str, typer.Option(help="Mean time to interruption of one host.")] = "90d",
  bandwidth: Annotated[str | None, typer.Option(help="Of the storage, all hosts together, per second.")] = None,
  bandwidth_per_host: Annotated[str | None, typer.Option(help="Of one host to the storage, per second.")] = None,
  interconnect: Annotated[str, typer.Option(help="Between hosts, per second.")] = "12.5GB",
  strategy: Annotated[str, typer.Option(help="Restore: direct, gather or broadcast.")] = "direct",
  blocking: Annotated[
    str | None, typer.Option(help="What a save takes from training (default: a copy at 5 GB/s).")
  ] = None,
  background: Annotated[str | None, typer.Option(help="The write behind it (default: by the bandwidth).")] = None,
  restart: Annotated[str, typer.Option(help="From an interruption to the restore.")] = "5m",
  interval: Annotated[str | None, typer.Option(help="Work between saves to look at, beside the best.")] = None,
  calibrate: Annotated[str | None, typer.Option(help="Take size, costs and MTTI from this run.")] = None,
  days: Annotated[float, typer.Option(help="How long storage is followed.")] = 30.0,
  price: Annotated[float | None, typer.Option(help="Of a GiB-month of storage, in your currency.")] = None,
  keep_last: Annotated[int | None, typer.Option()] = None,
  keep_hourly: Annotated[int | None, typer.Option()] = None,
  keep_daily: Annotated[int | None, typer.Option()] = None,
  keep_weekly: Annotated[int | None, typer.Option()] = None,
  keep_monthly: Annotated[int | None, typer.Option()] = None,
  keep_within: Annotated[str | None, typer.Option()] = None,
  keep_every_steps: Annotated[int | None, typer.Option(help="Counted in saves here.")] = None,
  budget: Annotated[str | None, typer.Option()] = None,
  thin: Annotated[
    str | None, typer.Option(metavar="AGE", help="Older steps keep only --thin-share of their bytes.")
  ] = None,
  thin_share: Annotated[float, typer.Option(help="Parameters without Adam's moments: a third.")] = 1 / 3,
  config: Annotated[
    str | None, typer.Option(help="A YAML file whose retention and price hold where no option does.")
  ] = None,
  seed: Annotated[int, typer.Option()] = 0,
  plot: Annotated[str | None, typer.Option(help="Draw goodput by interval, and storage, into this file.")] = None,
  as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
  """Goodput, lost work and storage of a schedule and a retention: Monte Carlo beside Daly's closed form."""
  from ckpt_jax.cli.prune import monthly_cost, retention
  from ckpt_jax.config import load_config
  from ckpt_jax.planning import simulate as model

  settings = None if config is None else load_config(config)
  options = {
    "last": keep_last,
    "hourly": keep_hourly,
    "daily": keep_daily,
    "weekly": keep_weekly,
    "monthly": keep_monthly,
    "within": keep_within,
    "every_steps": keep_every_steps,
    "budget": budget,
    "thin": thin,
  }
  try:
    source = "given"
    if calibrate is not None:
      job, size, source = model.calibrated(calibrate, parse_duration(restart))
    else:
      size = _size(params, nbytes)
      storage = model.Storage(
        parse_bytes(bandwidth) if bandwidth else None,
        parse_bytes(bandwidth_per_host) if bandwidth_per_host else None,
        parse_bytes(interconnect),
      )
      # Each host copies what it will write: 1/N of one copy, or all of it if it holds no less.
      held = size * (copies if copies is not None else hosts) / hosts
      job = model.Job(
        parse_duration(node_mtti) / hosts,
        parse_duration(blocking) if blocking else max(held / 5e9, 1e-3),
        parse_duration(background) if background else storage.seconds(size, hosts),
        parse_duration(restart),
        storage.restore_seconds(size, hosts, strategy, copies),
      )
    rules = retention(settings, options)
    chosen = parse_duration(interval) if interval else None
  except ValueError as e:  # ConfigError is one too
    raise typer.BadParameter(str(e)) from None

  best = model.best_interval(job)
  lengths = sorted({best * f for f in _FACTORS} | ({chosen} if chosen else set()))
  rows = [(model.simulate(job, length, seed=seed), model.closed_form(job, length)) for length in lengths]
  use = model.storage_use(rules, (chosen or best) + job.blocking_s, size, days, thin_share=thin_share)
  if price is None and settings is not None:
    price = settings.storage.price_per_gib_month
  cost = None if price is None else monthly_cost(use.mean_nbytes, price)

  def row(length: float) -> dict[str, Any]:
    found, closed = rows[lengths.index(length)]
    return dataclasses.asdict(found) | {"closed_form": closed}

  if as_json:
    print_json(
      {"nbytes": size, "hosts": hosts, "source": source}
      | dataclasses.asdict(job)
      | {"best": row(best), "chosen": row(chosen) if chosen else None, "intervals": [row(length) for length in lengths]}
      | {"storage": {"steps": use.steps[-1:], "mean_nbytes": use.mean_nbytes, "peak_nbytes": use.peak_nbytes}}
      | {"cost_per_month": cost}
    )
  else:
    _print(job, size, source, rows, best, chosen, use, days, cost)
  if plot is not None:
    _draw(plot, job, best, chosen, use, seed)


def _size(params: float | None, nbytes: str | None) -> int:
  if nbytes is not None:
    return parse_bytes(nbytes)
  if params is None:
    raise ConfigError("give --params, --bytes or --calibrate")
  return int(params * _TRAINING_BYTES_A_PARAM)


def _print(job: Any, size: int, source: str, rows: Any, best: float, chosen: Any, use: Any, days: float, cost: Any):
  from rich.table import Table

  mtti, blocking, background, restart, restore = (
    duration_text(t) for t in (job.mtti, job.blocking_s, job.background_s, job.restart_s, job.restore_s)
  )
  typer.echo(
    f"state {size_text(size)}; job interrupted every {mtti}; a save takes {blocking} from training and commits "
    f"{background} later; back after {restart} + {restore} of restore ({source})"
  )
  table = Table(
    "interval", "goodput", "90% of runs", "closed form", "saving", "done again", "down", "lost at a failure"
  )
  for found, closed in rows:
    mark = " best" if found.interval == best else " asked" if found.interval == chosen else ""
    table.add_row(
      duration_text(found.interval) + mark,
      f"{found.goodput:.2%}",
      f"{found.low:.2%} - {found.high:.2%}",
      f"{closed:.2%}",
      f"{found.saving:.2%}",
      f"{found.rework:.2%}",
      f"{found.down:.2%}",
      duration_text(found.lost_s),
    )
  console().print(table)
  if use.steps:
    money = "" if cost is None else f", {cost:,.2f} a month"
    typer.echo(
      f"storage over {days:g} days: {use.steps[-1]} steps at the end, {size_text(use.mean_nbytes)} on average, "
      f"{size_text(use.peak_nbytes)} at most{money}"
    )


def _draw(file: str, job: Any, best: float, chosen: float | None, use: Any, seed: int) -> None:
  try:
    from matplotlib.figure import Figure
  except ImportError:
    raise ConfigError("--plot needs matplotlib: pip install 'ckpt-jax[plots]'") from None
  import numpy as np

  from ckpt_jax.planning import simulate as model

  lengths = np.geomspace(best / 20, best * 20, 60)
  found = [model.simulate(job, float(x), seed=seed, trials=60) for x in lengths]
  figure = Figure(figsize=(11, 4), layout="constrained")
  left, right = figure.subplots(1, 2)
  left.fill_between(lengths, [f.low for f in found], [f.high for f in found], alpha=0.2, label="90% of runs")
  left.plot(lengths, [f.goodput for f in found], label="Monte Carlo")
  left.plot(lengths, [model.closed_form(job, float(x)) for x in lengths], "--", label="closed form (Daly)")
  left.axvline(best, color="k", lw=1)
  left.annotate(
    f"best: {duration_text(best)}", (best, model.closed_form(job, best)), xytext=(5, -18), textcoords="offset points"
  )
  if chosen:
    left.axvline(chosen, color="r", lw=1, ls=":", label="asked")
  left.set(xscale="log", xlabel="seconds of work between saves", ylabel="goodput", ylim=(0, 1.05))
  left.legend()
  right.plot(use.days, [n / 2**30 for n in use.nbytes])
  right.set(xlabel="days", ylabel="GiB stored", ylim=(0, None))
  try:
    figure.savefig(file)
  except (OSError, ValueError) as e:
    raise ConfigError(f"{file}: the plot cannot be written: {e}") from None
