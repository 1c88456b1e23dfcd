"""Which step a restore takes when the newest cannot be read, and what happens to the steps that could not be read."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence

import jax
from etils import epath

from ckpt_jax.errors import (
  CheckpointError,
  ConfigError,
  CorruptCheckpointError,
  NoCheckpointError,
  StorageError,
  StructureMismatchError,
)
from ckpt_jax.job.waits import Together
from ckpt_jax.restore.result import Restored
from ckpt_jax.run.quarantine import QUARANTINE, damaged_steps, listed, put_aside
from ckpt_jax.run.steps import (
  NOTES,
  committed_steps,
  is_gone,
  is_step,
  list_readable_steps,
  newest_to_restore,
  step_path,
)
from ckpt_jax.storage import look

_log = logging.getLogger(__name__)
_MOST_GONE, _MOST_REWRITTEN = 30, 3
_GONE, _REWRITTEN = "gone", "rewritten"
Attempt = Callable[[int], Restored]


def candidates(directory: epath.Path, *, healthy: bool) -> list[int]:
  """The steps that a restore of the newest may take, best first, damaged ones included.

  Newest first, except that thinned steps come last, since training cannot go on from them. `healthy` leaves out the
  steps that are tagged unhealthy.
  """
  damaged = set(damaged_steps(directory))
  if healthy:
    steps, unreadable = list_readable_steps(directory)
    found = [s.step for s in steps if s.healthy is not False]
    damaged |= set(unreadable)
    thinned = {s.step for s in steps if not s.resumable}
  else:
    found = committed_steps(directory)
    newest = newest_to_restore(directory)
    thinned = {step for step in found if newest is not None and step > newest}
  return sorted({*found, *damaged}, key=lambda step: (step not in thinned, step), reverse=True)


def damage(directory: epath.Path, step: int) -> CorruptCheckpointError | None:
  """What is wrong with a directory that was a committed step and is none now; None if it is one, or never was."""
  return None if is_step(step_path(directory, step)) else damaged_steps(directory).get(step)


def newest_sound(
  directory: epath.Path,
  steps: Sequence[int],
  look_again: Callable[[], Sequence[int]],
  attempt: Attempt,
  together: Together,
  *,
  fallback: bool,
) -> Restored | None:
  """What `attempt` makes of the newest step that it can read; None if there is no step.

  Newer steps that it cannot read go into quarantine, but only after an older one was read: if none can be, the fault
  may be elsewhere. A step that is deleted while it is read is not damaged: the newest is then looked up again.

  Args:
    steps, look_again: the steps to try, best first, and how to look them up anew; the same on all processes.
    attempt: reads a step; raises the same error on all processes.
    fallback: whether to go on to older steps; else the first error is raised.

  Raises:
    CorruptCheckpointError: if no step could be read.
    NoCheckpointError: if one after the other was deleted.
    CheckpointError: anything else that `attempt` raises: storage that does not answer, or a `like` that does not fit,
      says nothing about the step.
  """
  failed: dict[int, str] = {}
  gone: list[int] = []
  waiting = list(steps)
  while waiting:
    step = waiting.pop(0)
    try:
      restored = unless_gone(directory, step, attempt, together)
    except NoCheckpointError as e:  # a StepGoneError, or it went before it was begun
      gone.append(step)
      if len(gone) >= _MOST_GONE:
        raise StepGoneError(
          f"{directory}: steps {gone} were deleted one after the other while this process read them; keep more "
          "(retention.last), or save less often than a restore takes"
        ) from e
      _log.info("step %d was deleted while it was read; looking for the newest again", step)
      waiting = [s for s in look_again() if s not in failed]
    except CorruptCheckpointError as e:
      if not fallback or (not failed and not waiting):  # the only one
        raise
      failed[step] = str(e)
      _log.error("step %d cannot be restored (%s); trying the one before", step, e)
    else:
      if failed:
        _quarantine(directory, failed, together)
        names = ", ".join(map(str, failed))
        _log.error("restored step %d in place of %s: see `ckpt-jax ls %s --all`", step, names, directory)
      assert restored.report is not None
      report = dataclasses.replace(restored.report, quarantined=failed, gone=tuple(gone))
      return dataclasses.replace(restored, report=report)
  if not failed:
    return None
  reasons = "\n  ".join(f"step {step}: {why}" for step, why in failed.items())
  raise CorruptCheckpointError(f"{directory}: none of the steps {list(failed)} can be restored:\n  {reasons}")


class StepGoneError(NoCheckpointError):
  """A step was deleted while it was read."""

  topic = "deleted-while-read"


def unless_gone(directory: epath.Path, step: int, attempt: Attempt, together: Together) -> Restored:
  """`attempt(step)`, again if the step was rewritten meanwhile.

  Raises:
    StepGoneError: on all processes, if the step was deleted meanwhile.
    CheckpointError: what `attempt` raises.
  """
  for attempts_left in reversed(range(_MOST_REWRITTEN)):
    before = look.identity(step_path(directory, step)) if jax.process_index() == 0 else None
    try:
      return attempt(step)
    except (ConfigError, CorruptCheckpointError, StorageError, StructureMismatchError) as e:  # no item, no leaf
      became = _what_became_of(directory, step, before, together)
      if became == _GONE:
        raise StepGoneError(f"{directory}: step {step} was deleted while it was read") from e
      if became != _REWRITTEN or not attempts_left:
        raise
      _log.info("step %d was rewritten while it was read; reading it again", step)
  raise AssertionError("unreachable")


def _what_became_of(directory: epath.Path, step: int, before: tuple[int, ...] | None, together: Together) -> str:
  """What process 0 sees of a step that could not be read."""

  def see() -> str:
    try:
      if is_gone(directory, step):
        return _GONE
      return "" if before == look.identity(step_path(directory, step)) else _REWRITTEN
    except (CheckpointError, OSError):  # storage that does not answer: the error of the read says so
      return ""

  return together.decided("process 0 to see whether the step is still there", see)


def _quarantine(directory: epath.Path, failed: dict[int, str], together: Together) -> None:
  def move() -> None:
    try:
      put_aside(directory, failed, QUARANTINE, failed)
    except CheckpointError as e:  # a run that is read-only is restored all the same
      _log.warning("%s", e)

  together.decided("process 0 to put damaged steps into quarantine", move)


def refuse_to_start_afresh(directory: epath.Path, together: Together) -> None:
  """Raises if a run without a step that counts has had one: training must not start at step 0 unnoticed.

  Raises:
    CorruptCheckpointError: on all processes, naming the steps in quarantine.
  """

  def refuse() -> None:
    quarantined = sorted({a.step for a in listed(directory) if a.kind == QUARANTINE})
    if quarantined:
      raise CorruptCheckpointError(
        f"{directory}: no step is left, and steps {quarantined} are in quarantine ({NOTES}/{QUARANTINE}): "
        f"`ckpt-jax ls {directory} --all` says why, `ckpt-jax restore-quarantined {directory} STEP` puts one back. "
        "Start in another directory, or remove them to begin afresh",
        topic="quarantine",
      )

  together.decided("process 0 to see whether the run is new", refuse)
