"""`ckpt-jax estimate`: how large a training state is, and what saving and restoring it takes, before there is one."""

from __future__ import annotations

import dataclasses
import inspect
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ckpt_jax.cli.common import Json, duration, grouped, named_function, number, print_json, print_table
from ckpt_jax.cli.hosts import HostOptions
from ckpt_jax.cli.retention import RetentionOptions
from ckpt_jax.config.units import count, decimal_text, duration_text, size_text
from ckpt_jax.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
  from ckpt_jax.planning.estimate import SizeEstimate
  from ckpt_jax.planning.simulate import StorageUse
  from ckpt_jax.planning.spread import Spread


@dataclasses.dataclass(frozen=True)
class StateOptions:
  """What a state holds."""

  state: Annotated[
    str | None,
    typer.Option(
      metavar="MODULE:FUNCTION",
      help="The state that this function makes, by jax.eval_shape; or of --mesh, its jax.ShapeDtypeStructs.",
    ),
  ] = None
  mesh: Annotated[
    str | None, typer.Option(metavar="AXIS=SIZE,...", help="A mesh that need not be there, given to the function.")
  ] = None
  optimizer: Annotated[str, typer.Option(help="sgd, momentum, lion, muon, adam, adamw, adafactor, adam8bit.")] = "adam"
  param_dtype: Annotated[str, typer.Option(help="Of the parameters.")] = "float32"
  master_dtype: Annotated[str | None, typer.Option(help="Of a second copy that the optimizer updates.")] = None
  moments_dtype: Annotated[
    str | None, typer.Option(help="Of the optimizer's values (default: of what it updates).")
  ] = None
  ema: Annotated[int, typer.Option(min=0, help="Number of averaged copies of the parameters.")] = 0
  inference_dtype: Annotated[str, typer.Option(help="Of the weights for inference.")] = "bfloat16"

  def make(self, params: int | None, mesh: Any = None) -> tuple[SizeEstimate, Any]:
    """The sizes, and the state if it comes from a function, which is given the mesh if it takes an argument.

    Raises:
      ConfigError: if it is not clear of what.
      CheckpointError: if the function fails.
    """
    from ckpt_jax.planning.estimate import estimate

    if (params is None) == (self.state is None):
      raise ConfigError("give either a number of parameters, e.g. 7b, or --state")
    if self.state is None:
      recipe = {k: v for k, v in vars(self).items() if k not in ("state", "mesh")}
      return estimate(params, **recipe), None
    function = named_function("--state", self.state)
    takes_mesh = bool(inspect.signature(function).parameters)
    if takes_mesh and mesh is None:
      raise ConfigError(f"--state {self.state}: {function.__name__} takes a mesh: give --mesh, e.g. data=8,model=4")
    import jax

    try:
      state = function(mesh) if takes_mesh else jax.eval_shape(function)
    except Exception as e:
      raise CheckpointError(
        f"--state {self.state}: {function.__name__} failed: {type(e).__name__}: {e}", topic="configuration"
      ) from None
    return estimate(state=state, inference_dtype=self.inference_dtype), state

  def abstract_mesh(self) -> Any:
    """The mesh of `--mesh`; None without it.

    Raises:
      ConfigError: if the text describes none.
    """
    if self.mesh is None:
      return None
    axes = dict(axis.partition("=")[::2] for axis in self.mesh.split(","))
    if not all(name.isidentifier() and size.isdecimal() and int(size) for name, size in axes.items()):
      raise ConfigError(f"--mesh {self.mesh}: expected AXIS=SIZE,..., e.g. data=8,model=4")
    if self.state is None:
      raise ConfigError("--mesh needs --state: how a state is spread depends on the shapes and specs of its arrays")
    from jax.sharding import AbstractMesh

    return AbstractMesh(tuple(map(int, axes.values())), tuple(axes))


@grouped
def estimate(
  of: StateOptions,
  hosts: HostOptions,
  retention: RetentionOptions,
  size: Annotated[
    int | None, number(make=typer.Argument, metavar="[PARAMS]", help="Number of parameters, as --params.")
  ] = None,
  devices: Annotated[int, typer.Option("--devices-per-host", min=1, help="Devices of a host.")] = 8,
  every: Annotated[float | None, duration(help="A save every so often: what the --keep options then store.")] = None,
  days: Annotated[float, typer.Option(help="How long storage is followed.")] = 30.0,
  as_json: Json = False,
) -> None:
  """Estimate bytes of a training state and of inference weights, and what saves and restores take."""
  mesh = of.abstract_mesh()
  if size is not None and hosts.params is not None:
    raise ConfigError("give the number of parameters once")
  sizes, state = of.make(hosts.params if size is None else size, mesh)
  job = _job(sizes, hosts, devices if mesh is None else _spread(state, mesh, devices))
  use = None
  if every is not None:
    from ckpt_jax.planning.simulate import storage_use

    use = storage_use(retention.rules(), every, sizes.step_nbytes, days)
  if as_json:
    stored = {} if use is None else {"stored": _as_json(use, retention)}
    print_json(sizes.to_dict() | {"job": job} | stored)
    return
  _print_sizes(sizes)
  _print_job(job)
  if use is not None:
    typer.echo(retention.use_text(use, days))


