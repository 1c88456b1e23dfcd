"""Position-weighted sums of bits: the same number however an array is cut into shards, another one if any bit moves.

An array is read as a matrix: its last axes, as many as make 512 bytes, are the columns, the others the rows. Column
bytes form little-endian 64-bit words y. With odd random weights A (row), H (block of words), K1 and K2 (word in a
block), all of which depend on the global position alone,

  sum over rows r and words q of A[r] * H[q // BLOCK] * (y * K1[q % BLOCK] + (y >> 32) * K2[q % BLOCK])   mod 2**64.

The sum is linear in the bytes, so that the parts of an array add up in any order. One flipped bit always changes it:
an odd factor times a power of two below 2**64 is not zero. The shifted term is there for the high bits, of which the
first term keeps little (two lost sign bits would cancel half of the time). It leaves every bit at least 32 bits of the
result; multilinear hashing, see Lemire and Kaser, arXiv:1202.4961. It is a check against faults, not against forgery.

Why not a jit: XLA's CPU code made 1 to 2.4 GB/s of it on one core, numpy's einsum 6 to 11.
`device.py` has the jit for accelerators.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import xxhash

from ckpt_jax.layout.encoding import dtype_name

MASK = 2**64 - 1
ROW_NBYTES = 512  # columns hold at least this much: shorter rows would cost more in overhead than in sums
BLOCK = 8192  # words
SMALL_NBYTES = 1 << 16  # of arrays that are summed up many at a time
# Small enough that the second pass finds the data in a cache, large enough that two threads do not spend their time on
# handing Python's lock to each other: 256 KiB made 5.0 GB/s in one thread and 4.2 in two, 1 MiB makes 6.5 and 8.4.
_CHUNK_NBYTES = 1 << 20
GOLDEN, MIX_1, MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
ROW_SEED, BLOCK_SEED, LOW_SEED, HIGH_SEED = 1, 2, 3, 4

_local = threading.local()


def mix(numbers: np.ndarray, seed: int) -> np.ndarray:
  """Odd 64-bit weights for positions (splitmix64's finaliser: Steele, Lea, Flood 2014, doi:10.1145/2714064.2660195)."""
  z = (numbers.astype(np.uint64) + np.uint64(seed << 56)) * np.uint64(GOLDEN)
  z ^= z >> np.uint64(30)
  z *= np.uint64(MIX_1)
  z ^= z >> np.uint64(27)
  z *= np.uint64(MIX_2)
  z ^= z >> np.uint64(31)
  return z | np.uint64(1)


_K1 = mix(np.arange(BLOCK), LOW_SEED)
_K2 = mix(np.arange(BLOCK), HIGH_SEED)


@functools.lru_cache(maxsize=4096)
def _block_weight(block: int) -> int:
  return int(mix(np.array([block]), BLOCK_SEED)[0])


@functools.lru_cache(maxsize=64)
def word_weights(first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
  """H * K1 and H * K2 of the words `first` to `first + count - 1`."""
  words = np.arange(first, first + count)
  blocks = mix(words // BLOCK, BLOCK_SEED)
  return blocks * _K1[words % BLOCK], blocks * _K2[words % BLOCK]


def columns_from(shape: tuple[int, ...], itemsize: int) -> int:
  """The first axis that belongs to the columns."""
  axis, nbytes = len(shape), itemsize
  while axis > 0 and nbytes < ROW_NBYTES:
    axis -= 1
    nbytes *= shape[axis]
  return axis


def row_weights(lead: tuple[int, ...], start: tuple[int, ...], local: tuple[int, ...]) -> np.ndarray:
  """Weights of the rows of a block at `start` with size `local`, of an array whose row axes have the sizes `lead`."""
  return (_cached_rows if math.prod(local) <= _CACHED_ROWS else _rows)(lead, start, local)


def _rows(lead: tuple[int, ...], start: tuple[int, ...], local: tuple[int, ...]) -> np.ndarray:
  rows = np.zeros((), np.int64)
  for size, begin, count in zip(lead, start, local, strict=True):
    rows = rows[..., None] * size + np.arange(begin, begin + count)
  return mix(rows.reshape(-1), ROW_SEED)


_CACHED_ROWS = 4096
_cached_rows = functools.lru_cache(maxsize=256)(_rows)  # shards of many arrays lie alike


class Tally:
  """A sum and a hash under way, and of floats the count of non-finite values, how many of them are NaN, and the sum of
  squares of the others."""

  __slots__ = ("hash", "nan", "nonfinite", "squares", "total")

  def __init__(self) -> None:
    self.total, self.hash, self.nonfinite, self.nan, self.squares = 0, 0, 0, 0, 0.0

  def add(self, other: Tally) -> None:
    self.total = (self.total + other.total) & MASK
    self.hash = (self.hash + other.hash) & MASK
    self.nonfinite += other.nonfinite
    self.nan += other.nan
    self.squares += other.squares


def add_block(
  tally: Tally, block: np.ndarray, start: tuple[int, ...], shape: tuple[int, ...], floats: np.dtype | None = None
) -> None:
  """Adds one block of an array.

  Args:
    tally: what to add to.
    block: the block's bits as unsigned integers, C-contiguous, with as many axes as `shape`.
    start: where it lies in the array, by axis.
    shape: the whole array's.
    floats: what the bits mean, if health is to be tallied too.
  """
  if block.size == 0:
    return
  first = columns_from(shape, block.itemsize)
  local = block.shape
  rows = row_weights(shape[:first], start[:first], local[:first])
  # A block that does not span the columns' inner axes is cut until its pieces do.
  cut = max((a for a in range(first + 1, len(shape)) if local[a] != shape[a]), default=first)
  inner = math.prod(shape[cut + 1 :])
  for index in np.ndindex(*local[first:cut]):
    offset = 0
    for axis, i in zip(range(first, cut), index, strict=True):
      offset = offset * shape[axis] + start[axis] + i
    column = (offset * shape[cut] + start[cut]) * inner if cut < len(shape) else 0
    piece = block[(*[slice(None)] * first, *index)] if index else block
    _add_rows(tally, piece.reshape(len(rows), -1), column, rows, floats)


def tally_alike(
  blocks: Sequence[np.ndarray], floats: np.dtype | None, *, fingerprint: bool = True, hashed: bool = False
) -> list[Tally]:
  """The tallies of whole small arrays, all of one shape and dtype, in few calls of numpy: an array costs 2 us, not 70.

  Args:
    blocks: numbers of any kind whose bytes are the bits to sum up, none of them empty; each at most SMALL_NBYTES.
    floats: as for `add_block`.
    fingerprint: whether to sum up the bits.
    hashed: whether to hash them too.
  """
  shape, itemsize = blocks[0].shape, blocks[0].itemsize
  first = columns_from(shape, itemsize)
  rows = row_weights(shape[:first], (0,) * first, shape[:first])
  width = math.prod(shape[first:]) * itemsize
  words = -(-width // 8)
  nbytes = len(rows) * width
  together = max(1, _CHUNK_NBYTES // (len(rows) * words * 8))
  if not shape:
    blocks = [block.reshape(1) for block in blocks]
  out = []
  for i in range(0, len(blocks), together):
    bunch = blocks[i : i + together]
    data = np.concatenate(bunch).reshape(-1).view(np.uint8)
    matrix = _words(data.reshape(-1, width), 0, 0, words)
    tallies = [Tally() for _ in bunch]
    if hashed:
      for k, tally in enumerate(tallies):
        tally.hash = hash_bits(data[k * nbytes : (k + 1) * nbytes])
    if fingerprint:
      totals = _weighted(matrix, *word_weights(0, words)).reshape(len(bunch), -1) @ rows
      for tally, total in zip(tallies, totals.tolist(), strict=True):
        tally.total = total
    if floats is not None:
      _add_health_alike(tallies, matrix.reshape(len(bunch), -1), floats)
    out += tallies
  return out


def hash_bits(bits: np.ndarray, number: int = 0) -> int:
  """XXH3 of a block's bytes, C-contiguous, seeded with its number."""
  return int(xxhash.xxh3_64_intdigest(bits.data, seed=number))


def _add_rows(tally: Tally, matrix: np.ndarray, column: int, rows: np.ndarray, floats: np.dtype | None) -> None:
  begin = column * matrix.itemsize
  data = matrix.view(np.uint8)
  head = begin % 8
  words = -(-(head + data.shape[1]) // 8)
  if words <= BLOCK:
    weights = word_weights(begin // 8, words)
    step = max(1, _CHUNK_NBYTES // (words * 8))
    for i in range(0, len(rows), step):
      chunk = _words(data[i : i + step], head, 0, words)
      sums = _weighted(chunk, *weights)
      tally.total = (tally.total + int(np.dot(sums, rows[i : i + step]))) & MASK
      if floats is not None:
        _add_health(tally, chunk, floats)
    return
  for row, weight in zip(data, rows, strict=True):
    for first, count in _segments(begin // 8, words):
      chunk = _words(row[None], head, first, first + count)
      where = first + begin // 8
      if count % BLOCK == 0 and where % BLOCK == 0:
        blocks = _weighted(chunk.reshape(-1, BLOCK), _K1, _K2)
        total = sum(int(s) * _block_weight(where // BLOCK + i) for i, s in enumerate(blocks))
      else:
        inside = slice(where % BLOCK, where % BLOCK + count)
        total = int(_weighted(chunk, _K1[inside], _K2[inside])[0]) * _block_weight(where // BLOCK)
      tally.total = (tally.total + int(weight) * total) & MASK
      if floats is not None:
        _add_health(tally, chunk, floats)


def _segments(first: int, count: int) -> Iterator[tuple[int, int]]:
  """Cuts `count` words, of which the first is number `first` of its row, into whole blocks and parts of one."""
  most = _CHUNK_NBYTES // 8 // BLOCK * BLOCK
  at = 0
  while at < count:
    into = (first + at) % BLOCK
    size = min(count - at, BLOCK - into if into else most)
    if not into and size > BLOCK:
      size -= size % BLOCK
    yield at, size
    at += size


def _words(data: np.ndarray, head: int, first: int, end: int) -> np.ndarray:
  """Words `first` to `end` of byte rows that begin `head` bytes into word 0; a copy padded with zeros where it must."""
  low, high = first * 8 - head, end * 8 - head
  if low >= 0 and high <= data.shape[1]:
    part = data[:, low:high]
    if part.ctypes.data % 8 == 0 and (len(part) == 1 or part.strides[0] % 8 == 0):
      return part.view(np.uint64)
  padded = np.zeros((len(data), (end - first) * 8), np.uint8)
  low, high = max(low, 0), min(high, data.shape[1])
  at = low - (first * 8 - head)
  padded[:, at : at + high - low] = data[:, low:high]
  return padded.view(np.uint64)


def _weighted(words: np.ndarray, k1: np.ndarray, k2: np.ndarray) -> np.ndarray:
  buffer = getattr(_local, "buffer", None)
  if buffer is None:
    buffer = _local.buffer = np.empty(_CHUNK_NBYTES // 8, np.uint64)
  high = buffer[: words.size].reshape(words.shape)
  np.right_shift(words, 32, out=high)
  sums = np.einsum("ij,j->i", words, k1)
  sums += np.einsum("ij,j->i", high, k2)
  return sums


# -- health


@functools.cache
def _table(dtype: np.dtype) -> np.ndarray:
  return np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32)


def add_health(tally: Tally, bits: np.ndarray, floats: np.dtype) -> None:
  """Adds what a block's floats say of health, without its sum: at the speed of memory for float32 and float64."""
  flat = bits.reshape(-1)
  step = _CHUNK_NBYTES // bits.itemsize
  for i in range(0, flat.size, step):
    _add_health(tally, flat[i : i + step], floats)


def _add_health(tally: Tally, words: np.ndarray, dtype: np.dtype) -> None:
  values = _numbers(words, dtype)
  with np.errstate(over="ignore", invalid="ignore"):
    squares = float(np.dot(values, values))
  if math.isfinite(squares):  # a NaN or an infinity would have stayed in it
    tally.squares += squares
    return
  finite = np.isfinite(values)
  nonfinite = int(values.size - np.count_nonzero(finite))
  if nonfinite:
    tally.nonfinite += nonfinite
    tally.nan += int(np.count_nonzero(np.isnan(values)))
  large = values[finite].astype(np.float64)
  with np.errstate(over="ignore"):
    tally.squares += float(np.dot(large, large))


def _add_health_alike(tallies: Sequence[Tally], words: np.ndarray, dtype: np.dtype) -> None:
  values = _numbers(words, dtype).reshape(len(tallies), -1)
  with np.errstate(over="ignore", invalid="ignore"):
    squares = np.einsum("ij,ij->i", values, values).tolist()
  for tally, found, row in zip(tallies, squares, words, strict=True):
    if math.isfinite(found):
      tally.squares = found
    else:
      _add_health(tally, row, dtype)


def _numbers(words: np.ndarray, dtype: np.dtype) -> np.ndarray:
  flat: Any = np.ascontiguousarray(words).reshape(-1)
  name = dtype_name(dtype)
  if name in ("float32", "complex64"):
    return flat.view(np.float32)
  if name in ("float64", "complex128"):
    return flat.view(np.float64)
  if name == "bfloat16":
    return (flat.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
  if name == "float16":
    return flat.view(np.float16).astype(np.float32)
  return _table(dtype)[flat.view(np.uint8)]


def is_float(dtype: Any) -> bool:
  """Whether a dtype can hold non-finite values, or a norm: floats of all widths, complex numbers."""
  return dtype.kind in "fc" or "float" in dtype.name
