"""Position-weighted sums of bits: the same number however an array is cut into shards, another one if any bit moves.

An array is read as a matrix: its last axes, as many as make 512 bytes, are the columns, the others the rows. Column
bytes form little-endian 64-bit words y. With odd random weights A (row), H (block of words), K1 and K2 (word in a
block), all of which depend on the global position alone,

  sum over rows r and words q of A[r] * H[q // BLOCK] * (y * K1[q % BLOCK] + (y >> 32) * K2[q % BLOCK])   mod 2**64.

The sum is linear in the bytes, so the parts of an array add up in any order. One flipped bit always changes it: an odd
factor times a power of two below 2**64 is not zero. The shifted term is there for the high bits, of which the first
term keeps little (two lost sign bits would cancel half of the time). It leaves every bit at least 32 bits of the
result; multilinear hashing, see Lemire and Kaser, arXiv:1202.4961. It guards against faults, not against forgery.

Why not a jit: XLA's CPU code ran at 1 to 2.4 GB/s on one core, numpy's einsum at 6 to 11. On accelerators it is fast,
but each shape compiles for 0.3 s: an H200 took 16 s for the first restore of 901 leaves.
"""

from __future__ import annotations

import dataclasses
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
SMALL_NBYTES = 1 << 16  # arrays up to this size, which is one block, are summed many at a time
# Small enough that the second pass finds the data in a cache, large enough that two threads do not spend their time
# handing over Python's lock: with 256 KiB one thread reached 5.0 GB/s and two 4.2, with 1 MiB 6.5 and 8.4.
_CHUNK_NBYTES = 1 << 20
_CACHED_ROWS = 4096
_SHORT_NBYTES = 240  # XXH3 hashes them by other formulas, for 64 and 128 bits apart
ROW_SEED, BLOCK_SEED, LOW_SEED, HIGH_SEED = 1, 2, 3, 4

_local = threading.local()


def mix(numbers: Any, seed: int) -> Any:
  """Odd 64-bit weights for positions, which are an array of numpy or jax.

  splitmix64's finaliser: Steele, Lea and Flood 2014, doi:10.1145/2714064.2660195.
  """
  z = (numbers.astype(np.uint64) + np.uint64(seed << 56)) * np.uint64(0x9E3779B97F4A7C15)
  z ^= z >> np.uint64(30)
  z *= np.uint64(0xBF58476D1CE4E5B9)
  z ^= z >> np.uint64(27)
  z *= np.uint64(0x94D049BB133111EB)
  z ^= z >> np.uint64(31)
  return z | np.uint64(1)


_K1 = mix(np.arange(BLOCK), LOW_SEED)
_K2 = mix(np.arange(BLOCK), HIGH_SEED)


@functools.lru_cache(maxsize=4096)
def _block_weights(first: int, count: int) -> np.ndarray:
  return mix(np.arange(first, first + count), BLOCK_SEED)


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


_cached_rows = functools.lru_cache(maxsize=256)(_rows)  # many arrays are sharded alike


@dataclasses.dataclass(slots=True)
class Tally:
  """What has been found of a leaf, or of a part of it; tallies of parts add up.

  Attributes:
    total: the position-weighted sum of its bits.
    hash: the sum of the XXH3 hashes of its shards.
    high: the sum of the upper halves of their XXH3 hashes of 128 bits.
    nonfinite: how many numbers are not finite.
    nan: how many of those are NaN.
    squares: the sum of squares of the finite numbers.
  """

  total: int = 0
  hash: int = 0
  high: int = 0
  nonfinite: int = 0
  nan: int = 0
  squares: float = 0.0

  def add(self, other: Tally) -> None:
    """Adds the tally of another part."""
    self.total = (self.total + other.total) & MASK
    self.hash = (self.hash + other.hash) & MASK
    self.high = (self.high + other.high) & MASK
    self.nonfinite += other.nonfinite
    self.nan += other.nan
    self.squares += other.squares


def tally_block(
  block: np.ndarray,
  start: tuple[int, ...],
  shape: tuple[int, ...],
  floats: np.dtype | None = None,
  *,
  fingerprint: bool = True,
) -> Tally:
  """The tally of one block of an array.

  Args:
    block: the block's bits as unsigned integers, C-contiguous, with as many axes as `shape`.
    start: index of the block's first element in the array.
    shape: shape of the whole array.
    floats: dtype of the numbers that the bits are, to count health too.
    fingerprint: whether to sum the bits; without it health takes the speed of memory for float32 and float64.
  """
  tally = Tally()
  if floats is not None and not fingerprint:
    flat, step = block.reshape(-1), _CHUNK_NBYTES // block.itemsize
    for i in range(0, flat.size, step):
      _add_health([tally], flat[i : i + step], floats)
  if block.size == 0 or not fingerprint:
    return tally
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
  return tally


