"""Fingerprints of a state's leaves: what training holds when it saves, and what a restore delivers.

A fingerprint covers path, dtype, shape and all bits of a leaf. It is the same however the leaf is sharded, on however
many processes, and in whatever form a checkpoint stores it (packed, compressed, re-encoded), since it is taken of the
state and not of files. Bits count, not values: -0.0 differs from 0.0, and so do NaNs with different payloads.

There are two. The sum (see `sums`) can be computed from any cut of an array, at some 6 GB/s on one core. The hash is
XXH3 (https://github.com/Cyan4973/xxHash) of each shard, seeded with the shard's number and added up: it runs at the
speed of memory, but can be compared only if a restore delivers the same shards, as it does on the mesh of the save.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from ckpt_jax.integrity import sums
from ckpt_jax.integrity.sums import Tally
from ckpt_jax.layout.encoding import dtype_name, is_prng_key
from ckpt_jax.layout.placing import Unplaced
from ckpt_jax.layout.ring import Values
from ckpt_jax.layout.sharding import Box, box_of, one_device, replicas
from ckpt_jax.layout.staging import HostCopies, is_on_accelerator
from ckpt_jax.layout.structure import Flat
from ckpt_jax.storage.parallel import in_threads

_TASK_NBYTES = 32 << 20  # larger pieces are cut for the threads to share
_SCALARS = {"bool": np.uint8, "int": np.int64, "float": np.float64, "complex": np.complex128}
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_Pieces = dict[str, list[tuple[Values, tuple[int, ...]]]]  # what returns the values, and the index of the first one
_Task = tuple[Sequence[str], Callable[[], Tally | list[Tally]]]  # what finds a tally for each path


@dataclasses.dataclass(frozen=True)
class LeafPrint:
  """The fingerprint of one leaf.

  Attributes:
    dtype: numpy's name, Python's for its scalars, `key<impl>` for PRNG keys.
    shape: shape of the leaf.
    total: the sum of its bits (see `sums`).
    hash: shape of its shards when it was saved, and the sum of their hashes; None if no process had whole shards in
      host memory, or by a version without hashes.
  """

  dtype: str
  shape: tuple[int, ...]
  total: int
  hash: tuple[tuple[int, ...], int] | None = None


@dataclasses.dataclass(frozen=True)
class Leaf:
  """A leaf without its values.

  Attributes:
    dtype, shape: as in `LeafPrint`.
    bits_shape: shape of its bits as unsigned integers: that of the key data, or with the two halves of a complex128.
    part: shape of its shards, as in `bits_shape`; None if they are not hashed, since they are saved in parts.
    floats: the dtype if its numbers may be non-finite, else None.
    place: `own` if each process has the whole leaf for itself; `elsewhere` on one device of another process; in
      `shards`.
    copies: how often the leaf exists, over all processes.
    times: how many copies of this process one that is summed stands for.
  """

  dtype: str
  shape: tuple[int, ...]
  bits_shape: tuple[int, ...]
  part: tuple[int, ...] | None
  floats: np.dtype | None
  place: str
  copies: int
  times: int = 1


@dataclasses.dataclass
class Taken:
  """Copies of a state, from which tallies are made: quick to start while training waits, summed in the background.

  On a CPU these are zero-copy views that keep the buffers alive: jax copies a viewed buffer instead of donating it.
  From accelerators they are on their way to pinned memory (see `layout.staging`).

  Attributes:
    leaves: by path.
    pieces: what this process has yet to sum of each leaf.
    summed: tallies that are known already.
    own: dtype, shape and hash of each leaf that every process of a job has for itself; empty in one process.
    copies: in host memory, for the writing of the same arrays.
    health: of what this process has of each leaf, if it was looked at before.
  """

  leaves: dict[str, Leaf] = dataclasses.field(default_factory=dict)
  pieces: _Pieces = dataclasses.field(default_factory=dict)
  summed: dict[str, Tally] = dataclasses.field(default_factory=dict)
  own: dict[str, str] = dataclasses.field(default_factory=dict)
  copies: HostCopies = dataclasses.field(default_factory=HostCopies)
  health: Mapping[str, Tally] = dataclasses.field(default_factory=dict)

  def of(self, paths: Collection[str]) -> Taken:
    """Those of some leaves."""
    return dataclasses.replace(
      self,
      leaves={path: self.leaves[path] for path in paths},
      pieces={path: self.pieces[path] for path in paths if path in self.pieces},
      summed={path: self.summed[path] for path in paths if path in self.summed},
    )

  def tallies(
    self,
    threads: int,
    *,
    fingerprint: bool = True,
    health: bool = True,
    hashed: Collection[str] | None = None,
    last: bool = False,
  ) -> dict[str, Tally]:
    """Sums, hashes and health of this process's part, by leaf path.

    Args:
      threads: how many share the work.
      fingerprint, health: which are wanted.
      hashed: paths of leaves to hash and not to sum, while the others are summed and not hashed; None does both for
        all.
      last: whether the values are not needed again, so that a ring may use their memory for others.
    """
    out = {path: Tally() for path in self.leaves}

    def add(found: Mapping[str, Tally]) -> None:
      for path, tally in found.items():
        out[path].add(tally)

    add(self.summed)
    for pieces in self._in_turn():
      tasks = list(self._tasks(pieces, threads, fingerprint, health, hashed))
      for found in _run(tasks, threads):
        add(found)
      del tasks  # views of the pieces
      if last and self.copies.by_piece:
        for values, _ in itertools.chain.from_iterable(pieces.values()):
          values.done()
    return out

  def _in_turn(self) -> list[_Pieces]:
    """The pieces, those that arrive together in one group."""
    if not self.copies.in_turn:
      return [self.pieces]
    groups: dict[int, _Pieces] = {}
    for path, pieces in self.pieces.items():
      for values, start in pieces:
        groups.setdefault(values.turn, {}).setdefault(path, []).append((values, start))
    return [groups[turn] for turn in sorted(groups)]

  def _tasks(
    self, of: _Pieces, threads: int, fingerprint: bool, health: bool, hashed: Collection[str] | None
  ) -> Iterator[_Task]:
    alike: dict[Any, list[tuple[str, np.ndarray]]] = collections.defaultdict(list)
    for path, pieces in of.items():
      leaf = self.leaves[path]
      floats = leaf.floats if health else None
      hash_it = fingerprint and leaf.part is not None and (hashed is None or path in hashed)
      sum_it = fingerprint and (hashed is None or not hash_it)
      for values, start in pieces:
        bits = bits_of(values())
        if 0 < bits.nbytes <= sums.SMALL_NBYTES and bits.shape == leaf.bits_shape:
          alike[bits.shape, bits.dtype, floats, sum_it, hash_it].append((path, bits))
          continue
        if hash_it:
          yield [path], functools.partial(_hashed, leaf, bits, start)
        if bits.size > 0 and (sum_it or floats is not None):
          for part, at in _cut(bits, start):
            yield [path], functools.partial(sums.tally_block, part, at, leaf.bits_shape, floats, fingerprint=sum_it)
    for (*_, floats, sum_it, hash_it), members in alike.items():
      for i in range(min(threads, len(members))):
        paths, blocks = zip(*members[i::threads], strict=True)
        yield paths, functools.partial(sums.tally_alike, blocks, floats, fingerprint=sum_it, hashed=hash_it)

  def in_parts_of(self, saved: Mapping[str, LeafPrint]) -> set[str]:
    """Paths of the leaves that are in the same shards as those of which `saved` has hashes."""
    known = {path: saved[path].hash for path in self.leaves if path in saved}
    return {path for path, hash_ in known.items() if hash_ is not None and hash_[0] == self.leaves[path].part}


def take(state: Flat, copies: HostCopies | None = None) -> Taken:
  """Views of a state that is about to be saved; of replicated values one copy is counted.

  `copies` are of its arrays, for the writing of the same ones.
  """
  structure, leaves = state.structure, state.leaves
  copies = HostCopies() if copies is None else copies
  single, first = jax.process_count() == 1, jax.process_index() == 0
  described = structure.once(_describe_arrays, leaves)
  early, rest = copies, leaves
  if not single:  # copies of their own, since what is summed below must not wait for other pieces to be read
    own = [leaf is not None and leaf.place == "own" for leaf in described]
    early, rest = HostCopies(), [leaf for leaf, alone in zip(leaves, own, strict=True) if not alone]
    early.stage(list(itertools.compress(leaves, own)))
  copies.stage(rest)
  taken = _take(structure.names, leaves, described, copies, early)
  # Numpy arrays may be overwritten once `save` returns, and summing them now is faster than a copy. In a job of many
  # each process has its own, of which process 0's is saved.
  now = {
    path: taken.pieces.pop(path)
    for path, leaf in zip(structure.names, leaves, strict=True)
    if taken.leaves[path].place == "own" and not (single and isinstance(leaf, jax.Array))
  }
  if now:
    found = Taken({path: taken.leaves[path] for path in now}, now).tallies(1, hashed=None if first else now)
    taken.summed = found if first else {}
    if not single:
      labels = {path: f"{taken.leaves[path].dtype}{list(taken.leaves[path].shape)}" for path in now}
      taken.own = {path: f"{of} {found[path].hash:016x}" for path, of in labels.items()}
  return taken


def take_some(arrays: Mapping[str, jax.Array], copies: HostCopies) -> Taken:
  """Copies of what this process saves of some arrays of a state, by path, for one reader."""
  copies.stage([*arrays.values()])
  taken = _take([*arrays], [*arrays.values()], [None] * len(arrays), copies, copies)
  copies.settled()
  return taken


def take_restored(leaves: Mapping[str, Any], saved_as: Mapping[str, str]) -> Taken:
  """Views of restored leaves, by path; every copy of replicated values is counted, since each may be wrong.

  Of copies that went, or will go (`Unplaced`), to accelerators of this process from the same memory one is summed.
  `saved_as` has the dtypes, for leaves that may have come back as another type of number (a Python int as int32).
  """
  values = [_as_saved(leaf, saved_as.get(path)) for path, leaf in leaves.items()]
  copies = HostCopies()
  copies.stage(values)
  return _take(list(leaves), values, [None] * len(values), None, copies)


def _take(
  names: Sequence[str],
  leaves: Sequence[Any],
  known: Sequence[Leaf | None],
  copies: HostCopies | None,
  own: HostCopies,
) -> Taken:
  """Views of leaves.

  Args:
    names, leaves, known: of each leaf, the description if there is one.
    copies: of what is about to be saved; None for what was restored.
    own: of the leaves that each process has for itself, or of all that were restored.
  """
  taken = Taken(copies=copies or own)
  for path, values, leaf in zip(names, leaves, known, strict=True):
    if leaf is None:
      values, leaf = _describe(values)
    if leaf.place == "shards" and copies is None:
      taken.pieces[path], times = _restored_shards(values, own)
      leaf = dataclasses.replace(leaf, times=times)
    elif leaf.place == "shards" or (leaf.place == "own" and isinstance(values, jax.Array)):
      taken.pieces[path], whole = _saved_pieces(values, own if copies is None or leaf.place == "own" else copies)
      leaf = leaf if whole else dataclasses.replace(leaf, part=None)
    elif leaf.place == "own":
      taken.pieces[path] = [(Values(_only(values)), ())]
    taken.leaves[path] = leaf
  return taken


def _saved_pieces(array: jax.Array, copies: HostCopies) -> tuple[list[tuple[Values, tuple[int, ...]]], bool]:
  """Values and first index of the pieces of an array that this process sums, and whether they are whole shards."""
  if copies.by_piece:
    _, whole, pieces = copies.pieces(array)
    return [(values, tuple([start for start, _ in box])) for box, values in pieces], whole
  if one_device(array.sharding) == "here":
    return [(copies.of(array), ())], True
  shards = [s for s in array.addressable_shards if s.replica_id == 0]
  return [(copies.of(s.data), tuple([i.start or 0 for i in s.index])) for s in shards], True


def _only(values: np.ndarray | Unplaced) -> np.ndarray:
  """The values of a leaf of which this process has all."""
  return next(iter(values.regions.values())) if isinstance(values, Unplaced) else values


def _restored_shards(
  array: jax.Array | Unplaced, copies: HostCopies
) -> tuple[list[tuple[Values, tuple[int, ...]]], int]:
  """Values and first index of the shards of this process to sum, and how often each is there."""
  found: list[tuple[Box, Values]]
  if isinstance(array, Unplaced):
    found = [(box, Values(array.at(box))) for _, box in array.shards()]
  else:
    found = [(box_of(s.index, array.shape), copies.of(s.data)) for s in array.addressable_shards]
  counts = collections.Counter(box for box, _ in found)
  # On a CPU each device has memory of its own.
  from_same_memory = isinstance(array, Unplaced) or is_on_accelerator(array)
  times = math.gcd(*counts.values()) if from_same_memory else 1
  left = {box: count // times for box, count in counts.items()}
  pieces: list[tuple[Values, tuple[int, ...]]] = []
  for box, values in found:
    if left[box]:
      left[box] -= 1
      pieces.append((values, tuple(start for start, _ in box)))
  return pieces, times


def _describe_arrays(leaves: Sequence[Any]) -> list[Leaf | None]:
  """Descriptions of the leaves that look the same at the next save: jax arrays."""
  arrays = [leaf if isinstance(leaf, jax.Array) and not is_prng_key(leaf) else None for leaf in leaves]
  return [None if array is None else _describe(array)[1] for array in arrays]


def _describe(leaf: Any) -> tuple[Any, Leaf]:
  """The values of a leaf as an array of numbers, and its description."""
  name, values = label(leaf), leaf
  if not hasattr(leaf, "dtype"):
    values = np.frombuffer(leaf.encode(), np.uint8) if name == "str" else np.asarray(leaf, _SCALARS[name])
  elif is_prng_key(leaf):
    values = jax.random.key_data(leaf)
  elif not isinstance(leaf, (jax.Array, Unplaced)):
    values = np.asarray(leaf)
  shape = tuple(leaf.shape if hasattr(leaf, "dtype") else values.shape)  # of text: its bytes
  halves = (2,) if values.dtype.itemsize == 16 else ()
  part: tuple[int, ...] = (*values.shape, *halves)
  place, copies = "own", jax.process_count()
  if isinstance(values, (jax.Array, Unplaced)):
    where = one_device(values.sharding)
    if where is None:
      place, copies = "shards", replicas(values.sharding, values.shape)
      part = (*values.sharding.shard_shape(values.shape), *halves)
    elif where == "elsewhere":
      place = where
  floats = np.dtype(values.dtype) if sums.is_float(values.dtype) else None
  return values, Leaf(name, shape, (*values.shape, *halves), part, floats, place, copies)


def label(leaf: Any) -> str:
  """The name of a leaf's type: numpy's, Python's for its scalars, `key<impl>` for PRNG keys."""
  if isinstance(leaf, (bool, int, float, complex, str)) and not isinstance(leaf, np.generic):
    return type(leaf).__name__
  return dtype_name(leaf.dtype)


