"""The description of an item: its tree with metadata for leaves, and its arrays, opened.

Orbax's handler of trees takes some 80 us a leaf for that: a tenth of a restore of 600 leaves, most of one of 5,000. So
the tree is made from the item's JSON here, unless it holds nodes or leaves that Orbax alone can describe. Nodes with
both numbers and names for keys, or with gaps in the numbers (an nnx module with an `nnx.List`), become dicts.

Before 0.6 Orbax wrote the tree into one MessagePack file, `checkpoint`, each leaf of which is the name of an array
beside it, or the value itself: flax.training.checkpoints had Orbax put all values there. Before 0.4 nothing else
describes the tree. `ArraySave` calls its only array `checkpoint` to this day.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath
from orbax.checkpoint import msgpack_utils

from ckpt_jax.config import Config, LimitsConfig
from ckpt_jax.errors import CheckpointError, CorruptCheckpointError, StorageError
from ckpt_jax.failures import is_unreachable, root_cause
from ckpt_jax.layout import packing, reading
from ckpt_jax.layout.splitting import SEQUENCE
from ckpt_jax.layout.stored import tree_entries
from ckpt_jax.layout.structure import path_name
from ckpt_jax.orbax import format as fmt
from ckpt_jax.orbax import private
from ckpt_jax.run import untrusted
from ckpt_jax.run.steps import tree_nbytes
from ckpt_jax.storage import look

PyTree = Any
_EMPTY: dict[str, Callable[[], Any]] = {
  "Dict": dict,
  "List": list,
  "Tuple": tuple,
  "None": lambda: None,
  "NamedTuple": lambda: None,
}
_ELSEWHERE = "PLACEHOLDER://"
# Of those who read a step once, not to train on it: it pushes nothing out of the page cache, and what is checked is
# what the disk has, not what memory has of it.
ONCE = Config(limits=LimitsConfig(file_io="direct"))


@dataclasses.dataclass(frozen=True)
class ItemDescription:
  """An item without the values of its arrays.

  Attributes:
    tree: nested containers with Orbax's ArrayMetadata, ScalarMetadata and StringMetadata for leaves, whose `name` is
      that in the database.
    info: Orbax's description of an array of the item, without a name.
    index: where its packed arrays are; empty if it is not packed.
    stores: arrays that are open already, by their names in the database.
    values: leaves whose values the description itself holds, by path, as early Orbax wrote them.
  """

  tree: PyTree
  info: ocp.type_handlers.ParamInfo
  index: packing.Index = dataclasses.field(default_factory=dict)
  stores: dict[str, ts.TensorStore] = dataclasses.field(default_factory=dict)
  values: dict[str, Any] = dataclasses.field(default_factory=dict)

  def open(self, names: Collection[str]) -> dict[str, ts.TensorStore]:
    """The stores of arrays that are not packed, by name."""
    closed = reading.open_stores(self.info, [name for name in names if name not in self.stores])
    return {name: self.stores.get(name) or closed[name] for name in names}


def describe_item(item_dir: epath.Path, config: Config = ONCE) -> ItemDescription:
  """Reads the description of an item, RUN/STEP/default, and opens its arrays within the limits of `config`.

  Raises:
    CorruptCheckpointError: if it is damaged.
    StorageError: if storage does not answer, or denies access.
  """
  try:
    limits = config.limits
    found = _from_aggregate(item_dir, limits) or _from_json(item_dir, limits)
    _check_claims(found.tree, item_dir)
    return found
  except (CheckpointError, MemoryError):
    raise
  except Exception as e:
    if is_unreachable(e):
      raise StorageError(f"{item_dir}: {root_cause(e)}") from e
    raise CorruptCheckpointError(f"{item_dir}: its metadata cannot be read: {' '.join(str(e).split())[:500]}") from e


def _check_claims(tree: PyTree, item_dir: epath.Path) -> None:
  leaves = [leaf for leaf in jax.tree.leaves(tree) if getattr(leaf, "shape", None) is not None]
  claimed = untrusted.claimed_bytes(
    ((leaf.shape, np.dtype(leaf.dtype).itemsize if leaf.dtype is not None else 1) for leaf in leaves), str(item_dir)
  )
  if claimed > untrusted.FREE_CLAIM:
    untrusted.check_claim(claimed, tree_nbytes(item_dir), str(item_dir))


def item_info(item: epath.Path, limits: LimitsConfig, *, ocdbt: bool, zarr3: bool) -> ocp.type_handlers.ParamInfo:
  """Orbax's description of an array of an item, whose name is to be filled in."""

  def number(limit: int | str) -> int | None:
    return None if isinstance(limit, str) else limit

  # Fresh each time: one that outlives a step has answered NOT_FOUND for the step that replaced it.
  context = private.tensorstore_context(
    use_ocdbt=ocdbt,
    file_io_concurrency_limit=number(limits.file_io_concurrency),
    data_copy_concurrency_limit=number(limits.data_copy_concurrency),
  )
  if limits.file_io == "direct" and jax.process_count() == 1:  # several of one host share what one of them has read
    context = ts.Context({"file_io_mode": {"mode": "direct"}}, parent=context)
  return ocp.type_handlers.ParamInfo(
    name="",
    parent_dir=item,
    is_ocdbt_checkpoint=ocdbt,
    use_zarr3=zarr3,
    use_compression=False,
    ts_context=context,
    value_typestr="jax.Array",
  )