def _spread(state: Any, mesh: Any, devices: int) -> Spread:
  from ckpt_jax.planning.spread import spread

  if mesh.size % devices:
    raise ConfigError(f"--mesh has {count(mesh.size, 'device')}, not a multiple of --devices-per-host {devices}")
  return spread(state, mesh, [i // devices for i in range(mesh.size)])


def _print_sizes(sizes: SizeEstimate) -> None:
  rows = [(name, size_text(n), "" if each is None else f"{each:.3g}") for name, n, each in sizes.rows()]
  what = count(sizes.params, "parameter") if sizes.params else count(sizes.leaves, "array")
  print_table(("", "size", "bytes a parameter"), rows, title=what)
  line = f"in powers of 1000: training state {decimal_text(sizes.training_nbytes)}"
  if sizes.inference_nbytes and sizes.inference_share:
    line += f"; weights for inference {decimal_text(sizes.inference_nbytes)}, 1/{1 / sizes.inference_share:.3g} of it"
  typer.echo(line)


def _print_job(job: dict[str, Any]) -> None:
  each = " each" if job["hosts"] > 1 else ""
  copies = f"{job['copies']:.3g} {'copy' if job['copies'] == 1 else 'copies'} of the state"
  device, host = size_text(job["device_nbytes"]), size_text(job["held_nbytes"])
  devices = count(job["devices_per_host"], "device")
  typer.echo(f"{count(job['hosts'], 'host')} with {devices}{each}, {copies}: a device holds {device}, a host {host}")
  took = ""
  if job["save_s"] is not None:
    took = f", blocks training for {duration_text(job['blocking_s'])}, and commits {duration_text(job['save_s'])} later"
  written, memory = size_text(job["written_nbytes"]), size_text(job["save_host_nbytes"])
  typer.echo(f"a save writes {written} from each host, with {memory} of its memory{took}")
  if spread := job["spread"]:
    held, wrote = (
      [size_text(spread[name][which]) for which in ("least", "mean", "most")] for name in ("held", "written")
    )
    print_table(("of a host", "least", "mean", "most"), [("holds", *held), ("writes", *wrote)])
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


def _job(sizes: SizeEstimate, hosts: HostOptions, of: int | Spread) -> dict[str, Any]:
  """What saves and restores take, by the number of devices of a host or by how the state is spread over a mesh.

  Bytes are those of the host that has most. Seconds are None without a bandwidth.
  """
  from ckpt_jax.planning.estimate import STRATEGIES, copy_seconds, host_nbytes, traffic

  nbytes = sizes.training_nbytes
  storage = hosts.storage() if hosts.is_measured else None
  if isinstance(of, int):
    number, devices, copies = hosts.hosts, of, float(hosts.copies)
    held, written = nbytes * copies / number, nbytes / number
    device_nbytes = held / devices
  else:
    number, devices, copies = of.processes, of.devices // of.processes, of.copies
    held, written, device_nbytes = of.held.most, of.written.most, of.device_nbytes
  restore = {}
  for name in STRATEGIES:
    moved = traffic(nbytes, number, name, copies)
    seconds = storage and storage.restore_seconds(nbytes, number, name, copies)
    restore[name] = {"read_nbytes": moved.read, "exchanged_nbytes": moved.exchanged, "s": seconds}
  return {
    "hosts": number,
    "devices_per_host": devices,
    "copies": copies,
    "device_nbytes": device_nbytes,
    "held_nbytes": held,
    "written_nbytes": written,
    "save_host_nbytes": host_nbytes(written),
    "blocking_s": copy_seconds(written),
    "save_s": storage and storage.seconds(sizes.step_nbytes, number),
    "restore": restore,
    "spread": None if isinstance(of, int) else dataclasses.asdict(of),
  }


def _as_json(use: StorageUse, retention: RetentionOptions) -> dict[str, Any]:
  return {
    "steps": use.steps[-1] if use.steps else 0,
    "mean_nbytes": use.mean_nbytes,
    "peak_nbytes": use.peak_nbytes,
    "cost_per_month": retention.monthly_cost(use.mean_nbytes),
  }
