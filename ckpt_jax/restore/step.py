"""An item of a committed step, opened to be read: its leaves, what was noted of them, and their values."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Sharding

from ckpt_jax.config import Config
from ckpt_jax.errors import CheckpointError, CorruptCheckpointError, StorageError, StructureMismatchError
from ckpt_jax.failures import is_damage, is_unreachable, root_cause
from ckpt_jax.integrity.fingerprint import take_restored
from ckpt_jax.layout import contents, reading
from ckpt_jax.layout.description import describe_item
from ckpt_jax.layout.forms import shared_names
from ckpt_jax.layout.sharding import Box
from ckpt_jax.layout.structure import path_name
from ckpt_jax.layout.values import Wanted, read_leaves, window
from ckpt_jax.orbax.format import COMMITTED_AT
from ckpt_jax.restore.leaf import AS_SAVED, LeafPlan, plan_leaf
from ckpt_jax.run.steps import THINNED, is_tree, our_item, our_metadata, step_metadata


class Step:
  """An item as Orbax describes it, with its arrays open within the limits of a Config.

  Attributes:
    directory: of the step.
    ours: what ckpt_jax wrote into the step's metadata; empty for a step of another program.
    committed_at: nanoseconds since the epoch; 0 if the metadata do not say.
    item_name: the item; empty where the step is a tree by itself.
    item: its description.
    meta: Orbax's metadata of each leaf, by path.
    infos: each leaf as its trainer saw it, by path.
    notes: how leaves were encoded, by path.
    thinned: the patterns that a thinned step was reduced to; None if it is whole.
  """

  def __init__(self, step_dir: epath.Path, config: Config, item: str | None = None, like: Any = None):
    """Reads the metadata. For `item` and `like` see `item_to_read`, whose errors it raises.

    Raises:
      CorruptCheckpointError: if the metadata are damaged.
    """
    self.directory = step_dir
    metadata = step_metadata(step_dir)
    self.ours = our_metadata(step_dir, metadata)
    self.committed_at: int = metadata.get(COMMITTED_AT) or 0
    self.item_name = name = item_to_read(step_dir, config, item, like, self.ours)
    self.item_dir = step_dir / name
    self.item = describe_item(self.item_dir, config)
    self.notes = contents.encoded_leaves(self.ours, name)
    weak = self.ours.get("weak") if our_item(self.ours) == name else None
    self._weak: frozenset[str] | None = None if weak is None else frozenset(weak)
    self.thinned: list[str] | None = (self.ours.get(THINNED) or {}).get("keep")
    self._config = config
    leaves = jax.tree_util.tree_flatten_with_path(self.item.tree)[0]
    self.meta: dict[str, Any] = {path_name(path): meta for path, meta in leaves}
    refuse_shared(self.meta, leaves, str(step_dir))
    self.infos = {info.path: info for info in contents.leaf_infos(self.item.tree, self.notes)}

  def __str__(self) -> str:
    return str(self.directory)

  def plan(self, name: str, like: Any = AS_SAVED, casts: Mapping[str, tuple[str, str]] | None = None) -> LeafPlan:
    """How to read a leaf, given the one wanted and, of those whose dtype changes, the old and the new one."""
    cast = (casts or {}).get(name, (None, None))[1]
    weak = None if self._weak is None else name in self._weak
    return plan_leaf(name, self.meta[name], self.notes.get(name), like, cast, weak)

  def is_in_chunks(self, name: str) -> bool:
    """Whether a leaf is an array of its own, of which `read_box` reads no more than a part."""
    return self.meta[name].name not in self.item.index and name not in self.item.values

  def read_box(self, name: str, box: Box) -> np.ndarray:
    """A part of the stored form of an array. Raises what `read` raises."""
    if not self.is_in_chunks(name):
      return self.read([(self.plan(name), None)])[name][tuple(slice(*span) for span in box)]
    stored = self.meta[name].name
    with self._reading():
      request = reading.Request(stored, self.item.open([stored])[stored], (box,))
      ((_, (value,)),) = reading.read([request], window(self.item, self._config))
      return value

  def read(
    self, wanted: Sequence[tuple[LeafPlan, Sharding | None]], arrived: Callable[[str, Any], None] | None = None
  ) -> dict[str, Any]:
    """The stored values of leaves, by path. May be called several times, from any thread, for different leaves.

    Each process may ask for leaves of its own, which `ocp.Checkpointer` does not allow.

    Args:
      wanted: which, and the sharding of each jax array; None for a numpy array, a number or text.
      arrived: called with path and value of each array when it has been read, before the others have.

    Raises:
      StorageError: if storage does not answer.
      CorruptCheckpointError: if it holds something else than its metadata says.
      CheckpointError: for a failure that says nothing about the step, which then stays where it is.
    """
    rows = {plan.name: Wanted(self.meta[plan.name].name, plan.scalar, sharding) for plan, sharding in wanted}
    with self._reading():
      return read_leaves(self.item, rows, self._config, arrived)

  @contextlib.contextmanager
  def _reading(self) -> Iterator[None]:
    try:
      yield
    except (MemoryError, CheckpointError):
      raise
    except Exception as e:
      if is_unreachable(e):
        raise StorageError(f"{self.item_dir}: {root_cause(e)}") from e
      if is_damage(e):
        raise CorruptCheckpointError(f"{self.item_dir}: cannot be read: {root_cause(e)}") from e
      raise CheckpointError(f"{self.item_dir}: cannot be read: {type(e).__name__}: {root_cause(e)}") from e


def refuse_shared(by_name: Collection[str], leaves: Sequence[tuple[tuple[Any, ...], Any]], where: str) -> None:
  """Leaves are found by their names: `{"a": {"b": 1}, "a/b": 2}` has two of one name, which `save` refuses.

  Raises:
    StructureMismatchError: if `by_name` has fewer names than there are leaves.
  """
  if len(by_name) < len(leaves):
    paths = [path for path, _ in leaves]
    shared = "\n  ".join(shared_names(paths, [path_name(path) for path in paths]))
    raise StructureMismatchError(f"{where}: some leaves have a name in common; nothing was read:\n  {shared}")


def item_to_read(step_dir: epath.Path, config: Config, item: str | None, like: Any, ours: dict[str, Any]) -> str:
  """The name of the item of a committed step that a restore takes.

  Args:
    config: its `item` says where the state is in steps that another program wrote.
    item: the one asked for, which must be there.
    like: the tree that is to be restored, or None. If several items are trees and none has the name that states have,
      the only one with the leaves of `like` is taken.
    ours: `run.our_metadata` of the step.

  Raises:
    ConfigError: if there is no such item.
    SeveralItemsError: if it is not clear which is meant; the message names them.
  """
  if item is not None:
    return contents.item_name(step_dir, item)
  try:
    # `Config.item` is about steps of other programs; a step that is a tree by itself has no items.
    has_state = config.item is None or bool(ours) or is_tree(step_dir)
    return contents.item_name(step_dir, None if has_state else config.item, ours)
  except contents.SeveralItemsError as e:
    if like is not None:
      wanted = {path_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(like)[0]}
      fitting = [name for name in e.names if {leaf.path for leaf in contents.saved_leaves(step_dir, name)} == wanted]
      if len(fitting) == 1:
        return fitting[0]
    raise


def count_nonfinite(step_dir: epath.Path, item: str, names: Collection[str]) -> dict[str, tuple[int, int]]:
  """Infinities and NaNs, by path, of those leaves among `names` that an item has. Reads them one at a time.

  Raises:
    CheckpointError: if they cannot be read.
  """
  step = Step(step_dir, Config(), item)
  found = {}
  for plan in [step.plan(name) for name in names if name in step.meta]:
    value = plan.finish(step.read([(plan, None)])[plan.name])
    tally = take_restored({plan.name: value}, {}).tallies(1, fingerprint=False)[plan.name]
    found[plan.name] = (tally.nonfinite - tally.nan, tally.nan)
  return found
