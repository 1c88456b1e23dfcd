"""Opening a run that is about to be trained: how it goes on, which all processes of the job decide alike."""

from __future__ import annotations

import contextlib
import dataclasses
import json

import jax
from etils import epath

from ckpt_jax.errors import CheckpointError, StorageError
from ckpt_jax.job.agreement import decided_by_process_zero
from ckpt_jax.job.rendezvous import Rendezvous
from ckpt_jax.layout import contents
from ckpt_jax.orbax.format import DEFAULT_ITEM
from ckpt_jax.run import foreign
from ckpt_jax.run.naming import PLAIN, Naming
from ckpt_jax.run.steps import is_called, is_tree, naming_in, newest_step, our_item, our_metadata, step_path
from ckpt_jax.storage import look
from ckpt_jax.storage.objects import snapshot


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

  def found_out() -> list[int]:
    with snapshot(directory):
      names = look.names(directory)
      found = naming_in(directory, names, opening=True)
      newest = newest_step(directory, names)
      if newest is None:
        foreign.refuse(directory)
      elif found == PLAIN:
        with contextlib.suppress(StorageError):  # what cannot be looked into is nothing to stop for
          foreign.warn_of_others(directory, names)
      return list(json.dumps([found.prefix, found.width, _item_of(directory, newest, item)]).encode())

  told = bytes(decided_by_process_zero(found_out, Rendezvous(f"open {directory}"), timeout))
  prefix, width, name = json.loads(told)
  naming = Naming(prefix, width)
  if jax.process_index() > 0:
    is_called(directory, naming)
  return Opened(naming, name)


def _item_of(directory: epath.Path, newest: int | None, wanted: str | None) -> str:
  """That of the configuration, or of the newest step: whoever reads this run looks for the state there."""
  if newest is None:
    return wanted or DEFAULT_ITEM
  step_dir = step_path(directory, newest)
  if is_tree(step_dir):
    return ""
  if wanted is not None:
    return wanted
  try:
    ours = our_metadata(step_dir)
    return our_item(ours) if ours else contents.item_name(step_dir, None, ours)
  except CheckpointError:  # damaged, or several of which none stands out
    return DEFAULT_ITEM
