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
from ckpt_jax.layout.placing import Transfers, Unplaced, place, place_on_cpu
from ckpt_jax.layout.sharding import Box, local_regions, whole_box
from ckpt_jax.layout.staging import belongs_to_accelerators
from ckpt_jax.orbax.format import TEXTS
from ckpt_jax.run import untrusted
from ckpt_jax.storage.urls import is_object_store

# Bytes in flight at a time: enough for 10 GB/s at 100 ms a request. It bounds TensorStore's memory beside the arrays.
_WINDOW_NBYTES = 10**9
_BATCH_NBYTES = 2**26
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
  """The stored values of the `wanted` leaves, by path. The limits of `config` bound how much is read at a time.

  `arrived` is called from this thread with path and value of each array while the others are still being read.

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
  reader, transfers = _Reader(item, arrays, window(item, config)), Transfers(_batch_nbytes(config))
  for path, value in reader.values():
    if arrived is not None and wanted[path].scalar is None and path not in reader.keys:
      arrived(path, value)
    found.update(transfers.add(path, value) if isinstance(value, Unplaced) else [(path, value)])
  found.update(transfers.send())
  for path in filter(reader.keys.__contains__, wanted):  # a computation, which all processes of a job run in one order
    found[path] = jax.random.wrap_key_data(found[path], impl=reader.keys[path])
  return found


def window(item: ItemDescription, config: Config) -> reading.Window:
  """How much of an item is read at a time, within the limits of `config`.

  Of `limits.host_memory` reads take two fifths, half of it for TensorStore's buffers; batches on their way to
  accelerators three eighths (one is filled, one is sent, and XLA holds a pinned copy of that); verification an eighth.
  """
  limits = config.limits
  most = [_WINDOW_NBYTES]
  if not isinstance(limits.restore_concurrency, str):
    most.append(limits.restore_concurrency)
  if not isinstance(limits.host_memory, str):
    most.append(limits.host_memory // 5)
  return reading.Window(min(most), not is_object_store(item.info.parent_dir))


def _batch_nbytes(config: Config) -> int:
  limit = config.limits.host_memory
  return _BATCH_NBYTES if isinstance(limit, str) else min(_BATCH_NBYTES, limit // 8)


def _held(value: Any, want: Wanted) -> Any:
  """A value that the description holds, as it is wanted."""
  if want.scalar is not None:
    return want.scalar(value)
  array = np.array(value)  # its own memory: msgpack's is read-only
  if want.sharding is None:
    return array
  return place([Unplaced.whole(array, want.sharding)])[0]


class _Reader:
  """Reads some arrays and numbers of an item.

  Attributes:
    keys: implementations, by path, of the arrays of words that plain Orbax noted as PRNG keys.
  """

  def __init__(self, item: ItemDescription, wanted: Mapping[str, Wanted], window: reading.Window):
    self._item = item
    self._wanted = wanted
    self._window = window
    self._by_name = {want.stored: path for path, want in wanted.items()}
    self._stores = item.open([name for name in self._by_name if name not in item.index])
    self._kinds = {path: self._kind(want.stored) for path, want in wanted.items()}
    self._boxes = {path: _boxes(want, self._kinds[path][0]) for path, want in wanted.items()}
    self._far = {path for path, want in wanted.items() if want.sharding and belongs_to_accelerators(want.sharding)}
    self.keys = self._prng_keys()

  def values(self) -> Iterator[tuple[str, Any]]:
    """Path and value of each, in the order in which they are complete; `Unplaced` if it goes to accelerators."""
    item = self._item
    small = {want.stored: self._boxes[path] for path, want in self._wanted.items() if want.stored in item.index}
    for name, parts in reading.read_packed(item.info, item.index, small, self._window):
      path = self._by_name[name]
      if self._wanted[path].sharding is None:
        parts = [part.copy() for part in parts]  # else one leaf would keep its whole slab in memory
      yield path, self._delivered(path, parts)
    rest = {path: want for path, want in self._wanted.items() if want.stored not in small}
    near = [(path, want.sharding) for path, want in rest.items() if want.sharding and path not in self._far]
    own = owned.make_for({path: (self._boxes[path], self._kinds[path][1], sharding) for path, sharding in near})
    requests = [
      reading.Request(
        want.stored, self._stores[want.stored], self._boxes[path], (own[path][1],) if path in own else None
      )
      for path, want in rest.items()
    ]
    for request, parts in reading.read(requests, self._window):
      path = self._by_name[request.name]
      if path in own:
        yield path, _placed(self._kinds[path][0], own.pop(path)[0], self._wanted[path].sharding)
      else:
        yield path, self._delivered(path, parts)

  def _delivered(self, path: str, parts: list[np.ndarray]) -> Any:
    want = self._wanted[path]
    if want.scalar is not None:
      return want.scalar(parts[0].item())
    if want.sharding is None:
      return parts[0]
    array = Unplaced(*self._kinds[path], want.sharding, dict(zip(self._boxes[path], parts, strict=True)))
    return array if path in self._far else place_on_cpu(array)

  def _prng_keys(self) -> dict[str, str]:
    stored = {
      path: want.stored
      for path, want in self._wanted.items()
      if want.sharding and self._kinds[path][1] == np.uint32 and want.stored in self._stores
    }
    keys = prng_keys(self._item.info.parent_dir) if stored else {}
    return {path: keys[name] for path, name in stored.items() if name in keys}

  def _kind(self, name: str) -> tuple[tuple[int, ...], np.dtype]:
    if (packed := self._item.index.get(name)) is not None:
      return packed.shape, packing.dtype_of(packed.dtype)
    store = self._stores[name]
    return tuple(store.shape), np.dtype(store.dtype.numpy_dtype)


def _boxes(want: Wanted, shape: tuple[int, ...]) -> tuple[Box, ...]:
  return (whole_box(shape),) if want.sharding is None else local_regions(want.sharding, shape)


def _placed(shape: tuple[int, ...], part: jax.Array, sharding: Any) -> jax.Array:
  """An array of which this process holds one part, on one device."""
  if part.sharding == sharding:
    return part
  return jax.make_array_from_single_device_arrays(shape, sharding, [part])
