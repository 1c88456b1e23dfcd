"""Describes and reads the leaves of a packed item through Orbax's type handlers, without its handler of trees.

That one takes some 80 us a leaf for passes over trees, which for thousands of small leaves is most of a restore.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any

import orbax.checkpoint as ocp
from etils import epath

from ckpt_jax.config import Config
from ckpt_jax.layout import packing
from ckpt_jax.layout.handler import Arrived, handlers

PyTree = Any
_SEQUENCE = 1  # Orbax's KeyType
_EMPTY: dict[str, Any] = {"Dict": dict, "List": list, "Tuple": tuple, "None": lambda: None, "NamedTuple": lambda: None}


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
  """The tree of a packed item, as Orbax's handler describes it: containers, with metadata for leaves.

  Args:
    item: the item.
    data: its `_METADATA`, checked.
    index: where its small arrays lie.

  Raises:
    ValueError, KeyError, TypeError: if the description is none of a tree.
  """
  info = item_info(item, data)
  by_type = {handler.typestr(): handler for handler in handlers(Config(), index=index).values()}
  flat: list[tuple[tuple[str, ...], tuple[int, ...], Any]] = []
  others: dict[str, list[tuple[int, str]]] = {}
  for entry in data["tree_metadata"].values():
    keys = entry["key_metadata"]
    names, kinds = tuple([str(key["key"]) for key in keys]), tuple([key["key_type"] for key in keys])
    kind, name = entry["value_metadata"]["value_type"], ".".join(names)
    packed = index.get(name)
    leaf: Any = None
    if packed is not None:
      written = entry["value_metadata"].get("write_shape")
      storage = ocp.metadata.StorageMetadata(
        chunk_shape=packed.shape, write_shape=tuple(written) if written is not None else None
      )
      dtype = packing.dtype_of(packed.dtype)
      leaf = ocp.metadata.ArrayMetadata(
        name=name, directory=item, shape=packed.shape, dtype=dtype, sharding=None, storage=storage
      )
    elif kind in _EMPTY:
      leaf = _EMPTY[kind]()
    else:
      others.setdefault(kind, []).append((len(flat), name))
    flat.append((names, kinds, leaf))
  for kind, rows in others.items():
    found = run_sync(by_type[kind].metadata([info.replace(name=name) for _, name in rows]))
    for (i, _), meta in zip(rows, found, strict=True):
      flat[i] = (*flat[i][:2], meta)
  return _nested(flat)


def _nested(flat: Sequence[tuple[tuple[str, ...], tuple[int, ...], Any]]) -> PyTree:
  top: dict[str, Any] = {}
  sequences: dict[tuple[str, ...], bool] = {}
  for names, kinds, leaf in flat:
    node = top
    for i, name in enumerate(names):
      if sequences.setdefault(names[:i], kinds[i] == _SEQUENCE) != (kinds[i] == _SEQUENCE):
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
  by_type = handlers(config, arrived, index)
  rows: dict[Any, list[int]] = {}
  for i, (_, _, args) in enumerate(wanted):
    rows.setdefault(args.restore_type, []).append(i)
  out: list[Any] = [None] * len(wanted)
  for kind, where in rows.items():
    infos = [info.replace(name=wanted[i][1], keypath=wanted[i][0]) for i in where]
    found = run_sync(by_type[kind].deserialize(infos, [wanted[i][2] for i in where]))
    for i, value in zip(where, found, strict=True):
      out[i] = value
  return out


def run_sync(work: Coroutine[Any, Any, Any]) -> Any:
  """The result of a coroutine, also inside of a loop that runs already (a notebook's)."""
  try:
    asyncio.get_running_loop()
  except RuntimeError:
    return asyncio.run(work)
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    return pool.submit(asyncio.run, work).result()
