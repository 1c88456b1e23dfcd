"""Where the records of a run go beside the run itself: TensorBoard, Prometheus, OpenTelemetry, people's own functions.

Each sink is a function of one `run.events.Event`, called in the journal's thread; one that needs an optional package
imports it when it is made.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

from etils import epath

from ckpt_jax.config import ObserveConfig
from ckpt_jax.errors import ConfigError
from ckpt_jax.run.events import Deletion, End, Event, Failure, Fallback, Restore, Save
from ckpt_jax.run.journal import Sink

_BUCKETS_S = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)


def make_sinks(config: ObserveConfig, run: epath.Path, on_event: Callable[[Event], None] | None) -> list[Sink]:
  """The sinks that a configuration asks for, and the user's own.

  Raises:
    ConfigError: if the package that one needs is not installed; the message names the extra.
  """
  found: list[Sink] = []
  if config.tensorboard is not None:
    found.append(tensorboard(config.tensorboard))
  if config.prometheus is not None:
    found.append(prometheus(config.prometheus, run.name))
  if config.opentelemetry:
    found.append(opentelemetry(str(run)))
  return [*found, on_event] if on_event is not None else found


def scalars(event: Event) -> dict[str, float]:
  """The numbers of a save or restore, by name, for metrics of one value a step; none of other events.

  For a sink of your own: `on_event=lambda e: wandb.log(scalars(e), step=e.step) if scalars(e) else None`.
  """
  if isinstance(event, Save):
    found = {name: getattr(event, name) for name in ("blocking_s", "waited_s", "background_s", "commit_s", "nbytes")}
    found |= {"retries": event.retries} | {f"norm/{group}": norm for group, norm in event.norms.items()}
    if event.processes:
      found["slowest_write_s"] = max(p.write_s for p in event.processes)
    return {f"save/{name}": float(value) for name, value in found.items()}
  if isinstance(event, Restore):
    return {f"restore/{name}": float(getattr(event, name)) for name in ("seconds", "nbytes", "retries")}
  return {}


def tensorboard(directory: str) -> Sink:
  """Scalars of each save and restore under `ckpt/`, at their step."""
  writer = _import("tensorboardX", "observe.tensorboard", "tensorboard").SummaryWriter(directory, flush_secs=10)

  def write(event: Event) -> None:
    found = scalars(event)
    for name, value in found.items():
      writer.add_scalar(f"ckpt/{name}", value, getattr(event, "step", 0), walltime=event.time)
    if found:
      writer.flush()
    elif isinstance(event, End):
      writer.close()  # only this writes the last of them

  return write


def prometheus(port: int, run: str, registry: Any = None) -> Sink:
  """Counters and histograms by `run`, served at `port` unless it is 0; a second run of the process shares them."""
  client = _import("prometheus_client", "observe.prometheus", "prometheus")
  registry = registry or client.REGISTRY
  seconds, nbytes, events, retries, step = _metrics(registry)
  if port and port not in _served:
    client.start_http_server(port, registry=registry)
    _served.add(port)

  def count(event: Event) -> None:
    events.labels(run, event.kind).inc()  # type: ignore[attr-defined]
    if isinstance(event, Save):
      for part in ("blocking", "background", "commit"):
        seconds.labels(run, part).observe(getattr(event, f"{part}_s"))
      step.labels(run).set(event.step)
    elif isinstance(event, Restore):
      seconds.labels(run, "restore").observe(event.seconds)
    if isinstance(event, (Save, Restore)):
      nbytes.labels(run, event.kind).inc(event.nbytes)
      retries.labels(run).inc(event.retries)

  return count


_served: set[int] = set()


@functools.cache
def _metrics(registry: Any) -> tuple[Any, ...]:
  import prometheus_client as client

  def named(kind: Any, name: str, about: str, *labels: str, **options: Any) -> Any:
    return kind(f"ckpt_jax_{name}", about, ("run", *labels), registry=registry, **options)

  return (
    named(client.Histogram, "seconds", "Of saves and restores, by part.", "part", buckets=_BUCKETS_S),
    named(client.Counter, "bytes_total", "Committed and restored.", "what"),
    named(client.Counter, "events_total", "Saves, restores, failures and so on.", "kind"),
    named(client.Counter, "retries_total", "Requests sent again."),
    named(client.Gauge, "committed_step", "The newest committed step."),
  )


def opentelemetry(run: str) -> Sink:
  """A span for each save, with its blocking part, write and commit beneath, and one for each restore."""
  trace = _import("opentelemetry.trace", "observe.opentelemetry", "opentelemetry")
  tracer = trace.get_tracer("ckpt_jax")

  def span(name: str, start: float, end: float, parent: Any = None, **attributes: Any) -> Any:
    context = None if parent is None else trace.set_span_in_context(parent)
    made = tracer.start_span(name, context, attributes=attributes, start_time=int(start * 1e9))
    if parent is not None:
      made.end(int(end * 1e9))
    return made

  def send(event: Event) -> None:
    if isinstance(event, Save):
      returned, written = event.called + event.blocking_s, event.time - event.commit_s
      whole = span("ckpt_jax.save", event.called, event.time, run=run, step=event.step, nbytes=event.nbytes)
      span("blocking", event.called, returned, whole, waited_s=event.waited_s)
      span("write", returned, max(returned, written), whole, retries=event.retries)
      span("commit", max(returned, written), event.time, whole)
    elif isinstance(event, Restore):
      begun = event.time - event.seconds
      whole = span("ckpt_jax.restore", begun, event.time, run=run, step=event.step, nbytes=event.nbytes)
      whole.set_attribute("strategy", event.strategy)
    elif isinstance(event, (Failure, Fallback, Deletion)):
      whole = span(f"ckpt_jax.{event.kind}", event.time, event.time, run=run, step=event.step or -1)
      if isinstance(event, Failure):
        whole.set_status(trace.Status(trace.StatusCode.ERROR, event.error))
    else:
      return
    whole.end(int(event.time * 1e9))

  return send


def _import(module: str, key: str, extra: str) -> Any:
  try:
    return importlib.import_module(module)
  except ModuleNotFoundError as e:
    package = module.split(".")[0]
    raise ConfigError(
      f"{key} needs {package}, which is not installed: pip install 'ckpt-jax[{extra}]'", topic="missing-package"
    ) from e
