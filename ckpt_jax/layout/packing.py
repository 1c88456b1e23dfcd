"""Small arrays stored side by side in slabs.

Orbax and its formats cost about a millisecond an array, however small: 5,000 arrays of 40 KB are written at 30 MB/s.
Packed, each process writes its pieces of all small arrays into one array of bytes of its own (the slab), and an index
in the item says where each piece is. No byte crosses from one process to another.

A packed step describes the same tree; but plain Orbax does not find its small arrays. `ckpt-jax repack RUN STEP --pack
off` makes an ordinary Orbax checkpoint of it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from ckpt_jax.errors import CheckpointError, CorruptCheckpointError
from ckpt_jax.layout.encoding import dtype_name
from ckpt_jax.layout.keys import PACK_INDEX, SLABS
from ckpt_jax.layout.memory import ALIGNMENT, unaligned_empty
from ckpt_jax.layout.ring import Values
from ckpt_jax.layout.sharding import Box, intersection, shape_of, within
from ckpt_jax.storage import look

_FORMAT = 1
# At 160 MB/s, a slow shared store, writing a megabyte takes six times the fixed cost of an array.
SMALL_NBYTES = 2**20
# Read whole: small enough that reading a few leaves costs little, large enough to be worth a request.
_CHUNK_NBYTES = 8 * 2**20
_SLAB_NBYTES = 64 * 2**20  # of a slab in flight at a time, and kept for the next save
_GAP = np.zeros(ALIGNMENT, np.uint8)  # between pieces


@dataclasses.dataclass(frozen=True)
class Piece:
  """The place of one part of an array: the process whose slab holds it, the offset there, and the part's box."""

  process: int
  offset: int
  box: Box


@dataclasses.dataclass(frozen=True)
class Packed:
  """An array in slabs: dtype name, shape, and pieces, which cover it and do not overlap."""

  dtype: str
  shape: tuple[int, ...]
  pieces: tuple[Piece, ...]

  @property
  def nbytes(self) -> int:
    """Bytes of the array."""
    return math.prod(self.shape) * dtype_of(self.dtype).itemsize


Index = dict[str, Packed]
# An array to be packed: dtype, shape of the whole, and the boxes that this process writes.
Parts = tuple[Any, tuple[int, ...], Sequence[Box]]


def is_small(nbytes: int) -> bool:
  """Whether an array of this size is packed, given its bytes over all processes, which then all agree."""
  return nbytes < SMALL_NBYTES


def slab_name(process: int) -> str:
  """The database name of the slab of a process."""
  return f"{SLABS}{process}"


@dataclasses.dataclass(frozen=True)
class Slab:
  """The places of the pieces that one process writes: the same for all steps of a run.

  Attributes:
    index: the pieces of each array.
    offsets: of each piece, in order.
    nbytes: length of the slab, with the gaps that align the pieces.
    chunk_nbytes: length of its chunks.
  """

  index: Index
  offsets: tuple[int, ...]
  nbytes: int
  chunk_nbytes: int

  @functools.cached_property
  def leaves_json(self) -> str:
    """The index as JSON."""
    return leaves_json(self.index)

  def chunks(self, pieces: Sequence[Values], memory: Callable[[], np.ndarray]) -> Iterator[tuple[int, int, np.ndarray]]:
    """Offset, length and content of each chunk, given the pieces in order and a source of buffers."""
    i = 0
    for start in range(0, self.nbytes, self.chunk_nbytes):
      stop = min(start + self.chunk_nbytes, self.nbytes)
      chunk = memory()
      parts, end = [], start
      while i < len(pieces) and self.offsets[i] < stop:
        offset = self.offsets[i]
        data = np.ascontiguousarray(pieces[i]()).reshape(-1).view(np.uint8)
        if offset > end:
          parts.append(_GAP[: offset - end])
        end = min(offset + data.nbytes, stop)
        parts.append(data[max(start - offset, 0) : end - offset])
        if offset + data.nbytes > stop:
          break
        i += 1
      parts.append(_GAP[: stop - end])
      # One call for all: each would wait for Python's lock, which the thread that sums up the state takes in turn.
      np.concatenate(parts, out=chunk[: stop - start])
      yield start, stop - start, chunk


