"""Host memory that jax can take over."""

from __future__ import annotations

import numpy as np

# XLA's CPU client takes over host memory without a copy if it is aligned so.
ALIGNMENT = 64


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
  """Memory that nothing else refers to, aligned so that jax on CPU need not copy it."""
  nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
  memory = np.empty(nbytes + ALIGNMENT, np.uint8)
  start = -memory.ctypes.data % ALIGNMENT
  return memory[start : start + nbytes].view(dtype).reshape(shape)
