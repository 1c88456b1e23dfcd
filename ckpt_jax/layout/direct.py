"""Describes and reads the leaves of our items through Orbax's type handlers, past its handler of trees.

That one takes some 80 us a leaf for passes over trees: a tenth of a restore of 600 leaves, most of one of 5,000. What
plain Orbax saved goes its way, since only Orbax knows in how many forms it has saved trees.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any

import orbax.checkpoint as ocp
from etils import epath

from ckpt_jax import run
from ckpt_jax.config import Config
from ckpt_jax.layout import packing
from ckpt_jax.layout.handler import Arrived, handlers
from ckpt_jax.layout.splitting import SEQUENCE

PyTree = Any
_EMPTY: dict[str, Any] = {"Dict": dict, "List": list, "Tuple": tuple, "None": lambda: None, "NamedTuple": lambda: None}


def is_known(item: epath.Path, data: Mapping[str, Any]) -> bool:
  """Whether an item is one of ours, with nothing in it that only Orbax knows; `data` is its `_METADATA`."""
  if not data.get("use_ocdbt") or "value_metadata_tree" in data or not (item / run.RECORD).exists():
    return False
  found = {entry["value_metadata"].get("value_type") for entry in data.get("tree_metadata", {}).values()}
  return found <= {*_EMPTY, *(handler.typestr() for handler in handlers(Config()).values())}


def item_info(item: epath.Path, data: Mapping[str, Any]) -> ocp.type_handlers.ParamInfo:
  """Orbax's description of an array of an item, whose name is to be filled in; `data` is the item's `_METADATA`."""
  return ocp.type_handlers.ParamInfo(
    name="",
    parent_dir=item,
    is_ocdbt_checkpoint=True,
    use_zarr3=bool(data.get("use_zarr3")),
    use_compression=False,
    ts_context=ocp.type_handlers.get_ts_context(use_ocdbt=True),
    value_typestr="jax.Array",
  )


def describe(item: epath.Path, data: Mapping[str, Any], index: packing.Index) -> PyTree:
  """The tree of an item, as Orbax's handler describes it: containers, with metadata for leaves.

  Args:
    item: the item.
    data: its `_METADATA`, checked.
    index: where its small arrays lie, if it is packed.

  Raises:
    ValueError, KeyError, TypeError: if the description is none of a tree.
  """
  info = item_info(item, data)
  by_type = {handler.typestr(): handler for handler in handlers(Config(), index=index).values()}
  flat: list[tuple[tuple[str, ...], tuple[int, ...], Any]] = []
  others: dict[str, list[tuple[int, str, Any]]] = {}
  for entry in data["tree_metadata"].values():
    keys = entry["key_metadata"]
    names, kinds = tuple([str(key["key"]) for key in keys]), tuple([key["key_type"] for key in keys])
    kind, name = entry["value_metadata"]["value_type"], ".".join(names)
    packed = index.get(name)
    leaf: Any = None
    written = entry["value_metadata"].get("write_shape")
    written = tuple(written) if written is not None else None
    if packed is not None:
      storage = ocp.metadata.StorageMetadata(chunk_shape=packed.shape, write_shape=written)
      dtype = packing.dtype_of(packed.dtype)
      leaf = ocp.metadata.ArrayMetadata(
        name=name, directory=item, shape=packed.shape, dtype=dtype, sharding=None, storage=storage
      )
    elif kind in _EMPTY:
      leaf = _EMPTY[kind]()
    else:
      others.setdefault(kind, []).append((len(flat), name, written))
    flat.append((names, kinds, leaf))
  for kind, rows in others.items():
    infos = [info.replace(name=name, write_shape=written) for _, name, written in rows]
    for (i, *_), meta in zip(rows, run_sync(by_type[kind].metadata(infos)), strict=True):
      flat[i] = (*flat[i][:2], meta)
  return _nested(flat)


def _nested(flat: Sequence[tuple[tuple[str, ...], tuple[int, ...], Any]]) -> PyTree:
  top: dict[str, Any] = {}
  sequences: dict[tuple[str, ...], bool] = {}
  for names, kinds, leaf in flat:
    node = top
    for i, name in enumerate(names):
      if sequences.setdefault(names[:i], kinds[i] == SEQUENCE) != (kinds[i] == SEQUENCE):
        raise ValueError(f"{'/'.join(names[:i])} is both a list and a dict")
      if i + 1 == len(names):
        if name in node:
          raise ValueError(f"{'/'.join(names)} is there twice")
        node[name] = leaf
      else:
        node = node.setdefault(name, {})
  # Innermost first: a list takes the place of the dict that stood for it.
  for path in sorted((p for p, is_list in sequences.items() if is_list), key=len, reverse=True):
    if not path:
      return _list(top, path)
    parent = top
    for name in path[:-1]:
      parent = parent[name]
    parent[path[-1]] = _list(parent[path[-1]], path)
  return top


def _list(node: Mapping[str, Any], path: tuple[str, ...]) -> list[Any]:
  items = {int(name): value for name, value in node.items()}
  if sorted(items) != list(range(len(items))):
    raise ValueError(f"{'/'.join(path)}: a list with gaps")
  return [items[i] for i in range(len(items))]


def read(
  info: ocp.type_handlers.ParamInfo,
  wanted: Sequence[tuple[tuple[Any, ...], str, ocp.RestoreArgs]],
  index: packing.Index,
  config: Config,
  arrived: Arrived | None,
) -> list[Any]:
  """The values of leaves.

  Args:
    info: see `item_info`.
    wanted: of each leaf its jax key path, its name in the database, and how it is to be restored.
    index: where the item's small arrays lie.
    config, arrived: see `pytree_handler`.
  """
  by_type = ocp.type_handlers.create_type_handler_registry(*handlers(config, arrived, index).items())
  rows: dict[Any, list[int]] = {}
  for i, (_, _, args) in enumerate(wanted):
    rows.setdefault(args.restore_type, []).append(i)
  out: list[Any] = [None] * len(wanted)
  for kind, where in rows.items():
    infos = [info.replace(name=wanted[i][1], keypath=wanted[i][0]) for i in where]
    found = run_sync(by_type.get(kind).deserialize(infos, [wanted[i][2] for i in where]))
    for i, value in zip(where, found, strict=True):
      out[i] = value
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
    return pool.submit(asyncio.run, work).result()
