"""Small arrays side by side in few large ones.

Orbax and its formats cost about a millisecond an array, however small: 5,000 arrays of 40 KB are written at 30 MB/s.
Packed, each process lays the pieces that it would have written of all small arrays into one array of bytes of its own
(the slab), and an index in the item says where each piece is. No byte crosses from one process to another.

The tree that a step describes is the same, packed or not; only the bytes of small arrays lie elsewhere, so that plain
Orbax does not find them. `ckpt-jax repack RUN STEP --pack off` makes an ordinary Orbax checkpoint of such a step.
"""

from __future__ import annotations

import bisect
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
from ckpt_jax.layout.keys import SLABS
from ckpt_jax.layout.memory import ALIGNMENT, unaligned_empty
from ckpt_jax.layout.sharding import Box, intersection, shape_of, within
from ckpt_jax.storage import look

INDEX = "ckpt_jax_pack.json"
_FORMAT = 1
# At 160 MB/s, a slow shared store, a megabyte takes six times what its array costs beside it.
SMALL_NBYTES = 2**20
# Read as a whole: small enough that a few leaves of a slab cost little, large enough to be worth a request.
_CHUNK_NBYTES = 8 * 2**20
_GAP = np.zeros(ALIGNMENT, np.uint8)  # between pieces


@dataclasses.dataclass(frozen=True)
class Piece:
  """Where a part of an array lies: the process whose slab holds it, the offset there, and the part."""

  process: int
  offset: int
  box: Box


@dataclasses.dataclass(frozen=True)
class Packed:
  """An array in slabs: its dtype's name, its shape, and its pieces, which do not overlap and cover it."""

  dtype: str
  shape: tuple[int, ...]
  pieces: tuple[Piece, ...]

  @property
  def nbytes(self) -> int:
    """Bytes of the array."""
    return math.prod(self.shape) * dtype_of(self.dtype).itemsize


Index = dict[str, Packed]
# Of an array before it is written: dtype, shape of the whole, and the boxes of it that this process writes.
Parts = tuple[Any, tuple[int, ...], Sequence[Box]]


def is_small(nbytes: int) -> bool:
  """Whether an array of so many bytes, over all processes, is packed. Alike on all processes."""
  return nbytes < SMALL_NBYTES


def slab_name(process: int) -> str:
  """The name in the database of the slab that a process wrote."""
  return f"{SLABS}{process}"


@dataclasses.dataclass(frozen=True)
class Slab:
  """Where a process puts what it writes of small arrays: the same for all steps of a run.

  Attributes:
    index: where the pieces of each array lie.
    offsets: of each piece, in order.
    nbytes: the slab's length, with the gaps that align the pieces.
    chunk_nbytes: what of it is stored, and read, as one.
  """

  index: Index
  offsets: tuple[int, ...]
  nbytes: int
  chunk_nbytes: int

  @functools.cached_property
  def leaves_json(self) -> str:
    """The index as it is written."""
    return _leaves_json(self.index)

  def chunks(
    self, pieces: Sequence[np.ndarray], memory: Callable[[], np.ndarray]
  ) -> Iterator[tuple[int, int, np.ndarray]]:
    """Offset, length and memory of one chunk after the other, given the pieces in order and where memory comes from."""
    i = 0
    for start in range(0, self.nbytes, self.chunk_nbytes):
      stop = min(start + self.chunk_nbytes, self.nbytes)
      chunk = memory()
      parts, end = [], start
      while i < len(pieces) and self.offsets[i] < stop:
        offset = self.offsets[i]
        data = np.ascontiguousarray(pieces[i]).reshape(-1).view(np.uint8)
        if offset > end:
          parts.append(_GAP[: offset - end])
        end = min(offset + data.nbytes, stop)
        parts.append(data[max(start - offset, 0) : end - offset])
        if offset + data.nbytes > stop:
          break
        i += 1
      parts.append(_GAP[: stop - end])
      # One call for all of them: a copy each would wait for Python's lock each time, beside whoever sums up the state.
      np.concatenate(parts, out=chunk[: stop - start])
      yield start, stop - start, chunk