def _as_saved(leaf: Any, dtype: str | None) -> Any:
  """`leaf` as the type of number it was saved as: `like` may ask for an int where an int32 was, and vice versa."""
  if dtype is None or label(leaf) == dtype or dtype == "str" or dtype.startswith("key<"):
    return leaf
  if np.ndim(leaf) or is_prng_key(leaf) or isinstance(leaf, str):
    return leaf
  plain = {"bool": bool, "int": int, "float": float, "complex": complex}.get(dtype)
  value = np.asarray(leaf)[()]
  return plain(value) if plain else np.asarray(value).astype(jax.numpy.dtype(dtype))


def bits_of(array: np.ndarray) -> np.ndarray:
  """The bits of an array as unsigned integers, C-contiguous; the same memory if possible."""
  dtype, shape = array.dtype, array.shape
  if not dtype.isnative:
    array = array.astype(dtype.newbyteorder("="))
  if not array.flags.c_contiguous:
    array = np.ascontiguousarray(array)
  if dtype.itemsize == 16:
    return array.reshape(*shape, 1).view(np.uint64)
  bits = array.view(_UNSIGNED[dtype.itemsize])
  return bits if (mask := _mask(dtype)) is None else bits & mask


def tally_of_box(values: np.ndarray, box: Box, shape: tuple[int, ...]) -> Tally:
  """The sum of the bits of one box of an array of this shape."""
  bits = bits_of(values)
  halves = bits.shape[values.ndim :]  # of complex128
  start = (*(first for first, _ in box), *[0] * len(halves))
  return sums.tally_block(bits, start, (*shape, *halves))


