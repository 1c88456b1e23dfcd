"""The sums of `sums.py` as a jit, for arrays that live on an accelerator: one dispatch for many leaves, no copy.

The result is the same number, to the bit: tests hold the two against each other. GSPMD splits the sum over the devices
that hold the array, and every process gets the total.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ckpt_jax.integrity import sums

_AT_ONCE = 64  # leaves in one program: compiling grows with it, dispatching shrinks


def is_on_accelerator(leaf: Any) -> bool:
  """Whether a leaf's bits lie in the memory of an accelerator."""
  if _has_cpu_alone() or not isinstance(leaf, jax.Array) or leaf.size == 0:
    return False
  return _is_on_accelerator(leaf.sharding)


@functools.cache
def _has_cpu_alone() -> bool:
  return jax.default_backend() == "cpu"


@functools.lru_cache(maxsize=4096)
def _is_on_accelerator(sharding: jax.sharding.Sharding) -> bool:
  if sharding.memory_kind in ("pinned_host", "unpinned_host"):
    return False  # parked in host memory
  one: jax.Device = next(iter(sharding.device_set))
  return one.platform != "cpu"


def dispatch(arrays: Sequence[jax.Array]) -> list[tuple[jax.Array, ...]]:
  """Starts the sums of `arrays` and returns what `result` reads, one tuple an array: sum, counts, squares.

  The counts are of non-finite numbers, and of NaNs among them: one array, since each that is fetched takes its time.

  Arrays of one shape, dtype and sharding share programs, so that a model compiles a handful of them once.
  """
  groups: dict[Any, list[int]] = {}
  for i, x in enumerate(arrays):
    groups.setdefault((x.shape, x.dtype, x.sharding), []).append(i)
  out: list[Any] = [None] * len(arrays)
  for members in groups.values():
    for first in range(0, len(members), _AT_ONCE):
      part = members[first : first + _AT_ONCE]
      with jax.enable_x64(True):
        found = _tally_all(tuple(arrays[i] for i in part))
      for i, value in zip(part, found, strict=True):
        out[i] = value
  return out


def result(found: tuple[jax.Array, ...]) -> sums.Tally:
  """Waits for one array's sums."""
  tally = sums.Tally()
  total, counts, squares = (x.addressable_data(0) for x in found)
  tally.total = int(np.asarray(total))
  tally.nonfinite, tally.nan = np.asarray(counts).tolist()
  tally.squares = float(np.asarray(squares))
  return tally


@jax.jit
def _tally_all(arrays: tuple[jax.Array, ...]) -> list[tuple[jax.Array, ...]]:
  return [_tally(x) for x in arrays]


def _tally(x: jax.Array) -> tuple[jax.Array, ...]:
  planes, itemsize = _planes(x)
  if jnp.issubdtype(x.dtype, jnp.inexact):
    parts = [lax.real(x), lax.imag(x)] if jnp.issubdtype(x.dtype, jnp.complexfloating) else [x]
    finite = [jnp.isfinite(p) for p in parts]
    wide = [jnp.where(ok, p, 0).astype(jnp.float32) for ok, p in zip(finite, parts, strict=True)]
    squares = functools.reduce(jnp.add, [jnp.sum(p * p) for p in wide])
    bad = [(~ok, jnp.isnan(p)) for ok, p in zip(finite, parts, strict=True)]
    counts = functools.reduce(jnp.add, [jnp.stack([jnp.sum(b, dtype=jnp.int64) for b in both]) for both in bad])
  else:
    counts, squares = jnp.zeros(2, jnp.int64), jnp.zeros((), jnp.float32)
  shape = x.shape
  if x.size == 0:
    return jnp.zeros((), jnp.uint64), counts, squares
  first = sums.columns_from(shape, itemsize)
  rows = _mixed(_flat_index(shape[:first]), sums.ROW_SEED)
  rows = lax.optimization_barrier(rows.reshape(shape[:first] + (1,) * (len(shape) - first)))
  total = jnp.zeros((), jnp.uint64)
  columns = _flat_index(shape[first:]).reshape((1,) * first + shape[first:])
  for offset, plane in planes:
    weights = lax.optimization_barrier(_column_weights(columns * itemsize + offset))
    total += jnp.sum(plane.astype(jnp.uint64) * rows * weights, dtype=jnp.uint64)
  return total, counts, squares


def _flat_index(shape: tuple[int, ...]) -> jax.Array:
  index = jnp.zeros(shape, jnp.int64)
  for axis, size in enumerate(shape):
    index = index * size + lax.broadcasted_iota(jnp.int64, shape, axis)
  return index


def _mixed(numbers: jax.Array, seed: int) -> jax.Array:
  z = (numbers.astype(jnp.uint64) + jnp.uint64(seed << 56)) * jnp.uint64(sums.GOLDEN)
  z ^= z >> jnp.uint64(30)
  z *= jnp.uint64(sums.MIX_1)
  z ^= z >> jnp.uint64(27)
  z *= jnp.uint64(sums.MIX_2)
  z ^= z >> jnp.uint64(31)
  return z | jnp.uint64(1)


def _column_weights(byte: jax.Array) -> jax.Array:
  """What a plane of at most four bytes that begins at this byte of its row counts."""
  word, within = byte // 8, (byte % 8).astype(jnp.uint64)
  blocks = _mixed(word // sums.BLOCK, sums.BLOCK_SEED)
  low = blocks * _mixed(word % sums.BLOCK, sums.LOW_SEED) << (8 * within)
  high = blocks * _mixed(word % sums.BLOCK, sums.HIGH_SEED) << (
    8 * (jnp.maximum(within, jnp.uint64(4)) - jnp.uint64(4))
  )
  return low + jnp.where(within >= 4, high, jnp.uint64(0))


def _planes(x: jax.Array) -> tuple[list[tuple[int, jax.Array]], int]:
  """The bits of `x` as unsigned arrays of at most four bytes, each with its place in the element; bytes an element."""
  if jnp.issubdtype(x.dtype, jnp.complexfloating):
    real, itemsize = _planes(lax.real(x))
    imag, _ = _planes(lax.imag(x))
    return real + [(offset + itemsize, plane) for offset, plane in imag], 2 * itemsize
  if x.dtype == jnp.bool_:
    return [(0, x.astype(jnp.uint8))], 1
  bits = jnp.iinfo(x.dtype).bits if jnp.issubdtype(x.dtype, jnp.integer) else jnp.finfo(x.dtype).bits
  if bits < 8:
    unsigned = lax.bitcast_convert_type(x, jnp.dtype(f"uint{bits}")) if bits in (2, 4) else None
    if unsigned is None:
      raise TypeError(f"{x.dtype}: no unsigned type of {bits} bits")
    return [(0, unsigned.astype(jnp.uint8))], 1
  word = lax.bitcast_convert_type(x, jnp.dtype(f"uint{bits}"))
  if bits == 64:
    return [(0, word & jnp.uint64(0xFFFFFFFF)), (4, word >> jnp.uint64(32))], 8
  return [(0, word)], bits // 8
