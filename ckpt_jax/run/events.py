"""What happens to a run, as typed records: one line of JSON each, which `run/journal.py` keeps.

All times are seconds; `time` is since the epoch by the clock of process 0, and at the end of what the record tells.
A field that has its default is left out of the line, and one that is not known is ignored when it is read.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import operator
import time
from collections.abc import Iterable
from typing import Annotated, Any, Literal, NamedTuple

import pydantic

STORM = 10  # retries during one save or restore that make a RetryStorm
_MOST_PROCESSES = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Event:
  """Attributes of all records.

  Attributes:
    time: when it ended.
    attempt: the life of the job that it belongs to; on storage it is in the name of the file.
  """

  time: float = dataclasses.field(default_factory=time.time)
  attempt: str = ""


class ProcessCost(NamedTuple):
  """What one process spent on one save.

  Attributes:
    process: its index.
    blocking_s: seconds that training waited in `save`.
    snapshot_s: the part of them in which Orbax copied the state's shards to host memory.
    write_s: seconds from the return of `save` until this process had written its part.
    requests, retries, nbytes_written: see `storage.traffic`.
    nbytes_unchanged: bytes that it did not write, since they are in a step that has them already.
  """

  process: int
  blocking_s: float
  snapshot_s: float
  write_s: float
  requests: int
  retries: int
  nbytes_written: int
  nbytes_unchanged: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Start(Event):
  """A Checkpointer was opened: a start, or a restart, of the job."""

  kind: Literal["start"] = "start"
  processes: int = 1
  devices: int = 1
  platform: str = ""
  host: str = ""
  version: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanMade(Event):
  """The settings that were `auto` have values; `plan` is `Plan.to_dict()`."""

  kind: Literal["plan"] = "plan"
  plan: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Save(Event):
  """A step was committed.

  Attributes:
    step, nbytes: the step, and bytes of its state.
    unchanged_nbytes: the part of it that was not written, since it is in the step before; see docs/format.md.
    files, stored_nbytes: files of the step and their bytes; None where asking for them would cost requests.
    blocking_s, waited_s, background_s: as in `SaveRecord`, of process 0.
    commit_s: seconds from the last write of all processes to the commit.
    processes: the cost of each process; of more than 64, the slowest.
    healthy: False if the step is tagged unhealthy; None if that was not checked.
    norms: of the top-level groups of the state.
  """

  kind: Literal["save"] = "save"
  step: int
  nbytes: int = 0
  unchanged_nbytes: int = 0
  files: int | None = None
  stored_nbytes: int | None = None
  blocking_s: float = 0.0
  waited_s: float = 0.0
  background_s: float = 0.0
  commit_s: float = 0.0
  processes: tuple[ProcessCost, ...] = ()
  healthy: bool | None = None
  norms: dict[str, float] = dataclasses.field(default_factory=dict)

  @property
  def retries(self) -> int:
    """Of all processes."""
    return sum(p.retries for p in self.processes)

  @property
  def called(self) -> float:
    """When `save` was called."""
    return self.time - self.background_s - self.blocking_s


@dataclasses.dataclass(frozen=True, kw_only=True)
class Restore(Event):
  """A step was read; the fields are those of `RestoreReport`, and the traffic of process 0."""

  kind: Literal["restore"] = "restore"
  step: int
  nbytes: int = 0
  seconds: float = 0.0
  strategy: str = ""
  why: str = ""
  verified: int = 0
  unverified: str = ""
  requests: int = 0
  retries: int = 0
  nbytes_read: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fallback(Event):
  """A restore took `step` in place of newer ones that could not be read; `skipped` has the reasons by step."""

  kind: Literal["fallback"] = "fallback"
  step: int
  skipped: dict[int, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quarantine(Event):
  """A step no longer counts: `place` is `quarantine`, `set_aside` or `deleted`. Or it counts again: `back`."""

  kind: Literal["quarantine"] = "quarantine"
  step: int
  place: str = "quarantine"
  reason: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Deletion(Event):
  """A step was removed, and why."""

  kind: Literal["deletion"] = "deletion"
  step: int
  why: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Failure(Event):
  """A `save` or `restore` (`what`) failed."""

  kind: Literal["failure"] = "failure"
  what: str = "save"
  step: int | None = None
  error: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RetryStorm(Event):
  """Storage refused, or did not answer, many requests of one save or restore (`during`)."""

  kind: Literal["retry_storm"] = "retry_storm"
  during: str = "save"
  step: int
  retries: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class End(Event):
  """The Checkpointer was closed; `how` is closed or preempted."""

  kind: Literal["end"] = "end"
  how: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attempt(Event):
  """One life of the job, summed up: what is left of its records once they are rolled up. `time` is that of the last.

  Attributes:
    started: when the run was opened.
    end: `closed`, `preempted`, or None for a job that was killed, or still runs.
    saves, failures, restores, deletions, retries: how many.
    blocking_sum, waited_sum, background_sum: seconds of all saves; the wait for the previous one is not in the first.
    nbytes: bytes of the last state.
    first_step, last_step: steps of its first and last commit.
    restored: the step that training went on from; None if it began afresh.
    trained_from: when training began: the end of the last restore before the first save.
    trained_since: when the last `save` returned.
    work_s, work_steps: seconds of training between saves, and the steps done in them.
  """

  kind: Literal["attempt"] = "attempt"
  started: float = 0.0
  end: str | None = None
  saves: int = 0
  failures: int = 0
  restores: int = 0
  deletions: int = 0
  retries: int = 0
  blocking_sum: float = 0.0
  waited_sum: float = 0.0
  background_sum: float = 0.0
  nbytes: int = 0
  first_step: int = 0
  last_step: int = 0
  restored: int | None = None
  trained_from: float | None = None
  trained_since: float = 0.0
  work_s: float = 0.0
  work_steps: int = 0

  @property
  def blocking_s(self) -> float:
    """Mean of its saves."""
    return self.blocking_sum / max(self.saves, 1)

  @property
  def background_s(self) -> float:
    """Mean of its saves."""
    return self.background_sum / max(self.saves, 1)

  @property
  def lived_s(self) -> float:
    """Seconds from its start to its last record."""
    return max(self.time - self.started, 0.0)

  @property
  def half_interval_s(self) -> float:
    """What a job that is killed loses on average: half the time from one save to the next."""
    return self.lived_s / max(self.saves, 1) / 2

  def then(self, events: Iterable[Event]) -> Attempt:
    """This attempt once `events` have happened too, in their order."""
    now = dict(vars(self))  # hundreds of records a millisecond; an object for each would take longer than reading them
    for event in events:
      now["time"] = max(now["time"], event.time)
      if isinstance(event, Save):
        _saved(now, event)
      elif isinstance(event, Restore):
        now["restores"] += 1
        now["retries"] += event.retries
        if not now["saves"]:
          now["restored"], now["trained_from"] = event.step, event.time
      elif isinstance(event, Failure):
        now["failures"] += 1
      elif isinstance(event, Deletion):
        now["deletions"] += 1
      elif isinstance(event, End):
        now["end"] = event.how
    return Attempt(**now)


def _saved(now: dict[str, Any], save: Save) -> None:
  if not now["saves"]:
    now["first_step"] = save.step
  elif save.step > now["last_step"]:
    now["work_s"] += max(0.0, save.called - now["trained_since"])
    now["work_steps"] += save.step - now["last_step"]
  now["saves"] += 1
  now["retries"] += save.retries
  now["blocking_sum"] += max(0.0, save.blocking_s - save.waited_s)
  now["waited_sum"] += save.waited_s
  now["background_sum"] += save.background_s
  now |= {"nbytes": save.nbytes, "last_step": save.step, "trained_since": save.called + save.blocking_s}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RolledUp(Event):
  """Heads a file of Attempts that takes the place of the files named here."""

  kind: Literal["rolled_up"] = "rolled_up"
  replaces: tuple[str, ...] = ()


_kinds: Any = functools.reduce(operator.or_, Event.__subclasses__())
_any: pydantic.TypeAdapter[Event] = pydantic.TypeAdapter(Annotated[_kinds, pydantic.Field(discriminator="kind")])


def to_line(event: Event) -> str:
  """A record as a line of JSON without its end. Floats have six digits, times milliseconds."""
  data = {"kind": event.kind, "time": round(event.time, 3)}  # type: ignore[attr-defined]
  for field in dataclasses.fields(event):
    value = getattr(event, field.name)
    empty = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
    if field.name not in ("time", "kind") and value != empty:
      data[field.name] = _short(value) if field.name not in _TIMES else round(value, 3)
  return json.dumps(data, separators=(",", ":"))


_TIMES = ("started", "trained_from", "trained_since")


def _short(value: Any) -> Any:
  if isinstance(value, float):
    return float(f"{value:.6g}")
  if isinstance(value, (list, tuple)):
    return [_short(v) for v in value]
  return {k: _short(v) for k, v in value.items()} if isinstance(value, dict) else value


def from_line(line: str | bytes) -> Event | None:
  """The record in a line; None if there is none: a kill has cut it short, or a newer version wrote another kind."""
  try:
    return _any.validate_json(line)
  except pydantic.ValidationError:
    return None


def slowest(costs: list[ProcessCost]) -> tuple[ProcessCost, ...]:
  """All of them, by process; of more than 64 those that wrote, or blocked training, for longest."""
  chosen = sorted(costs, key=lambda c: c.write_s + c.blocking_s, reverse=True)[:_MOST_PROCESSES]
  return tuple(sorted(chosen))
