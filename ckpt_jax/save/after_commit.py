"""What follows a commit: the log line, the schedule, the journal, and a warning if the storage will be full."""

from __future__ import annotations

import dataclasses
import datetime
import logging
import os
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from etils import epath

from ckpt_jax.config import ScheduleConfig
from ckpt_jax.config.units import duration_text, size_text
from ckpt_jax.integrity.health import Health
from ckpt_jax.policies.retention import Retention
from ckpt_jax.policies.schedule import AnyOf, ByClock, EverySteps
from ckpt_jax.run.events import STORM, Failure, PlanMade, RetryStorm, Save
from ckpt_jax.run.journal import Journal
from ckpt_jax.run.steps import StepInfo, step_path
from ckpt_jax.save.retention import LiveRetention
from ckpt_jax.save.write import SaveRecord
from ckpt_jax.storage.space import count_files, free_bytes, own_nbytes
from ckpt_jax.storage.urls import is_object_store
from ckpt_jax.tuning.plan import Plan

_log = logging.getLogger(__name__)
E = TypeVar("E", bound=BaseException)
HORIZON = 100  # saves to look ahead
_THIN_SHARE = 1 / 3  # what is left of a step that was thinned to its parameters, under Adam


class AfterCommit:
  """Passes on that saves begin and commit. On process 0, and in Orbax's threads too."""

  def __init__(
    self, directory: epath.Path, schedule: Any, journal: Journal, retention: LiveRetention, config: ScheduleConfig
  ):
    """Args as named. `schedule` may be a policy of Orbax's own, without the methods `begun` and `finished`."""
    self._directory = directory
    self._schedule = schedule
    self._journal = journal
    self._plan: Plan | None = None
    self._failure = ""
    self._outlook = Outlook(directory, retention, schedule, config)

  def begun(self, step: int, plan: Plan | None) -> None:
    """A save begins, by `plan`. Raises whatever the schedule raises, which may be the user's own."""
    if plan is not None and plan is not self._plan:
      self._plan = plan
      self._journal.emit(lambda: PlanMade(plan=plan.to_dict()))
    self._notify("begun", step)

  def failed(self, step: int, error: E) -> E:
    """A save has failed. Returns the error, which may be reported again where it is raised."""
    if (message := str(error)) != self._failure:
      self._failure = message
      self._journal.emit(Failure(step=step, error=message))
    return error

  def committed(self, record: SaveRecord, health: Callable[[], Health | None] = lambda: None) -> None:
    """A save is committed, and its cost is known; `health` is called when the state has been looked at."""
    assert record.background_s is not None
    _log.info(
      "%s: step %d is committed: %s%s in %.2f s (%s/s) in the background, training waited %.2f s",
      self._directory,
      record.step,
      size_text(record.nbytes),
      f", {size_text(record.unchanged_nbytes)} of it unchanged," if record.unchanged_nbytes else "",
      record.background_s,
      size_text(record.nbytes / max(record.background_s, 1e-3)),
      record.blocking_s,
    )
    blocking = record.blocking_s - record.waited_s  # the wait for the previous save is not this one's cost
    try:
      self._notify("finished", blocking, record.background_s)
    except Exception as e:  # the user's own; the step is committed all the same
      _log.warning("%s: the schedule failed on being notified of a commit: %r", self._directory, e)
    now, seen = time.time(), health()
    self._journal.emit(lambda: self._described(record, now, seen))
    if (retries := sum(p.retries for p in record.processes)) >= STORM:
      self._journal.emit(RetryStorm(step=record.step, retries=retries))
    self._outlook.committed(record.step, record.nbytes)

  def _described(self, record: SaveRecord, now: float, health: Health | None) -> Save:
    files, stored = None, None
    if not is_object_store(self._directory):
      files, stored = count_files(os.fspath(step_path(self._directory, record.step)))
    return Save(
      time=now,
      step=record.step,
      nbytes=record.nbytes,
      unchanged_nbytes=record.unchanged_nbytes,
      files=files,
      stored_nbytes=stored,
      blocking_s=record.blocking_s,
      waited_s=record.waited_s,
      background_s=record.background_s or 0.0,
      commit_s=record.commit_s or 0.0,
      processes=record.processes,
      healthy=None if health is None else health.healthy,
      norms={} if health is None else health.norms,
    )

  def _notify(self, event: str, *arguments: Any) -> None:
    listener = getattr(self._schedule, event, None)
    if listener is not None:
      listener(*arguments)


