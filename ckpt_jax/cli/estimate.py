"""`ckpt-jax estimate`: how large a training state is, and what saving and restoring it takes, before there is one."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ckpt_jax.cli.common import Json, duration, grouped, named_function, print_json, print_table
from ckpt_jax.cli.hosts import HostOptions
from ckpt_jax.cli.retention import RetentionOptions
from ckpt_jax.config.units import count, decimal_text, duration_text, size_text
from ckpt_jax.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
  from ckpt_jax.planning.estimate import SizeEstimate

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class StateOptions:
  """What a state holds."""

  state: Annotated[
    str | None,
    typer.Option(metavar="MODULE:FUNCTION", help="The state that this function makes, by jax.eval_shape."),
  ] = None
  optimizer: Annotated[str, typer.Option(help="sgd, momentum, lion, muon, adam, adamw, adafactor, adam8bit.")] = "adam"
  param_dtype: Annotated[str, typer.Option(help="Of the parameters.")] = "float32"
  master_dtype: Annotated[str | None, typer.Option(help="Of a second copy that the optimizer updates.")] = None
  moments_dtype: Annotated[
    str | None, typer.Option(help="Of the optimizer's values (default: of what it updates).")
  ] = None
  ema: Annotated[int, typer.Option(min=0, help="Number of averaged copies of the parameters.")] = 0
  inference_dtype: Annotated[str, typer.Option(help="Of the weights for inference.")] = "bfloat16"

  def estimate(self, params: int | None) -> SizeEstimate:
    """The sizes.

    Raises:
      ConfigError: if it is not clear of what.
      CheckpointError: if the function fails.
    """
    from ckpt_jax.planning.estimate import estimate

    if (params is None) == (self.state is None):
      raise ConfigError("give either --params or --state")
    if self.state is None:
      recipe = {k: v for k, v in vars(self).items() if k != "state"}
      return estimate(params, **recipe)
    import jax

    function = named_function("--state", self.state)
    try:
      state = jax.eval_shape(function)
    except Exception as e:
      raise CheckpointError(f"--state {self.state}: it cannot be traced: {type(e).__name__}: {e}") from None
    return estimate(state=state, inference_dtype=self.inference_dtype)


@grouped
def estimate(
  of: StateOptions,
  hosts: HostOptions,
  retention: RetentionOptions,
  devices: Annotated[int, typer.Option("--devices-per-host", min=1, help="Devices of a host.")] = 8,
  every: Annotated[float | None, duration(help="A save every so often: what the --keep options then store.")] = None,
  days: Annotated[float, typer.Option(help="How long storage is followed.")] = 30.0,
  as_json: Json = False,
) -> None:
  """Estimate bytes of a training state and of inference weights, and what saves and restores take."""
  sizes = of.estimate(hosts.params)
  job = _job(sizes, hosts, devices)
  stored = _stored(sizes, retention, every, days)
  if as_json:
    print_json(sizes.to_dict() | {"job": job} | ({"stored": stored} if stored else {}))
    return
  _print_sizes(sizes)
  _print_job(job, devices)
  if stored:
    money = "" if stored["cost_per_month"] is None else f", {stored['cost_per_month']:,.2f} a month"
    mean, most = size_text(stored["mean_nbytes"]), size_text(stored["peak_nbytes"])
    typer.echo(
      f"storage over {days:g} days: {count(stored['steps'])} at the end, {mean} on average, {most} at most{money}"
    )


def _print_sizes(sizes: SizeEstimate) -> None:
  rows = [(name, size_text(n), "" if each is None else f"{each:.3g}") for name, n, each in sizes.rows()]
  what = count(sizes.params, "parameter") if sizes.params else count(sizes.leaves, "array")
  print_table(("", "size", "bytes a parameter"), rows, title=what)
  line = f"in powers of 1000: training state {decimal_text(sizes.training_nbytes)}"
  if sizes.inference_nbytes and sizes.inference_share:
    line += f"; weights for inference {decimal_text(sizes.inference_nbytes)}, 1/{1 / sizes.inference_share:.3g} of it"
  typer.echo(line)


def _print_job(job: dict[str, Any], devices: int) -> None:
  each = "each hold" if job["hosts"] > 1 else "holds"
  device, host, memory = (size_text(job[f"{name}_nbytes"]) for name in ("device", "held", "save_host"))
  typer.echo(
    f"{count(job['hosts'], 'host')} with {count(devices, 'device')} {each}, together "
    f"{count(job['copies'], 'copy', 'copies')} of the state: {device} a device, {host} a host"
  )
  took = ""
  if job["save_s"] is not None:
    took = f", blocks training for {duration_text(job['blocking_s'])}, and commits {duration_text(job['save_s'])} later"
  typer.echo(f"a save takes {memory} of memory on each host{took}")
  moved = {(r["read_nbytes"], r["exchanged_nbytes"]): name for name, r in reversed(job["restore"].items())}
  rows = [
    (
      name,
      size_text(r["read_nbytes"]),
      size_text(r["exchanged_nbytes"]),
      "" if r["s"] is None else duration_text(r["s"]),
    )
    for name, r in job["restore"].items()
    if name in moved.values() or job["copies"] > 1
  ]
  print_table(("restore", "read from storage", "sent between hosts", "time"), rows)


def _job(sizes: SizeEstimate, hosts: HostOptions, devices: int) -> dict[str, Any]:
  """What saves and restores take; seconds are None without a bandwidth."""
  from ckpt_jax.planning.estimate import STRATEGIES, copy_seconds, host_nbytes, traffic

  nbytes, held = sizes.training_nbytes, sizes.training_nbytes * hosts.copies / hosts.hosts
  storage = hosts.storage() if hosts.bandwidth or hosts.bandwidth_per_host else None
  restore = {}
  for name in STRATEGIES:
    moved = traffic(nbytes, hosts.hosts, name, hosts.copies)
    seconds = storage and storage.restore_seconds(nbytes, hosts.hosts, name, hosts.copies)
    restore[name] = {"read_nbytes": moved.read, "exchanged_nbytes": moved.exchanged, "s": seconds}
  return {
    "hosts": hosts.hosts,
    "copies": hosts.copies,
    "device_nbytes": held / devices,
    "held_nbytes": held,
    "save_host_nbytes": host_nbytes(held),
    "blocking_s": copy_seconds(held),
    "save_s": storage and storage.seconds(sizes.step_nbytes, hosts.hosts),
    "restore": restore,
  }


def _stored(
  sizes: SizeEstimate, retention: RetentionOptions, every: float | None, days: float
) -> dict[str, Any] | None:
  """What a retention keeps; None without an interval."""
  if every is None:
    return None
  from ckpt_jax.planning.simulate import storage_use

  use = storage_use(retention.rules(), every, sizes.step_nbytes, days)
  return {
    "steps": use.steps[-1] if use.steps else 0,
    "mean_nbytes": use.mean_nbytes,
    "peak_nbytes": use.peak_nbytes,
    "cost_per_month": retention.monthly_cost(use.mean_nbytes),
  }
