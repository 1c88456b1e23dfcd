"""Host copies of a state's arrays, for as long as a save writes and sums them.

On a CPU there is nothing to copy: a view of jax's memory keeps it from being reused. From an accelerator all pieces
that this process writes go to pinned host memory in one batched transfer, which returns at once: what donates the
arrays afterwards waits for it on the device. 901 leaves of 2.95 GB took 0.04 s to dispatch and 0.1 s to arrive on an
H200, and 0.9 s one by one through pageable memory. What does not fit into host memory goes through a ring (see `ring`).
"""

from __future__ import annotations

import collections
import concurrent.futures
import functools
import itertools
import math
import os
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax

from ckpt_jax.config.units import size_text
from ckpt_jax.errors import CheckpointError, ConfigError
from ckpt_jax.layout.encoding import as_words, is_prng_key
from ckpt_jax.layout.link import PINNED, has_pinned, known_link, pageable
from ckpt_jax.layout.ring import Copy, Cut, Late, Part, Ring, Values
from ckpt_jax.layout.sharding import Box, box_of, one_device, shape_of, split_box, whole_box
from ckpt_jax.layout.shares import Limits, Slices, slices

_HOST_KINDS = (PINNED, "unpinned_host")
PINNED_LIMIT = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"
_COPYING_THREADS = 8  # for what is in host memory already
as_accelerators = False  # tests: devices of a CPU count as accelerators


def has_accelerators() -> bool:
  """Whether states are in the memory of accelerators, as a rule."""
  return as_accelerators or jax.default_backend() != "cpu"


def pinned_limit() -> int | None:
  """Bytes of pinned memory that XLA gives this process; None if it sets no limit.

  Raises:
    ConfigError: if the variable is no whole number, at which XLA would end the process.
  """
  if jax.default_backend() != "gpu" and not as_accelerators:
    return None
  text = os.environ.get(PINNED_LIMIT, "64")
  try:
    return int(text) * 2**30
  except ValueError:
    raise ConfigError(f"{PINNED_LIMIT}={text!r}: XLA takes a whole number of GiB", topic="pinned-memory") from None


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


class Pieces(NamedTuple):
  """The pieces of an array that this process saves.

  Attributes:
    chunks: the shape of the array's chunks.
    whole: whether all pieces, those of other processes too, are whole shards.
    pieces: box and values of each.
  """

  chunks: tuple[int, ...]
  whole: bool
  pieces: tuple[tuple[Box, Values], ...]


