"""How well values compress under each codec: a sample of bounded size, taken of each kind of leaf.

Measured with TensorStore's own codecs in memory, which also compress the checkpoint.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from ckpt_jax.layout import codec
from ckpt_jax.layout.codec import kind_of
from ckpt_jax.layout.encoding import as_words
from ckpt_jax.layout.staging import HostCopies, is_on_accelerator
from ckpt_jax.layout.structure import Flat, Structure

_BLOCK = 512 << 10
_BLOCKS = 16  # 8 MiB in all
# Pieces up to this size come from an accelerator as a whole, since a program to cut them takes longer; of larger ones
# only some rows.
_FETCH_NBYTES = 32 << 20


# What has a smaller share of the bytes is not worth a codec of its own.
_WORTH_A_SAMPLE = 0.01


@dataclasses.dataclass(frozen=True)
class Compressibility:
  """A codec on a sample; the rates are bytes of values per second and thread.

  Attributes:
    ratio: compressed bytes / bytes, at most 1.0.
    compress_bytes_per_s, decompress_bytes_per_s: on one thread.
    sampled_nbytes: bytes of the sample.
  """

  ratio: float
  compress_bytes_per_s: float
  decompress_bytes_per_s: float
  sampled_nbytes: int


Codecs = Mapping[str, Compressibility]  # by name, see `layout.codec`; without "off"


@dataclasses.dataclass(frozen=True)
class Kind:
  """Leaves of one kind, which are stored alike.

  Attributes:
    name: see `layout.codec.kind_of`.
    nbytes: of all of them.
    codecs: measured on a sample of their values.
  """

  name: str
  nbytes: int
  codecs: Codecs


class _Sample(NamedTuple):
  """Values of a kind of leaves: the kind, its bytes, and blocks of them as rows of unsigned integers."""

  name: str
  nbytes: int
  rows: np.ndarray


def sample_kinds(state: Flat) -> tuple[Kind, ...]:
  """How well a state's values compress, by kind, most bytes first: some 8 MiB of them in all.

  Left out are kinds that have less than 1% of the bytes, or of which this process holds no values.
  """
  return measure_kinds(take_sample(state))


def take_sample(state: Flat) -> list[_Sample]:
  """Copies of the values that `sample_kinds` would compress: the state may change afterwards."""
  kinds = state.structure.once(_kinds, state.structure)
  total = sum(nbytes for nbytes, _ in kinds.values())
  found = []
  for name, (nbytes, numbers) in kinds.items():
    if nbytes and nbytes >= _WORTH_A_SAMPLE * total:
      leaves = [state.leaves[i] for i in numbers]
      values = [np.asarray(x) if isinstance(x, np.generic) else as_words(x) for x in leaves]
      rows = _rows([x for x in values if _has_values(x)], max(1, round(_BLOCKS * nbytes / total)))
      if rows is not None:
        found.append(_Sample(name, nbytes, rows))
  return found


def measure_kinds(samples: Sequence[_Sample]) -> tuple[Kind, ...]:
  """How well samples compress; some 50 ms."""
  return tuple([Kind(sample.name, sample.nbytes, _codecs(sample.rows)) for sample in samples])


def _kinds(structure: Structure) -> dict[str, tuple[int, list[int]]]:
  """The kinds of a state's leaves: bytes, and the numbers of the leaves; most bytes first."""
  nbytes: collections.Counter[str] = collections.Counter()
  numbers: dict[str, list[int]] = {}
  for i, (name, leaf) in enumerate(zip(structure.names, structure.abstract, strict=True)):
    if leaf is None:
      continue
    leaf = as_words(leaf)
    kind = kind_of(name, np.dtype(leaf.dtype))
    nbytes[kind] += math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
    numbers.setdefault(kind, []).append(i)
  return {kind: (n, numbers[kind]) for kind, n in nbytes.most_common()}


def _has_values(x: Any) -> bool:
  return hasattr(x, "addressable_shards") or hasattr(x, "__array_interface__")


def measure_codecs(arrays: Sequence[Any], blocks: int = _BLOCKS) -> dict[str, Compressibility]:
  """Compresses blocks of 512 KiB taken evenly over the bytes of arrays of one dtype, under each codec.

  Args:
    arrays: numpy, or what this process holds of jax's.
    blocks: how many.

  Returns:
    By codec; empty if the arrays hold less than a kilobyte.
  """
  rows = _rows(arrays, blocks)
  return {} if rows is None else _codecs(rows)


def _codecs(rows: np.ndarray) -> dict[str, Compressibility]:
  names = (codec.ZSTD, codec.SHUFFLED) if rows.itemsize > 1 else (codec.ZSTD,)
  return {name: _compress(rows, name) for name in names}


def _rows(arrays: Sequence[Any], blocks: int) -> np.ndarray | None:
  """Blocks of arrays as the rows of one of unsigned integers; None if the arrays hold less than a kilobyte."""
  sampled = _sample([x for x in arrays if x.size], blocks)
  if sum(map(len, sampled)) < 1024:
    return None
  # All blocks of one length, as the codec's chunks are. Longer ones are cut and shorter ones left out: padding or
  # repeating would improve the ratio.
  size = sorted(map(len, sampled))[len(sampled) // 2]
  data = np.stack([block[:size] for block in sampled if len(block) >= size])
  return data.view(f"u{math.gcd(arrays[0].dtype.itemsize, 8)}")


def _sample(arrays: list[Any], blocks: int) -> list[np.ndarray]:
  """Blocks of bytes at even distances."""
  sizes = np.array([_nbytes(x) for x in arrays], np.int64)
  ends = np.cumsum(sizes)
  total = int(ends[-1]) if len(ends) else 0
  count = min(blocks, max(1, total // _BLOCK)) if total else 0
  pieces: list[tuple[Any, int]] = []
  for i in range(count):
    offset = int((i + 0.5) * total / count)
    which = int(np.searchsorted(ends, offset, side="right"))
    pieces += _piece(arrays[which], offset - int(ends[which] - sizes[which]))
  copies = HostCopies()
  copies.stage([piece for piece, _ in pieces if isinstance(piece, jax.Array)])
  found = [_block(copies.of(piece)() if isinstance(piece, jax.Array) else piece, offset) for piece, offset in pieces]
  return [block for block in found if len(block)]


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


def _compress(data: np.ndarray, name: str) -> Compressibility:
  """A codec on the rows of an array."""
  import tensorstore as ts

  metadata = {"shape": list(data.shape), "chunks": [1, data.shape[1]], "dtype": data.dtype.str, "compressor": None}
  codec.set_codec(metadata, name, data.dtype.itemsize)
  spec = {
    "driver": "zarr",
    "kvstore": {"driver": "memory"},
    "metadata": metadata,
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
