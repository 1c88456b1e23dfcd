"""Host memory beside that of arrays."""

from __future__ import annotations

import contextlib
import math
import mmap

import numpy as np

# XLA's CPU client takes over host memory of this alignment without a copy, but cannot donate it. So memory that is to
# become an array is aligned for numpy only, and XLA copies it.
ALIGNMENT = 64
_UNALIGNED = 16
# The kernel hands out fresh memory page by page, and a page of 4 KiB costs more than filling it: reading 1 GB into
# arrays of 2 to 25 MB took 0.52 s, of which huge pages saved 0.11. (numpy asks for them from 4 MiB on.)
_HUGE_PAGE = 2 * 2**20 if hasattr(mmap, "MADV_HUGEPAGE") else None


def unaligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
  """Fresh memory, which jax on a CPU copies to make an array of it."""
  nbytes = math.prod(shape) * dtype.itemsize
  if _HUGE_PAGE is not None and nbytes >= _HUGE_PAGE:
    pages = mmap.mmap(-1, nbytes + 2 * _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory = np.frombuffer(pages, np.uint8)
    start = -_address(memory) % _HUGE_PAGE
    with contextlib.suppress(OSError):  # a kernel without them
      # Whole pages only: the rest of a last one would be wasted.
      pages.madvise(mmap.MADV_HUGEPAGE, start, nbytes // _HUGE_PAGE * _HUGE_PAGE)
  else:
    memory = np.empty(nbytes + 2 * ALIGNMENT, np.uint8)
    start = -_address(memory) % ALIGNMENT
  start += _UNALIGNED
  return memory[start : start + nbytes].view(dtype).reshape(shape)


def _address(array: np.ndarray) -> int:
  return array.__array_interface__["data"][0]  # a third of what `array.ctypes.data` takes


def to_be_copied(array: np.ndarray) -> np.ndarray:
  """The array, or a copy of it, that jax on a CPU copies instead of taking it over."""
  if _address(array) % ALIGNMENT or not array.flags.c_contiguous or array.size < 2:
    return array
  out = unaligned_empty(array.shape, array.dtype)
  out[...] = array
  return out