class HostCopies:
  """The pieces of arrays that this process saves, in host memory: views on a CPU, else copies on their way there.

  An object serves one save, or one pass over what was restored. It holds the arrays until `settled`, since an array's
  id may be used again after it.

  Attributes:
    ring: what brings the copies.
    in_turn: whether they have to be read wave by wave, see `ring`.
    by_piece: whether what is written is what should be summed, since other values would be copied for the sums alone.
    held: arrays, by id, of which what is in storage suffices: nothing is copied unless somebody asks for the values.
  """

  def __init__(self, limits: Limits | None = None, limit: int | None = None):
    """Copies nothing yet.

    Args:
      limits: of the division among processes; None for all that this process holds, once.
      limit: bytes that may be in host memory at a time; None for any number.
    """
    self._limits = limits
    self._on_cpu = not has_accelerators()
    self.ring = Ring(_send_views if self._on_cpu else _send, limit)
    self.in_turn = limit is not None
    self.by_piece = self.in_turn or not self._on_cpu
    self.held: dict[int, jax.Array] = {}
    self._plans: dict[int, tuple[jax.Array, Slices]] = {}
    self._pieces: dict[int, tuple[jax.Array, Pieces]] = {}
    self._whole: dict[int, tuple[jax.Array, Values]] = {}  # of single-device arrays
    self._devices_take_turns = itertools.count()

  @property
  def views_in_turn(self) -> bool:
    """Whether a ring holds views: the arrays themselves then take the memory that is short."""
    return self.in_turn and self._on_cpu

  def again(self, limit: int | None) -> HostCopies:
    """Copies of the same arrays, for one more pass over them or under another limit."""
    other = HostCopies(self._limits, limit)
    other._plans |= self._plans
    other.held |= self.held
    return other

  def plan(self, leaves: Sequence[Any], beside: int = 0) -> None:
    """Divides jax arrays among the processes, which all call it alike, with all leaves of a state.

    Args:
      leaves: of the state.
      beside: bytes that the first process saves besides.
    """
    several = [x for x in leaves if isinstance(x, jax.Array) and one_device(x.sharding) is None]
    self._divide([x for x in several if x.size > 0 and not is_prng_key(x)], beside)

  def nbytes(self, leaves: Sequence[Any]) -> int:
    """Bytes of what this process copies of jax arrays."""
    arrays = [x for x in _arrays(leaves) if id(x) not in self.held]
    plans = self._planned(arrays)
    return sum(_size(box) * x.dtype.itemsize for x, plan in zip(arrays, plans, strict=True) for box, _, _ in plan.parts)

  def boxes(self, array: jax.Array) -> tuple[Box, ...]:
    """What this process saves of an array, in the pieces in which it is stored."""
    return tuple([box for box, _, _ in self._stored(array, self._planned([array])[0]).parts])

  def stage(self, leaves: Sequence[Any]) -> None:
    """Starts to copy what this process saves of jax arrays: all of it, or what fits into the ring.

    What the user keeps in pinned memory is copied too: an update that donates it would overwrite a view. On a CPU
    without a ring there is nothing to do.
    """
    if not self.by_piece:
      return
    arrays = [
      x
      for x in _arrays(leaves)
      if not (id(x) in self._pieces or id(x) in self.held) and (self._on_cpu or belongs_to_accelerators(x.sharding))
    ]
    for array, plan in zip(arrays, self._planned(arrays), strict=True):
      self._pieces.setdefault(id(array), (array, self._queued(array, plan)))
    self.ring.start()

  def pieces(self, array: jax.Array) -> Pieces:
    """What this process saves of an array, for one more reader, who says `Values.done` of each piece."""
    if id(array) in self.held:
      plan, itemsize = self._stored(array, self._planned([array])[0]), array.dtype.itemsize
      late = [(box, Late(self.ring, shard, cut, _size(box) * itemsize)) for box, shard, cut in plan.parts]
      return Pieces(plan.chunks, plan.whole, tuple(late))
    if self.by_piece and array.size and (self._on_cpu or belongs_to_accelerators(array.sharding)):
      if id(array) not in self._pieces:
        self.stage([array])
      found = self._pieces[id(array)][1]
      for _, values in found.pieces:
        values.begin()
      return found
    if one_device(array.sharding) == "here":
      return Pieces(array.shape, True, ((whole_box(array.shape), self.of(array)),))
    chunks, whole, parts = self._planned([array])[0]
    pieces = [(box, self.of(shard) if cut is None else Values(self.of(shard)()[cut])) for box, shard, cut in parts]
    return Pieces(chunks, whole, tuple(pieces))

  def of(self, array: jax.Array) -> Values:
    """The values of a single-device array, for one more reader."""
    known = self._whole.get(id(array))
    if known is None:
      if self.by_piece and array.size and (self._on_cpu or belongs_to_accelerators(array.sharding)):
        return self.pieces(array).pieces[0][1]
      known = self._whole[id(array)] = array, Values(_view(array))
    if self.by_piece:
      known[1].begin()
    return known[1]

  def settled(self) -> None:
    """Forgets the arrays: all readers have their pieces, and what nobody will read makes room."""
    self.ring.settled()
    for known in (self._plans, self._pieces, self._whole, self.held):
      known.clear()

  def _divide(self, several: Sequence[jax.Array], beside: int = 0) -> None:
    new = [x for x in several if id(x) not in self._plans]
    if new:
      found = [_held(x) for x in new] if self._limits is None else slices(new, self._limits, beside)
      self._plans |= {id(x): (x, plan) for x, plan in zip(new, found, strict=True)}

  def _planned(self, arrays: Sequence[jax.Array]) -> list[Slices]:
    self._divide([x for x in arrays if one_device(x.sharding) is None])
    return [
      self._plans[id(x)][1] if id(x) in self._plans else Slices(x.shape, True, [(whole_box(x.shape), x, None)])
      for x in arrays
    ]

  @property
  def _most(self) -> int:
    """The largest piece in bytes: at most half of a ring, and a power of two, so that much the same ring cuts alike."""
    return sys.maxsize if self.ring.limit is None else 1 << max(0, (self.ring.limit // 2).bit_length() - 1)

  def _stored(self, array: jax.Array, plan: Slices) -> Slices:
    """What is planned of an array, in finer pieces if one would be too large for the ring."""
    if self.ring.limit is None:
      return plan
    itemsize, most, piece = array.dtype.itemsize, self._most, array.sharding.shard_shape(array.shape)
    chunks, parts = _finer(tuple(map(min, plan.chunks, piece)), plan.parts, itemsize, most)
    return Slices(chunks, plan.whole and math.prod(piece) * itemsize <= max(most, itemsize), parts)

  def _queued(self, array: jax.Array, plan: Slices) -> Pieces:
    """Queues what is planned of an array.

    A shard that this process writes all of, from one device or several, is sent whole: no program has to cut it.
    """
    itemsize, most = array.dtype.itemsize, self._most
    chunks, whole, parts = self._stored(array, plan)
    shards: dict[Box, list[jax.Array]] = {whole_box(array.shape): [array]}
    if one_device(array.sharding) is None:
      shards.clear()
      for shard in array.addressable_shards:
        shards.setdefault(box_of(shard.index, array.shape), []).append(shard.data)
    alike = {id(one): same for same in shards.values() for one in same}
    here: collections.Counter[int] = collections.Counter()
    for box, shard, _ in parts:
      here[id(alike[id(shard)][0])] += _size(box)
    pieces: list[tuple[Box, Values]] = []
    for box, shard, cut in parts:
      same = alike[id(shard)]
      complete = here[id(same[0])] >= shard.size
      if cut is not None and not (complete and shard.size * itemsize <= most):
        pieces.append((box, self.ring.add(shard, cut, _size(box) * itemsize)))
        continue
      if id(same[0]) not in self._whole:
        sender = same[next(self._devices_take_turns) % len(same)]
        copy = self.ring.add(sender, None, shard.size * itemsize)
        self._whole |= {id(one): (one, copy) for one in same}
      values = self._whole[id(same[0])][1]
      pieces.append((box, values if cut is None else Part(values, cut)))
    return Pieces(chunks, whole, tuple(pieces))


def _held(array: jax.Array) -> Slices:
  shards = {box_of(s.index, array.shape): s.data for s in array.addressable_shards}
  return Slices(array.sharding.shard_shape(array.shape), True, [(box, shard, None) for box, shard in shards.items()])


def _size(box: Box) -> int:
  """Number of elements of a box."""
  return math.prod(shape_of(box))


def _arrays(leaves: Sequence[Any]) -> list[jax.Array]:
  """The jax arrays among leaves of which this process has values; of typed PRNG keys their words."""
  found = [x for x in leaves if isinstance(x, jax.Array) and x.size > 0 and x.sharding.addressable_devices]
  return [as_words(x) for x in found]


def _finer(
  chunks: tuple[int, ...], parts: Sequence[tuple[Box, jax.Array, Cut | None]], itemsize: int, nbytes: int
) -> tuple[tuple[int, ...], list[tuple[Box, jax.Array, Cut | None]]]:
  """The shape of chunks of at most `nbytes`, and parts of whole chunks that take no more."""
  while math.prod(chunks) * itemsize > max(nbytes, itemsize):
    axis, size = _slice_of(chunks, int(nbytes / 2 / itemsize))
    chunks = (*chunks[:axis], size, *chunks[axis + 1 :])
  finer: list[tuple[Box, jax.Array, Cut | None]] = []
  for box, shard, cut in parts:
    inside = _bounds(cut, shard.shape)
    for some in split_box(box, chunks, itemsize, nbytes):
      offsets = [s.start - start for s, (start, _) in zip(inside, box, strict=True)]
      part = tuple([slice(start + o, stop + o) for (start, stop), o in zip(some, offsets, strict=True)])
      finer.append((some, shard, cut if some == box else part))
  return chunks, finer


@functools.lru_cache(maxsize=4096)
def _slice_of(shape: tuple[int, ...], most: int) -> tuple[int, int]:
  """An axis, and a divisor of its size, that cut slices of at most `most` elements, and as large as possible.

  If one axis is not enough, the longest one is cut into single rows.
  """
  found = []
  for axis, n in enumerate(shape):
    row = math.prod(shape) // n
    divisors = (d for small in range(1, math.isqrt(n) + 1) if n % small == 0 for d in (small, n // small))
    size = max((d for d in divisors if d * row <= most), default=0)
    found.append((size * row, n, axis, max(size, 1)))
  *_, axis, size = max(found)
  return axis, size


def _bounds(cut: Cut | None, shape: tuple[int, ...]) -> Cut:
  """A cut with the bounds in each dimension."""
  given = (*(cut or ()), *[slice(None)] * len(shape))
  return tuple([slice(*s.indices(n)[:2]) for s, n in zip(given, shape, strict=False)])


def _send_views(copies: Sequence[Copy]) -> None:
  for copy in copies:
    assert copy.source is not None
    view = _view(copy.source)
    copy.found = view if copy.cut is None else view[copy.cut]


def _send(copies: Sequence[Copy]) -> None:
  """Starts to copy from accelerators."""
  kinds = [(copy, copy.source, copy.source.sharding.memory_kind) for copy in copies if copy.source is not None]
  offloaded = [(copy, source) for copy, source, kind in kinds if kind in _HOST_KINDS]
  resident = [(copy, source) for copy, source, kind in kinds if kind not in _HOST_KINDS]
  if offloaded:
    with concurrent.futures.ThreadPoolExecutor(_COPYING_THREADS) as pool:
      views = pool.map(lambda entry: np.array(_view(entry[1])[entry[0].cut or ...]), offloaded)
      for (copy, _), values in zip(offloaded, views, strict=True):
        copy.found = values
  if not resident:
    return
  pinned = uses_pinned(resident[0][1])
  parts = [source if copy.cut is None else _sliced(source, copy.cut, pinned=pinned) for copy, source in resident]
  if pinned:
    whole = [i for i, (copy, _) in enumerate(resident) if copy.cut is None]
    there = _put([parts[i] for i in whole], [parts[i].sharding.with_memory_kind(PINNED) for i in whole])
    for i, part in zip(whole, there, strict=True):
      parts[i] = part
  else:
    parts = pageable(parts)
  for (copy, _), part in zip(resident, parts, strict=True):
    copy.found = part


def _put(arrays: Sequence[jax.Array], places: Sequence[jax.sharding.Sharding]) -> list[jax.Array]:
  try:
    return jax.device_put(arrays, places)
  except jax.errors.JaxRuntimeError as e:
    if "RESOURCE_EXHAUSTED" not in str(e):
      raise
    needed, most = size_text(sum(x.nbytes for x in arrays)), pinned_limit()
    raise CheckpointError(
      f"XLA has no pinned host memory left for {needed} of copies"
      + (f"; {PINNED_LIMIT} allows it {size_text(most)} in all" if most is not None else "")
      + f". Raise it, or set limits.host_memory below it, and the state is saved in turns: {e}",
      topic="pinned-memory",
    ) from e


def uses_pinned(array: jax.Array) -> bool:
  """Whether copies of an array go to pinned memory: where there is such, unless it was measured to be slower."""
  known = None if as_accelerators else known_link()
  return all(map(has_pinned, array.sharding.addressable_devices)) and (known is None or known.prefers_pinned)


def _sliced(array: jax.Array, cut: Cut, *, pinned: bool) -> jax.Array:
  """A part of a single-device array, in pinned memory if asked for; a program for each shape of a part."""
  bounds = _bounds(cut, array.shape)
  sharding = array.sharding.with_memory_kind(PINNED) if pinned else array.sharding
  starts = np.array([s.start for s in bounds], np.int32)
  return _slicing(sharding, tuple([s.stop - s.start for s in bounds]))(array, starts)


@functools.lru_cache(maxsize=1024)
def _slicing(sharding: jax.sharding.Sharding, sizes: tuple[int, ...]) -> Any:
  return jax.jit(lambda x, starts: lax.dynamic_slice(x, list(starts), sizes), out_shardings=sharding)


def _view(array: jax.Array) -> np.ndarray:
  """A view of an array's memory, which keeps the buffer alive.

  np.asarray of the array itself would be cached in it, and the array could never be donated again.
  """
  try:
    return np.asarray(memoryview(array))  # type: ignore[arg-type]
  except (BufferError, TypeError):  # bfloat16, float8 and the like
    return np.asarray(jax.make_array_from_single_device_arrays(array.shape, array.sharding, [array]))
