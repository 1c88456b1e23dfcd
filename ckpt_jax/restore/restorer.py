"""The lifecycle of a restore: which step, reading it, comparing it with what was saved, falling back from damage."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import time
from collections.abc import Callable
from typing import Any

import jax
from etils import epath

from ckpt_jax.config import Config
from ckpt_jax.errors import (
  CheckpointError,
  CorruptCheckpointError,
  NoCheckpointError,
  RestoreTimeoutError,
  StorageError,
  StructureMismatchError,
)
from ckpt_jax.integrity.comparison import Verifier
from ckpt_jax.integrity.record import Record, read_record
from ckpt_jax.job.agreement import who_differs
from ckpt_jax.job.garbage import paused
from ckpt_jax.job.progress import Counter, OnProgress, reported
from ckpt_jax.job.rendezvous import Rendezvous
from ckpt_jax.job.threads import transfers_asked_for
from ckpt_jax.job.waits import Together
from ckpt_jax.layout import alike
from ckpt_jax.layout.forms import why_not_flat
from ckpt_jax.layout.sharding import global_nbytes
from ckpt_jax.layout.structure import flatten
from ckpt_jax.orbax.format import STEP_METADATA
from ckpt_jax.orbax.saves import quietly
from ckpt_jax.restore import fallback
from ckpt_jax.restore.like import on_real_devices
from ckpt_jax.restore.read import Reading, RestoreRequest, fetch_state, plan_reading
from ckpt_jax.restore.result import Restored, RestoreReport
from ckpt_jax.restore.rollback import place_of, roll_back
from ckpt_jax.restore.step import Step
from ckpt_jax.run.events import STORM, Event, Failure, Fallback, Quarantine, Restore, RetryStorm
from ckpt_jax.run.journal import Journal
from ckpt_jax.run.steps import RECORD, step_directory, step_info, step_path
from ckpt_jax.storage import look
from ckpt_jax.storage.objects import snapshot
from ckpt_jax.storage.traffic import Traffic, traffic
from ckpt_jax.tuning.planner import Planner

_log = logging.getLogger(__name__)
Check = Callable[[str, Any], None]


@dataclasses.dataclass(eq=False)
class Restorer:
  """The restores of one run. All processes of the job call it alike, and each step below ends on all before the next.

  1. (process 0) `fallback.candidates` lists the steps, so that a commit in between cannot give two answers.
  2. (all) `Planner.for_restore` chooses settings; `Step` reads the step's metadata and opens its arrays.
  3. (all) `plan_reading` matches its leaves with `like`, before any value is read.
  4. (process 0) `agree_on_strategy` chooses a strategy, from which all derive the same route for each leaf.
  5. (all) `fetch` reads and exchanges the leaves in parts; `LeafPlan` gives each the type and sharding of `like`.
  6. (all) `Verifier` compares what arrives with the fingerprints of the save; `finish` adds up those of all processes.
  7. (process 0) If the step is damaged, `fallback` puts it into quarantine after an older one was read; if it was
     deleted or rewritten meanwhile, it begins anew.

  All errors are raised on all processes, through `Together.meet`.
  """

  directory: epath.Path
  config: Config
  planner: Planner
  restoring: set[int]  # steps of the run that are being read, which must not be deleted
  journal: Journal
  on_progress: OnProgress | None

  def __post_init__(self) -> None:
    self._rendezvous = Rendezvous(f"restore {self.directory}")

  def is_empty(self) -> bool:
    """Whether the run never had a step.

    Raises:
      CorruptCheckpointError: if it had, and none is left that counts.
    """
    together = self._together()
    if self._candidates(None, False, together):
      return False
    fallback.refuse_to_start_afresh(self.directory, together)
    return True

  def rollback(self, step: int, *, delete: bool) -> list[int]:
    """Process 0 rolls back, and all processes get the outcome; see `roll_back`."""
    what = f"process 0 to go back to step {step}"
    later = self._together().decided(what, lambda: roll_back(self.directory, step, delete=delete))
    self._note(*(Quarantine(step=s, place=place_of(delete), reason=f"rollback to step {step}") for s in later))
    return later

  def restore(self, step: int | None, request: RestoreRequest, strategy: str, *, healthy: bool) -> Restored:
    """See `Checkpointer.restore`."""
    if problem := why_not_flat(request.like):
      raise StructureMismatchError(f"like= is no tree for jax; nothing was read:\n  {problem}")
    before = traffic()
    try:
      with paused(), quietly(), transfers_asked_for():
        restored = self._restore(step, request, strategy, healthy=healthy)
    except (CorruptCheckpointError, RestoreTimeoutError, StorageError) as e:
      self._note(Failure(what="restore", step=step, error=str(e)))
      raise
    self._note(*_events(restored, traffic().since(before)))
    if restored.report is not None and restored.report.quarantined:
      self.journal.begin()  # the run has changed, be it by one who only reads
    return restored

  # -- inside

  def _note(self, *events: Event) -> None:
    for event in events:
      self.journal.emit(event)

  def _together(self) -> Together:
    """The waits of a new restore."""
    return Together(self._rendezvous, self.config.timeouts.restore_s)

  def _restore(self, step: int | None, request: RestoreRequest, strategy: str, *, healthy: bool) -> Restored:
    together = self._together()
    wrong: Exception | None = None
    try:
      request = dataclasses.replace(request, like=on_real_devices(request.like))
    except Exception as e:
      wrong = e
    steps = self._candidates(step, healthy, together, wrong)
    self._agree_on(request, strategy, together)
    look_again = functools.partial(self._candidates, None, healthy, together)
    read = functools.partial(self._read, request=request, strategy=strategy, together=together)
    if step is not None:
      return fallback.unless_gone(self.directory, int(step), read, together)
    may_fall_back = self.config.restore.on_corruption == "fallback"
    restored = fallback.newest_sound(self.directory, steps, look_again, read, together, fallback=may_fall_back)
    if restored is None:
      which = "no committed checkpoint that is not tagged unhealthy" if healthy else "no committed checkpoint"
      raise NoCheckpointError(f"{self.directory}: {which}; save one first, or check the path")
    return restored

  def _candidates(
    self, step: int | None, healthy: bool, together: Together, error: Exception | None = None
  ) -> list[int]:
    """The steps to try, which process 0 looks up for all; none if `step` is given.

    `error`: what went wrong before on this process, to be raised on all.
    """
    found: list[int] = []
    if jax.process_index() == 0 and step is None and error is None:
      try:
        with snapshot(self.directory):
          found = fallback.candidates(self.directory, healthy=healthy)
      except Exception as e:
        error = e
    said = together.meet(f"all processes to restore from {self.directory}", error, json.dumps([step, found]))
    answers = [json.loads(text) for text in said]
    if any(asked != answers[0][0] for asked, _ in answers):
      who = ", ".join(f"process {process}: {asked}" for process, (asked, _) in enumerate(answers[:20]))
      raise CheckpointError(
        f"{self.directory}: the processes ask for different steps ({who})", topic="processes-differ"
      )
    return answers[0][1]

  def _agree_on(self, request: RestoreRequest, strategy: str, together: Together) -> None:
    """Makes sure that all processes want the same leaves in the same form, since they read and exchange them together.

    Raises:
      StructureMismatchError: on all processes, naming who differs and in which leaves.
    """
    if jax.process_count() == 1:
      return
    flat = flatten(request.like)
    named = (request.only, request.item, request.cast, tuple(request.init_missing or ()), strategy)
    what = "all processes to ask for the same leaves"
    told = [json.loads(text) for text in together.meet(what, text=json.dumps([alike.digest_of(flat), repr(named)]))]
    digests, names = zip(*told, strict=True)
    decided = functools.partial(together.decided, what)
    who = who_differs(alike.kinds(flat), digests, decided, lambda text: together.meet(what, text=text))
    if other := [process for process, text in enumerate(names) if text != names[0]]:
      arguments = "(only, item, cast, init_missing, strategy)"
      who = who or f"{arguments} are {names[0]} on process 0, and {names[other[0]]} on process {other[0]}"
    if who:
      raise StructureMismatchError(
        f"{self.directory}: the processes do not ask for the same; nothing was read: {who}", topic="processes-differ"
      )

  def _read(self, number: int, request: RestoreRequest, strategy: str, together: Together) -> Restored:
    started = time.perf_counter()
    step_dir = step_path(self.directory, number)
    self.restoring.add(number)
    verifier: Verifier | None = None
    try:
      with snapshot(step_dir):
        settings = self.planner.for_restore(request.like)
        error: Exception | None = None
        try:
          step, metrics, record, reading = self._opened(number, request, settings)
          verifier = Verifier(record, settings.limits.host_memory) if record is not None else None
        except Exception as e:
          error = e
        together.meet("all processes to compare like= with the step", error)
        counter = Counter()
        check = verifier if self.on_progress is None else _counting(reading, counter, verifier)
        total = sum(plan.nbytes for plan in reading.plans)
        with reported(self.on_progress, f"restoring step {number}", total, counter):
          state, choice = fetch_state(step, reading, settings, together, strategy, check)
      jax.block_until_ready(state)
      verified = verifier.finish(str(step_dir), together) if verifier is not None else 0
    finally:
      self.restoring.discard(number)
      if verifier is not None:
        verifier.stop()
    report = RestoreReport(
      strategy=choice.strategy,
      seconds=time.perf_counter() - started,
      nbytes=global_nbytes(state),
      directory=str(step_dir),
      why=choice.why,
      predicted=choice.predicted,
      casts=reading.casts,
      initialised=tuple(reading.kept),
      verified=verified,
      unverified=""
      if verified
      else "the step has no fingerprints"
      if self.config.restore.verify
      else "restore.verify is off",
    )
    _log.info("restored step %d of %s in %.2f s", number, self.directory, report.seconds)
    return Restored(state, number, number + 1, metrics, step.ours.get("extras"), report)

  def _opened(
    self, number: int, request: RestoreRequest, settings: Config
  ) -> tuple[Step, dict[str, Any], Record | None, Reading]:
    """A step, its metrics and fingerprints, and what to read of it."""
    damaged = fallback.damage(self.directory, number)
    if damaged is not None:
      raise damaged
    step_dir = step_directory(self.directory, number)
    step = Step(step_dir, settings, request.item, request.like)
    record = read_record(step_dir, step.item_name, step.ours) if self.config.restore.verify else None
    # `ours` was read once, at first: the file that holds it is among the first that a deletion removes, and a step
    # without it looks like one of an old Orbax, which has no extras.
    if not step.ours and look.exists(step.item_dir / RECORD):
      raise CorruptCheckpointError(f"{step_dir / STEP_METADATA}: what ckpt_jax wrote there is missing")
    metrics = step.ours.get("metrics")
    if not isinstance(metrics, dict):
      metrics = step_info(self.directory, number).metrics
    return step, metrics, record, plan_reading(step, request)


def _counting(reading: Reading, counter: Counter, check: Check | None) -> Check:
  """`check`, which also counts the bytes of each leaf, once."""
  left = {plan.name: plan.nbytes for plan in reading.plans}

  def counting(path: str, value: Any) -> None:
    if check is not None:
      check(path, value)
    counter.add(left.pop(path, 0))

  return counting


def _events(restored: Restored, spent: Traffic) -> list[Event]:
  """What there is to record of a restore."""
  report, step = restored.report, restored.step
  assert report is not None and step is not None
  shared = ("nbytes", "seconds", "strategy", "why", "verified", "unverified")
  events: list[Event] = [
    Restore(
      step=step,
      requests=spent.requests,
      retries=spent.retries,
      nbytes_read=spent.nbytes_read,
      **{name: getattr(report, name) for name in shared},
    )
  ]
  if spent.retries >= STORM:
    events.append(RetryStorm(during="restore", step=step, retries=spent.retries))
  events += [Quarantine(step=bad, reason=why) for bad, why in report.quarantined.items()]
  return [*events, Fallback(step=step, skipped=report.quarantined)] if report.quarantined else events