def lay_out(process: int, arrays: Mapping[str, Parts]) -> Slab:
  """The slab of a process, given its index and its parts of the arrays by name."""
  index: Index = {}
  offsets: list[int] = []
  end = 0
  for name, (dtype, shape, boxes) in arrays.items():
    pieces = []
    itemsize = np.dtype(dtype).itemsize
    for box in boxes:
      pieces.append(Piece(process, end, box))
      offsets.append(end)
      end += -(-math.prod(shape_of(box)) * itemsize // ALIGNMENT) * ALIGNMENT
    index[name] = Packed(dtype_name(dtype), tuple(shape), tuple(pieces))
  # Chunks of equal size, since zarr pads the last one.
  count = max(1, -(-end // _CHUNK_NBYTES))
  chunk = max(ALIGNMENT, -(-end // (count * ALIGNMENT)) * ALIGNMENT)
  return Slab(index, tuple(offsets), end, chunk)


def gather(packed: Packed, box: Box, slabs: Mapping[int, SlabBytes]) -> np.ndarray:
  """The part `box` of an array from the slabs, by process; a view if it is exactly one piece."""
  dtype = dtype_of(packed.dtype)
  out = None
  for piece in packed.pieces:
    shared = box if piece.box == box else intersection(piece.box, box)
    if shared is None:
      continue
    shape = shape_of(piece.box)
    data = slabs[piece.process].bytes_at(piece.offset, math.prod(shape) * dtype.itemsize).view(dtype).reshape(shape)
    if piece.box == box:
      return data
    if out is None:
      out = unaligned_empty(shape_of(box), dtype)
    out[within(shared, box)] = data[within(shared, piece.box)]
  assert out is not None
  return out


def needed(packed: Packed, boxes: Sequence[Box]) -> Iterator[tuple[int, int, int]]:
  """(process, first byte, end) of the pieces that have to be read for some boxes of an array."""
  itemsize = dtype_of(packed.dtype).itemsize
  for piece in packed.pieces:
    if piece.box in boxes or any(intersection(piece.box, box) is not None for box in boxes):
      yield piece.process, piece.offset, piece.offset + math.prod(shape_of(piece.box)) * itemsize


class SlabBytes:
  """Chunks of a slab that were read, by their number."""

  def __init__(self, chunk_nbytes: int):
    self._nbytes = chunk_nbytes
    self._chunks: dict[int, np.ndarray] = {}

  def add(self, start: int, data: np.ndarray) -> None:
    """Adds the chunk that starts at an offset."""
    self._chunks[start // self._nbytes] = data

  def bytes_at(self, offset: int, nbytes: int) -> np.ndarray:
    """Some of the bytes: a view if one chunk holds them all."""
    n = self._nbytes
    touched = range(offset // n, max(offset // n + 1, -(-(offset + nbytes) // n)))
    parts = [self._chunks[c][max(offset - c * n, 0) : offset + nbytes - c * n] for c in touched]
    return parts[0] if len(parts) == 1 else np.concatenate(parts, out=unaligned_empty((nbytes,), np.dtype(np.uint8)))


class SlabMemory:
  """Buffers for the chunks of slabs, reused once a chunk is written, and by the next save.

  Fresh memory costs as much as filling it, and now and then ten times that, where the kernel has to move pages for it.
  """

  def __init__(self) -> None:
    self._chunk_nbytes = 0
    self._free: list[np.ndarray] = []
    self._left = 0

  def begin(self, chunk_nbytes: int) -> None:
    """Sets the size of the chunks from now on."""
    most = max(1, _SLAB_NBYTES // chunk_nbytes)
    self._free = self._free[:most] if self._chunk_nbytes == chunk_nbytes else []
    self._chunk_nbytes = chunk_nbytes
    self._left = most - len(self._free)

  def take(self, wait: Callable[[], None]) -> np.ndarray:
    """A buffer for a chunk; `wait` is called until one is free."""
    while not self._left and not self._free:
      wait()
    if self._free:
      return self._free.pop()
    self._left -= 1
    return fresh(self._chunk_nbytes)

  def give(self, chunk: np.ndarray) -> None:
    """Takes the buffer of a written chunk back."""
    self._free.append(chunk)


class FreshMemory(SlabMemory):
  """Buffers that are not used again, since what they hold is referred to until all is committed."""

  def take(self, wait: Callable[[], None]) -> np.ndarray:
    """A new buffer."""
    return fresh(self._chunk_nbytes)

  def give(self, chunk: np.ndarray) -> None:
    """Does nothing."""


def fresh(nbytes: int) -> np.ndarray:
  """A new buffer."""
  return unaligned_empty((nbytes,), np.dtype(np.uint8))


@functools.cache
def dtype_of(name: str) -> np.dtype:
  """numpy's dtype of a name in an index."""
  return np.dtype(jax.numpy.dtype(name))


# -- the index in the item


def write_part(item: epath.Path, process: int, slab: Slab) -> None:
  """Writes a process's part of the index, which names also leaves that have no piece on this process."""
  if jax.process_count() == 1:
    write_index(item, slab.leaves_json)
  else:
    _part(item, process).write_text(slab.leaves_json)


def merge_parts(item: epath.Path, processes: int) -> None:
  """Makes one index of the parts, if the step is packed."""
  if not _part(item, 0).exists():
    return
  index: dict[str, Any] = {}
  for process in range(processes):
    for name, (dtype, shape, pieces) in json.loads(_part(item, process).read_text()).items():
      index.setdefault(name, [dtype, shape, []])[2].extend(pieces)
  write_index(item, json.dumps(index))
  for process in range(processes):
    _part(item, process).unlink()


def write_index(item: epath.Path, leaves: str) -> None:
  """Writes the whole index, given as `leaves_json`."""
  (item / PACK_INDEX).write_text(f'{{"format": {_FORMAT}, "leaves": {leaves}}}')


def read_index(item: epath.Path) -> Index:
  """The index of an item; empty if it is not packed.

  Raises:
    CorruptCheckpointError: if it is damaged.
    CheckpointError: if a later version wrote it.
  """
  file = item / PACK_INDEX
  try:
    data = json.loads(look.read_bytes(file))
    if data["format"] > _FORMAT:
      raise CheckpointError(
        f"{file}: of format {data['format']}, which a later ckpt_jax wrote; install that", topic="newer-format"
      )
    return {
      name: Packed(dtype, tuple(shape), tuple(_piece(p) for p in pieces))
      for name, (dtype, shape, pieces) in data["leaves"].items()
    }
  except FileNotFoundError:
    return {}
  except (ValueError, KeyError, TypeError, AttributeError) as e:
    raise CorruptCheckpointError(f"{file}: no index of a packed step ({type(e).__name__}: {e})") from e


def _part(item: epath.Path, process: int) -> epath.Path:
  return item / f"ckpt_jax_pack.process_{process}.json"


def leaves_json(index: Index) -> str:
  """An index as JSON."""
  return json.dumps(
    {
      name: [packed.dtype, packed.shape, [[p.process, p.offset, *p.box] for p in packed.pieces]]
      for name, packed in index.items()
    }
  )


def _piece(data: Sequence[Any]) -> Piece:
  process, offset, *box = data
  return Piece(int(process), int(offset), tuple([(int(a), int(b)) for a, b in box]))
