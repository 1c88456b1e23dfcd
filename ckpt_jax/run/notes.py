"""Notes that ckpt_jax keeps beside the steps of a run: RUN/.ckpt_jax/KIND/NAME.

Each is a small JSON file that is written in one go, because a bucket has neither rename nor append.
"""

from __future__ import annotations

import json
from typing import Any

from etils import epath

from ckpt_jax.storage import look

NOTES = ".ckpt_jax"
# Kinds with one note for each step, which is named after the step's number.
PINS, DELETING = "pins", "deleting"
ASIDE = "aside"  # steps of a bucket that no longer count and are still in place; on a disk they are moved instead


def note_of(run: epath.Path, kind: str, step: int) -> epath.Path:
  """The file of a step's note."""
  return run / NOTES / kind / str(step)


def noted_steps(run: epath.Path, kind: str) -> set[int]:
  """The steps that have a note of this kind."""
  return {int(name) for name in look.names(run / NOTES / kind) if name.isdigit()}


def write_note(file: epath.Path, data: dict[str, Any]) -> None:
  """Writes a note.

  Raises:
    OSError: if that fails.
  """
  file.parent.mkdir(parents=True, exist_ok=True)
  file.write_text(json.dumps(data))


def read_note(file: epath.Path) -> dict[str, Any]:
  """The content of a note; empty if it is missing or unreadable, or was cut short by a crash."""
  try:
    data = json.loads(file.read_text())
  except (OSError, ValueError):
    return {}
  return data if isinstance(data, dict) else {}
