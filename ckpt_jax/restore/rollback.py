"""Goes back to an older step of a run: the newer ones are set aside, or deleted."""

from __future__ import annotations

from etils import epath

from ckpt_jax.errors import CheckpointError
from ckpt_jax.run.quarantine import SET_ASIDE, damaged_steps, listed, put_aside, remove_aside
from ckpt_jax.run.steps import PINS, committed_steps, noted_steps, step_directory


def roll_back(directory: epath.Path, step: int, *, delete: bool = False) -> list[int]:
  """Makes `step` the newest that counts, and returns the newer steps, which it sets aside.

  To be called by one process; `Checkpointer.rollback` is for running jobs. `delete` removes the newer steps for good,
  those of earlier rollbacks too.

  Raises:
    NoCheckpointError: if there is no such step.
    CheckpointError: if a newer one is pinned and would be deleted.
  """
  step_directory(directory, step)
  newer = sorted(_newer(directory, step))
  pinned = noted_steps(directory, PINS) & set(newer)
  if delete and pinned:
    raise CheckpointError(
      f"{directory}: steps {sorted(pinned)} are pinned; unpin them, or roll back without delete",
      topic="steps-in-the-way",
    )
  put_aside(directory, newer, SET_ASIDE, dict.fromkeys(newer, f"rolled back to step {step}"))
  if delete:
    newer = sorted(set(newer) | set(remove_aside(directory, SET_ASIDE, _set_aside(directory, step))))
  return newer


def deleted_by_rollback(directory: epath.Path, step: int) -> list[int]:
  """The steps that `roll_back(directory, step, delete=True)` would delete."""
  return sorted(_newer(directory, step) | _set_aside(directory, step))


def _newer(directory: epath.Path, step: int) -> set[int]:
  return {s for s in (*committed_steps(directory), *damaged_steps(directory)) if s > step}


def _set_aside(directory: epath.Path, step: int) -> set[int]:
  return {a.step for a in listed(directory) if a.kind == SET_ASIDE and a.step > step}


def place_of(delete: bool) -> str:
  """Where `roll_back` leaves the later steps, as its record says."""
  return "deleted" if delete else SET_ASIDE
