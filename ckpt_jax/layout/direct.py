"""Describes and reads the leaves of our items through Orbax's type handlers, past its handler of trees.

That one takes some 80 us a leaf for passes over trees: a tenth of a restore of 600 leaves, most of one of 5,000. What
plain Orbax saved goes its way, since only Orbax knows in how many forms it has saved trees.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath

from ckpt_jax.config import Config, LimitsConfig
from ckpt_jax.job.threads import transfers_asked_for
from ckpt_jax.layout import packing, reading
from ckpt_jax.layout.handler import (
  ArrayHandler,
  Arrived,
  NumpyHandler,
  Reads,
  describe_array,
  handlers,
  limited_context,
)
from ckpt_jax.layout.splitting import SEQUENCE
from ckpt_jax.orbax import private
from ckpt_jax.orbax.format import (
  KEY_TYPE,
  KEYS,
  TREE,
  USE_OCDBT,
  USE_ZARR3,
  VALUE,
  VALUE_TREE,
  VALUE_TYPE,
  WRITE_SHAPE,
  key_path,
)
from ckpt_jax.run.steps import RECORD
from ckpt_jax.storage import look

PyTree = Any
EMPTY: dict[str, Any] = {"Dict": dict, "List": list, "Tuple": tuple, "None": lambda: None, "NamedTuple": lambda: None}


def is_known(item: epath.Path, data: Mapping[str, Any]) -> bool:
  """Whether nothing in an item is known to Orbax alone: it is ours, or Orbax has written what it cannot read.

  Args:
    item: its directory.
    data: its `_METADATA`.
  """
  if not data.get(USE_OCDBT) or VALUE_TREE in data:
    return False
  if not (look.exists(item / RECORD) or _is_beyond_orbax(data)):
    return False
  found = {entry[VALUE].get(VALUE_TYPE) for entry in data.get(TREE, {}).values()}
  return found <= {*EMPTY, *(handler.typestr() for handler in handlers(Config()).values())}


def _is_beyond_orbax(data: Mapping[str, Any]) -> bool:
  """Whether a node has numbers and names for keys, or numbers with gaps: an nnx module with an `nnx.List`."""
  children: dict[tuple[str, ...], dict[str, int]] = {}
  for entry in data[TREE].values():
    names = key_path(entry)
    for i, key in enumerate(entry[KEYS]):
      children.setdefault(names[:i], {})[names[i]] = key[KEY_TYPE]
  return any(
    SEQUENCE in kinds.values() and not (set(kinds.values()) == {SEQUENCE} and isinstance(_list(kinds), list))
    for kinds in map(dict, children.values())
  )


def item_info(item: epath.Path, data: Mapping[str, Any], limits: LimitsConfig) -> ocp.type_handlers.ParamInfo:
  """Orbax's description of an array of an item, whose name is to be filled in; `data` is the item's `_METADATA`."""
  info = ocp.type_handlers.ParamInfo(
    name="",
    parent_dir=item,
    is_ocdbt_checkpoint=True,
    use_zarr3=bool(data.get(USE_ZARR3)),
    use_compression=False,
    ts_context=private.tensorstore_context(use_ocdbt=True),
    value_typestr="jax.Array",
  )
  return info.replace(ts_context=limited_context(limits, info))


def describe(
  info: ocp.type_handlers.ParamInfo, data: Mapping[str, Any], index: packing.Index
) -> tuple[PyTree, dict[str, ts.TensorStore]]:
  """The tree of an item, as Orbax's handler describes it, containers with metadata for leaves; and its open arrays.

  Args:
    info: see `item_info`.
    data: the item's `_METADATA`, checked.
    index: where its small arrays lie, if it is packed.

  Raises:
    ValueError, KeyError, TypeError: if the description is none of a tree.
  """
  item = info.parent_dir
  by_type = {handler.typestr(): handler for handler in handlers(Config()).values()}
  flat: list[tuple[tuple[str, ...], tuple[int, ...], Any]] = []
  others: dict[str, list[tuple[int, str, Any]]] = {}
  for entry in data[TREE].values():
    keys = entry[KEYS]
    names, kinds = tuple([str(key["key"]) for key in keys]), tuple([key[KEY_TYPE] for key in keys])
    kind, name = entry[VALUE][VALUE_TYPE], ".".join(names)
    leaf: Any = None
    written = entry[VALUE].get(WRITE_SHAPE)
    written = tuple(written) if written is not None else None
    if (packed := index.get(name)) is not None:
      leaf = describe_array(name, item, packed, written)
    elif kind in EMPTY:
      leaf = EMPTY[kind]()
    else:
      others.setdefault(kind, []).append((len(flat), name, written))
    flat.append((names, kinds, leaf))
  stores: dict[str, ts.TensorStore] = {}
  for kind, rows in others.items():
    infos = [info.replace(name=name) for _, name, _ in rows]
    described: Sequence[Any]
    if isinstance(by_type[kind], (ArrayHandler, NumpyHandler)):
      opened = reading.open_stores(infos, info.ts_context)
      stores |= {name: store for (_, name, _), store in zip(rows, opened, strict=True)}
      described = [describe_array(name, item, stores[name], written) for _, name, written in rows]
    else:
      described = run_sync(by_type[kind].metadata(infos))
    for (i, *_), meta in zip(rows, described, strict=True):
      flat[i] = (*flat[i][:2], meta)
  return _nested(flat), stores


def _nested(flat: Sequence[tuple[tuple[str, ...], tuple[int, ...], Any]]) -> PyTree:
  """The tree of leaves given by names and kinds of keys. A node with both kinds, or with gaps, becomes a dict."""
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


@dataclasses.dataclass(frozen=True)
class Wanted:
  """A leaf to read: its path, as a name and as jax has it, the sharding of a jax array, and Orbax's arguments."""

  name: str
  keys: tuple[Any, ...]
  sharding: jax.sharding.Sharding | None
  args: Callable[[], ocp.RestoreArgs]


