"""Pins: steps that every retention rule leaves alone. A pin is a note, RUN/.ckpt_jax/pins/STEP."""

from __future__ import annotations

import datetime
import os

from ckpt_jax.errors import StorageError
from ckpt_jax.run.notes import PINS, note_of, noted_steps, write_note
from ckpt_jax.run.steps import run_directory, step_directory


def pin(path: str | os.PathLike[str], step: int) -> None:
  """Keeps a committed step whatever the retention rules say. Pinning it twice is no error.

  Raises:
    NoCheckpointError: if there is no such step; the message lists the steps that exist.
    StorageError: if the note cannot be written.
  """
  directory = run_directory(path)
  step_directory(directory, step)
  file = note_of(directory, PINS, step)
  try:
    write_note(file, {"pinned": datetime.datetime.now(datetime.timezone.utc).isoformat()})
  except OSError as e:
    raise StorageError(f"{file}: the pin cannot be written: {e.strerror or e}") from e


def unpin(path: str | os.PathLike[str], step: int) -> bool:
  """Subjects a step to the retention rules again. Returns whether it was pinned.

  Raises:
    StorageError: if the note cannot be removed.
  """
  file = note_of(run_directory(path), PINS, step)
  try:
    file.unlink()
  except FileNotFoundError:
    return False
  except OSError as e:
    raise StorageError(f"{file}: the pin cannot be removed: {e.strerror or e}") from e
  return True


def pinned(path: str | os.PathLike[str]) -> set[int]:
  """The pinned steps of a run."""
  return noted_steps(run_directory(path), PINS)
