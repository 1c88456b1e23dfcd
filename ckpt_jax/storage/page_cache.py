"""The page cache: what files take of it, and how they leave it while they are written.

A step is written once and read after a crash; the pages that it leaves behind push out the data that training reads,
and taking them costs more than the copy (a virtual machine's host hands them out one by one). TensorStore's
`file_io_mode: direct` is for reads alone: it opens what it writes without O_DIRECT. So the pages are dropped behind it.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import mmap
import os
import threading
import time
from collections.abc import Iterator

from ckpt_jax.storage.paths import files_beneath
from ckpt_jax.storage.urls import is_object_store

CAN_RELEASE = hasattr(os, "posix_fadvise")
# 1 GB written by one call took 0.32 s, and 0.36 s beside a thread that hashed it; with steps of 16 MiB that were late
# whenever the one before had taken long, 1.2 s and 0.7 s: the disk stood idle, and the writer waited for fresh pages.
_EVERY_S, _STEP_NBYTES = 0.002, 8 * 2**20
_LAG_S = 0.1  # after which what was sent to the disk counts as there: before, its pages cannot be dropped
_PATIENCE_S = 60.0
_LOOK_S = 0.01  # between looks for files that begin to grow, and at those that have stopped
_SHARE = 0.1  # of the time at most is spent on them, however many files there are


@contextlib.contextmanager
def write_behind(directory: str | os.PathLike[str]) -> Iterator[None]:
  """Drops what is written into files of `directory` from the page cache, meanwhile and, soon after, the rest.

  Every drop also starts to write out what is still dirty, so that the disk is busy while others copy. It is advice
  to the kernel: nothing is lost by it or fails, nothing is synced, and tmpfs and systems without such advice ignore it.

  Args:
    directory: of the files, not those of folders in it; it need not exist yet, and may be renamed at the end.
      Nothing happens if it is in a bucket.
  """
  if not CAN_RELEASE or is_object_store(directory):
    yield
    return
  files = _Files(os.fspath(directory))
  threading.Thread(target=files.follow, name="ckpt_jax-write-behind", daemon=True).start()
  try:
    yield
  finally:
    files.end()


class _File:
  """A file that grows, opened for as long as it does."""

  def __init__(self, descriptor: int, size: int, now: float):
    self.size = size
    self._descriptor = descriptor
    self._sent = collections.deque([(now, size)])  # when, and up to where, it was sent to the disk
    self._tried_at = now

  def turn(self, now: float) -> bool:
    """Sends what is new to the disk, and drops what was sent before; False once it has stopped growing."""
    size = os.fstat(self._descriptor).st_size  # all that most turns call: each call gives Python's lock away
    grows = size >= self.size + _STEP_NBYTES
    if grows or now >= self._tried_at + _LOOK_S:
      start = self._sent[0][1]
      os.posix_fadvise(self._descriptor, start, size - start, os.POSIX_FADV_DONTNEED)
      self._tried_at = now
    if grows:
      self.size = size
      self._sent.append((now, size))
      while self._sent[1][0] < now - _LAG_S:
        self._sent.popleft()
    return now < self._sent[-1][0] + _LAG_S

  def close(self) -> None:
    """Closes it."""
    os.close(self._descriptor)


class _Files:
  """The files of a directory: those that grow, and of each other one when it is dropped next, its size, the pause."""

  def __init__(self, directory: str):
    self._directory = directory
    self._descriptor: int | None = None
    self._ended = threading.Event()
    self._lock = threading.Lock()
    self._growing: dict[str, _File] = {}
    self._others: dict[str, tuple[float, int, float]] = {}

  def follow(self) -> None:
    """Drops pages until `end`, then what is left."""
    look_at = 0.0
    while not self._ended.wait(_EVERY_S):
      now = time.monotonic()
      with contextlib.suppress(OSError):  # not there yet, or gone
        if now >= look_at:
          self._look(now)
          look_at = time.monotonic() + max(_LOOK_S, (time.monotonic() - now) / _SHARE)
      for name, file in [*self._growing.items()]:
        if not file.turn(now):
          file.close()
          self._others[name] = now, file.size, _LAG_S
          del self._growing[name]
    for file in self._growing.values():
      file.close()
    if self._descriptor is not None:
      with contextlib.suppress(OSError):
        for name in os.listdir(self._descriptor):
          release(name, directory=self._descriptor)
      os.close(self._descriptor)

  def end(self) -> None:
    """Has the rest dropped, whatever becomes of the directory's name; returns at once."""
    with contextlib.suppress(OSError):  # nothing was written
      self._opened()
    self._ended.set()

  def _opened(self) -> int:
    with self._lock:
      if self._descriptor is None:
        self._descriptor = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY)
      return self._descriptor

  def _look(self, now: float) -> None:
    """Finds the files that grow, and drops what has stopped before it could be followed."""
    folder = self._opened()
    for name in os.listdir(folder):
      if name in self._growing:
        continue
      at, seen, pause = self._others.setdefault(name, (now + _LAG_S, 0, _LAG_S))
      size = os.stat(name, dir_fd=folder).st_size
      if size >= seen + _STEP_NBYTES:
        self._growing[name] = _File(os.open(name, os.O_RDONLY, dir_fd=folder), seen, now)
      elif now >= at and pause < _PATIENCE_S:  # a slow disk may not have had it the last time
        release(name, directory=folder)
        self._others[name] = now + 2 * pause, size, 2 * pause


def release(path: str, directory: int | None = None) -> None:
  """Starts to write out the dirty pages of a file, and drops the others from the page cache.

  Args:
    path: the file; relative to the open `directory`, if one is given.
    directory: a descriptor.
  """
  descriptor = os.open(path, os.O_RDONLY, dir_fd=directory)
  try:
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
  finally:
    os.close(descriptor)


def pages_in_memory(descriptor: int) -> tuple[int, int]:
  """Pages of a file in the page cache, and all its pages (mincore(2)). All, if the system does not say."""
  size = os.fstat(descriptor).st_size
  pages = -(-size // mmap.PAGESIZE)
  vector = (ctypes.c_ubyte * pages)(*[1] * pages)
  if size:
    # A private mapping, since ctypes takes the address of writable memory only; no page of it is touched.
    with mmap.mmap(descriptor, size, access=mmap.ACCESS_COPY) as mapped:
      start = ctypes.c_char.from_buffer(mapped)
      ctypes.CDLL(None).mincore(ctypes.byref(start), ctypes.c_size_t(size), vector)
      del start  # else the mapping cannot be closed
  return sum(page & 1 for page in vector), pages


def cached_nbytes(directory: str | os.PathLike[str]) -> tuple[int, int]:
  """Bytes that the files below a directory take of the page cache, and all their bytes, both in whole pages."""
  cached = total = 0
  for path in files_beneath(os.fspath(directory)):
    with open(path, "rb") as file:
      found, pages = pages_in_memory(file.fileno())
    cached, total = cached + found * mmap.PAGESIZE, total + pages * mmap.PAGESIZE
  return cached, total
