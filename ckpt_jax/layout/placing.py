"""Arrays from host memory to their devices: for accelerators many in one transfer, a batch while the next is read."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from ckpt_jax.layout.memory import to_be_copied
from ckpt_jax.layout.sharding import Box, box_of, one_device, whole_box, within
from ckpt_jax.layout.staging import belongs_to_accelerators


@dataclasses.dataclass(frozen=True, eq=False)
class Unplaced:
  """An array whose values are in host memory, on its way to its devices.

  Attributes:
    shape, dtype: of the array.
    sharding: where it is wanted, in which kind of memory.
    regions: values, by their place in the array; each shard of this process is within one of them.
  """

  shape: tuple[int, ...]
  dtype: np.dtype
  sharding: jax.sharding.Sharding
  regions: Mapping[Box, np.ndarray]

  @classmethod
  def whole(cls, values: np.ndarray, sharding: jax.sharding.Sharding) -> Unplaced:
    """An array of which this process has all values."""
    return cls(values.shape, values.dtype, sharding, {whole_box(values.shape): values})

  @property
  def ndim(self) -> int:
    """Number of dimensions."""
    return len(self.shape)

  @property
  def nbytes(self) -> int:
    """Bytes of the values that are here."""
    return sum(values.nbytes for values in self.regions.values())

  def shards(self) -> list[tuple[jax.Device, Box]]:
    """The device and the place of each shard of this process."""
    found = self.sharding.addressable_devices_indices_map(self.shape)
    return [(device, box_of(index, self.shape)) for device, index in found.items() if index is not None]

  def at(self, box: Box) -> np.ndarray:
    """The values of a shard."""
    if (values := self.regions.get(box)) is not None:
      return values
    for outer, values in self.regions.items():
      if all(a <= c and d <= b for (a, b), (c, d) in zip(outer, box, strict=True)):
        return values[within(box, outer)]
    raise AssertionError(f"{box} is in none of {list(self.regions)}")


def place(arrays: Sequence[Unplaced]) -> list[jax.Array]:
  """jax arrays in memory of jax's own, straight in the kind of memory that is wanted.

  What goes to accelerators goes in one transfer, which may still be under way: 25 GB/s on an H200 for a list of arrays,
  3 to 8 one by one. On a CPU a list gains nothing.
  """
  values: list[np.ndarray] = []
  places: list[Any] = []
  made: list[Any] = []
  for array in arrays:
    if not belongs_to_accelerators(array.sharding):
      made.append(place_on_cpu(array))
      continue
    if (whole := array.regions.get(whole_box(array.shape))) is not None and array.sharding.is_fully_addressable:
      pieces: list[tuple[np.ndarray, Any]] = [(whole, array.sharding)]
    else:
      kind = array.sharding.memory_kind
      pieces = [
        (array.at(box), jax.sharding.SingleDeviceSharding(device, memory_kind=kind)) for device, box in array.shards()
      ]
    made.append(slice(len(values), len(values) + len(pieces)))
    values += [value for value, _ in pieces]
    places += [where for _, where in pieces]
  sent = jax.device_put(values, places) if values else []
  return [
    _assembled(array, sent[found]) if isinstance(found, slice) else found
    for array, found in zip(arrays, made, strict=True)
  ]


def _assembled(array: Unplaced, pieces: list[jax.Array]) -> jax.Array:
  if len(pieces) == 1 and pieces[0].sharding == array.sharding:
    return pieces[0]
  return jax.make_array_from_single_device_arrays(array.shape, array.sharding, pieces, dtype=array.dtype)


def place_on_cpu(array: Unplaced) -> jax.Array:
  """The same for one array that does not go to accelerators."""
  if not array.regions:  # all of it goes to other processes
    return _assembled(array, [])
  if one_device(array.sharding) == "here":
    (whole,) = array.regions.values()
    whole = to_be_copied(whole)
    return jax.make_array_from_callback(array.shape, array.sharding, lambda _: whole)

  def piece(index: tuple[slice, ...] | None) -> np.ndarray:
    assert index is not None  # it is for devices of other processes only
    return to_be_copied(array.at(box_of(index, array.shape)))

  return jax.make_array_from_callback(array.shape, array.sharding, piece, dtype=array.dtype)


class Transfers:
  """Batches of arrays on their way to accelerators. Two are in host memory at a time: one arrives, one is filled."""

  def __init__(self, batch_nbytes: int):
    """A batch is sent once it has `batch_nbytes`."""
    self._batch_nbytes = batch_nbytes
    self._batch: dict[str, Unplaced] = {}
    self._nbytes = 0
    self._sent: list[jax.Array] = []

  def add(self, path: str, array: Unplaced) -> Iterator[tuple[str, jax.Array]]:
    """Takes an array; path and array of each that was sent, if the batch was full."""
    self._batch[path] = array
    self._nbytes += array.nbytes
    if self._nbytes >= self._batch_nbytes:
      yield from self.send()

  def send(self) -> Iterator[tuple[str, jax.Array]]:
    """Sends what there is, after the batch before has arrived."""
    jax.block_until_ready(self._sent)
    self._sent = place(list(self._batch.values()))
    yield from zip(self._batch, self._sent, strict=True)
    self._batch, self._nbytes = {}, 0