def read(
  info: ocp.type_handlers.ParamInfo,
  wanted: Mapping[str, Wanted],
  index: packing.Index,
  stores: Mapping[str, ts.TensorStore],
  config: Config,
  arrived: Arrived | None,
) -> dict[str, Any]:
  """The values of leaves, by their names in the database.

  Args:
    info: see `item_info`.
    wanted: by name.
    index: where the item's small arrays lie.
    stores: its other arrays, as `describe` opened them.
    config, arrived: see `pytree_handler`.
  """
  reads = Reads(config.limits, arrived, stores)
  small = {name: leaf.sharding for name, leaf in wanted.items() if name in index}
  out: dict[str, Any] = {}
  for name, array in reading.read_small(info, index, small, info.ts_context, reads.window(info)):
    out[name] = array
    if arrived is not None:
      arrived(wanted[name].name, array)
  by_type = ocp.type_handlers.create_type_handler_registry(*handlers(config, reads).items())
  rows: dict[Any, list[tuple[str, ocp.RestoreArgs]]] = {}
  for name, leaf in wanted.items():
    if name not in small:
      args = leaf.args()
      rows.setdefault(args.restore_type, []).append((name, args))
  for kind, row in rows.items():
    infos = [info.replace(name=name, keypath=wanted[name].keys) for name, _ in row]
    found = run_sync(by_type.get(kind).deserialize(infos, [args for _, args in row]))
    out |= dict(zip([name for name, _ in row], found, strict=True))
  return out


def run_sync(work: Coroutine[Any, Any, Any]) -> Any:
  """The result of a coroutine, also inside of a loop that runs already (a notebook's)."""
  running = True
  try:
    asyncio.get_running_loop()
  except RuntimeError:
    running = False
  if not running:  # not in the except clause: what the work raises would have that error for a cause
    return asyncio.run(work)
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    return pool.submit(transfers_asked_for()(asyncio.run), work).result()
