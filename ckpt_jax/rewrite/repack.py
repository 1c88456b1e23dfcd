"""A saved state with its small arrays packed, or not, made from one that has them the other way.

Arrays that stay where they are are copied chunk by chunk (`copy`); the others are read and written in batches of
bounded size. What was compressed stays so: small arrays by zstd in slabs, and shuffled by themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from ckpt_jax.config import Config, LimitsConfig
from ckpt_jax.errors import CheckpointError, CorruptCheckpointError, StorageError
from ckpt_jax.failures import is_unreachable, root_cause
from ckpt_jax.job.progress import Counter, OnProgress, reported
from ckpt_jax.layout import codec, contents, packing
from ckpt_jax.layout.description import ItemDescription, describe_item, item_info, prng_keys
from ckpt_jax.layout.reading import open_stores
from ckpt_jax.layout.ring import Values
from ckpt_jax.layout.sharding import whole_box
from ckpt_jax.layout.stored import tree_entries
from ckpt_jax.layout.values import Wanted, read_leaves
from ckpt_jax.layout.writing import Writer, Written
from ckpt_jax.orbax.format import ARRAY_TYPES, USE_ZARR3, VALUE, VALUE_TYPE, key_path
from ckpt_jax.rewrite.copy import copy_leaves, leaf_names
from ckpt_jax.rewrite.swap import finish_rewrites, rewrite_step
from ckpt_jax.run.steps import our_metadata, step_directory, step_info

_BATCH_NBYTES = 256 * 2**20  # of values in memory at a time


def repack_step(directory: epath.Path, step: int, *, pack: bool, on_progress: OnProgress | None = None) -> int:
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
    raise CheckpointError(f"{item}: packed already", topic="rewriting-steps")
  counter, total = Counter(), 2 * sum(moving.values())  # each array is written, and read back

  def write(old: epath.Path, new: epath.Path) -> dict[str, Any]:
    everything = leaf_names(item)
    staying = [name for name in everything if ".".join(name) not in moving]
    copy_leaves(item, new / item.name, everything, pause=lambda: None, chunks_of=staying)
    _move(item, new / item.name, moving, pack=pack, moved=counter.add)
    leaves = contents.saved_leaves(old)
    known = {"nbytes": sum(leaf.nbytes for leaf in leaves), "leaves": len(leaves)}
    return {"metrics": step_info(directory, step).metrics} | known | our_metadata(old)

  def check(old: epath.Path, new: epath.Path) -> None:
    # What was copied has been compared by `copy_leaves`.
    before, after = describe_item(item), describe_item(new / item.name)
    for batch in _batches(moving):
      copied = _values(after, batch)
      counter.add(sum(moving[name] for name in batch))
      for name, value in _values(before, batch).items():
        other = copied[name]
        if (value.dtype, value.shape) != (other.dtype, other.shape) or value.tobytes() != other.tobytes():
          raise CorruptCheckpointError(f"{new / item.name}: {name} reads back differently from what was copied")

  with reported(on_progress, f"repacking step {step}", total, counter):
    rewritten = rewrite_step(directory, step, write, check)
  if not rewritten:
    raise CheckpointError(f"{directory}: step {step} was deleted or saved again meanwhile", topic="rewriting-steps")
  return len(moving)


def _moving(item: epath.Path, *, pack: bool) -> dict[str, int]:
  """Names and bytes of the arrays that packing an item, or unpacking it, moves."""
  index = packing.read_index(item)
  if not pack:
    return {name: packed.nbytes for name, packed in index.items()}
  entries = tree_entries(item)[1]
  arrays = {".".join(key_path(entry)) for entry in entries if entry[VALUE][VALUE_TYPE] == ARRAY_TYPES[0]}
  names = arrays - index.keys() - prng_keys(item).keys()
  stores = describe_item(item).open(sorted(names)) if names else {}
  sizes = {name: store.size * store.dtype.numpy_dtype.itemsize for name, store in stores.items()}
  return {name: nbytes for name, nbytes in sizes.items() if packing.is_small(nbytes)}


def carry_packed(source: epath.Path, target: epath.Path, names: Collection[str]) -> None:
  """Gives `target`, a copy of some leaves of `source`, those of the leaves `names` that are packed, packed again."""
  index = packing.read_index(source)
  _move(source, target, {name: packed.nbytes for name, packed in index.items() if name in names}, pack=True)


def _move(
  source: epath.Path,
  target: epath.Path,
  moving: dict[str, int],
  *,
  pack: bool,
  moved: Callable[[int], None] = lambda nbytes: None,
) -> None:
  index: packing.Index = {}
  old = describe_item(source)
  info = item_info(target, LimitsConfig(), ocdbt=True, zarr3=bool(tree_entries(target)[0].get(USE_ZARR3)))
  compressed = _are_compressed(old, moving)
  compression = codec.SHUFFLED if compressed else codec.OFF
  for number, batch in enumerate(_batches(moving)):
    values = _values(old, batch)
    arrays = [
      Written(
        info.replace(name=n),
        ocp.SaveArgs(),
        v.shape,
        v.dtype,
        v.shape,
        ((whole_box(v.shape), Values(v)),),
        codec.codec_of(compression, n, v.dtype),
      )
      for n, v in values.items()
    ]
    writer = Writer(info.ts_context, _BATCH_NBYTES, compressed=compressed)
    if pack:
      slab = packing.lay_out(number, {a.info.name: (a.dtype, a.shape, [box for box, _ in a.pieces]) for a in arrays})
      index |= slab.index
      writer.spec(arrays[0])  # locates the database
      writer.write([], slab, [Values(v) for v in values.values()], number)
    else:
      writer.write(arrays)
    moved(sum(moving[name] for name in batch))
  if index:
    packing.write_index(target, packing.leaves_json(index))


def _are_compressed(item: ItemDescription, names: Collection[str]) -> bool:
  """Whether some of the arrays, or the slabs that hold them, have a codec."""
  slabs = {packing.slab_name(p.process) for name in names if name in item.index for p in item.index[name].pieces}
  alone = [name for name in names if name not in item.index]
  stores = open_stores(item.info.replace(use_zarr3=False), sorted(slabs)) | (item.open(alone) if alone else {})
  return any(codec.ZSTD in str(store.codec) for store in stores.values())  # blosc's is called so too


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


def _values(item: ItemDescription, names: Sequence[str]) -> dict[str, np.ndarray]:
  directory = item.info.parent_dir
  try:
    return read_leaves(item, {name: Wanted(name, None, None) for name in names}, Config())
  except ValueError as e:
    if is_unreachable(e):
      raise StorageError(f"{directory}: {root_cause(e)}") from e
    raise CorruptCheckpointError(f"{directory}: {e}") from e
