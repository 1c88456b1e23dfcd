"""Fingerprints of a state's leaves: what training holds when it saves, what it gets when it restores.

A fingerprint says path, dtype, shape and all bits of a leaf. It is the same however the leaf is sharded, on how many
processes, and in whatever form a checkpoint stores it (packed, compressed, re-encoded), since it is taken of the state
and not of files. Bits, not values: -0.0 differs from 0.0, and NaNs with other payloads differ.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from ckpt_jax.integrity import device, sums
from ckpt_jax.layout.encoding import dtype_name, is_prng_key, path_name
from ckpt_jax.layout.memory import host_view
from ckpt_jax.layout.sharding import one_device

PyTree = Any
_TASK_NBYTES = 32 << 20  # a larger piece is cut, for the threads to share
_BUNCH_NBYTES = 4 << 20  # of small leaves that make a task
_SCALARS = {"bool": np.uint8, "int": np.int64, "float": np.float64, "complex": np.complex128}
_KEEPS_BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


@dataclasses.dataclass(frozen=True)
class LeafPrint:
  """One leaf: `dtype` is numpy's name, Python's for its scalars, `key<impl>` for PRNG keys; `total` the sum of bits."""

  dtype: str
  shape: tuple[int, ...]
  total: int


@dataclasses.dataclass
class _Leaf:
  path: str
  dtype: str
  shape: tuple[int, ...]
  bits_shape: tuple[int, ...]  # of the unsigned integers: that of the key data, or with the two halves of a complex128
  floats: np.dtype | None
  pieces: list[tuple[np.ndarray, tuple[int, ...]]]  # views, and where in the array they lie
  copies: int = 1  # how often the leaf is there, over all processes
  on_device: tuple[jax.Array, ...] | None = None
  done: sums.Tally | None = None  # of what may be overwritten once `save` returns: numpy arrays


@dataclasses.dataclass
class _Task:
  """What one thread sums up in one go: a part of a leaf at `start`, or whole small leaves of one shape and dtype."""

  floats: np.dtype | None
  shape: tuple[int, ...]
  start: tuple[int, ...] | None = None
  paths: list[str] = dataclasses.field(default_factory=list)
  blocks: list[np.ndarray] = dataclasses.field(default_factory=list)
  nbytes: int = 0

  def add(self, path: str, bits: np.ndarray) -> None:
    self.paths.append(path)
    self.blocks.append(bits)
    self.nbytes += bits.nbytes

  def run(self, fingerprint: bool, health: bool) -> list[sums.Tally]:
    """One tally a block."""
    floats = self.floats if health else None
    if self.start is None:
      return sums.tally_alike(self.blocks, floats, fingerprint=fingerprint)
    part = sums.Tally()
    if fingerprint:
      sums.add_block(part, self.blocks[0], self.start, self.shape, floats)
    elif floats is not None:
      sums.add_health(part, self.blocks[0], floats)
    return [part]


class Taken:
  """Views of a state, from which sums are made: cheap to take while training waits, to be summed up behind it.

  On a CPU these are zero-copy views that keep the buffers alive: jax copies instead of donating one that is looked at.
  On accelerators the sums are on their way when `take` returns.
  """

  def __init__(self, leaves: list[_Leaf]):
    self._leaves = leaves

  def tallies(self, threads: int, *, fingerprint: bool = True, health: bool = True) -> dict[str, sums.Tally]:
    """Sums and health, or one of them, by leaf path: of this process's part, or of all where it is on a device."""
    out = {leaf.path: sums.Tally() for leaf in self._leaves}
    tasks: list[_Task] = []
    alike: dict[Any, _Task] = {}
    for leaf in self._leaves:
      for piece, at in leaf.pieces:
        bits = bits_of(piece)
        if bits.shape == leaf.bits_shape and 0 < bits.nbytes <= sums.SMALL_NBYTES:
          kind = (bits.shape, bits.dtype, leaf.floats)
          task = alike.get(kind)
          if task is None or task.nbytes > _BUNCH_NBYTES:
            task = alike[kind] = _Task(leaf.floats, leaf.bits_shape)
            tasks.append(task)
          task.add(leaf.path, bits)
        else:
          for part, start in _cut(bits, at):
            tasks.append(_Task(leaf.floats, leaf.bits_shape, start))
            tasks[-1].add(leaf.path, part)
    for task, parts in zip(tasks, _in_threads(lambda t: t.run(fingerprint, health), tasks, threads), strict=True):
      for path, part in zip(task.paths, parts, strict=True):
        out[path].add(part)
    for leaf in self._leaves:
      if leaf.done is not None:
        out[leaf.path].add(leaf.done)
      if leaf.on_device is not None:
        found = device.result(leaf.on_device)
        if leaf.floats is None or not health:
          found.nonfinite, found.squares = 0, 0.0
        out[leaf.path].add(found)
    return out

  def release(self) -> None:
    """Lets go of the state's buffers, once they are summed up."""
    for leaf in self._leaves:
      leaf.pieces = []

  @property
  def counted_by_all(self) -> set[str]:
    """Leaves whose tally is already the total of all processes."""
    return {leaf.path for leaf in self._leaves if leaf.on_device is not None}

  def prints(self, totals: Mapping[str, int]) -> dict[str, LeafPrint]:
    """The fingerprints, given the sums over all processes."""
    return {leaf.path: LeafPrint(leaf.dtype, leaf.shape, totals[leaf.path] & sums.MASK) for leaf in self._leaves}

  @property
  def types(self) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape by path."""
    return {leaf.path: (leaf.dtype, leaf.shape) for leaf in self._leaves}

  @property
  def on_accelerator(self) -> bool:
    return any(leaf.on_device is not None for leaf in self._leaves)

  @property
  def host_nbytes(self) -> int:
    """Bytes that this process has yet to go through."""
    return sum(piece.nbytes for leaf in self._leaves for piece, _ in leaf.pieces)

  @property
  def copies(self) -> dict[str, int]:
    """How often each leaf was counted, over all processes."""
    return {leaf.path: leaf.copies for leaf in self._leaves}


def take(state: PyTree, *, every_copy: bool = False, saved_as: Mapping[str, str] | None = None) -> Taken:
  """Views of the leaves of `state`.

  Args:
    state: arrays, PRNG keys, scalars and text.
    every_copy: count replicas too, each of which could be the wrong one; otherwise each element counts once.
    saved_as: dtypes by path, for leaves that may have come back as another type of number (a Python int as int32).
  """
  names, leaves = [], []
  for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
    name = path_name(path)
    names.append(name)
    leaves.append(_as_saved(leaf, (saved_as or {}).get(name)))
  out = [_view(name, leaf, every_copy) for name, leaf in zip(names, leaves, strict=True)]
  on_device = [i for i, x in enumerate(leaves) if is_on_accelerator(x)]
  arrays = [jax.random.key_data(leaves[i]) if is_prng_key(leaves[i]) else leaves[i] for i in on_device]
  for i, found in zip(on_device, device.dispatch(arrays), strict=True):
    out[i].on_device, out[i].pieces = found, []
  return Taken(out)


def label(leaf: Any) -> str:
  """The name of a leaf's type: numpy's, Python's for its scalars, `key<impl>` for PRNG keys."""
  if isinstance(leaf, (bool, int, float, complex, str)) and not isinstance(leaf, np.generic):
    return type(leaf).__name__
  return dtype_name(leaf.dtype)


