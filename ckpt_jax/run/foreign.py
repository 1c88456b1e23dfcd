"""Checkpoints of other programs in a directory that is to become a run: read, or named, never overlooked.

Training that starts at 0 beside a checkpoint that it did not see has lost work. So a run begins afresh only where
nothing looks like a checkpoint: in an empty directory, in one with notes of ours and no steps, or beside logs and
settings.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable

from etils import epath

from ckpt_jax.errors import NotARunError, StorageError
from ckpt_jax.run.naming import is_temporary
from ckpt_jax.run.notes import NOTES
from ckpt_jax.run.steps import EXPORT, is_message_pack, is_step, is_tree, newest_step
from ckpt_jax.storage import look
from ckpt_jax.storage.urls import is_object_store

_log = logging.getLogger(__name__)
_MOST_LOOKED_AT = 200  # subdirectories
_NAMED = 5
# Names of other checkpoint files: what trainers call them, and how they keep weights. `config.yaml`,
# `events.out.tfevents.123` and `vocab.npy` are none.
_OTHERS = re.compile(
  r"(.*(ckpt|checkpoint|train_?state|opt_?state|(step|epoch|iter|snapshot)[_-]?[0-9]).*"
  r"\.(msgpack|pkl|pickle|npz|npy|pt|pth|bin|safetensors|h5))|.*\.(ckpt|eqx|msgpack)",
  re.IGNORECASE,
)


def refuse(directory: epath.Path) -> None:
  """Checks a directory without steps.

  Raises:
    NotARunError: if it, or something in it, looks like a checkpoint; the message names it, and how to open it.
  """
  problem = _itself(directory) or _within(directory)
  if problem is not None:
    raise NotARunError(f"{directory}: {problem}")


def warn_of_others(directory: epath.Path, names: Iterable[str]) -> None:
  """For a run with steps named by plain numbers: logs checkpoints of another name, which are not counted.

  An earlier job may have overlooked them, and have begun anew beside them. `names` are the entries of the run.
  """
  others = [path for path in _numbered(directory, names) if is_step(path) or is_message_pack(path)]
  if others:
    _log.warning(
      "%s: its steps are named by their numbers; %s beside them are no steps of it, and are not read. If training "
      "should have resumed from one of those, move the numbered steps away, and open the run again",
      directory,
      _some(others),
    )


def flax_files(directory: epath.Path) -> list[epath.Path]:
  """Files of flax.training.checkpoints, PREFIXstep, in the order of their names."""
  return [path for path in _numbered(directory, look.names(directory)) if is_message_pack(path)]


def number_of(name: str) -> int | None:
  """The step that a directory holds, by its name alone, as Orbax gives them."""
  match = re.fullmatch(r"(?:.*_)?([0-9]+)", name)
  return None if match is None else int(match[1])


def _itself(directory: epath.Path) -> str | None:
  parent = directory.parent
  if not directory.is_dir():
    if not directory.exists():
      return None
    if is_message_pack(directory):
      return f"is one file, which flax may have written; {_convert(directory)}"
    return "is a file; a run is a directory"
  if look.exists(directory / EXPORT):
    return "is an export; ckpt_jax.load_quantized or load_safetensors loads it, and `ckpt-jax verify` checks it"
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
  return f"is a checkpoint by itself, without a step number; {_convert(directory, ' --step 0')}"


def _within(directory: epath.Path) -> str | None:
  numbered = flax_files(directory)
  if numbered:
    return f"holds files that flax.training.checkpoints wrote ({_some(numbered)}); {_convert(directory)}"
  names = [name for name in look.names(directory) if not name.startswith(".") and not is_temporary(name)]
  paths = [directory / name for name in sorted(names)]
  runs, alone = [], []
  for path in [path for path in paths[:_MOST_LOOKED_AT] if path.is_dir()]:
    try:
      if is_step(path):
        alone.append(path)
      elif _is_run(path):
        runs.append(path)
    except StorageError:  # lost+found, and other directories that are not ours to look into
      if is_object_store(path):
        raise
  # A run may hold others, say of its best steps: one that was opened before is a run.
  if runs and not (directory / NOTES).exists():
    which = "a run" if len(runs) == 1 else "runs"
    return f'is no run but holds {which} ({_some(runs)}); open one: Checkpointer("{runs[0]}")'
  if alone:
    return f"holds checkpoints without step numbers ({_some(alone)}); {_convert(alone[0], ' --step 0')}"
  others = [path for path in paths if _OTHERS.fullmatch(path.name) and not path.is_dir()]
  if others:
    return (
      f"holds what looks like checkpoints of another program ({_some(others)}) and no step of a run. To begin afresh "
      "use another directory"
    )
  return None


def _is_run(directory: epath.Path) -> bool:
  try:
    return newest_step(directory) is not None or bool(flax_files(directory))
  except NotARunError:  # reported when it is opened
    return True


def _numbered(directory: epath.Path, names: Iterable[str]) -> list[epath.Path]:
  """Entries named by some text and a number."""
  fitting = (n for n in names if re.search(r"[^0-9][0-9]+$", n) and not n.startswith(".") and not is_temporary(n))
  return [directory / name for name in sorted(fitting)]


def _convert(path: epath.Path, options: str = "") -> str:
  return (
    f"make it a run, which Checkpointer then opens: `ckpt-jax convert {path} NEW_RUN{options}`. To begin "
    "afresh use another directory"
  )


def _some(paths: Iterable[epath.Path]) -> str:
  names = sorted(path.name for path in paths)
  return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