def _from_json(item: epath.Path, limits: LimitsConfig) -> ItemDescription:
  data, entries = tree_entries(item)
  ocdbt = bool(data.get(fmt.USE_OCDBT, look.exists(item / fmt.MANIFEST)))
  info = item_info(item, limits, ocdbt=ocdbt, zarr3=bool(data.get(fmt.USE_ZARR3)))
  types = {entry[fmt.VALUE].get(fmt.VALUE_TYPE) for entry in entries}
  if fmt.VALUE_TREE in data or not types <= {*_EMPTY, *fmt.ARRAY_TYPES, fmt.NUMBER_TYPE, fmt.TEXT_TYPE}:
    return ItemDescription(ocp.PyTreeCheckpointHandler().metadata(item).tree, info)
  index = packing.read_index(item)
  rows = []
  for entry in entries:
    names, kinds = fmt.key_path(entry), tuple([key[fmt.KEY_TYPE] for key in entry[fmt.KEYS]])
    rows.append((names, kinds, ".".join(names), entry[fmt.VALUE]))
  stored = [n for _, _, n, v in rows if v[fmt.VALUE_TYPE] in (*fmt.ARRAY_TYPES, fmt.NUMBER_TYPE) and n not in index]
  stores = reading.open_stores(info, stored)
  flat = []
  for names, kinds, name, value in rows:
    kind = value[fmt.VALUE_TYPE]
    if kind in _EMPTY and name not in index:
      leaf = _EMPTY[kind]()
    else:
      leaf = _describe(kind, name, item, index.get(name) or stores.get(name), value.get(fmt.WRITE_SHAPE))
    flat.append((names, kinds, leaf))
  return ItemDescription(_nested(flat), info, index, stores)


def prng_keys(item: epath.Path) -> dict[str, str]:
  """The implementations of the arrays of an item that are the words of PRNG keys, by name, as Orbax notes them."""
  files = sorted(look.names(item / fmt.ARRAY_METADATAS))
  if not files:
    return {}
  arrays = untrusted.read_json(item / fmt.ARRAY_METADATAS / files[0])[fmt.ARRAY_METADATAS]
  notes = [entry["array_metadata"] for entry in arrays]
  impls = {note["param_name"]: (note.get("ext_metadata") or {}).get("random_key_impl") for note in notes}
  return {name: impl for name, impl in impls.items() if impl is not None}


def _describe(
  kind: str, name: str, item: epath.Path, found: packing.Packed | ts.TensorStore | np.ndarray | None, write_shape: Any
) -> Any:
  """Orbax's metadata of a leaf.

  Args:
    kind: its type in Orbax's JSON.
    name: its name in the database.
    found: its place in slabs, its open store, or its value; None for text.
    write_shape: of the pieces in which it was written, if that is known.
  """
  types, chunk = ocp.metadata, None
  if kind == fmt.TEXT_TYPE:
    return types.StringMetadata(name=name, directory=item)
  assert found is not None
  shape = tuple(found.shape)
  if isinstance(found, packing.Packed):
    dtype, chunk = packing.dtype_of(found.dtype), shape
  elif isinstance(found, ts.TensorStore):
    dtype, chunk = np.dtype(found.dtype.numpy_dtype), found.chunk_layout.read_chunk_template.shape
  else:
    dtype = found.dtype
  if kind == fmt.NUMBER_TYPE:
    return types.ScalarMetadata(name=name, directory=item, shape=(), sharding=None, dtype=dtype)
  write_shape = None if write_shape is None else tuple(write_shape)
  storage = None if chunk is None else types.StorageMetadata(chunk_shape=chunk, write_shape=write_shape)
  return types.ArrayMetadata(name=name, directory=item, shape=shape, dtype=dtype, sharding=None, storage=storage)