@functools.cache
def _floats(dtype: Any) -> np.dtype | None:
  return np.dtype(dtype) if sums.is_float(np.dtype(dtype)) else None


def _as_saved(leaf: Any, dtype: str | None) -> Any:
  """`leaf` as the type of number it was saved as: `like` may ask for an int where an int32 was, and vice versa."""
  if dtype is None or label(leaf) == dtype or dtype == "str" or dtype.startswith("key<"):
    return leaf
  if np.ndim(leaf) or is_prng_key(leaf) or isinstance(leaf, str):
    return leaf
  plain = {"bool": bool, "int": int, "float": float, "complex": complex}.get(dtype)
  value = np.asarray(leaf)[()]
  return plain(value) if plain else np.asarray(value).astype(jax.numpy.dtype(dtype))


def _view(path: str, leaf: Any, every_copy: bool) -> _Leaf:
  name = label(leaf)
  processes = jax.process_count()
  if not hasattr(leaf, "dtype"):
    bits = np.frombuffer(leaf.encode(), np.uint8) if name == "str" else np.asarray(leaf, _SCALARS[name])
    floats = bits.dtype if name in ("float", "complex") else None
    return _host_leaf(path, name, () if name != "str" else bits.shape, bits, floats, every_copy)
  shape = tuple(leaf.shape)
  array = jax.random.key_data(leaf) if is_prng_key(leaf) else leaf
  dtype = array.dtype
  floats = _floats(dtype)
  if not isinstance(array, jax.Array):
    return _host_leaf(path, name, shape, np.asarray(array), floats, every_copy)
  bits_shape = array.shape + ((2,) if dtype.itemsize == 16 else ())
  out = _Leaf(path, name, shape, bits_shape, floats, [])
  if is_on_accelerator(array):
    return out
  if (place := one_device(array.sharding)) is not None:
    if place == "here":
      # A state that lives on one device of its own process: in a job of many each has one.
      if every_copy or jax.process_index() == 0 or processes == 1:
        out.pieces = [(host_view(array), (0,) * array.ndim)]
      out.copies = processes if every_copy else 1
    return out
  for shard in array.addressable_shards:
    if every_copy or shard.replica_id == 0:
      start = tuple(s.start or 0 for s in shard.index)
      out.pieces.append((host_view(shard.data), start))
  if every_copy:
    indices = array.sharding.devices_indices_map(array.shape).values()
    out.copies = len(indices) // len({tuple((s.start, s.stop) for s in index) for index in indices})
  return out


