"""What a committed step holds: its items, and their leaves without the values."""

from __future__ import annotations

import dataclasses
import math
import os
from typing import Any

from etils import epath

from ckpt_jax import run, untrusted
from ckpt_jax.errors import CheckpointError, CorruptCheckpointError


@dataclasses.dataclass(frozen=True)
class LeafInfo:
  """One leaf as it was saved.

  Attributes:
    path: names with slashes between, as Orbax names the leaf.
    shape: () for scalars.
    dtype: numpy's name; `int`, `float`, `bool`, `str`, `complex` for Python's own; `key<impl>` for PRNG keys.
    nbytes: bytes of the value.
    scalar: whether it was a Python number or text rather than an array.
  """

  path: str
  shape: tuple[int, ...]
  dtype: str
  nbytes: int
  scalar: bool = False


@dataclasses.dataclass(frozen=True)
class StepDescription:
  """A committed step with everything but its values."""

  step: int
  metadata: dict[str, Any]
  metrics: dict[str, Any]
  extras: Any
  leaves: list[LeafInfo]


def item_directory(step_dir: epath.Path) -> epath.Path:
  """The directory of the training state inside a step, ours or plain Orbax's.

  Raises:
    CorruptCheckpointError: if the step holds no state.
    CheckpointError: if it holds several and none is called `default` or `state`.
  """
  items = sorted(p.name for p in step_dir.iterdir() if (p / run.ITEM_METADATA).exists())
  for name in (run.DEFAULT_ITEM, "state"):
    if name in items:
      return step_dir / name
  if len(items) == 1:
    return step_dir / items[0]
  if not items:
    raise CorruptCheckpointError(f"{step_dir}: no item with a {run.ITEM_METADATA}; the step holds no state")
  raise CheckpointError(f"{step_dir}: several items ({', '.join(items)}) and none is called default or state")


def describe(path: str | os.PathLike[str], step: int | None = None) -> StepDescription:
  """Everything about a step (default: the newest) but its values; reads metadata only.

  Raises:
    NoCheckpointError: if there is no such step.
    CorruptCheckpointError: if its metadata cannot be read.
  """
  directory = run.run_directory(path)
  step = run.latest_committed(directory) if step is None else step
  step_dir = run.step_directory(directory, step)
  ours = run.our_metadata(step_dir)
  shown = {k: v for k, v in ours.items() if k not in ("metrics", "extras", "encoded")}
  metrics = run.step_info(directory, step).metrics
  return StepDescription(step, shown, metrics, ours.get("extras"), saved_leaves(step_dir))


def saved_leaves(step_dir: epath.Path) -> list[LeafInfo]:
  """The leaves of a step as its trainer saw them, sorted as in the saved tree."""
  return leaf_infos(describe_item(item_directory(step_dir)).tree, run.our_metadata(step_dir).get("encoded", {}))


def leaf_infos(tree: Any, encoded: dict[str, Any]) -> list[LeafInfo]:
  """The leaves that `describe_item` finds, as their trainer saw them; `encoded` is what `layout.encoding` noted."""
  import jax  # listing steps needs neither jax nor Orbax
  import numpy as np

  from ckpt_jax.layout.encoding import dtype_name
  from ckpt_jax.layout.structure import path_name

  leaves = []
  for path, meta in jax.tree_util.tree_flatten_with_path(tree)[0]:
    name = path_name(path)
    note = encoded.get(name, {})
    kind = type(meta).__name__
    if kind == "StringMetadata":
      leaves.append(LeafInfo(name, (), "str", 0, scalar=True))
      continue
    shape, dtype = tuple(meta.shape), np.dtype(meta.dtype)
    nbytes = math.prod(shape) * dtype.itemsize
    label = dtype_name(dtype)
    if kind == "ScalarMetadata":
      label = {"b": "bool", "i": "int", "f": "float"}.get(dtype.kind, label)
    if note.get("kind") == "empty":
      shape, label, nbytes = tuple(note["shape"]), note["dtype"], 0
    elif note.get("kind") == "prng_key":
      shape, label = shape[:-1], note["dtype"]
    elif note.get("kind") == "complex":
      label = "complex"
    elif "dtype" in note:
      label = note["dtype"]
    leaves.append(LeafInfo(name, shape, label, nbytes, scalar=kind == "ScalarMetadata"))
  return leaves


@dataclasses.dataclass(frozen=True)
class ItemDescription:
  """What an item says of itself.

  Attributes:
    tree: as Orbax describes it: nested containers with ArrayMetadata, ScalarMetadata, StringMetadata leaves.
    info: Orbax's description of an array, without a name; None if only Orbax knows the item, see `layout.direct`.
    index: where its small arrays lie; empty if it is not packed.
    stores: its other arrays, open, by their names in the database.
  """

  tree: Any
  info: Any = None
  index: dict[str, Any] = dataclasses.field(default_factory=dict)
  stores: dict[str, Any] = dataclasses.field(default_factory=dict)


def describe_item(item_dir: epath.Path, config: Any = None) -> ItemDescription:
  """Reads what an item, RUN/STEP/default, says of itself, and opens its arrays within the limits of `config`.

  Raises:
    CorruptCheckpointError: if it cannot be read.
  """
  from ckpt_jax.config import Config
  from ckpt_jax.layout import direct, packing
  from ckpt_jax.layout.handler import pytree_handler

  try:
    data = untrusted.read_json(item_dir / run.ITEM_METADATA)
    untrusted.check_tree(data, str(item_dir / run.ITEM_METADATA))
    index = packing.read_index(item_dir)
    known = bool(index) or direct.is_known(item_dir, data)
    if not known:
      tree = pytree_handler(Config()).metadata(item_dir).tree
      _check_claims(tree, item_dir)
      return ItemDescription(tree)
    info = direct.item_info(item_dir, data, (config or Config()).limits)
    tree, stores = direct.describe(info, data, index)
    _check_claims(tree, item_dir)
    return ItemDescription(tree, info, index, stores)
  except (CheckpointError, MemoryError):
    raise
  except Exception as e:
    raise CorruptCheckpointError(f"{item_dir}: its metadata cannot be read: {' '.join(str(e).split())[:500]}") from e


def _check_claims(tree: Any, item_dir: epath.Path) -> None:
  import jax
  import numpy as np

  leaves = [leaf for leaf in jax.tree.leaves(tree) if getattr(leaf, "shape", None) is not None]
  claimed = untrusted.claimed_bytes(
    ((leaf.shape, np.dtype(leaf.dtype).itemsize if leaf.dtype is not None else 1) for leaf in leaves), str(item_dir)
  )
  if claimed > untrusted.FREE_CLAIM:
    untrusted.check_claim(claimed, run.tree_nbytes(item_dir), str(item_dir))
