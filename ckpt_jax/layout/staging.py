"""Host copies of a state's arrays, for as long as a save writes and sums them.

On a CPU there is nothing to copy: a view of jax's memory keeps it from being reused. From an accelerator all arrays of
a save go to pinned host memory in one batched transfer, which returns at once: what donates the arrays afterwards waits
for it on the device. 901 leaves of 2.95 GB took 0.04 s to dispatch and 0.1 s to arrive on an H200, and 0.9 s one by one
through pageable memory.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from ckpt_jax.layout.encoding import is_prng_key
from ckpt_jax.layout.sharding import Box, box_of

_PINNED = "pinned_host"
_HOST_KINDS = (_PINNED, "unpinned_host")
Values = Callable[[], np.ndarray]
as_accelerators = False  # tests: devices of a CPU count as accelerators


def is_on_accelerator(array: Any) -> bool:
  """Whether an array is in the memory of an accelerator."""
  return isinstance(array, jax.Array) and array.size > 0 and _is_on_accelerator(array.sharding, as_accelerators)


@functools.lru_cache(maxsize=4096)
def _is_on_accelerator(sharding: jax.sharding.Sharding, cpu_too: bool) -> bool:
  return _is_of_accelerators(sharding, cpu_too) and sharding.memory_kind not in _HOST_KINDS


@functools.lru_cache(maxsize=4096)
def _is_of_accelerators(sharding: jax.sharding.Sharding, cpu_too: bool) -> bool:
  device: jax.Device = next(iter(sharding.device_set))
  return cpu_too or device.platform != "cpu"


def belongs_to_accelerators(sharding: jax.sharding.Sharding) -> bool:
  """Whether the devices of a sharding are accelerators, whose memory it may be or pinned memory of their hosts."""
  return _is_of_accelerators(sharding, as_accelerators)


class HostCopies:
  """Values of single-device arrays in host memory: views on a CPU, else copies that may still be on their way.

  An object serves one save, and holds the arrays while it lives: an array's id may be used again after it.
  """

  def __init__(self) -> None:
    self._found: dict[int, tuple[jax.Array, Values]] = {}
    self._turns = itertools.count()
    self._nothing_to_copy = jax.default_backend() == "cpu" and not as_accelerators

  def stage(self, leaves: Sequence[Any], wanted: Callable[[jax.Shard], bool] = lambda shard: True) -> None:
    """Starts to copy shards from accelerators in one transfer; other leaves, and typed PRNG keys, are left alone.

    Of a shard that several devices of this process hold, one is copied. The devices take turns.

    Args:
      leaves: of a state.
      wanted: which of their shards.
    """
    if self._nothing_to_copy:
      return
    sources: list[jax.Array] = []
    copies: list[list[jax.Array]] = []
    for leaf in leaves:
      if not is_on_accelerator(leaf) or is_prng_key(leaf):
        continue
      by_box: dict[Box, list[jax.Shard]] = {}
      for shard in leaf.addressable_shards:
        by_box.setdefault(box_of(shard.index, leaf.shape), []).append(shard)
      for shards in by_box.values():
        if id(shards[0].data) not in self._found and any(map(wanted, shards)):
          sources.append(shards[next(self._turns) % len(shards)].data)
          # jax may make an array of its own of the only shard of one.
          copies.append([shard.data for shard in shards] + [leaf] * (len(leaf.sharding.device_set) == 1))
    if not sources:
      return
    kinds = [source.sharding.with_memory_kind(_PINNED) for source in sources]
    for same, pinned in zip(copies, jax.device_put(sources, kinds), strict=True):
      values = functools.partial(np.asarray, pinned)  # a view of pinned memory, once the copy has arrived
      self._found |= {id(array): (array, values) for array in same}

  def of(self, array: jax.Array) -> Values:
    """A function that returns the values of a single-device array, when they have arrived."""
    known = self._found.get(id(array))
    if known is not None:
      return known[1]
    if self._nothing_to_copy or not is_on_accelerator(array):
      values = ready(_view(array))
      self._found[id(array)] = array, values
      return values
    self.stage([array])
    return self._found[id(array)][1]


def ready(array: np.ndarray) -> Values:
  """`Values` that are there already."""
  return lambda: array


def _view(array: jax.Array) -> np.ndarray:
  """A view of an array's memory, which keeps the buffer alive.

  np.asarray of the array itself would be cached in it, and the array could never be donated again.
  """
  try:
    return np.asarray(memoryview(array))  # type: ignore[arg-type]
  except (BufferError, TypeError):  # bfloat16, float8 and the like
    return np.asarray(jax.make_array_from_single_device_arrays(array.shape, array.sharding, [array]))
