"""Who writes what of a state: a pure function of shapes, dtypes and shardings, the same on all processes.

Orbax has each replica write 1/R of a shard, along an axis that R divides; where there is none, the first replica writes
all of it: with 3 replicas of 1024x512 arrays one process of three writes everything. Here a shard is cut into runs of
rows along any axis, more of them than replicas where they cannot be as many, and each run, or the whole of a small
shard, goes to the process that has least so far. Zarr's chunks form a regular grid, so the runs are multiples of one
chunk shape: it divides the shards, and the last chunk of an axis that is not sharded may be shorter.

Chunks are cut along the other axes too, so that a restore onto an orthogonal mesh (rows -> columns) reads little more
than it needs: a chunk is read whole.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import heapq
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, Sharding

from ckpt_jax.config import LayoutConfig
from ckpt_jax.layout.sharding import Box, box_of, intersection, merge_boxes, one_device, shape_of, within
from ckpt_jax.layout.structure import flatten

# A part costs 40 us on each side, as much as 40 kB at 1 GB/s. A cut across the rows costs a copy besides.
SLICE_NBYTES, _ACROSS = 64 * 1024, 2
# A run that is larger than this share of what a process writes on average would make the shares uneven.
_COARSE = 1 / 40
_LEAST_COARSE_NBYTES = 4096  # tiny states may be uneven
# How far from even R runs of one shard may be.
_UNEVEN = 1.02
_MOST_RUNS = 4  # of each replica, where evenness does not ask for more
_FINEST = 1 / 16  # of what is coarse: no finer where evenness does not ask for it
# An array of at most this size that one process alone holds is one chunk: one request instead of one for each device.
# Larger ones keep their pieces, since a later restore on more hosts reads whole chunks.
_JOINED_NBYTES = 32 * 2**20


@dataclasses.dataclass(frozen=True, eq=False)
class Held:
  """An array as the processes of a job hold it.

  Attributes:
    shape: of the whole array.
    itemsize: bytes of an element.
    shards: box of each distinct shard, sorted, and the processes that hold it, in ascending order.
  """

  shape: tuple[int, ...]
  itemsize: int
  shards: tuple[tuple[Box, tuple[int, ...]], ...]

  @functools.cached_property
  def piece(self) -> tuple[int, ...]:
    """The shape of a shard; all are alike."""
    return shape_of(self.shards[0][0])

  @functools.cached_property
  def processes(self) -> frozenset[int]:
    """Those that hold a part of it."""
    return frozenset(process for _, holders in self.shards for process in holders)

  @functools.cached_property
  def piece_nbytes(self) -> int:
    """Bytes of a shard."""
    return math.prod(self.piece) * self.itemsize

  @property
  def nbytes(self) -> int:
    """Bytes of the array."""
    return len(self.shards) * self.piece_nbytes


@dataclasses.dataclass(frozen=True, eq=False)
class Share:
  """Who writes what of one array.

  Attributes:
    chunks: the shape of its chunks.
    whole: whether all parts are whole shards.
    parts: process and box of each part. Together they cover the array once; each consists of whole chunks and is within
      one shard. A process has at most one of a shard, cut along one axis, unless a single axis is too short to be even.
  """

  chunks: tuple[int, ...]
  whole: bool
  parts: tuple[tuple[int, Box], ...]


@functools.lru_cache(maxsize=4096)
def held(shape: tuple[int, ...], itemsize: int, sharding: Sharding, process_of: tuple[int, ...] | None = None) -> Held:
  """How processes hold an array.

  An array on devices of this process alone counts as process 0's: a job of many saves such leaves only if all processes
  have the same.

  Args:
    shape: of the whole array.
    itemsize: bytes of an element.
    sharding: of the array; that over an abstract mesh needs `process_of`.
    process_of: of each device of the mesh, in its order; default: what the devices say.

  Raises:
    ValueError: if the sharding does not divide the shape.
  """
  if process_of is None and sharding.is_fully_addressable:
    found = {box_of(i, shape): (0,) for i in sharding.addressable_devices_indices_map(shape).values() if i is not None}
    return Held(shape, itemsize, tuple(sorted(found.items())))
  if not isinstance(sharding, NamedSharding):
    holders: dict[Box, set[int]] = collections.defaultdict(set)
    for device, index in sharding.devices_indices_map(shape).items():
      holders[box_of(index, shape)].add(device.process_index)  # type: ignore[attr-defined]
    return Held(shape, itemsize, tuple(sorted((box, tuple(sorted(some))) for box, some in holders.items())))
  piece = sharding.shard_shape(shape)
  mesh: Any = sharding.mesh
  names = mesh.axis_names
  grid = _process_grid(mesh) if process_of is None else np.array(process_of)
  by_dim = [
    (e,) if isinstance(e, str) else tuple(e or ()) for e in [*sharding.spec, *[None] * len(shape)][: len(shape)]
  ]
  used = [name for axes in by_dim for name in axes]
  order = [names.index(name) for name in [*used, *[n for n in names if n not in used]]]
  counts = [math.prod(mesh.shape[name] for name in axes) for axes in by_dim]
  cells = grid.reshape([mesh.shape[n] for n in names]).transpose(order).reshape(math.prod(counts), -1)
  boxes = (tuple((i * n, (i + 1) * n) for i, n in zip(at, piece, strict=True)) for at in np.ndindex(*counts))
  return Held(
    shape, itemsize, tuple((box, tuple(sorted({*row}))) for box, row in zip(boxes, cells.tolist(), strict=True))
  )


@functools.lru_cache(maxsize=64)
def _process_grid(mesh: Mesh) -> np.ndarray:
  return np.array([device.process_index for device in mesh.devices.flat])


@dataclasses.dataclass(frozen=True)
class Limits:
  """What the user or the plan says of the division.

  Attributes:
    divide: whether replicas write a part of a shard each.
    slice_nbytes: parts are not made smaller than this, unless the shares would be uneven; chunks not than twice this.
    across: whether chunks are cut across the rows of a process too.
  """

  divide: bool = True
  slice_nbytes: int = SLICE_NBYTES
  across: bool = True

  @classmethod
  def of(cls, layout: LayoutConfig) -> Limits:
    """Those of a configuration."""
    nbytes = layout.min_slice_for_replica_parallel
    nbytes = SLICE_NBYTES if nbytes == "auto" else nbytes
    return cls(layout.replica_parallel != "off", nbytes, layout.reshard != "off")


WHOLE = Limits(divide=False)  # of arrays that go into slabs


@dataclasses.dataclass(frozen=True)
class _Cut:
  """How the shards of an array are cut: the shapes of a chunk, and of a run, the least that a process writes."""

  chunks: tuple[int, ...]
  run: tuple[int, ...]


def share_out(arrays: Sequence[Held], limits: Limits = Limits(), loads: Mapping[int, int] | None = None) -> list[Share]:
  """Who writes what, so that all processes write as much, as far as what they hold allows.

  Args:
    arrays: of the state, in the same order on all processes.
    limits: see there.
    loads: bytes that processes write besides.
  """
  kinds = collections.Counter(arrays)  # thousands of arrays are of few kinds
  given = collections.Counter(loads or {})
  job = frozenset().union(*(array.processes for array in kinds), given)
  even = (sum(array.nbytes * n for array, n in kinds.items()) + given.total()) / max(1, len(job))
  cuts = {array: _cut(array, limits, max(even * _COARSE, _LEAST_COARSE_NBYTES)) for array in kinds}
  fixed: dict[Held, Share] = {}
  for array, n in kinds.items():
    if all(len(holders) == 1 for _, holders in array.shards):
      fixed[array] = Share(cuts[array].chunks, True, tuple((process, box) for box, (process,) in array.shards))
      for process, _ in fixed[array].parts:
        given[process] += n * array.piece_nbytes
  deal = _Deal(given)
  found = [fixed.get(array) for array in arrays]
  open_ = [i for i, share in enumerate(found) if share is None]
  for i in sorted(open_, key=lambda i: (-math.prod(cuts[arrays[i]].run) * arrays[i].itemsize, i)):
    cut = cuts[arrays[i]]
    found[i] = Share(cut.chunks, cut.run == arrays[i].piece, tuple(deal.parts(arrays[i], cut.run)))
  return [share for share in found if share is not None]


class _Deal:
  """Gives each run of rows to the process that has least so far, of those that hold it."""

  def __init__(self, loads: collections.Counter[int]):
    self._loads = loads
    # By holders. An entry of a process that has got more through other holders is mended when it comes to the top.
    self._heaps: dict[tuple[int, ...], list[tuple[int, int]]] = {}

  def parts(self, array: Held, run: tuple[int, ...]) -> Iterator[tuple[int, Box]]:
    """Process and box of each part of an array, whose shards are cut into runs of a shape."""
    nbytes = math.prod(run) * array.itemsize
    counts = [-(-size // length) if size else 1 for size, length in zip(array.piece, run, strict=True)]
    runs = math.prod(counts)
    for box, holders in array.shards:
      heap = self._heaps.setdefault(holders, [])
      if not heap:
        heap += sorted((self._loads[p], p) for p in holders)
      if runs == 1:
        yield self._least(heap, nbytes), box
        continue
      dealt, at = collections.Counter(self._least(heap, nbytes) for _ in range(runs)), 0
      for process, n in sorted(dealt.items()):
        part = _interval(box, run, counts, at, at + n)
        self._loads[process] += sum(math.prod(shape_of(b)) for b in part) * array.itemsize - n * nbytes
        yield from ((process, b) for b in part)
        at += n

  def _least(self, heap: list[tuple[int, int]], nbytes: int) -> int:
    """The process of a heap that has least; it gets `nbytes` more."""
    while heap[0][0] != self._loads[process := heap[0][1]]:
      heapq.heapreplace(heap, (self._loads[process], process))
    self._loads[process] += nbytes
    heapq.heapreplace(heap, (self._loads[process], process))
    return process


def _interval(box: Box, run: tuple[int, ...], counts: Sequence[int], start: int, stop: int) -> tuple[Box, ...]:
  """Few boxes that cover the runs `start` to `stop` of a box, which consists of `counts` runs along each axis."""
  cut = [axis for axis, n in enumerate(counts) if n > 1]
  if len(cut) < 2:
    return (tuple(_span(s, run[a], start, stop) if a in cut else s for a, s in enumerate(box)),)
  cells = (np.unravel_index(i, counts) for i in range(start, stop))
  return merge_boxes(
    [tuple(_span(s, n, int(i), int(i) + 1) for s, n, i in zip(box, run, at, strict=True)) for at in cells]
  )


def _span(span: tuple[int, int], length: int, start: int, stop: int) -> tuple[int, int]:
  return span[0] + start * length, min(span[0] + stop * length, span[1])


class Slices(NamedTuple):
  """What this process writes of an array.

  Attributes:
    chunks: the shape of the array's chunks.
    whole: whether all parts, those of other processes too, are whole shards.
    parts: of each the box in the array, the single-device array that holds it, and the part of that; None for all.
  """

  chunks: tuple[int, ...]
  whole: bool
  parts: list[tuple[Box, jax.Array, tuple[slice, ...] | None]]


def slices(arrays: Sequence[jax.Array], limits: Limits, beside: int = 0) -> list[Slices]:
  """This process's part of `share_out`, which is computed once for arrays that are alike.

  Args:
    arrays: all that are saved together, in the same order on all processes.
    limits: see there.
    beside: bytes that the first process writes besides: leaves that are no jax arrays.
  """
  found = flatten([*arrays]).structure.once(_question(limits, beside), arrays)
  return [
    Slices(chunks, whole, _sources(array, parts)) for array, (chunks, whole, parts) in zip(arrays, found, strict=True)
  ]


def _sources(
  array: jax.Array, parts: Sequence[tuple[Box, int, tuple[slice, ...] | None]]
) -> list[tuple[Box, jax.Array, tuple[slice, ...] | None]]:
  if one_device(array.sharding) == "here":  # the same, without the cost of a list of shards
    return [(box, array, cut) for box, _, cut in parts]
  return [(box, array.addressable_shards[i].data, cut) for box, i, cut in parts]


@functools.lru_cache(maxsize=64)  # `Structure.once` remembers answers by the object that asks
def _question(limits: Limits, beside: int) -> Callable[[Sequence[jax.Array]], list[Any]]:
  return functools.partial(_own, limits=limits, loads={0: beside})


def _own(arrays: Sequence[jax.Array], limits: Limits, loads: Mapping[int, int]) -> list[Any]:
  """`Slices` with the number of the addressable shard in place of the array."""
  shares = share_out([held(a.shape, a.dtype.itemsize, a.sharding) for a in arrays], limits, loads)
  me, found = jax.process_index(), []
  for array, share in zip(arrays, shares, strict=True):
    boxes = [box for process, box in share.parts if process == me]
    shards = [box_of(shard.index, array.shape) for shard in array.addressable_shards] if boxes else []
    at = [next(i for i, shard in enumerate(shards) if intersection(box, shard) == box) for box in boxes]
    cuts = [None if shards[i] == box else within(box, shards[i]) for box, i in zip(boxes, at, strict=True)]
    found.append((share.chunks, share.whole, [*zip(boxes, at, cuts, strict=True)]))
  return found


def nbytes_by_process(arrays: Sequence[Held], shares: Sequence[Share]) -> dict[int, int]:
  """The bytes that each process writes; 0 for one that only holds replicas of what others write."""
  nbytes = dict.fromkeys(sorted(frozenset().union(*(array.processes for array in {*arrays}))), 0)
  for (share, itemsize), n in collections.Counter(zip(shares, (a.itemsize for a in arrays), strict=True)).items():
    for process, box in share.parts:
      nbytes[process] += n * math.prod(shape_of(box)) * itemsize
  return nbytes


def resharding(array: Held, chunks: tuple[int, ...]) -> float:
  """Bytes that all processes read of an array, over its own, if each wants a part of its longest axis not sharded yet.

  1 if they cannot divide that axis.
  """
  parts = len(array.processes)
  axes = [i for i, n in enumerate(array.shape) if n and n == array.piece[i] and n % parts == 0]
  axis = max(axes, key=lambda i: array.shape[i], default=None)
  return 1.0 if axis is None else max(1.0, min(chunks[axis], array.shape[axis]) * parts / array.shape[axis])


# -- the shape of chunks


def _cut(array: Held, limits: Limits, coarse: float) -> _Cut:
  """How to cut the shards of an array, of which a run should have at most `coarse` bytes, or be one of R even ones."""
  if len(array.processes) == 1 and array.nbytes <= _JOINED_NBYTES:
    return _Cut(array.shape, array.piece)
  replicas = max(len(holders) for _, holders in array.shards)
  run = _run(array, replicas, limits, coarse) if replicas > 1 and limits.divide else array.piece
  chunks = list(run)
  # Jax divides axes evenly, so that a chunk that divides an axis is within one shard of any mesh with as few shards.
  room = math.prod(chunks) * array.itemsize // (_ACROSS * max(1, limits.slice_nbytes))
  for i in sorted(range(len(chunks)), key=lambda i: -chunks[i]) if limits.across else ():
    if chunks[i] == array.shape[i] and room > 1:
      pieces = max(d for d in _divisors(chunks[i]) if d <= min(room, len(array.processes)))
      chunks[i] //= pieces
      room //= pieces
  return _Cut(tuple(chunks), run)


def _run(array: Held, replicas: int, limits: Limits, coarse: float) -> tuple[int, ...]:
  """The shape of the runs that a shard is cut into: along one axis, or more if that is not fine enough."""
  needed = math.ceil(array.piece_nbytes / coarse)
  least = min(replicas, max(needed, int(array.piece_nbytes / max(1, limits.slice_nbytes, coarse * _FINEST))))
  run, smallest = array.piece, min(limits.slice_nbytes, coarse) / 4
  while least > 1:
    first, nbytes = run is array.piece, math.prod(run) * array.itemsize
    found: list[tuple[tuple[float, ...], tuple[int, ...]]] = []
    for axis, size in enumerate(run):
      for length in _lengths(size, least, max(least, needed), whole=first and size == array.shape[axis]):
        runs, rest, unequal = -(-size // length), nbytes // size * length, size % length > 0
        if runs == 1 or rest < smallest:
          continue
        # Few runs, along an early axis, whose rows are contiguous, and of equal length, which other meshes can use.
        many = runs if runs > _MOST_RUNS * least else 0
        is_even = first and -(-runs // replicas) * length * replicas <= _UNEVEN * size
        rank = (0, many > 0, axis, many, unequal, runs) if is_even or rest <= coarse else (1, unequal, rest)
        found.append((rank, (*run[:axis], length, *run[axis + 1 :])))
    if not found:
      break
    (is_coarse, *_), run = min(found)
    least, needed = (2, math.ceil(math.prod(run) * array.itemsize / coarse)) if is_coarse else (1, 1)
  return run


def _lengths(size: int, least: int, needed: int, *, whole: bool) -> set[int]:
  """Lengths of runs, few of them or `needed`; `whole`: chunks need not divide the axis."""
  few = range(min(least, size), min(_MOST_RUNS * least, size) + 1)
  divisors = [runs for runs in _divisors(size) if runs >= few.start]
  found = {size // runs for runs in divisors if runs in few}
  found.add(size // next((runs for runs in divisors if runs >= needed), size))
  if whole:
    found |= {-(-size // runs) for runs in few} | {max(1, size // needed)}
  return found


@functools.lru_cache(maxsize=1024)
def _divisors(n: int) -> list[int]:
  small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
  return sorted({*small, *(n // d for d in small)})
