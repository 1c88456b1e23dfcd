"""Pins: steps that every retention rule leaves alone. A pin is a small file, RUN/.ckpt_jax/pins/STEP."""

from __future__ import annotations

import datetime
import json
import os

from ckpt_jax.errors import StorageError
from ckpt_jax.run.steps import NOTES, PINS, noted_steps, run_directory, step_directory


def pin(path: str | os.PathLike[str], step: int) -> None:
  """Keeps a committed step whatever the retention rules say. Pinning it twice is no error.

  Raises:
    NoCheckpointError: if there is no such step; the message names those that there are.
    StorageError: if the note cannot be written.
  """
  directory = run_directory(path)
  step_directory(directory, step)
  file = directory / NOTES / PINS / str(step)
  try:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"pinned": datetime.datetime.now(datetime.timezone.utc).isoformat()}))
  except OSError as e:
    raise StorageError(f"{file}: the pin cannot be written: {e.strerror or e}") from e


def unpin(path: str | os.PathLike[str], step: int) -> bool:
  """Gives a step back to the retention rules. Returns whether it was pinned.

  Raises:
    StorageError: if the note cannot be removed.
  """
  file = run_directory(path) / NOTES / PINS / str(step)
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
