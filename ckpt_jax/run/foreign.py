"""What other programs have left in a directory that is to be a run: read, or named, never overlooked.

Training that starts at 0 beside a checkpoint it did not see has lost work. So a run begins afresh only where nothing
looks like a checkpoint: in an empty directory, in one with notes of ours and no steps, or beside logs and settings.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable

from etils import epath

from ckpt_jax.errors import NotARunError, StorageError
from ckpt_jax.run.naming import is_temporary
from ckpt_jax.run.steps import NOTES, is_message_pack, is_step, is_tree, newest_step
from ckpt_jax.storage import look
from ckpt_jax.storage.urls import is_object_store

_log = logging.getLogger(__name__)
_MOST_LOOKED_AT = 200  # subdirectories
_NAMED = 5
# Other checkpoint files, by their names: what trainers call them, and how they keep weights. `config.yaml`,
# `events.out.tfevents.123` and `vocab.npy` are none.
_OTHERS = re.compile(
  r"(.*(ckpt|checkpoint|train_?state|opt_?state|(step|epoch|iter|snapshot)[_-]?[0-9]).*"
  r"\.(msgpack|pkl|pickle|npz|npy|pt|pth|bin|safetensors|h5))|.*\.(ckpt|eqx|msgpack)",
  re.IGNORECASE,
)


def refuse(directory: epath.Path) -> None:
  """For a directory without steps.

  Raises:
    NotARunError: if something in it, or it itself, looks like a checkpoint; the message says what, and how to open it.
  """
  problem = _itself(directory) or _within(directory)
  if problem is not None:
    raise NotARunError(f"{directory}: {problem}")


def warn_of_others(directory: epath.Path, names: Iterable[str]) -> None:
  """For a run with steps called by plain numbers: logs those of another name, which are not counted.

  An earlier job may have overlooked them, and have begun anew beside them.

  Args:
    directory: the run.
    names: what it holds.
  """
  others = [path for path in _numbered(directory, names) if is_step(path) or is_message_pack(path)]
  if others:
    _log.warning(
      "%s: its steps are called by their numbers; %s beside them are no steps of it, and are not read. If training "
      "should have gone on from one of those, move the numbered steps away, and open the run again",
      directory,
      _some(others),
    )


def _itself(directory: epath.Path) -> str | None:
  parent = directory.parent
  if not directory.is_dir():
    if not directory.exists():
      return None
    if is_message_pack(directory):
      return f"is one file, which flax may have written; {_convert(directory)}"
    return "is a file; a run is a directory"
  if is_tree(directory) and is_step(parent) and not is_tree(parent):
    step = number_of(parent.name)
    if step is not None:
      return (
        f"is an item of step {step} of the run {parent.parent}; open that: "
        f'Checkpointer("{parent.parent}").restore({step}, item="{directory.name}")'
      )
  if not is_step(directory):
    return None
  step = number_of(directory.name)
  if step is not None:
    return f'is step {step} of the run {parent}; open that: Checkpointer("{parent}").restore({step})'
  return f"is a checkpoint by itself, without a step number; {_convert(directory, step=0)}"


def flax_files(directory: epath.Path) -> list[epath.Path]:
  """Files of flax.training.checkpoints, PREFIXstep, in the order of their names."""
  return [path for path in _numbered(directory, look.names(directory)) if is_message_pack(path)]


def _numbered(directory: epath.Path, names: Iterable[str]) -> list[epath.Path]:
  """What is called by some name and a number."""
  fitting = (n for n in names if re.search(r"[^0-9][0-9]+$", n) and not n.startswith(".") and not is_temporary(n))
  return [directory / name for name in sorted(fitting)]


def number_of(name: str) -> int | None:
  """The step that a directory holds, by its name alone, as Orbax gives them."""
  match = re.fullmatch(r"(?:.*_)?([0-9]+)", name)
  return None if match is None else int(match[1])


def _is_run(directory: epath.Path) -> bool:
  try:
    return newest_step(directory) is not None or bool(flax_files(directory))
  except NotARunError:  # it says so when it is opened
    return True


def _within(directory: epath.Path) -> str | None:
  if not directory.exists():
    return None
  paths = [p for p in directory.iterdir() if not p.name.startswith(".") and not is_temporary(p.name)]
  numbered = flax_files(directory)
  if numbered:
    return f"holds files that flax.training.checkpoints wrote ({_some(numbered)}); {_convert(directory)}"
  runs, alone = [], []
  for path in sorted(paths)[:_MOST_LOOKED_AT]:
    if path.is_dir():
      try:
        if is_step(path):
          alone.append(path)
        elif _is_run(path):
          runs.append(path)
      except StorageError:  # lost+found, and what else is not ours to look into
        if is_object_store(path):
          raise
  # A run may hold others, say of its best steps: one that was opened before is a run.
  if runs and not (directory / NOTES).exists():
    which = "a run" if len(runs) == 1 else "runs"
    return f'is no run but holds {which} ({_some(runs)}); open one: Checkpointer("{runs[0]}")'
  if alone:
    return f"holds checkpoints without step numbers ({_some(alone)}); {_convert(alone[0], step=0)}"
  others = [p for p in paths if _OTHERS.fullmatch(p.name) and not p.is_dir()]
  if others:
    return (
      f"holds what looks like checkpoints of another program ({_some(others)}) and no step of a run. To begin afresh "
      "use another directory"
    )
  return None


def _convert(path: epath.Path, step: int | None = None) -> str:
  number = "" if step is None else f" --step {step}"
  return (
    f"make it a run, which Checkpointer then opens: `ckpt-jax convert {os.fspath(path)} NEW_RUN{number}`. To begin "
    "afresh use another directory"
  )


def _some(paths: Iterable[epath.Path]) -> str:
  names = sorted(p.name for p in paths)
  return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
