"""Weights as 8-bit or 4-bit integers with scales: symmetric, round to nearest.

A value x is stored as q = round(x / scale) with scale = max|x| / Q over the values that share the scale, Q = 127 for
int8 and 7 for int4, so that |x - q * scale| <= scale / 2 for each of them (Jacob et al. 2018, eq. 1, with a zero point
of 0). int8 has a scale for each output channel, int4 one for each group of 32, 64 or 128 inputs of a channel.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ckpt_jax.inference.cast import BLOCK, Loss, difference
from ckpt_jax.layout.sharding import Box

PyTree = Any
LARGEST = {8: 127, 4: 7}  # by number of bits
_SMALLEST_GROUP = 16
_SMALLEST_SCALE = float(np.finfo(np.float32).tiny)  # a smaller one would be flushed to zero on a device
# Matrices that stay as they are: tables that are looked up, and vectors that scanned layers stack to matrices.
_KEPT = re.compile(r"embed|wte|wpe|vocab|position|token|norm|(^|/)ln[_\d]*(/|$)|(^|/)(bias|scale)(/|$)", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Scheme:
  """How the values of one array are stored.

  Attributes:
    bits: 8 or 4.
    axis: the inputs, along which values share a scale.
    group: how many neighbours along `axis` share one; divides its length.
  """

  bits: int
  axis: int
  group: int

  def scale_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of the scales of an array."""
    return tuple(n // self.group if i == self.axis else n for i, n in enumerate(shape))

  def stored_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape in which integers are stored: two of int4 in a byte, along the last axis."""
    return tuple(shape) if self.bits == 8 else (*shape[:-1], -(-shape[-1] // 2))


def scheme_of(path: str, shape: Sequence[int], quantize: str, group: int) -> Scheme | None:
  """The scheme for a floating-point leaf; None if it stays one.

  Matrices alone are quantised, and of these neither embeddings nor what belongs to a norm. The inputs of a kernel are
  its largest axis but the last: right for a layer [in, out], layers that are stacked [layer, in, out], a projection to
  heads [in, head, out], and a convolution [height, width, in, out].
  """
  if len(shape) < 2 or min(shape) < 2 or _KEPT.search(path):
    return None
  axis = max(range(len(shape) - 1), key=lambda i: (shape[i], i))
  length = shape[axis]
  if quantize == "int8":
    return Scheme(8, axis, length)
  fitting = max(n for n in range(1, min(group, length) + 1) if length % n == 0)
  # With scales for fewer values than this, int4 would take more than int8.
  return Scheme(4, axis, fitting) if fitting >= _SMALLEST_GROUP else Scheme(8, axis, length)


class Magnitudes:
  """The largest absolute value of each group of an array that arrives in boxes."""

  def __init__(self, scheme: Scheme, shape: Sequence[int]):
    """Knows nothing yet of an array of that shape."""
    self._scheme = scheme
    self._largest = np.zeros(scheme.scale_shape(shape), np.float32)

  def see(self, values: np.ndarray, box: Box) -> None:
    """Takes in the values of a box."""
    at, starts = _groups(self._scheme, box)
    found = np.maximum.reduceat(np.abs(values.astype(np.float32, copy=False)), starts, axis=self._scheme.axis)
    self._largest[at] = np.maximum(self._largest[at], found)

  def scales(self) -> np.ndarray:
    """float32, a scale for each group: `largest / Q`. Groups of zeros have a scale too, whatever it is."""
    most = np.float32(LARGEST[self._scheme.bits])
    # Rounded up, the scale of the largest float32 would give back infinity.
    bound = np.nextafter(np.finfo(np.float32).max / most, np.float32(0))
    return np.clip(self._largest / most, np.float32(_SMALLEST_SCALE), bound)


def quantized(values: np.ndarray, box: Box, scheme: Scheme, scales: np.ndarray) -> tuple[np.ndarray, Loss]:
  """The integers of a box of an array, as int8, and what was lost; `scales` are of the whole array."""
  out = np.empty(values.shape, np.int8)
  loss = Loss()
  rows = max(1, BLOCK * len(values) // values.size)
  for first in range(0, len(values), rows):
    part = slice(first, first + rows)
    start = box[0][0] + first
    of_part = ((start, min(start + rows, box[0][1])), *box[1:])
    out[part], lost = _quantized(values[part].astype(np.float32, copy=False), _spread(scales, scheme, of_part), scheme)
    loss.add(lost)
  return out, loss


def _quantized(values: np.ndarray, scale: np.ndarray, scheme: Scheme) -> tuple[np.ndarray, Loss]:
  largest = LARGEST[scheme.bits]
  rounded = np.divide(values, scale)
  np.rint(rounded, out=rounded)
  np.clip(rounded, -largest, largest, out=rounded)
  out = rounded.astype(np.int8)
  return out, difference(values, np.multiply(rounded, scale, out=rounded))


def _groups(scheme: Scheme, box: Box) -> tuple[tuple[slice, ...], np.ndarray]:
  """The groups that a box touches, and where in the box each of them begins."""
  start, stop = box[scheme.axis]
  first, last = start // scheme.group, -(-stop // scheme.group)
  at = tuple(slice(first, last) if i == scheme.axis else slice(a, b) for i, (a, b) in enumerate(box))
  return at, np.maximum(np.arange(first, last) * scheme.group - start, 0)


def _spread(scales: np.ndarray, scheme: Scheme, box: Box) -> np.ndarray:
  """The scale of each value of a box, in a shape that broadcasts to that of the box."""
  at, _ = _groups(scheme, box)
  if scales.shape[scheme.axis] == 1:
    return scales[at]
  start, stop = box[scheme.axis]
  return np.take(scales[at], np.arange(start, stop) // scheme.group - start // scheme.group, axis=scheme.axis)


def packed(integers: np.ndarray) -> np.ndarray:
  """int4 values, two in a byte along the last axis: the first in the lower half; an odd last one beside a zero."""
  if integers.shape[-1] % 2:
    integers = np.concatenate([integers, np.zeros((*integers.shape[:-1], 1), np.int8)], axis=-1)
  halves = integers.view(np.uint8)
  return (halves[..., ::2] & 0xF) | (halves[..., 1::2] << 4)


def unpacked_int4(stored: jax.Array, length: int) -> jax.Array:
  """`packed` undone, as int4[..., length]."""
  both = jnp.stack([stored << jnp.uint8(4), stored], axis=-1).reshape(*stored.shape[:-1], -1)[..., :length]
  return (jax.lax.bitcast_convert_type(both, jnp.int8) >> jnp.int8(4)).astype(jnp.int4)


@functools.partial(jax.tree_util.register_dataclass, data_fields=("values", "scale"), meta_fields=("axis",))
@dataclasses.dataclass(frozen=True)
class QuantizedArray:
  """A matrix of integers with scales; a pytree of two arrays, so it goes through jit, device_put and sharding.

  `x @ w` multiplies the integers and applies the scales to the result, without a copy of `w` in floating point where
  the scales allow it.

  Attributes:
    values: int8[...] or int4[...].
    scale: float32, with as many axes: those of `values` but for `axis`, which has one scale for each group.
    axis: the inputs.
  """

  values: jax.Array
  scale: jax.Array
  axis: int

  @property
  def shape(self) -> tuple[int, ...]:
    """The shape of the matrix."""
    return tuple(self.values.shape)

  def dequantize(self, dtype: Any = jnp.float32) -> jax.Array:
    """The matrix in floating point: integers times scales."""
    groups = self.scale.shape[self.axis]
    split = (*self.shape[: self.axis], groups, self.shape[self.axis] // groups, *self.shape[self.axis + 1 :])
    values = self.values.astype(jnp.float32).reshape(split) * jnp.expand_dims(self.scale, self.axis + 1)
    return values.reshape(self.shape).astype(dtype)

  def __rmatmul__(self, x: jax.Array) -> jax.Array:
    """`x[..., in] @ self[in, out]`, in the type of `x`."""
    if self.values.ndim == 2 and self.scale.shape[self.axis] == 1:
      product = jnp.matmul(x, self.values.astype(x.dtype))
      return product * self.scale.astype(x.dtype).reshape((1,) * (product.ndim - 1) + (-1,))
    return jnp.matmul(x, self.dequantize(x.dtype))


def dequantize(tree: PyTree, dtype: Any = jnp.float32) -> PyTree:
  """A tree with plain arrays of `dtype` in place of the `QuantizedArray`s; other leaves stay as they are."""
  is_quantized = lambda leaf: isinstance(leaf, QuantizedArray)  # noqa: E731
  return jax.tree.map(lambda leaf: leaf.dequantize(dtype) if is_quantized(leaf) else leaf, tree, is_leaf=is_quantized)
