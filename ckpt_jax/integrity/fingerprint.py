"""Fingerprints of a state's leaves: what training holds when it saves, what it gets when it restores.

A fingerprint says path, dtype, shape and all bits of a leaf. It is the same however the leaf is sharded, on how many
processes, and in whatever form a checkpoint stores it (packed, compressed, re-encoded), since it is taken of the state
and not of files. Bits, not values: -0.0 differs from 0.0, and NaNs with other payloads differ.

There are two of them. The sum (see `sums`) can be had of any cut of an array, at some 6 GB/s a core. The hash is XXH3
(https://github.com/Cyan4973/xxHash) of each part that one device held, seeded with the part's number and added up: at
the speed of memory, but comparable only where a restore delivers the same parts, as it does on the mesh of the save.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from ckpt_jax.integrity import device, sums
from ckpt_jax.layout.encoding import dtype_name, is_prng_key
from ckpt_jax.layout.memory import host_view
from ckpt_jax.layout.sharding import one_device, replicas
from ckpt_jax.layout.structure import Structure, look, path_name

PyTree = Any
_TASK_NBYTES = 32 << 20  # a larger piece is cut, for the threads to share
_BUNCH_NBYTES = 4 << 20  # of small leaves that make a task
_SCALARS = {"bool": np.uint8, "int": np.int64, "float": np.float64, "complex": np.complex128}
_KEEPS_BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


@dataclasses.dataclass(frozen=True)
class LeafPrint:
  """One leaf.

  Attributes:
    dtype: numpy's name, Python's for its scalars, `key<impl>` for PRNG keys.
    shape: the leaf's.
    total: the sum of its bits (see `sums`).
    hash: the shape of its parts as it was saved, and the sum of their hashes; None if it was saved from an accelerator,
      or by a version that did not hash.
  """

  dtype: str
  shape: tuple[int, ...]
  total: int
  hash: tuple[tuple[int, ...], int] | None = None


@dataclasses.dataclass(frozen=True)
class _Leaf:
  """A leaf apart from its values.

  Attributes:
    path, dtype, shape: as in a LeafPrint.
    bits_shape: of its unsigned integers: that of the key data, or with the two halves of a complex128.
    part: shape of the parts, in terms of `bits_shape`, of which there are hashes; None where the bits lie on a device.
    floats: the dtype, if health is to be tallied.
    place: `whole` in host memory; on `one` device of this process, or `elsewhere` on one of another; in `shards`; `far`
      on an accelerator.
    copies: how often it is there, over all processes, where every copy counts.
    plain: its bytes are its bits, and Python can hand them on.
  """

  path: str
  dtype: str
  shape: tuple[int, ...]
  bits_shape: tuple[int, ...]
  part: tuple[int, ...] | None
  floats: np.dtype | None
  place: str
  copies: int
  plain: bool

  @functools.cached_property
  def origin(self) -> tuple[int, ...]:
    """The first index of its values."""
    return (0,) * len(self.bits_shape)


@dataclasses.dataclass(slots=True)
class _Held:
  """What this process is to go through of a leaf: views and where in the array they lie, or sums on their way."""

  leaf: _Leaf
  pieces: Sequence[tuple[np.ndarray, tuple[int, ...]]] = ()
  on_device: tuple[jax.Array, ...] | None = None
  done: sums.Tally | None = None  # of what may be overwritten once `save` returns: numpy arrays
  own: str | None = None  # type, shape and hash of what each process of a job has for itself


@dataclasses.dataclass
class _Task:
  """What one thread sums up in one go: a part of a leaf at `start`, or whole small leaves of one shape and dtype."""

  floats: np.dtype | None
  shape: tuple[int, ...]
  sum: bool
  hash: bool = False
  start: tuple[int, ...] | None = None
  paths: list[str] = dataclasses.field(default_factory=list)
  blocks: list[np.ndarray] = dataclasses.field(default_factory=list)
  nbytes: int = 0

  def add(self, path: str, bits: np.ndarray) -> None:
    self.paths.append(path)
    self.blocks.append(bits)
    self.nbytes += bits.nbytes

  def run(self, health: bool) -> list[sums.Tally]:
    """One tally a block."""
    floats = self.floats if health else None
    if self.start is None:
      return sums.tally_alike(self.blocks, floats, fingerprint=self.sum, hashed=self.hash)
    part = sums.Tally()
    if self.sum:
      sums.add_block(part, self.blocks[0], self.start, self.shape, floats)
    elif floats is not None:
      sums.add_health(part, self.blocks[0], floats)
    return [part]


class Taken:
  """Views of a state, from which sums are made: cheap to take while training waits, to be summed up behind it.

  On a CPU these are zero-copy views that keep the buffers alive: jax copies instead of donating one that is looked at.
  On accelerators the sums are on their way when `take` returns.
  """

  def __init__(self, held: list[_Held], every_copy: bool):
    self._held = held
    self._every_copy = every_copy

  def tallies(
    self,
    threads: int,
    *,
    fingerprint: bool = True,
    health: bool = True,
    hashed: Collection[str] | None = None,
  ) -> dict[str, sums.Tally]:
    """Sums, hashes and health, or some of them, by leaf path: of this process's part, or of all that is on a device.

    Args:
      threads: how many share the work.
      fingerprint, health: what is asked for.
      hashed: paths of leaves to be hashed and not summed up, while the others are summed up and not hashed; None does
        both with all.
    """
    out = {held.leaf.path: sums.Tally() for held in self._held}
    tasks: list[_Task] = []
    alike: dict[Any, _Task] = {}
    to_hash: list[tuple[_Leaf, np.ndarray, tuple[int, ...]]] = []
    for held in self._held:
      leaf = held.leaf
      hash_it = fingerprint and (hashed is None or leaf.path in hashed)
      sum_it = fingerprint and (hashed is None or not hash_it)
      tally_it = sum_it or (health and leaf.floats is not None)
      for piece, at in held.pieces:
        bits = piece if leaf.plain and piece.flags.c_contiguous else bits_of(piece)
        if tally_it and 0 < bits.nbytes <= sums.SMALL_NBYTES and bits.shape == leaf.bits_shape:
          kind = (bits.shape, bits.dtype, leaf.floats, sum_it, hash_it)
          task = alike.get(kind)
          if task is None or task.nbytes > _BUNCH_NBYTES:
            task = alike[kind] = _Task(leaf.floats, leaf.bits_shape, sum_it, hash_it)
            tasks.append(task)
          task.add(leaf.path, bits)
          continue
        if hash_it:
          to_hash.append((leaf, bits, at))
        if tally_it:
          for part, start in _cut(bits_of(bits), at):
            tasks.append(_Task(leaf.floats, leaf.bits_shape, sum_it, start=start))
            tasks[-1].add(leaf.path, part)
    for task, parts in zip(tasks, _in_threads(lambda t: t.run(health), tasks, threads), strict=True):
      for path, part in zip(task.paths, parts, strict=True):
        out[path].add(part)
    for (leaf, _, _), found in zip(to_hash, _in_threads(lambda p: _hash(*p), to_hash, threads), strict=True):
      out[leaf.path].hash = out[leaf.path].hash + found & sums.MASK
    for held in self._held:
      if held.done is not None:
        out[held.leaf.path].add(held.done)
      if held.on_device is not None:
        tally = device.result(held.on_device)
        if held.leaf.floats is None or not health:
          tally.nonfinite, tally.nan, tally.squares = 0, 0, 0.0
        out[held.leaf.path].add(tally)
    return out

  def release(self) -> None:
    """Lets go of the state's buffers, once they are summed up."""
    for held in self._held:
      held.pieces = ()

  @property
  def counted_by_all(self) -> set[str]:
    """Leaves whose tally is already the total of all processes."""
    return {held.leaf.path for held in self._held if held.on_device is not None}

  def prints(self, totals: Mapping[str, int], hashes: Mapping[str, int]) -> dict[str, LeafPrint]:
    """The fingerprints, given the sums over all processes."""
    found = {}
    for held in self._held:
      leaf = held.leaf
      hash_ = None if leaf.part is None else (leaf.part, hashes[leaf.path] & sums.MASK)
      found[leaf.path] = LeafPrint(leaf.dtype, leaf.shape, totals[leaf.path] & sums.MASK, hash_)
    return found

  @property
  def own(self) -> dict[str, str]:
    """Of the leaves that each process of a job has for itself (numpy arrays, numbers, text), what tells them apart."""
    return {held.leaf.path: held.own for held in self._held if held.own is not None}

  @property
  def leaves(self) -> dict[str, _Leaf]:
    """What is known of each leaf, by path."""
    return {held.leaf.path: held.leaf for held in self._held}

  def in_parts_of(self, saved: Mapping[str, LeafPrint]) -> set[str]:
    """Paths of the leaves that lie in those parts of which `saved` has hashes."""
    return {
      h.leaf.path
      for h in self._held
      if (known := saved.get(h.leaf.path)) is not None and known.hash is not None and known.hash[0] == h.leaf.part
    }

  @property
  def on_accelerator(self) -> bool:
    return any(held.on_device is not None for held in self._held)

  @property
  def host_nbytes(self) -> int:
    """Bytes that this process has yet to go through."""
    return sum(piece.nbytes for held in self._held for piece, _ in held.pieces)

  @property
  def copies(self) -> dict[str, int]:
    """How often each leaf was counted, over all processes."""
    return {held.leaf.path: held.leaf.copies if self._every_copy else 1 for held in self._held}