def saves_that_fit(
  rules: Retention, steps: Sequence[StepInfo], coming: Sequence[StepInfo], free: int, step_nbytes: int
) -> int | None:
  """How many of the `coming` saves fit into `free` bytes beside what the rules keep; None if all of them do.

  The bytes of the committed `steps` are not free; each step takes `step_nbytes`.
  """

  def taken(count: int) -> float:
    """Steps in storage once `count` more are committed."""
    decided = rules.decide([*steps, *coming[:count]])
    return len(decided.kept) - (1 - _THIN_SHARE) * len(decided.thinned)

  def fits(count: int) -> bool:  # while the last one is written, nothing that it replaces is deleted yet
    return (taken(count - 1) + 1 - len(steps)) * step_nbytes <= free

  if rules.keeps_all and rules.thin is None:
    found = free // step_nbytes
    return found if found < len(coming) else None
  if fits(len(coming)):
    return None
  low, high = 0, len(coming)  # `low` fit, `high` do not
  while high - low > 1:
    middle = (low + high) // 2
    low, high = (middle, high) if fits(middle) else (low, middle)
  return low


@dataclasses.dataclass(frozen=True)
class _Pace:
  """Steps and seconds from one save to the next; None while unknown."""

  steps: int | None
  seconds: float | None


class Outlook:
  """Warns, once, if the run will fill its storage within the next HORIZON saves. On process 0."""

  def __init__(self, directory: epath.Path, retention: LiveRetention, schedule: Any, config: ScheduleConfig):
    self._directory = directory
    self._retention = retention
    parts = getattr(schedule, "policies", None) if isinstance(schedule, AnyOf) else None
    self._schedule = parts[0] if parts else schedule  # the others add a few saves, such as the last one
    self._last = config.last
    self._warned = False
    self._before: tuple[int, float] | None = None

  def committed(self, step: int, nbytes: int) -> None:
    """Checks the free space after a commit of `nbytes` bytes of arrays; costs one system call."""
    if self._warned:
      return
    now = time.monotonic()
    try:
      pace = self._pace(step, now)
      self._before = (step, now)
      self._look(step, nbytes, pace)
    except Exception as e:  # e.g. of the user's own schedule: a warning is not worth a failed save
      _log.debug("%s: cannot tell whether its storage will fill up: %s", self._directory, e)

  def _pace(self, step: int, now: float) -> _Pace:
    seconds = self._schedule.interval() if isinstance(self._schedule, ByClock) else None
    if self._before is not None and step > self._before[0]:
      return _Pace(step - self._before[0], max(now - self._before[1], seconds or 0.0))
    return _Pace(self._schedule.n if isinstance(self._schedule, EverySteps) else None, seconds)

  def _look(self, step: int, nbytes: int, pace: _Pace) -> None:
    free = free_bytes(self._directory)
    if free is None or free >= HORIZON * (nbytes + (1 << 20)):
      return
    count = self._saves_left(step, pace)
    if not count:
      return
    step_nbytes = own_nbytes(os.fspath(step_path(self._directory, step)))
    now = datetime.datetime.now(datetime.timezone.utc)
    coming = [
      StepInfo(step + i * (pace.steps or 1), now + datetime.timedelta(seconds=i * (pace.seconds or 600.0)), nbytes, {})
      for i in range(1, count + 1)
    ]
    rules = self._retention.rules
    fit = saves_that_fit(rules, self._retention.known(), coming, free, step_nbytes)
    if fit is None:
      return
    self._warned = True
    _log.warning(
      "%s: this run will fill its storage: %s are free and a step takes %s, so that %d more %s%s. %s",
      self._directory,
      size_text(free),
      size_text(step_nbytes),
      fit,
      "fits" if fit == 1 else "fit",
      self._until(step, fit, pace),
      self._what_bounds_it(rules, step_nbytes),
    )

  def _saves_left(self, step: int, pace: _Pace) -> int:
    """At most HORIZON; 0 while unknown."""
    if self._last is None:
      return HORIZON
    if pace.steps is None or step >= self._last:
      return 0
    return min(HORIZON, -(-(self._last - step) // pace.steps))

  def _until(self, step: int, fit: int, pace: _Pace) -> str:
    explain = getattr(self._schedule, "explain", None)
    how_often = explain().splitlines()[0] if explain else repr(self._schedule)
    when = []
    if pace.steps is not None:
      when.append(f"at step {step + (fit + 1) * pace.steps}")
    if pace.seconds is not None:
      when.append(f"in about {duration_text((fit + 1) * pace.seconds)}")
    return f": saving {how_often}, it is full {', '.join(when)}" if when else f", saving {how_often}"

  def _what_bounds_it(self, rules: Retention, step_nbytes: int) -> str:
    bounds = f"retention: {{last: 3}} takes {size_text(4 * step_nbytes)}, and budget: bounds all steps together"
    if rules.keeps_all:
      return f"No rule is set, so that every step stays. {bounds}"
    return f"The rules ({rules.explain()}) keep more than that. {bounds}"
