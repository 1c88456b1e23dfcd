"""Which step a restore takes when the newest cannot be read, and what becomes of those that could not."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Generic, TypeVar

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
from ckpt_jax.run.quarantine import QUARANTINE, SET_ASIDE, damaged_steps, listed, put_aside, remove_aside
from ckpt_jax.run.steps import (
  NOTES,
  PINS,
  committed_steps,
  is_gone,
  is_step,
  list_readable_steps,
  newest_to_restore,
  noted_steps,
  step_directory,
  step_path,
)
from ckpt_jax.storage import look

if TYPE_CHECKING:  # a room below
  from ckpt_jax.job.waits import Together

_log = logging.getLogger(__name__)
T = TypeVar("T")
_MOST_GONE, _MOST_REWRITTEN = 30, 3
_GONE, _REWRITTEN = "gone", "rewritten"


def candidates(directory: epath.Path, *, healthy: bool) -> list[int]:
  """The steps that a restore of the newest may take, best first, damaged ones included.

  Newest first, but for thinned ones, from which no training goes on.

  Args:
    directory: the run.
    healthy: leave out the steps that are tagged unhealthy.
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
  """Why a directory that holds a step is no step any more; None if it is one, or never was."""
  return None if is_step(step_path(directory, step)) else damaged_steps(directory).get(step)


@dataclasses.dataclass(frozen=True)
class Sound(Generic[T]):
  """What was made of a step, and of those that came before it.

  Attributes:
    found: what was read.
    failed: newer steps that could not be read, and why.
    gone: newer steps that were deleted while they were read.
  """

  found: T
  failed: dict[int, str]
  gone: tuple[int, ...]


def newest_sound(
  directory: epath.Path,
  steps: Callable[[], Sequence[int]],
  attempt: Callable[[int], T],
  together: Together,
  *,
  fallback: bool,
) -> Sound[T] | None:
  """What `attempt` makes of the newest step that it can read; None if there is no step.

  Newer ones that it cannot read are put into quarantine, but only once an older step was read: where none can be, the
  fault may lie elsewhere, and nothing is touched. A step that is deleted while it is read (by the retention of a
  trainer elsewhere, say) is no damaged one: then the newest is looked for again.

  Args:
    directory: the run.
    steps: looks for steps, newest first; the same on all processes.
    attempt: reads a step; raises the same error on all processes.
    together: the waits of the restore.
    fallback: whether to go on to older steps; else the first error is raised.

  Raises:
    CorruptCheckpointError: if no step could be read.
    NoCheckpointError: if one after the other was deleted.
    CheckpointError: anything else that `attempt` raises: storage that does not answer, or a `like` that does not fit,
      says nothing about the step.
  """
  failed: dict[int, str] = {}
  gone: list[int] = []
  waiting = list(steps())
  while waiting:
    step = waiting.pop(0)
    try:
      found = unless_gone(directory, step, attempt, together)
    except NoCheckpointError as e:  # a StepGoneError, or it went before it was begun
      gone.append(step)
      if len(gone) >= _MOST_GONE:
        raise NoCheckpointError(
          f"{directory}: steps {gone} were deleted one after the other while this process read them; keep more "
          "(retention.last), or save less often than a restore takes"
        ) from e
      _log.info("step %d was deleted while it was read; looking for the newest again", step)
      waiting = [s for s in steps() if s not in failed]
      continue
    except CorruptCheckpointError as e:
      if not fallback or (not failed and not waiting):  # the only one
        raise
      failed[step] = str(e)
      _log.error("step %d cannot be restored (%s); trying the one before", step, e)
      continue
    if failed:
      _quarantine(directory, failed, together)
      _log.error(
        "restored step %d in place of %s: see `ckpt-jax ls %s --all`", step, ", ".join(map(str, failed)), directory
      )
    return Sound(found, failed, tuple(gone))
  if not failed:
    return None
  reasons = "\n  ".join(f"step {step}: {why}" for step, why in failed.items())
  raise CorruptCheckpointError(f"{directory}: none of the steps {list(failed)} can be restored:\n  {reasons}")


class StepGoneError(NoCheckpointError):
  """A step was deleted while it was read."""