def take(state: PyTree, *, every_copy: bool = False, saved_as: Mapping[str, str] | None = None) -> Taken:
  """Views of the leaves of `state`.

  Args:
    state: arrays, PRNG keys, scalars and text.
    every_copy: count replicas too, each of which could be the wrong one; otherwise each element counts once.
    saved_as: dtypes by path, for leaves that may have come back as another type of number (a Python int as int32).
  """
  if saved_as is None:
    structure, leaves = look(state)
    described = structure.once(_describe_arrays, structure, leaves)
    names: Sequence[str] = structure.names
  else:  # a few leaves of a step: the next ones are others
    found = jax.tree_util.tree_flatten_with_path(state)[0]
    names = [path_name(path) for path, _ in found]
    leaves = [_as_saved(leaf, saved_as.get(name)) for name, (_, leaf) in zip(names, found, strict=True)]
    described = [None] * len(leaves)
  mine = every_copy or jax.process_index() == 0
  held = [
    _Held(d, [(host_view(leaf), d.origin)] if mine else ())
    if d is not None and d.place == "one"  # thousands of them
    else _hold(name, leaf, d, every_copy, mine)
    for name, leaf, d in zip(names, leaves, described, strict=True)
  ]
  far = [i for i, h in enumerate(held) if h.leaf.place == "far"]
  arrays = [jax.random.key_data(leaves[i]) if is_prng_key(leaves[i]) else leaves[i] for i in far]
  for i, sums_ahead in zip(far, device.dispatch(arrays), strict=True):
    held[i].on_device = sums_ahead
  return Taken(held, every_copy)