@functools.cache
def _mask(dtype: np.dtype) -> np.uint8 | None:
  """The bits of a byte that count, for types of fewer than eight."""
  if dtype.itemsize > 1 or dtype.name in ("bool", "int8", "uint8"):
    return None
  info = jax.numpy.iinfo if "int" in dtype.name else jax.numpy.finfo
  return np.uint8((1 << info(dtype).bits) - 1)


def _cut(bits: np.ndarray, start: tuple[int, ...]) -> list[tuple[np.ndarray, tuple[int, ...]]]:
  first, *rest = (*start, *(0,) * (bits.ndim - len(start)))
  step = max(1, _TASK_NBYTES * len(bits) // bits.nbytes)
  return [(bits[i : i + step], (first + i, *rest)) for i in range(0, len(bits), step)]


def _hashed(leaf: Leaf, bits: np.ndarray, start: tuple[int, ...]) -> Tally:
  """Hash of one shard, seeded with the shard's number, so that swapped shards differ."""
  number = 0
  assert leaf.part is not None
  for begin, size, part in zip(start, leaf.bits_shape, leaf.part, strict=False):  # the halves of complex128 are not cut
    number = number * (size // max(1, part)) + begin // max(1, part)
  low, high = sums.hash_bits(bits, number)
  return Tally(hash=low, high=high)


def _run(tasks: Sequence[_Task], threads: int) -> list[dict[str, Tally]]:
  """What each thread found, by path."""

  def run(mine: Sequence[_Task]) -> dict[str, Tally]:
    out: dict[str, Tally] = collections.defaultdict(Tally)
    for paths, tally in mine:
      found = tally()
      for path, one in zip(paths, found if isinstance(found, list) else [found], strict=True):
        out[path].add(one)
    return out

  if threads == 1:
    return [run(tasks)]
  return in_threads(run, [tasks[i::threads] for i in range(threads)], threads=threads)
