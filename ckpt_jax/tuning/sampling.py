"""How well values compress: zstd at level 1, as Orbax applies it, on a sample of bounded size.

Through TensorStore's own codec in memory, which is what will compress the checkpoint, so that ratio and speed are those
of the real thing and no other library is needed.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

_BLOCK = 512 << 10
_BLOCKS = 16  # 8 MiB in all
# Whole pieces up to this are fetched from the device; of larger ones rows are sliced off there first.
_FETCH_NBYTES = 4 << 20


@dataclasses.dataclass(frozen=True)
class Compressibility:
  """zstd at level 1 on a sample; the rates are bytes of values per second and thread.

  Attributes:
    ratio: compressed bytes / bytes, 1.0 for what does not shrink.
    compress_bytes_per_s, decompress_bytes_per_s: on one thread.
    sampled_nbytes: bytes that were tried.
  """

  ratio: float
  compress_bytes_per_s: float
  decompress_bytes_per_s: float
  sampled_nbytes: int


def measure_compression(arrays: Sequence[Any]) -> Compressibility | None:
  """Compresses up to 8 MiB taken evenly over the bytes of `arrays`: numpy, or what this process holds of jax's.

  Returns:
    None if the arrays hold less than a kilobyte: there is nothing to gain.
  """
  blocks = _sample([x for x in arrays if x.size])
  nbytes = sum(map(len, blocks))
  if nbytes < 1024:
    return None
  # All blocks of one length, as the codec's chunks are. Longer ones are cut, shorter ones left out: neither padding nor
  # repeating, which would flatter the ratio.
  size = sorted(map(len, blocks))[len(blocks) // 2]
  rows = [np.frombuffer(block, np.uint8)[:size] for block in blocks if len(block) >= size]
  return _compress(np.stack(rows))


def _sample(arrays: list[Any]) -> list[bytes]:
  sizes = np.array([_nbytes(x) for x in arrays], np.int64)
  ends = np.cumsum(sizes)
  total = int(ends[-1]) if len(ends) else 0
  count = min(_BLOCKS, max(1, total // _BLOCK)) if total else 0
  blocks = []
  fetched: dict[tuple[int, int], np.ndarray] = {}
  for i in range(count):
    offset = int((i + 0.5) * total / count)
    which = int(np.searchsorted(ends, offset, side="right"))
    inside = offset - (int(ends[which]) - int(sizes[which]))
    blocks.append(_bytes_at(*_piece(arrays[which], inside), which, fetched))
  return [b for b in blocks if b]


def _piece(x: Any, offset: int) -> tuple[Any, int, int]:
  """The piece on this process to take for the bytes at `offset`, its number, and the offset in it."""
  if isinstance(x, np.ndarray):
    return x, 0, offset
  shards = x.addressable_shards
  if not shards:
    return np.zeros(0, np.uint8), 0, 0
  which = min(offset * len(shards) // max(_nbytes(x), 1), len(shards) - 1)
  piece = shards[which].data
  return piece, which, offset % max(_nbytes(piece), 1)


def _bytes_at(x: Any, piece: int, offset: int, which: int, fetched: dict[tuple[int, int], np.ndarray]) -> bytes:
  """Up to a block of the bytes of `x` near `offset`; a device is asked for few bytes more than that."""
  key = (which, piece)
  if key not in fetched:
    if isinstance(x, np.ndarray) or _nbytes(x) <= _FETCH_NBYTES or _on_cpu(x):
      fetched[key] = np.asarray(x)
    else:
      row = _nbytes(x) // x.shape[0]
      rows = max(1, min(x.shape[0], _BLOCK // max(row, 1)))
      start = min(offset // max(row, 1), x.shape[0] - rows)
      return _flat(np.asarray(x[start : start + rows]))[:_BLOCK].tobytes()
  flat = _flat(fetched[key])
  start = max(0, min(offset, len(flat) - _BLOCK)) // 16 * 16  # aligned to whole values of any dtype
  return flat[start : start + _BLOCK].tobytes()


def _flat(x: np.ndarray) -> np.ndarray:
  return np.ascontiguousarray(x).reshape(-1).view(np.uint8)


def _nbytes(x: Any) -> int:
  return int(x.size) * x.dtype.itemsize


def _on_cpu(x: Any) -> bool:
  return all(d.platform == "cpu" for d in x.devices())


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
  """Of one thread: the clock's if other threads of this process are at work, the CPU's if other processes are."""
  return max(min(b - a for a, b in zip(start, end, strict=True)), 1e-6)
