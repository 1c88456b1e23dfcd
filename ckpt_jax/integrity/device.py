"""The sums of `sums.py` as a jit, for arrays on an accelerator: one dispatch for many leaves, no copy.

The result is the same number, to the bit; tests compare the two. GSPMD splits the sum over the devices that hold the
array, and every process gets the total.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ckpt_jax.integrity import sums

_AT_ONCE = 64  # leaves in one program: more take longer to compile, fewer to dispatch


def dispatch(arrays: Sequence[jax.Array]) -> list[tuple[jax.Array, ...]]:
  """Starts the sums of `arrays`, and returns for each what `result` waits for.

  Arrays of one shape, dtype and sharding share programs, so that a model compiles only a handful.
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
  """Waits for the sums of one array."""
  total, counts, squares = (np.asarray(x.addressable_data(0)) for x in found)
  nonfinite, nan = counts.tolist()
  return sums.Tally(int(total), nonfinite=nonfinite, nan=nan, squares=float(squares))


@jax.jit
def _tally_all(arrays: tuple[jax.Array, ...]) -> list[tuple[jax.Array, ...]]:
  return [(_total(x), *_health(x)) for x in arrays]


def _health(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """How many numbers are not finite and how many are NaN, in one array to fetch it once; squares of the others."""
  if not jnp.issubdtype(x.dtype, jnp.inexact):
    return jnp.zeros(2, jnp.int64), jnp.zeros((), jnp.float32)
  if jnp.issubdtype(x.dtype, jnp.complexfloating):
    (counts, squares), (more_counts, more_squares) = _health(lax.real(x)), _health(lax.imag(x))
    return counts + more_counts, squares + more_squares
  finite = jnp.isfinite(x)
  counts = jnp.stack([jnp.sum(bad, dtype=jnp.int64) for bad in (~finite, jnp.isnan(x))])
  return counts, jnp.sum(jnp.square(jnp.where(finite, x, 0).astype(jnp.float32)))


def _total(x: jax.Array) -> jax.Array:
  total = jnp.zeros((), jnp.uint64)
  if x.size == 0:
    return total
  shape = x.shape
  planes, itemsize = _planes(x)
  first = sums.columns_from(shape, itemsize)
  rows = sums.mix(_flat_index(shape[:first]), sums.ROW_SEED)
  rows = lax.optimization_barrier(rows.reshape(shape[:first] + (1,) * (len(shape) - first)))
  columns = _flat_index(shape[first:]).reshape((1,) * first + shape[first:])
  for offset, plane in planes:
    weights = lax.optimization_barrier(_column_weights(columns * itemsize + offset))
    total += jnp.sum(plane.astype(jnp.uint64) * rows * weights, dtype=jnp.uint64)
  return total


def _flat_index(shape: tuple[int, ...]) -> jax.Array:
  index = jnp.zeros(shape, jnp.int64)
  for axis, size in enumerate(shape):
    index = index * size + lax.broadcasted_iota(jnp.int64, shape, axis)
  return index


def _column_weights(byte: jax.Array) -> jax.Array:
  """The weight of a plane of at most four bytes that begins at this byte of its row."""
  word, within = byte // 8, (byte % 8).astype(jnp.uint64)
  blocks = sums.mix(word // sums.BLOCK, sums.BLOCK_SEED)
  low = blocks * sums.mix(word % sums.BLOCK, sums.LOW_SEED) << (8 * within)
  high = blocks * sums.mix(word % sums.BLOCK, sums.HIGH_SEED) << (
    8 * (jnp.maximum(within, jnp.uint64(4)) - jnp.uint64(4))
  )
  return low + jnp.where(within >= 4, high, jnp.uint64(0))


def _planes(x: jax.Array) -> tuple[list[tuple[int, jax.Array]], int]:
  """The bits of `x` as unsigned arrays of at most four bytes with their offsets in the element; bytes per element."""
  if jnp.issubdtype(x.dtype, jnp.complexfloating):
    real, itemsize = _planes(lax.real(x))
    imag, _ = _planes(lax.imag(x))
    return real + [(offset + itemsize, plane) for offset, plane in imag], 2 * itemsize
  if x.dtype == jnp.bool_:
    return [(0, x.astype(jnp.uint8))], 1
  bits = jnp.iinfo(x.dtype).bits if jnp.issubdtype(x.dtype, jnp.integer) else jnp.finfo(x.dtype).bits
  if bits < 8 and bits not in (2, 4):
    raise TypeError(f"{x.dtype}: there is no unsigned type of {bits} bits")
  word = lax.bitcast_convert_type(x, jnp.dtype(f"uint{bits}"))
  if bits == 64:
    return [(0, word & jnp.uint64(0xFFFFFFFF)), (4, word >> jnp.uint64(32))], 8
  return [(0, word.astype(jnp.uint8) if bits < 8 else word)], -(-bits // 8)