def lay_out(process: int, arrays: Mapping[str, Parts]) -> Slab:
  """The slab of what a process writes of some arrays.

  Args:
    process: its index.
    arrays: by name.
  """
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
  # Chunks of equal size: zarr fills the last one up.
  count = max(1, -(-end // _CHUNK_NBYTES))
  chunk = max(ALIGNMENT, -(-end // (count * ALIGNMENT)) * ALIGNMENT)
  return Slab(index, tuple(offsets), end, chunk)


def gather(packed: Packed, box: Box, slabs: Mapping[int, SlabBytes]) -> np.ndarray:
  """Part `box` of an array, out of what was read of the slabs; a view if one piece holds just that."""
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
  """(process, first byte, end) of what must be read of the slabs for parts of an array."""
  itemsize = dtype_of(packed.dtype).itemsize
  for piece in packed.pieces:
    if piece.box in boxes or any(intersection(piece.box, box) is not None for box in boxes):
      yield piece.process, piece.offset, piece.offset + math.prod(shape_of(piece.box)) * itemsize


class SlabBytes:
  """What was read of a slab: runs of bytes by where they start."""

  def __init__(self) -> None:
    self._starts: list[int] = []
    self._runs: list[np.ndarray] = []

  def add(self, start: int, data: np.ndarray) -> None:
    """Adds a run, which overlaps none that is there."""
    i = bisect.bisect(self._starts, start)
    self._starts.insert(i, start)
    self._runs.insert(i, data)

  def bytes_at(self, offset: int, nbytes: int) -> np.ndarray:
    """Some of the bytes: a view if one run holds them all."""
    i = bisect.bisect(self._starts, offset) - 1
    parts, end = [], offset
    while end < offset + nbytes:
      if not 0 <= i < len(self._runs) or not self._starts[i] <= end < self._starts[i] + self._runs[i].nbytes:
        raise AssertionError(f"bytes {offset} to {offset + nbytes} were not read")
      first = end - self._starts[i]
      parts.append(self._runs[i][first : first + offset + nbytes - end])
      end += parts[-1].nbytes
      i += 1
    if len(parts) == 1:
      return parts[0]
    return np.concatenate(parts, out=unaligned_empty((nbytes,), np.dtype(np.uint8)))


@functools.cache
def dtype_of(name: str) -> np.dtype:
  """numpy's dtype of a name in an index."""
  return np.dtype(jax.numpy.dtype(name))


# -- the index in the item


def write_part(item: epath.Path, process: int, slab: Slab) -> None:
  """Writes a process's part of the index; a leaf of which it holds nothing is in it all the same."""
  if jax.process_count() == 1:
    _write_index(item, slab.leaves_json)
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
  _write_index(item, json.dumps(index))
  for process in range(processes):
    _part(item, process).unlink()


def write_index(item: epath.Path, index: Index) -> None:
  """Writes the whole index."""
  _write_index(item, _leaves_json(index))


def _write_index(item: epath.Path, leaves: str) -> None:
  (item / INDEX).write_text(f'{{"format": {_FORMAT}, "leaves": {leaves}}}')


def read_index(item: epath.Path) -> Index:
  """The index of an item; empty if it is not packed.

  Raises:
    CorruptCheckpointError: if it is no index.
    CheckpointError: if a later version wrote it.
  """
  file = item / INDEX
  try:
    data = json.loads(look.read_bytes(file))
    if data["format"] > _FORMAT:  # no damage
      raise CheckpointError(f"{file}: of format {data['format']}, which a later ckpt_jax wrote; install that")
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


def _leaves_json(index: Index) -> str:
  return json.dumps({name: _to_json(packed) for name, packed in index.items()})


def _to_json(packed: Packed) -> list[Any]:
  pieces = [[p.process, p.offset, *([a, b] for a, b in p.box)] for p in packed.pieces]
  return [packed.dtype, list(packed.shape), pieces]


def _piece(data: Sequence[Any]) -> Piece:
  process, offset, *box = data
  return Piece(int(process), int(offset), tuple([(int(a), int(b)) for a, b in box]))
