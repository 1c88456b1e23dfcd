"""A saved state with its small arrays packed, or not, made from one that has them the other way.

What does not move is copied chunk by chunk (`subset`); what moves is read and written in batches of bounded size.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from ckpt_jax.config import LimitsConfig
from ckpt_jax.errors import CheckpointError, CorruptCheckpointError, StorageError
from ckpt_jax.failures import is_unreachable, root_cause
from ckpt_jax.layout import contents, packing, reading, writing
from ckpt_jax.layout.direct import item_info
from ckpt_jax.layout.sharding import whole_box
from ckpt_jax.orbax import private
from ckpt_jax.orbax.format import ITEM_METADATA, TREE, VALUE, VALUE_TYPE, key_path
from ckpt_jax.rewrite.copy import copy_leaves, leaf_names
from ckpt_jax.rewrite.swap import finish_rewrites, rewrite_step
from ckpt_jax.run.steps import our_metadata, step_directory, step_info

_BATCH_NBYTES = 256 * 2**20  # of values in memory at a time


def repack_step(directory: epath.Path, step: int, *, pack: bool) -> int:
  """Rewrites a committed step with its small arrays packed, or as an ordinary Orbax checkpoint.

  Returns:
    How many arrays moved, each compared bit by bit; 0 if the step has the wanted form already.

  Raises:
    NoCheckpointError: if there is no such step.
    CorruptCheckpointError: if it cannot be read.
    CheckpointError: if it is not an OCDBT database, is partly packed, or was deleted or saved again meanwhile.
  """
  finish_rewrites(directory)
  item = contents.item_directory(step_directory(directory, step))
  moving = _moving(item, pack=pack)
  if not moving:
    return 0
  if pack and packing.read_index(item):
    raise CheckpointError(f"{item}: packed already")

  def write(old: epath.Path, new: epath.Path) -> dict[str, Any]:
    everything = leaf_names(item)
    staying = [name for name in everything if ".".join(name) not in moving]
    copy_leaves(item, new / item.name, everything, pause=lambda: None, chunks_of=staying)
    _move(item, new / item.name, moving, pack=pack)
    leaves = contents.saved_leaves(old)
    known = {"nbytes": sum(leaf.nbytes for leaf in leaves), "leaves": len(leaves)}
    return {"metrics": step_info(directory, step).metrics} | known | our_metadata(old)

  def check(old: epath.Path, new: epath.Path) -> None:
    # What was copied has been compared by `copy_leaves`.
    for batch in _batches(moving):
      before, after = _values(item, batch), _values(new / item.name, batch)
      for name, value in before.items():
        other = after[name]
        if (value.dtype, value.shape) != (other.dtype, other.shape) or value.tobytes() != other.tobytes():
          raise CorruptCheckpointError(f"{new / item.name}: {name} reads back differently from what was copied")

  if not rewrite_step(directory, step, write, check):
    raise CheckpointError(f"{directory}: step {step} was deleted or saved again meanwhile")
  return len(moving)


def _moving(item: epath.Path, *, pack: bool) -> dict[str, int]:
  """Names and bytes of the arrays that packing an item, or unpacking it, moves."""
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


def carry_packed(source: epath.Path, target: epath.Path, names: Collection[str]) -> None:
  """Gives `target`, a copy of some leaves of `source`, those of the leaves `names` that are packed, packed again."""
  index = packing.read_index(source)
  _move(source, target, {name: packed.nbytes for name, packed in index.items() if name in names}, pack=True)


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
