"""The values of an item's leaves: one reader for every item that Orbax or ckpt_jax wrote.

Orbax's handlers read shard by shard and pass over the tree several times: 80 us a leaf, 1 ms a shard. Here all leaves
of an item go through one queue of reads (see `reading`), and are delivered in the order in which they are complete.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from ckpt_jax.config import Config
from ckpt_jax.layout import owned, packing, reading, text
from ckpt_jax.layout.description import ItemDescription, prng_keys
from ckpt_jax.layout.memory import to_be_copied
from ckpt_jax.layout.sharding import Box, box_of, local_regions, one_device, whole_box, within
from ckpt_jax.orbax.format import TEXTS
from ckpt_jax.run import untrusted
from ckpt_jax.storage.urls import is_object_store

# Bytes in flight at a time: enough for 10 GB/s at 100 ms a request. It bounds TensorStore's memory beside the arrays.
_WINDOW_NBYTES = 10**9
Arrived = Callable[[str, Any], None]


@dataclasses.dataclass(frozen=True)
class Wanted:
  """How a leaf is to be delivered.

  Attributes:
    stored: its name in the database.
    scalar: the type of a Python number or text; None for an array.
    sharding: of a jax array; None for a numpy array.
  """

  stored: str
  scalar: type | None
  sharding: jax.sharding.Sharding | None


def read_leaves(
  item: ItemDescription, wanted: Mapping[str, Wanted], config: Config, arrived: Arrived | None = None
) -> dict[str, Any]:
  """The stored values of leaves, by path.

  Args:
    item: its description.
    wanted: by path.
    config: its limits bound what is read at a time.
    arrived: called from this thread with path and value of each array while the others are still being read.

  Raises:
    ValueError: naming the array that cannot be read.
  """
  found: dict[str, Any] = {}
  arrays: dict[str, Wanted] = {}
  texts: Any = None
  for path, want in wanted.items():
    if path in item.values:
      found[path] = _held(item.values[path], want)
    elif want.scalar is str:
      texts = untrusted.read_json(item.info.parent_dir / TEXTS) if texts is None else texts
      found[path] = str(text.find(texts, want.stored))
    else:
      arrays[path] = want
  for path, value in _Reader(item, arrays, window(item, config)).values():
    found[path] = value
    if arrived is not None and wanted[path].scalar is None:
      arrived(path, value)
  return found


def window(item: ItemDescription, config: Config) -> reading.Window:
  """How much of an item is read at a time, within the limits of `config`."""
  limits = config.limits
  bounds = [n for n in (_WINDOW_NBYTES, limits.restore_concurrency, limits.host_memory) if not isinstance(n, str)]
  return reading.Window(min(bounds), not is_object_store(item.info.parent_dir))


def _held(value: Any, want: Wanted) -> Any:
  """A value that the description holds, as it is wanted."""
  if want.scalar is not None:
    return want.scalar(value)
  array = np.array(value)  # its own memory: msgpack's is read-only
  if want.sharding is None:
    return array
  return jax.make_array_from_callback(array.shape, want.sharding, lambda index: array[index])


class _Reader:
  """Reads some arrays and numbers of an item."""

  def __init__(self, item: ItemDescription, wanted: Mapping[str, Wanted], window: reading.Window):
    self._item = item
    self._wanted = wanted
    self._window = window
    self._by_name = {want.stored: path for path, want in wanted.items()}
    self._stores = item.open([name for name in self._by_name if name not in item.index])

  def values(self) -> Iterator[tuple[str, Any]]:
    """Path and value of each, in the order in which they are complete."""
    item, staged = self._item, 0
    kinds = {path: self._kind(want.stored) for path, want in self._wanted.items()}
    words = any(want.sharding is not None and kinds[path][1] == np.uint32 for path, want in self._wanted.items())
    keys = prng_keys(item.info.parent_dir) if words else {}
    boxes = {path: self._boxes(want, kinds[path][0]) for path, want in self._wanted.items()}
    small = {want.stored: boxes[path] for path, want in self._wanted.items() if want.stored in item.index}
    for name, parts in reading.read_packed(item.info, item.index, small, self._window):
      path = self._by_name[name]
      if self._wanted[path].sharding is None:
        parts = [part.copy() for part in parts]  # else one leaf would keep its whole slab in memory
      yield path, _delivered(self._wanted[path], kinds[path], boxes[path], parts)
    rest = {path: want for path, want in self._wanted.items() if want.stored not in small}
    own = owned.make_for({p: (boxes[p], kinds[p][1], w.sharding) for p, w in rest.items() if w.sharding is not None})
    requests = [
      reading.Request(want.stored, self._stores[want.stored], boxes[path], (own[path][1],) if path in own else None)
      for path, want in rest.items()
    ]
    made: list[jax.Array] = []
    words_of: dict[str, jax.Array] = {}
    for request, parts in reading.read(requests, self._window):
      path = self._by_name[request.name]
      want = self._wanted[path]
      if path in own:
        value = _placed(kinds[path][0], own.pop(path)[0], want.sharding)
      else:
        value = _delivered(want, kinds[path], boxes[path], parts)
        if want.sharding is not None:
          made.append(value)
          staged += sum(part.nbytes for part in parts)
      if want.stored in keys and want.sharding is not None:
        words_of[path] = value
      else:
        yield path, value
      if staged > self._window.most:  # an accelerator still copies out of these parts
        jax.block_until_ready(made)
        made, staged = [], 0
    for path in filter(words_of.__contains__, rest):  # a computation, which all processes of a job run in one order
      yield path, jax.random.wrap_key_data(words_of[path], impl=keys[self._wanted[path].stored])

  def _kind(self, name: str) -> tuple[tuple[int, ...], np.dtype]:
    if (packed := self._item.index.get(name)) is not None:
      return packed.shape, packing.dtype_of(packed.dtype)
    store = self._stores[name]
    return tuple(store.shape), np.dtype(store.dtype.numpy_dtype)

  def _boxes(self, want: Wanted, shape: tuple[int, ...]) -> tuple[Box, ...]:
    return (whole_box(shape),) if want.sharding is None else local_regions(want.sharding, shape)


def _delivered(
  want: Wanted, kind: tuple[tuple[int, ...], np.dtype], boxes: tuple[Box, ...], parts: list[np.ndarray]
) -> Any:
  if want.scalar is not None:
    return want.scalar(parts[0].item())
  if want.sharding is None:
    return parts[0]
  return _to_jax(*kind, want.sharding, dict(zip(boxes, parts, strict=True)))


def _to_jax(
  shape: tuple[int, ...], dtype: np.dtype, sharding: jax.sharding.Sharding, regions: dict[Box, np.ndarray]
) -> jax.Array:
  """A jax array, in memory of jax's own, from the regions of it that this process read."""
  if one_device(sharding) == "here":
    (whole,) = regions.values()
    whole = to_be_copied(whole)
    return jax.make_array_from_callback(shape, sharding, lambda _: whole)

  def piece(index: tuple[slice, ...] | None) -> np.ndarray:
    assert index is not None  # it is for devices of other processes only
    box = box_of(index, shape)
    if (region := regions.get(box)) is not None:
      return to_be_copied(region)
    for outer, array in regions.items():
      if all(a <= c and d <= b for (a, b), (c, d) in zip(outer, box, strict=True)):
        return to_be_copied(array[within(box, outer)])
    raise AssertionError(f"{box} is in none of {list(regions)}")

  return jax.make_array_from_callback(shape, sharding, piece, dtype=dtype)


def _placed(shape: tuple[int, ...], part: jax.Array, sharding: Any) -> jax.Array:
  """An array of which this process holds one part, on one device."""
  if part.sharding == sharding:
    return part
  return jax.make_array_from_single_device_arrays(shape, sharding, [part])