def unless_gone(directory: epath.Path, step: int, attempt: Callable[[int], T], together: Together) -> T:
  """`attempt(step)`, where an error that came of the step's deletion, or of its rewriting, is told from others.

  Raises:
    StepGoneError: on all processes, if the step was deleted meanwhile.
    CheckpointError: what `attempt` raises.
  """
  for last in (*[False] * (_MOST_REWRITTEN - 1), True):
    before = look.identity(step_path(directory, step)) if jax.process_index() == 0 else None
    try:
      return attempt(step)
    except (ConfigError, CorruptCheckpointError, StorageError, StructureMismatchError) as e:  # no item, no leaf
      became = _what_became_of(directory, step, before, together)
      if became == _GONE:
        raise StepGoneError(f"{directory}: step {step} was deleted while it was read") from e
      if became != _REWRITTEN or last:
        raise
      _log.info("step %d was rewritten while it was read; reading it again", step)
  raise AssertionError("unreachable")


def _what_became_of(directory: epath.Path, step: int, before: tuple[int, ...] | None, together: Together) -> str:
  """What process 0 sees of a step that could not be read."""
  became = ""
  if jax.process_index() == 0:
    try:
      if is_gone(directory, step):
        became = _GONE
      elif before != look.identity(step_path(directory, step)):
        became = _REWRITTEN
    except (CheckpointError, OSError):  # storage that does not answer: then that is what is wrong
      pass
  return together.meet("process 0 to see whether the step is still there", text=became)[0]


def _quarantine(directory: epath.Path, failed: dict[int, str], together: Together) -> None:
  if jax.process_index() == 0:
    try:
      put_aside(directory, failed, QUARANTINE, failed)
    except CheckpointError as e:  # a run that can only be read is restored all the same
      _log.warning("%s", e)
  together.meet("process 0 to put damaged steps into quarantine")


def refuse_to_start_afresh(directory: epath.Path, together: Together) -> None:
  """Raises, on all processes, if a run without a step that counts has had one: it must not begin at 0 in silence.

  Raises:
    CorruptCheckpointError: naming what there is.
  """
  error: Exception | None = None
  if jax.process_index() == 0:
    try:
      quarantined = sorted({a.step for a in listed(directory) if a.kind == QUARANTINE})
      if quarantined:
        error = CorruptCheckpointError(
          f"{directory}: no step is left, and steps {quarantined} are in quarantine ({NOTES}/{QUARANTINE}): "
          f"`ckpt-jax ls {directory} --all` says why, `ckpt-jax restore-quarantined {directory} STEP` puts one back. "
          "Start in another directory, or remove them to begin afresh"
        )
    except Exception as e:
      error = e
  together.meet("process 0 to see whether the run is new", error)


def rollback(directory: epath.Path, step: int, *, delete: bool = False) -> list[int]:
  """Makes `step` the newest that counts. To be called by one process; `Checkpointer.rollback` is for running jobs.

  Args:
    directory: the run.
    step: a committed step.
    delete: remove the newer steps for good, those of earlier rollbacks too, rather than set them aside.

  Returns:
    The newer steps, now set aside or deleted.

  Raises:
    NoCheckpointError: if there is no such step.
    CheckpointError: if a newer one is pinned and would be deleted.
  """
  step_directory(directory, step)
  newer = sorted(_newer(directory, step))
  pinned = noted_steps(directory, PINS) & set(newer)
  if delete and pinned:
    raise CheckpointError(f"{directory}: steps {sorted(pinned)} are pinned; unpin them, or roll back without delete")
  put_aside(directory, newer, SET_ASIDE, dict.fromkeys(newer, f"rolled back to step {step}"))
  if delete:
    newer = sorted(set(newer) | set(remove_aside(directory, SET_ASIDE, _set_aside(directory, step))))
  return newer


def deleted_by_rollback(directory: epath.Path, step: int) -> list[int]:
  """The steps that `rollback(directory, step, delete=True)` would delete."""
  return sorted(_newer(directory, step) | _set_aside(directory, step))


def _newer(directory: epath.Path, step: int) -> set[int]:
  return {s for s in (*committed_steps(directory), *damaged_steps(directory)) if s > step}


def _set_aside(directory: epath.Path, step: int) -> set[int]:
  return {a.step for a in listed(directory) if a.kind == SET_ASIDE and a.step > step}


def rolled_back(directory: epath.Path, step: int, together: Together, *, delete: bool) -> list[int]:
  """`rollback` for a job: process 0 does it, all know the outcome."""
  error: Exception | None = None
  newer: list[int] = []
  if jax.process_index() == 0:
    try:
      newer = rollback(directory, step, delete=delete)
    except Exception as e:
      error = e
  return json.loads(together.meet(f"process 0 to go back to step {step}", error, json.dumps(newer))[0])