def _host_leaf(
  path: str, name: str, shape: tuple[int, ...], value: np.ndarray, floats: np.dtype | None, every_copy: bool
) -> _Leaf:
  # Every process holds a numpy leaf; process 0 is whose copy is saved.
  mine = every_copy or jax.process_index() == 0
  bits_shape = value.shape + ((2,) if value.dtype.itemsize == 16 else ())
  out = _Leaf(path, name, shape, bits_shape, floats, [], jax.process_count() if every_copy else 1)
  if every_copy:
    out.pieces = [(value, (0,) * value.ndim)]
  elif mine:  # summing up is faster than a copy
    out.done = sums.Tally()
    sums.add_block(out.done, bits_of(value), (0,) * len(bits_shape), bits_shape, floats)
  return out


def is_on_accelerator(leaf: Any) -> bool:
  """Whether a leaf's bits lie in the memory of an accelerator."""
  if _has_cpu_alone() or not isinstance(leaf, jax.Array) or leaf.size == 0:
    return False
  return _is_on_accelerator(leaf.sharding)


@functools.cache
def _has_cpu_alone() -> bool:
  return jax.default_backend() == "cpu"


@functools.lru_cache(maxsize=4096)
def _is_on_accelerator(sharding: jax.sharding.Sharding) -> bool:
  if sharding.memory_kind in ("pinned_host", "unpinned_host"):
    return False  # parked in host memory
  one: jax.Device = next(iter(sharding.device_set))
  return one.platform != "cpu"


def bits_of(array: np.ndarray) -> np.ndarray:
  """The bits of an array as unsigned integers, C-contiguous; the same memory wherever that is possible."""
  dtype, shape = array.dtype, array.shape
  if not dtype.isnative:
    array = array.astype(dtype.newbyteorder("="))
  if not array.flags.c_contiguous:
    array = np.ascontiguousarray(array).reshape(shape)
  if dtype.itemsize == 16:
    return array.reshape(*shape, 1).view(np.uint64)
  bits = (array if shape else array.reshape(1)).view(_KEEPS_BITS[dtype.itemsize]).reshape(shape)
  width = _width(dtype)
  return bits & np.uint8((1 << width) - 1) if width < 8 else bits


@functools.cache
def _width(dtype: np.dtype) -> int:
  if dtype.itemsize > 1 or dtype.name in ("bool", "int8", "uint8"):
    return 8
  info = jax.numpy.iinfo if "int" in dtype.name else jax.numpy.finfo
  return info(dtype).bits


def _cut(bits: np.ndarray, start: tuple[int, ...]) -> Iterable[tuple[np.ndarray, tuple[int, ...]]]:
  start = start + (0,) * (bits.ndim - len(start))
  if bits.nbytes <= _TASK_NBYTES or bits.ndim == 0 or bits.shape[0] == 1:
    return [(bits, start)]
  step = max(1, _TASK_NBYTES * bits.shape[0] // bits.nbytes)
  return [(bits[i : i + step], (start[0] + i, *start[1:])) for i in range(0, bits.shape[0], step)]


def _in_threads(function: Any, tasks: Sequence[Any], threads: int) -> Iterable[Any]:
  if threads <= 1 or len(tasks) <= 1:
    return [function(task) for task in tasks]
  with concurrent.futures.ThreadPoolExecutor(threads) as pool:
    # In bunches: a task may be a leaf of a few bytes.
    bunches = [tasks[i::threads] for i in range(threads)]
    done = list(pool.map(lambda bunch: [function(task) for task in bunch], bunches))
  out: list[Any] = [None] * len(tasks)
  for i, results in enumerate(done):
    out[i::threads] = results
  return out