def _describe_arrays(structure: Structure, leaves: Sequence[Any]) -> list[_Leaf | None]:
  """Those leaves that say nothing new at the next save: jax arrays."""
  return [
    _describe(name, leaf, leaf) if isinstance(leaf, jax.Array) and not is_prng_key(leaf) else None
    for name, leaf in zip(structure.names, leaves, strict=True)
  ]


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


def _hold(path: str, leaf: Any, described: _Leaf | None, every_copy: bool, mine: bool) -> _Held:
  values = leaf
  if described is None:
    if not hasattr(leaf, "dtype"):
      name = label(leaf)
      values = np.frombuffer(leaf.encode(), np.uint8) if name == "str" else np.asarray(leaf, _SCALARS[name])
    elif is_prng_key(leaf):
      values = jax.random.key_data(leaf)
    elif not isinstance(leaf, jax.Array):
      values = np.asarray(leaf)
    described = _describe(path, leaf, values)
  held = _Held(described)
  if described.place == "shards":
    shards = [s for s in values.addressable_shards if every_copy or s.replica_id == 0]
    held.pieces = [(host_view(s.data), tuple([i.start or 0 for i in s.index])) for s in shards]
  elif described.place == "one" and mine:
    # A state that lives on one device of its own process: in a job of many each has one.
    held.pieces = [(host_view(values), described.origin)]
  elif described.place == "whole" and every_copy:
    held.pieces = [(values, described.origin)]
  elif described.place == "whole":
    # Every process holds a numpy leaf; process 0 is whose copy is saved. Now: to sum up is faster than a copy.
    bits = bits_of(values)
    hash_ = _hash(described, bits, described.origin)
    if mine:
      held.done = sums.Tally()
      sums.add_block(held.done, bits, (0,) * bits.ndim, described.bits_shape, described.floats)
      held.done.hash = hash_
    if jax.process_count() > 1:
      held.own = f"{described.dtype}{list(described.shape)} {hash_:016x}"
  return held


def _describe(path: str, leaf: Any, values: Any) -> _Leaf:
  """What is known of a leaf, given its values as an array of numbers."""
  name, dtype = label(leaf), values.dtype
  shape = tuple(leaf.shape if hasattr(leaf, "dtype") else values.shape)  # of text: its bytes
  halves = (2,) if dtype.itemsize == 16 else ()
  bits_shape = (*values.shape, *halves)
  part: tuple[int, ...] | None = bits_shape
  copies = jax.process_count()
  if not isinstance(values, jax.Array):
    place = "whole"
  elif device.is_on_accelerator(values):
    place, part, copies = "far", None, 1
  elif (on := one_device(values.sharding)) is not None:
    place = "one" if on == "here" else on
  else:
    place, copies = "shards", replicas(values.sharding, values.shape)
    part = (*values.sharding.shard_shape(values.shape), *halves)
  return _Leaf(path, name, shape, bits_shape, part, _floats(dtype), place, copies, _is_plain(dtype))


@functools.cache
def _is_plain(dtype: np.dtype) -> bool:
  try:
    memoryview(np.empty(0, dtype))  # type: ignore[arg-type]
  except ValueError:  # bfloat16, float8 and the like
    return False
  return dtype.isnative and dtype.itemsize <= 8 and _width(dtype) == 8


def _hash(leaf: _Leaf, bits: np.ndarray, start: tuple[int, ...]) -> int:
  """The hash of one part, which is another one at another place."""
  number = 0
  if leaf.part != leaf.bits_shape:
    assert leaf.part is not None
    for begin, size, part in zip(start, leaf.bits_shape, leaf.part, strict=False):  # complex halves are not cut
      number = number * (size // max(1, part)) + begin // max(1, part)
  return sums.hash_bits(bits, number)


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
