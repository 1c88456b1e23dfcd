"""How well values compress: zstd at level 1, as Orbax applies it, on a sample of bounded size.

Measured with TensorStore's own codec in memory, which also compresses the checkpoint.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from ckpt_jax.layout.staging import HostCopies, is_on_accelerator

_BLOCK = 512 << 10
_BLOCKS = 16  # 8 MiB in all
# Pieces up to this size come from an accelerator as a whole, since a program to cut them takes longer; of larger ones
# only some rows.
_FETCH_NBYTES = 32 << 20


@dataclasses.dataclass(frozen=True)
class Compressibility:
  """zstd at level 1 on a sample; the rates are bytes of values per second and thread.

  Attributes:
    ratio: compressed bytes / bytes, at most 1.0.
    compress_bytes_per_s, decompress_bytes_per_s: on one thread.
    sampled_nbytes: bytes of the sample.
  """

  ratio: float
  compress_bytes_per_s: float
  decompress_bytes_per_s: float
  sampled_nbytes: int


def measure_compression(arrays: Sequence[Any]) -> Compressibility | None:
  """Compresses up to 8 MiB taken evenly over the bytes of `arrays`: numpy, or what this process holds of jax's.

  Returns:
    None if the arrays hold less than a kilobyte.
  """
  blocks = _sample([x for x in arrays if x.size])
  if sum(map(len, blocks)) < 1024:
    return None
  # All blocks of one length, as the codec's chunks are. Longer ones are cut and shorter ones left out: padding or
  # repeating would improve the ratio.
  size = sorted(map(len, blocks))[len(blocks) // 2]
  return _compress(np.stack([block[:size] for block in blocks if len(block) >= size]))


def _sample(arrays: list[Any]) -> list[np.ndarray]:
  """Blocks of bytes at even distances."""
  sizes = np.array([_nbytes(x) for x in arrays], np.int64)
  ends = np.cumsum(sizes)
  total = int(ends[-1]) if len(ends) else 0
  count = min(_BLOCKS, max(1, total // _BLOCK)) if total else 0
  pieces: list[tuple[Any, int]] = []
  for i in range(count):
    offset = int((i + 0.5) * total / count)
    which = int(np.searchsorted(ends, offset, side="right"))
    pieces += _piece(arrays[which], offset - int(ends[which] - sizes[which]))
  copies = HostCopies()
  copies.stage([piece for piece, _ in pieces if isinstance(piece, jax.Array)])
  blocks = [_block(copies.of(piece)() if isinstance(piece, jax.Array) else piece, offset) for piece, offset in pieces]
  return [b for b in blocks if len(b)]


def _piece(x: Any, offset: int) -> list[tuple[Any, int]]:
  """A piece of `x` on this process, and the offset in it, near byte `offset` of `x`; none if it holds nothing of it."""
  if isinstance(x, np.ndarray):
    return [(x, offset)]
  shards = x.addressable_shards
  if not shards:
    return []
  piece = (
    x if len(x.sharding.device_set) == 1 else shards[min(offset * len(shards) // _nbytes(x), len(shards) - 1)].data
  )
  offset %= max(_nbytes(piece), 1)
  if _nbytes(piece) > _FETCH_NBYTES and is_on_accelerator(piece):
    row = max(_nbytes(piece) // piece.shape[0], 1)
    rows = max(1, min(piece.shape[0], _BLOCK // row))
    start = min(offset // row, piece.shape[0] - rows)
    piece, offset = piece[start : start + rows], 0
  return [(piece, offset)]


def _block(values: np.ndarray, offset: int) -> np.ndarray:
  """Up to a block of the bytes of an array near `offset`."""
  flat = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
  start = max(0, min(offset, len(flat) - _BLOCK)) // 16 * 16  # aligned to whole values of any dtype
  return flat[start : start + _BLOCK]


def _nbytes(x: Any) -> int:
  return int(x.size) * x.dtype.itemsize


def _compress(data: np.ndarray) -> Compressibility:
  import tensorstore as ts

  spec = {
    "driver": "zarr",
    "kvstore": {"driver": "memory"},
    "metadata": {
      "shape": list(data.shape),
      "chunks": [1, data.shape[1]],
      "dtype": "|u1",
      "compressor": {"id": "zstd", "level": 1},
    },
    "store_data_equal_to_fill_value": True,  # Orbax stores zeros too
  }
  context = ts.Context({"data_copy_concurrency": {"limit": 1}})
  store = ts.open(spec, create=True, context=context).result()
  started = _now()
  store.write(data).result()
  written = _now()
  store.read().result()
  read = _now()
  kvstore: Any = store.kvstore
  stored = sum(len(kvstore.read(k).result().value) for k in kvstore.list().result() if not k.endswith(b".zarray"))
  return Compressibility(
    ratio=min(1.0, stored / data.nbytes),
    compress_bytes_per_s=data.nbytes / _seconds(started, written),
    decompress_bytes_per_s=data.nbytes / _seconds(written, read),
    sampled_nbytes=int(data.nbytes),
  )


def _now() -> tuple[float, float]:
  return time.perf_counter(), time.process_time()


def _seconds(start: tuple[float, float], end: tuple[float, float]) -> float:
  """Time of one thread: wall time where other threads of this process ran too, CPU time where other processes did."""
  return max(min(b - a for a, b in zip(start, end, strict=True)), 1e-6)
