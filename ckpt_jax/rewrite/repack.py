"""A saved state with its small arrays packed, or not, made from one that has them the other way.

What does not move is copied chunk by chunk (`subset`); what moves is read and written in batches of bounded size.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Collection, Iterator, Sequence

import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from ckpt_jax.config import LimitsConfig
from ckpt_jax.errors import CheckpointError, CorruptCheckpointError, StorageError
from ckpt_jax.failures import is_unreachable, root_cause
from ckpt_jax.layout import packing, reading, writing
from ckpt_jax.layout.direct import item_info
from ckpt_jax.layout.sharding import whole_box
from ckpt_jax.orbax import private
from ckpt_jax.orbax.format import ITEM_METADATA, TREE, VALUE, VALUE_TYPE, key_path
from ckpt_jax.rewrite.copy import copy_leaves, leaf_names

_BATCH_NBYTES = 256 * 2**20  # of values in memory at a time


def moving_leaves(item: epath.Path, *, pack: bool) -> dict[str, int]:
  """Names and bytes of the arrays that lie elsewhere once an item is packed, or is not.

  Raises:
    CorruptCheckpointError: if the item's metadata cannot be read.
  """
  index = packing.read_index(item)
  if not pack:
    return {name: packed.nbytes for name, packed in index.items()}
  entries = json.loads((item / ITEM_METADATA).read_text())[TREE].values()
  arrays = [".".join(key_path(entry)) for entry in entries if entry[VALUE][VALUE_TYPE] == "jax.Array"]
  keys = asyncio.run(private.prng_key_names(private.array_metadata_store(), item))
  names = [name for name in arrays if name not in index and name not in keys]
  if not names:
    return {}
  info = _info(item)
  infos = [info.replace(name=name) for name in names]
  stores = reading.open_stores(infos, infos[0].ts_context)
  sizes = {name: store.size * store.dtype.numpy_dtype.itemsize for name, store in zip(names, stores, strict=True)}
  return {name: nbytes for name, nbytes in sizes.items() if packing.is_small(nbytes)}


def repack_item(source: epath.Path, target: epath.Path, *, pack: bool) -> int:
  """Makes `target` the same state as `source`, packed or not. Returns how many arrays lie elsewhere now.

  Args:
    source: an item directory, e.g. RUN/STEP/default.
    target: a directory that does not exist.
    pack: whether small arrays go into slabs.

  Raises:
    CheckpointError: if `source` is not an OCDBT database.
    CorruptCheckpointError: if it cannot be read.
  """
  if pack and packing.read_index(source):
    raise CheckpointError(f"{source}: packed already")
  moving = moving_leaves(source, pack=pack)
  everything = leaf_names(source)
  staying = [name for name in everything if ".".join(name) not in moving]
  copy_leaves(source, target, everything, pause=lambda: None, chunks_of=staying)
  _move(source, target, moving, pack=pack)
  return len(moving)


def carry_packed(source: epath.Path, target: epath.Path, names: Collection[str]) -> None:
  """Gives `target`, a copy of some leaves of `source`, those of the leaves `names` that are packed, packed again."""
  index = packing.read_index(source)
  _move(source, target, {name: packed.nbytes for name, packed in index.items() if name in names}, pack=True)


def check_moved(source: epath.Path, target: epath.Path, *, pack: bool) -> None:
  """Compares what moved, bit by bit. What was copied has been compared by its copier.

  Raises:
    CorruptCheckpointError: naming the array that differs.
  """
  for batch in _batches(moving_leaves(source, pack=pack)):
    old, new = _values(source, batch), _values(target, batch)
    for name, value in old.items():
      other = new[name]
      if (value.dtype, value.shape) != (other.dtype, other.shape) or value.tobytes() != other.tobytes():
        raise CorruptCheckpointError(f"{target}: {name} reads back differently from what was copied")


def _move(source: epath.Path, target: epath.Path, moving: dict[str, int], *, pack: bool) -> None:
  index: packing.Index = {}
  for number, batch in enumerate(_batches(moving)):
    values = _values(source, batch)
    specs, info = writing.Specs(None), _info(target)
    arrays = [
      writing.Written(
        info.replace(name=name),
        ocp.SaveArgs(),
        value.shape,
        value.dtype,
        value.shape,
        ((whole_box(value.shape), value),),
      )
      for name, value in values.items()
    ]
    for array in arrays:
      specs.of(array)
    slab = None
    if pack:
      slab = packing.lay_out(number, {a.info.name: (a.dtype, a.shape, [box for box, _ in a.pieces]) for a in arrays})
      index |= slab.index
    writing.write(
      [] if pack else arrays,
      slab,
      list(values.values()),
      specs,
      compressed=False,
      context=arrays[0].info.ts_context,
      process=0,
      slab_number=number,
      window=_BATCH_NBYTES,
      stop=threading.Event(),
    )
  if index:
    packing.write_index(target, index)


def _batches(sizes: dict[str, int]) -> Iterator[list[str]]:
  batch: list[str] = []
  held = 0
  for name, nbytes in sizes.items():
    if batch and held + nbytes > _BATCH_NBYTES:
      yield batch
      batch, held = [], 0
    batch.append(name)
    held += nbytes
  if batch:
    yield batch


def _values(item: epath.Path, names: Sequence[str]) -> dict[str, np.ndarray]:
  index = packing.read_index(item)
  info, window = _info(item), reading.window_of(item, _BATCH_NBYTES)
  try:
    boxes = {name: (whole_box(index[name].shape),) for name in names if name in index}
    found = reading.read_packed(info, index, boxes, info.ts_context, window)
    values = {name: parts[0] for name, parts in found}
    alone = [name for name in names if name not in index]
    if alone:
      stores = reading.open_stores([info.replace(name=name) for name in alone], info.ts_context)
      requests = [reading.Request(n, store, (whole_box(store.shape),)) for n, store in zip(alone, stores, strict=True)]
      values |= {request.name: arrays[0] for request, arrays in reading.read(requests, window)}
  except ValueError as e:
    if is_unreachable(e):
      raise StorageError(f"{item}: {root_cause(e)}") from e
    raise CorruptCheckpointError(f"{item}: {e}") from e
  return values


def _info(item: epath.Path) -> ocp.type_handlers.ParamInfo:
  data = json.loads((item / ITEM_METADATA).read_text())
  return item_info(item, data, LimitsConfig())
