"""Host memory that jax can take over."""

from __future__ import annotations

import jax
import numpy as np

# XLA's CPU client takes over host memory without a copy if it is aligned so.
ALIGNMENT = 64


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
  """Memory that nothing else refers to, aligned so that jax on CPU need not copy it."""
  nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
  memory = np.empty(nbytes + ALIGNMENT, np.uint8)
  start = -memory.ctypes.data % ALIGNMENT
  return memory[start : start + nbytes].view(dtype).reshape(shape)


def host_view(array: jax.Array) -> np.ndarray:
  """The values of an array on one CPU device: a view of its memory, which keeps the buffer alive as long as it lives.

  np.asarray of the array itself would be kept by it, and the array could never be donated again.
  """
  try:
    return np.asarray(memoryview(array))  # type: ignore[arg-type]
  except (BufferError, TypeError):  # bfloat16, float8 and the like
    return np.asarray(jax.make_array_from_single_device_arrays(array.shape, array.sharding, [array]))