def _add_rows(tally: Tally, matrix: np.ndarray, column: int, rows: np.ndarray, floats: np.dtype | None) -> None:
  begin = column * matrix.itemsize
  data = matrix.view(np.uint8)
  head = begin % 8
  for first, count in _segments(begin // 8, -(-(head + data.shape[1]) // 8)):
    block, inside = divmod(begin // 8 + first, BLOCK)
    width = min(count, BLOCK)
    weights = _K1[inside : inside + width], _K2[inside : inside + width]
    blocks = _block_weights(block, count // width)
    step = max(1, _CHUNK_NBYTES // (count * 8))
    for i in range(0, len(rows), step):
      chunk = _words(data[i : i + step], head, first, first + count)
      sums = _weighted(chunk, *weights) @ blocks
      tally.total = (tally.total + int(np.dot(sums, rows[i : i + step]))) & MASK
      if floats is not None:
        _add_health([tally], chunk, floats)


def _segments(first: int, count: int) -> Iterator[tuple[int, int]]:
  """Cuts `count` words, of which the first is word `first` of its row, into whole blocks and parts of one."""
  at = 0
  while at < count:
    size = min(count - at, BLOCK - (first + at) % BLOCK)
    if size == BLOCK:
      size = min(count - at, _CHUNK_NBYTES // 8) // BLOCK * BLOCK
    yield at, size
    at += size


def _words(data: np.ndarray, head: int, first: int, end: int) -> np.ndarray:
  """Words `first` to `end` of rows of bytes that begin `head` bytes into word 0; a copy padded with zeros if needed."""
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
  """The sums of the blocks in each row of words, [rows, blocks]."""
  if not hasattr(_local, "buffer"):
    _local.buffer = np.empty(_CHUNK_NBYTES // 8, np.uint64)
  words = words.reshape(len(words), -1, len(k1))
  high = _local.buffer[: words.size].reshape(words.shape)
  np.right_shift(words, 32, out=high)
  sums = np.einsum("ijk,k->ij", words, k1)
  sums += np.einsum("ijk,k->ij", high, k2)
  return sums


def tally_alike(
  blocks: Sequence[np.ndarray], floats: np.dtype | None, *, fingerprint: bool = True, hashed: bool = False
) -> list[Tally]:
  """Tallies of whole small arrays of one shape and dtype, in few calls of numpy: 2 us an array instead of 70.

  Args:
    blocks: their bits, C-contiguous; none is empty or larger than SMALL_NBYTES.
    floats: as for `tally_block`.
    fingerprint, hashed: whether to sum and to hash the bits.
  """
  if not blocks[0].shape:
    blocks = [block.reshape(1) for block in blocks]
  tallies = [Tally() for _ in blocks]
  shape, itemsize = blocks[0].shape, blocks[0].itemsize
  first = columns_from(shape, itemsize)
  rows = row_weights(shape[:first], (0,) * first, shape[:first])
  width = math.prod(shape[first:]) * itemsize
  words = -(-width // 8)
  together = max(1, _CHUNK_NBYTES // (len(rows) * words * 8))
  for i in range(0, len(blocks), together):
    bunch = tallies[i : i + together]
    if hashed:  # here, so that the sums find the bytes in the cache
      for tally, block in zip(bunch, blocks[i : i + together], strict=True):
        tally.hash, tally.high = hash_bits(block)
    if not fingerprint and floats is None:
      continue
    data = np.concatenate(blocks[i : i + together]).reshape(-1).view(np.uint8)
    matrix = _words(data.reshape(-1, width), 0, 0, words)
    if fingerprint:
      sums = _weighted(matrix, _K1[:words], _K2[:words]) * _block_weights(0, 1)
      totals = sums.reshape(len(bunch), -1) @ rows
      for tally, total in zip(bunch, totals.tolist(), strict=True):
        tally.total = total
    if floats is not None:
      _add_health(bunch, matrix, floats)
  return tallies


def hash_bits(bits: np.ndarray, number: int = 0) -> tuple[int, int]:
  """XXH3 of the bytes of shard `number` of an array, C-contiguous, and the upper half of their XXH3 of 128 bits.

  The number is the seed. The lower half of the longer hash is the shorter one, but for short inputs (XXH3's
  specification, doc/xxhash_spec.md): both come from one pass, at the speed of the shorter one alone.
  """
  both = xxhash.xxh3_128_intdigest(bits.data, seed=number)
  low = both & MASK if bits.nbytes > _SHORT_NBYTES else xxhash.xxh3_64_intdigest(bits.data, seed=number)
  return low, both >> 64


# -- health


@functools.cache
def _table(dtype: np.dtype) -> np.ndarray:
  return np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32)


def _add_health(tallies: Sequence[Tally], words: np.ndarray, dtype: np.dtype) -> None:
  """Adds the health of as many parts, of equal size, as there are tallies."""
  values = _numbers(words, dtype).reshape(len(tallies), -1)
  with np.errstate(over="ignore", invalid="ignore"):
    squares = np.vecdot(values, values).tolist()
  for tally, found, row in zip(tallies, squares, values, strict=True):
    if math.isfinite(found):  # a NaN or an infinity would have stayed in it
      tally.squares += found
      continue
    finite = np.isfinite(row)
    tally.nonfinite += int(row.size - np.count_nonzero(finite))
    tally.nan += int(np.count_nonzero(np.isnan(row)))
    large = row[finite].astype(np.float64)
    with np.errstate(over="ignore"):
      tally.squares += float(np.dot(large, large))


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


@functools.cache  # numpy composes names anew each time
def is_float(dtype: Any) -> bool:
  """Whether a dtype can hold non-finite values, or a norm: floats of all widths, complex numbers."""
  return dtype.kind in "fc" or "float" in dtype.name
