"""The content of a committed step: its items, and their leaves without values."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from etils import epath

from ckpt_jax.errors import CheckpointError, ConfigError, CorruptCheckpointError
from ckpt_jax.orbax import format as fmt
from ckpt_jax.run import untrusted
from ckpt_jax.run.steps import (
  is_gone,
  is_tree,
  latest_committed,
  our_item,
  our_metadata,
  run_directory,
  step_directory,
  step_info,
  step_metadata,
)
from ckpt_jax.storage import look

if TYPE_CHECKING:
  from ckpt_jax.layout.stored import Stored

JSON_FILES = ("metadata", fmt.METRICS_ITEM)
V1_ITEM = "state"  # what Orbax v1's training.Checkpointer saves and asks for


@dataclasses.dataclass(frozen=True)
class LeafInfo:
  """One leaf as it was saved.

  Attributes:
    path: the keys that lead to it, joined by slashes.
    shape: () for scalars.
    dtype: numpy's name; `int`, `float`, `bool`, `str`, `complex` for Python's own; `key<impl>` for PRNG keys.
    nbytes: bytes of the value.
    scalar: whether it was a Python number or text.
  """

  path: str
  shape: tuple[int, ...]
  dtype: str
  nbytes: int
  scalar: bool = False

  @property
  def has_numbers(self) -> bool:
    """Whether it is neither text nor PRNG keys."""
    return self.dtype != "str" and not self.dtype.startswith("key<")


@dataclasses.dataclass(frozen=True)
class Item:
  """A part of a step that Orbax saves and restores by itself.

  Attributes:
    name: its directory in the step; empty if the step is a tree by itself, without items.
    kind: `tree`: a pytree; `array`: one array or number; `json`; `other`: only its handler knows.
    handler: the class that wrote it; empty if the step does not say.
  """

  name: str
  kind: str
  handler: str = ""


@dataclasses.dataclass(frozen=True)
class StepDescription:
  """A committed step without its values.

  Attributes:
    step, metadata, metrics, extras: saved beside the state.
    leaves: those of one item, by default of the training state; empty if the item has none.
    item: name of that item; None if it is not clear which of several trees is the state.
    items: all items of the step.
    content: content of the item if it is JSON.
    stored: how the leaves are stored, by path; empty for items that only Orbax can describe.
  """

  step: int
  metadata: dict[str, Any]
  metrics: dict[str, Any]
  extras: Any
  leaves: list[LeafInfo]
  item: str | None = fmt.DEFAULT_ITEM
  items: tuple[Item, ...] = ()
  content: Any = None
  stored: dict[str, Stored] = dataclasses.field(default_factory=dict)


def items(step_dir: epath.Path) -> list[Item]:
  """All items of a committed step, by name; those within items (random keys are two in one) after a slash."""
  handlers = step_metadata(step_dir).get(fmt.ITEM_HANDLERS)
  if is_tree(step_dir):
    return [Item("", "tree", _class_name(handlers))]
  return sorted(_items(step_dir, "", handlers if isinstance(handlers, dict) else {}), key=lambda item: item.name)


def _items(directory: epath.Path, prefix: str, handlers: dict[str, Any]) -> Iterator[Item]:
  for path in [directory / name for name in look.names(directory)]:
    if path.name.startswith(".") or not look.is_dir(path):
      continue
    name, handler = f"{prefix}{path.name}", _class_name(handlers.get(path.name))
    files = set(look.names(path)) - {fmt.COMMIT_MARKER, fmt.STEP_METADATA}
    if fmt.AGGREGATE in files and look.exists(path / fmt.AGGREGATE / ".zarray"):
      yield Item(name, "array", handler)
    elif is_tree(path):
      yield Item(name, "tree", handler)
    elif len(files) == 1 and files <= set(JSON_FILES):
      yield Item(name, "json", handler)
    elif not prefix and files and all(look.is_dir(path / file) for file in files):
      yield from _items(path, f"{name}/", {})
    else:
      yield Item(name, "other", handler)


def _class_name(handler: Any) -> str:
  return handler.rpartition(".")[2] if isinstance(handler, str) else ""


class SeveralItemsError(CheckpointError):
  """It is not clear which of several trees of a step is meant.

  Attributes:
    names: names of the trees.
  """

  topic = "several-items"

  def __init__(self, message: str, names: Sequence[str]):
    super().__init__(message)
    self.names = names


def item_name(step_dir: epath.Path, name: str | None = None, ours: dict[str, Any] | None = None) -> str:
  """The item of a step that holds the training state, ours or plain Orbax's.

  `name` is the one asked for. Default: the one that ckpt_jax wrote, else `default` (of Orbax's CheckpointManager), else
  `state` (of Orbax v1), else the only tree. `ours` is `run.our_metadata`, if it was read.

  Raises:
    ConfigError: if the step has no such item.
    CorruptCheckpointError: if the step has no tree at all.
    SeveralItemsError: if it holds several trees, none called `default` or `state`.
  """
  if not name and ours is None:
    ours = our_metadata(step_dir)
  for usual in [name] if name else [our_item(ours)] if ours else [fmt.DEFAULT_ITEM, V1_ITEM]:
    if is_tree(step_dir / usual):
      return usual
  if ours and not name:
    raise CorruptCheckpointError(
      f"{step_dir / our_item(ours)}: no {fmt.ITEM_METADATA}; the step was saved with its state there"
    )
  found = items(step_dir)
  trees = [item.name for item in found if item.kind == "tree" and "/" not in item.name]
  if name:
    kinds = {item.name: item.kind for item in found}
    if kinds.get(name) in ("tree", "array"):
      return name
    if name in kinds:
      how = (
        f"`ckpt-jax show` prints it, and it is in {step_dir / name}"
        if kinds[name] == "json"
        else "its handler reads it"
      )
      raise ConfigError(
        f"{step_dir}: its item {name} ({kinds[name]}) is no tree of arrays; {how}", topic="several-items"
      )
    there = ", ".join(f"{n} ({kind})" for n, kind in kinds.items()) if trees != [""] else "one tree without a name"
    near = difflib.get_close_matches(name, kinds, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ConfigError(f"{step_dir}: no item {name!r}; the step has {there}{hint}", topic="several-items")
  if len(trees) == 1:
    return trees[0]
  if not trees:
    there = ", ".join(f"{item.name} ({item.kind})" for item in found) or "nothing"
    raise CorruptCheckpointError(f"{step_dir}: holds no state: no item of it is a tree of arrays, it has {there}")
  raise SeveralItemsError(
    f"{step_dir}: several items ({', '.join(trees)}), and none is called {fmt.DEFAULT_ITEM} or {V1_ITEM}; say which "
    f'holds the state: restore(item="{trees[0]}"), Config(item="{trees[0]}"), or --item {trees[0]}',
    trees,
  )


def item_directory(step_dir: epath.Path, name: str | None = None) -> epath.Path:
  """The directory of an item, default: of the training state; see `item_name` for arguments and errors."""
  return step_dir / item_name(step_dir, name)


def describe(path: str | os.PathLike[str], step: int | None = None, item: str | None = None) -> StepDescription:
  """Everything about a step (default: the newest) but its values; reads metadata only.

  Raises:
    NoCheckpointError: if there is no such step.
    ConfigError: if the step has no such item.
    CorruptCheckpointError: if its metadata cannot be read.
  """
  directory = run_directory(path)
  if step is not None:
    return _describe(directory, step, item)
  while True:  # if the newest is deleted meanwhile, there is a newer one or none at all
    newest = latest_committed(directory)
    try:
      return _describe(directory, newest, item)
    except CheckpointError:
      if not is_gone(directory, newest):
        raise


def _describe(directory: epath.Path, step: int, item: str | None) -> StepDescription:
  step_dir = step_directory(directory, step)
  ours = our_metadata(step_dir)
  shown = {k: v for k, v in ours.items() if k not in ("metrics", "extras", "encoded")}
  metrics = step_info(directory, step).metrics
  there = tuple(items(step_dir))
  name, content = item, None
  leaves: list[LeafInfo] = []
  stored: dict[str, Stored] = {}
  if any(part.name == item and part.kind not in ("tree", "array") for part in there):
    content = json_item(step_dir / str(item))
  else:
    try:
      name = item_name(step_dir, item, ours)
      leaves, stored = _saved_leaves(step_dir / name, encoded_leaves(ours, name))
    except SeveralItemsError:
      pass
  return StepDescription(step, shown, metrics, ours.get("extras"), leaves, name, there, content, stored)


def json_item(item_dir: epath.Path) -> Any:
  """The content of an item of one JSON file, as `JsonSave` and Orbax's metrics write it; None for another item.

  Raises:
    CorruptCheckpointError: if the file is there and holds no JSON.
  """
  for name in JSON_FILES:
    if look.exists(item_dir / name):
      return untrusted.read_json(item_dir / name)
  return None


def saved_leaves(step_dir: epath.Path, item: str | None = None) -> list[LeafInfo]:
  """The leaves of an item (default: the training state) as they were before encoding, in the order of the tree."""
  ours = our_metadata(step_dir)
  name = item_name(step_dir, item, ours)
  return _saved_leaves(step_dir / name, encoded_leaves(ours, name))[0]


def _saved_leaves(item: epath.Path, encoded: dict[str, Any]) -> tuple[list[LeafInfo], dict[str, Stored]]:
  """The leaves, and how they are stored where that could be read without jax, whose import takes most of a second."""
  from ckpt_jax.layout import stored  # nor does listing steps need TensorStore

  found = stored.stored_leaves(item)
  if found is not None:
    return [_leaf_info(path, s.kind, s.shape, s.dtype, encoded.get(path, {})) for path, s in found.items()], found
  from ckpt_jax.layout import description

  return leaf_infos(description.describe_item(item).tree, encoded), {}


def encoded_leaves(ours: dict[str, Any], item: str) -> dict[str, Any]:
  """The notes of `layout.encoding` on the leaves of an item; empty for one that ckpt_jax did not write."""
  return ours.get("encoded", {}) if our_item(ours) == item else {}


def leaf_infos(tree: Any, encoded: dict[str, Any]) -> list[LeafInfo]:
  """The leaves of a described tree as they were before encoding; `encoded` are the notes of `layout.encoding`."""
  import jax

  from ckpt_jax.layout.structure import path_name

  leaves = []
  for path, meta in jax.tree_util.tree_flatten_with_path(tree)[0]:
    kind = "text" if fmt.is_text(meta) else "number" if fmt.is_number(meta) else "array"
    shape, dtype = (tuple(meta.shape), meta.dtype) if kind != "text" else ((), None)
    leaves.append(_leaf_info(name := path_name(path), kind, shape, dtype, encoded.get(name, {})))
  return leaves


def _leaf_info(path: str, kind: str, shape: tuple[int, ...], dtype: Any, note: dict[str, Any]) -> LeafInfo:
  import numpy as np

  if kind == "text":
    return LeafInfo(path, (), "str", 0, scalar=True)
  dtype = np.dtype(dtype)
  nbytes = math.prod(shape) * dtype.itemsize
  label = dtype.name
  if kind == "number":
    label = {"b": "bool", "i": "int", "f": "float"}.get(dtype.kind, label)
  if note.get("kind") == "empty":
    shape, label, nbytes = tuple(note["shape"]), note["dtype"], 0
  elif note.get("kind") == "prng_key":
    shape, label = shape[:-1], note["dtype"]
  elif note.get("kind") == "complex":
    label = "complex"
  elif "dtype" in note:
    label = note["dtype"]
  return LeafInfo(path, shape, label, nbytes, scalar=kind == "number")