def _nested(flat: Sequence[tuple[tuple[str, ...], tuple[int, ...], Any]]) -> PyTree:
  """The tree of leaves given by names and kinds of keys."""
  if any(not names for names, _, _ in flat):
    if len(flat) > 1:
      raise ValueError("the whole tree is a leaf, and it has others")
    return flat[0][2]
  top: dict[str, Any] = {}
  sequences: dict[tuple[str, ...], bool] = {}
  for names, kinds, leaf in flat:
    node = top
    for i, name in enumerate(names):
      sequences[names[:i]] = sequences.get(names[:i], True) and kinds[i] == SEQUENCE
      if i + 1 == len(names):
        if name in node:
          raise ValueError(f"{'/'.join(names)} is there twice")
        node[name] = leaf
      else:
        node = node.setdefault(name, {})
        if not isinstance(node, dict):
          raise ValueError(f"{'/'.join(names[: i + 1])} is a leaf, and has leaves")
  # Innermost first: a list takes the place of the dict that stood for it.
  for path in sorted((p for p, is_list in sequences.items() if is_list), key=len, reverse=True):
    if not path:
      return _list(top)
    parent = top
    for name in path[:-1]:
      parent = parent[name]
    parent[path[-1]] = _list(parent[path[-1]])
  return top


def _list(node: dict[str, Any]) -> Any:
  if not all(name.isdecimal() for name in node):
    return node
  items = {int(name): value for name, value in node.items()}
  return [items[i] for i in range(len(items))] if sorted(items) == list(range(len(items))) else node


def _from_aggregate(item: epath.Path, limits: LimitsConfig) -> ItemDescription | None:
  """The description of an item by its MessagePack file; None if it has none, or `_METADATA` says as much."""
  file = item / fmt.AGGREGATE
  if look.exists(file / ".zarray"):
    tree = {fmt.AGGREGATE: f"{_ELSEWHERE}{fmt.AGGREGATE}"}
  elif look.exists(file) and not look.is_dir(file):
    tree = msgpack_utils.msgpack_restore(look.read_bytes(file))
  else:
    return None
  flat = {path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}
  values = {name: v for name, v in flat.items() if not (isinstance(v, str) and v.startswith(_ELSEWHERE))}
  described = look.exists(item / fmt.ITEM_METADATA)
  if not values and described and not look.is_dir(file):
    return None
  types: dict[str, str] = {}
  if described:
    entries = tree_entries(item)[1]
    types = {"/".join(fmt.key_path(entry)): str(entry[fmt.VALUE].get(fmt.VALUE_TYPE)) for entry in entries}
  info = item_info(item, limits, ocdbt=look.exists(item / fmt.MANIFEST), zarr3=False)
  elsewhere = {name: str(v).removeprefix(_ELSEWHERE) for name, v in flat.items() if name not in values}
  stores = reading.open_stores(info, [stored for name, stored in elsewhere.items() if types.get(name) not in _EMPTY])

  def meta(path: Any, leaf: Any) -> Any:
    name = path_name(path)
    kind = types.get(name, "")
    if name in values:
      kind = fmt.TEXT_TYPE if isinstance(leaf, str) else fmt.NUMBER_TYPE if isinstance(leaf, (bool, int, float)) else ""
      return _describe(kind, name, item, np.asarray(leaf), None)
    return _EMPTY[kind]() if kind in _EMPTY else _describe(kind, elsewhere[name], item, stores[elsewhere[name]], None)

  return ItemDescription(jax.tree_util.tree_map_with_path(meta, tree), info, {}, stores, values)
