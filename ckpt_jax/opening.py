"""Whether a directory can be opened as a run: what other programs have left there is read, or named, never overlooked.

Training that starts at 0 beside a checkpoint it did not see has lost work. So a run begins afresh only where nothing
looks like a checkpoint: in an empty directory, in one with notes of ours and no steps, or beside logs and settings.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Iterable

import jax
from etils import epath

from ckpt_jax import contents, run
from ckpt_jax.errors import CheckpointError, NotARunError
from ckpt_jax.naming import Naming, is_temporary
from ckpt_jax.policies.agree import decided_by_process_zero
from ckpt_jax.rendezvous import Rendezvous
from ckpt_jax.storage.objects import snapshot

_MOST_LOOKED_AT = 200  # subdirectories
_NAMED = 5
# Other checkpoint files, by their names: a step number, or a word, and how trainers keep weights. `config.yaml`,
# `events.out.tfevents.123` and `vocab.npy` are none.
_OTHERS = re.compile(
  r"(.*(ckpt|checkpoint|step|epoch|iter|snapshot|train_?state|opt_?state).*"
  r"\.(msgpack|pkl|pickle|npz|npy|pt|pth|bin|eqx|safetensors|h5|orbax))|.*\.(ckpt|eqx|msgpack)",
  re.IGNORECASE,
)


@dataclasses.dataclass(frozen=True)
class Opened:
  """How a run goes on.

  Attributes:
    naming: how its steps are called.
    item: what the state is saved as within a step; empty where steps have no items, and none can be added.
  """

  naming: Naming
  item: str

  def check_writable(self, directory: epath.Path) -> None:
    """Raises CheckpointError if steps of ours cannot stand beside those that are there."""
    if not self.item:
      raise CheckpointError(
        f"{directory}: its checkpoints have no items (flax.training.checkpoints writes such), and steps of ckpt_jax "
        "beside them could be read by neither; save into another directory: Checkpointer(NEW), with what restore() "
        "gave. Nothing was written"
      )


def opened(directory: epath.Path, item: str | None, timeout: float) -> Opened:
  """Looks at a run that is about to be trained. All processes call it alike; process 0 looks.

  Args:
    directory: the run, which need not exist.
    item: `Config.item`.
    timeout: seconds that the other processes wait.

  Raises:
    NotARunError: if there are checkpoints and no steps; it says how to open them.
  """

  def look() -> list[int]:
    with snapshot(directory):
      found = run.naming(directory, opening=True)
      newest = run.newest_step(directory)
      if newest is None:
        refuse_foreign(directory)
      return list(json.dumps([found.prefix, found.width, _item_of(directory, newest, item)]).encode())

  told = bytes(decided_by_process_zero(look, Rendezvous(f"open {directory}"), timeout))
  prefix, width, name = json.loads(told)
  naming = Naming(prefix, width)
  if jax.process_index() > 0:
    run.is_called(directory, naming)
  return Opened(naming, name)


def _item_of(directory: epath.Path, newest: int | None, wanted: str | None) -> str:
  """That of the configuration, or of the newest step: whoever reads this run looks for the state there."""
  if newest is None:
    return wanted or run.DEFAULT_ITEM
  step_dir = run.step_path(directory, newest)
  if run.is_tree(step_dir):
    return ""
  if wanted is not None:
    return wanted
  try:
    ours = run.our_metadata(step_dir)
    return run.our_item(ours) if ours else contents.item_name(step_dir)
  except CheckpointError:  # damaged, or several of which none stands out
    return run.DEFAULT_ITEM


def refuse_foreign(directory: epath.Path) -> None:
  """For a directory without steps.

  Raises:
    NotARunError: if something in it, or it itself, looks like a checkpoint; the message says what, and how to open it.
  """
  problem = _itself(directory) or _within(directory)
  if problem is not None:
    raise NotARunError(f"{directory}: {problem}")


def _itself(directory: epath.Path) -> str | None:
  parent = directory.parent
  if not directory.is_dir():
    if not directory.exists():
      return None
    if run.is_message_pack(directory):
      return f"is one file, which flax may have written; {_convert(directory)}"
    return "is a file; a run is a directory"
  if run.is_tree(directory) and run.is_step(parent) and not run.is_tree(parent):
    step = _number(parent.name)
    if step is not None:
      return (
        f"is an item of step {step} of the run {parent.parent}; open that: "
        f'Checkpointer("{parent.parent}").restore({step}, item="{directory.name}")'
      )
  if not run.is_step(directory):
    return None
  step = _number(directory.name)
  if step is not None:
    return f'is step {step} of the run {parent}; open that: Checkpointer("{parent}").restore({step})'
  return f"is a checkpoint by itself, without a step number; {_convert(directory, step=0)}"


def _number(name: str) -> int | None:
  """The step that a directory holds, by its name alone, as Orbax gives them."""
  match = re.fullmatch(r"(?:.*_)?([0-9]+)", name)
  return None if match is None else int(match[1])


def _within(directory: epath.Path) -> str | None:
  if not directory.exists():
    return None
  paths = [p for p in directory.iterdir() if not p.name.startswith(".") and not is_temporary(p.name)]
  numbered = [p for p in paths if re.search(r"[0-9]$", p.name) and run.is_message_pack(p)]
  if numbered:
    return f"holds files that flax.training.checkpoints wrote ({_some(numbered)}); {_convert(directory)}"
  runs, alone = [], []
  for path in sorted(paths)[:_MOST_LOOKED_AT]:
    if path.is_dir():
      if run.is_step(path):
        alone.append(path)
      elif run.newest_step(path) is not None:
        runs.append(path)
  if runs:
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
