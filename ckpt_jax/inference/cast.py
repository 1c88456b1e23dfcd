"""Floating-point arrays in a narrower type, rounded to nearest even, and what that loses."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

# Elements worked on at a time: three arrays of them stay in the cache. 16 MiB at once took twice as long.
BLOCK = 1 << 16


@dataclasses.dataclass
class Loss:
  """What a leaf lost on its way into an export.

  Attributes:
    largest: the largest absolute difference of an element, of those that were finite and stayed so.
    magnitude: the largest absolute value of a finite element.
    overflowed: how many finite elements became infinite.
    nonfinite: how many elements were infinite or NaN before.
  """

  largest: float = 0.0
  magnitude: float = 0.0
  overflowed: int = 0
  nonfinite: int = 0

  @property
  def relative(self) -> float:
    """`largest` as a share of `magnitude`."""
    return self.largest / self.magnitude if self.magnitude else 0.0

  def add(self, other: Loss) -> None:
    """Takes in the loss of another part of the leaf."""
    self.largest = max(self.largest, other.largest)
    self.magnitude = max(self.magnitude, other.magnitude)
    self.overflowed += other.overflowed
    self.nonfinite += other.nonfinite


def cast(values: np.ndarray, dtype: Any) -> tuple[np.ndarray, Loss]:
  """Values in another floating-point type, as `values.astype(dtype)` gives them bit for bit, and what was lost.

  numpy and ml_dtypes round to nearest, ties to even (IEEE 754, 4.3.1), and let what is too large become infinite.
  """
  flat = np.ascontiguousarray(values).reshape(-1)
  out = np.empty(flat.shape, dtype)
  loss = Loss()
  with np.errstate(over="ignore", invalid="ignore"):
    for start in range(0, flat.size, BLOCK):
      part = slice(start, start + BLOCK)
      np.copyto(out[part], flat[part], casting="unsafe")
      loss.add(difference(flat[part], out[part]))
  return out.reshape(values.shape), loss


def difference(before: np.ndarray, after: np.ndarray) -> Loss:
  """How far two arrays of one shape are apart."""
  exact = np.float64 if before.dtype.itemsize > 4 else np.float32
  before = before.astype(exact, copy=False)
  with np.errstate(over="ignore", invalid="ignore"):
    apart = np.subtract(after, before, dtype=exact, casting="unsafe")
    largest = float(np.abs(apart, out=apart).max(initial=0.0))
  if np.isfinite(largest):
    return Loss(largest, max(float(before.max(initial=0.0)), -float(before.min(initial=0.0))))
  finite = np.isfinite(before)
  stayed = finite & np.isfinite(after)
  return Loss(
    float(apart.max(initial=0.0, where=stayed)),
    float(np.abs(before).max(initial=0.0, where=finite)),
    overflowed=int(np.count_nonzero(finite & ~stayed)),
    nonfinite=int(np.count_nonzero(~finite)),
  )
