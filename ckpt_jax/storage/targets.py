"""What `probe` measures on: a fresh directory of files, or a fresh prefix of objects, with the same few operations."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import pathlib
import random
import shutil
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any, Protocol

from etils import epath

from ckpt_jax.errors import StorageError
from ckpt_jax.storage.clients import filesystem, kvstore_spec
from ckpt_jax.storage.connect import connect

BLOCK = 2**20


class Target(Protocol):
  """One place to measure on. All methods run from several threads at a time; `data` is what every file holds."""

  cold_by: str | None
  can_rename: bool

  def write(self, name: str, data: memoryview) -> None:
    """Stores `data` and returns once it is durable."""

  def read(self, name: str, start: int, end: int) -> int:
    """Reads bytes [start, end) and returns how many there were."""

  def make_cold(self, names: list[str]) -> None:
    """Makes the next reads come from the storage itself, if it can; `cold_by` says how, or None."""

  def create(self, name: str) -> None: ...
  def stat(self, name: str) -> None: ...
  def list(self) -> int: ...
  def rename(self, name: str, new: str) -> None: ...
  def delete(self, name: str) -> None: ...


class FileTarget:
  """Files in a new directory, through system calls: buffered, with fsync, as TensorStore's file driver does."""

  can_rename = True

  def __init__(self, directory: pathlib.Path):
    self._directory = directory
    self.cold_by: str | None = None
    self.fsync_s: list[float] = []

  def free_nbytes(self) -> int:
    return shutil.disk_usage(self._directory).free

  def write(self, name: str, data: memoryview) -> None:
    fd = os.open(self._directory / name, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)
    try:
      for start in range(0, len(data), BLOCK):
        block = data[start : start + BLOCK]
        while block:
          block = block[os.write(fd, block) :]
      started = time.perf_counter()
      os.fsync(fd)
      self.fsync_s.append(time.perf_counter() - started)
    finally:
      os.close(fd)

  def read(self, name: str, start: int, end: int) -> int:
    fd = os.open(self._directory / name, os.O_RDONLY)
    try:
      buffer = _buffer(min(BLOCK * 4, end - start))
      position = start
      while position < end:
        count = os.preadv(fd, [buffer[: min(len(buffer), end - position)]], position)
        if count == 0:
          break
        position += count
      return position - start
    finally:
      os.close(fd)

  def make_cold(self, names: list[str]) -> None:
    if not hasattr(os, "posix_fadvise"):
      return
    cached = total = 0
    for name in names:
      fd = os.open(self._directory / name, os.O_RDONLY)
      try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        in_memory, pages = _pages_in_memory(fd)
        cached, total = cached + in_memory, total + pages
      finally:
        os.close(fd)
    self.cold_by = "page cache dropped (posix_fadvise), seen by mincore" if cached <= 0.02 * total else None

  def create(self, name: str) -> None:
    self.write(name, memoryview(b"x" * 64))

  def stat(self, name: str) -> None:
    os.stat(self._directory / name)

  def list(self) -> int:
    return len(os.listdir(self._directory))

  def rename(self, name: str, new: str) -> None:
    os.rename(self._directory / name, self._directory / new)

  def delete(self, name: str) -> None:
    os.unlink(self._directory / name)


class ObjectTarget:
  """Objects under a new prefix: data by TensorStore's driver, ranges and metadata by fsspec, as Orbax does."""

  can_rename = False

  def __init__(self, url: str):
    import tensorstore as ts

    self._url = url
    self._fs = filesystem(url)
    self._nbytes: dict[str, int] = {}
    self._store: Any = ts.KvStore.open(kvstore_spec(url + "/")).result()
    self.cold_by: str | None = "object store, no cache on this host"

  def write(self, name: str, data: memoryview) -> None:
    self._store.write(name, bytes(data)).result()
    self._nbytes[name] = len(data)

  def read(self, name: str, start: int, end: int) -> int:
    if (start, end) == (0, self._nbytes.get(name)):  # whole, as TensorStore reads a data file
      return len(self._store.read(name).result().value)
    return len(self._fs.cat_file(f"{self._url}/{name}", start=start, end=end))

  def make_cold(self, names: list[str]) -> None:
    del names

  def create(self, name: str) -> None:
    self._fs.pipe_file(f"{self._url}/{name}", b"x" * 64)

  def stat(self, name: str) -> None:
    self._fs.info(f"{self._url}/{name}")

  def list(self) -> int:
    return len(self._fs.ls(self._url, detail=False, refresh=True))

  def rename(self, name: str, new: str) -> None:
    raise NotImplementedError

  def delete(self, name: str) -> None:
    self._fs.rm([f"{self._url}/{name}"], recursive=False)


@contextlib.contextmanager
def file_target(path: pathlib.Path, needed: int) -> Iterator[FileTarget]:
  """A directory of our own under `path` (made if need be); all that was made is gone afterwards, whatever happens.

  Raises:
    StorageError: if fewer than `needed` bytes are free, or if it cannot be written.
  """
  made: list[pathlib.Path] = []
  existing = path
  while not existing.exists():
    made.append(existing)
    existing = existing.parent
  try:
    free = shutil.disk_usage(existing).free
    if free < needed:
      raise StorageError(
        f"{path}: the probe needs {needed / 1e6:.0f} MB and {free / 1e6:.0f} MB are free; free some space first"
      )
    directory = path / f".ckpt_jax-probe-{uuid.uuid4().hex[:12]}"
    try:
      directory.mkdir(parents=True)
      yield FileTarget(directory)
    finally:
      shutil.rmtree(directory, ignore_errors=True)
      for parent in made:
        with contextlib.suppress(OSError):  # somebody else may have put something there
          parent.rmdir()
  except OSError as e:
    if isinstance(e, StorageError):
      raise
    raise StorageError(f"{path}: cannot be probed: {e.strerror or e}") from e


@contextlib.contextmanager
def object_target(url: str) -> Iterator[ObjectTarget]:
  """A prefix of our own under `url`, gone afterwards."""
  connect(url)
  prefix = f"{url.rstrip('/')}/ckpt_jax-probe-{uuid.uuid4().hex[:12]}"
  where = epath.Path(prefix)
  where.exists()  # a bucket that is not there, or lets nobody in, says so before anything else
  try:
    yield ObjectTarget(prefix)
  finally:
    with contextlib.suppress(FileNotFoundError):
      where.rmtree()


def random_bytes(nbytes: int) -> memoryview:
  """Bytes that no file system or network compresses or deduplicates."""
  return memoryview(random.Random(os.urandom(8)).randbytes(min(nbytes, 64 * BLOCK)) * -(-nbytes // (64 * BLOCK)))[
    :nbytes
  ]


_local = threading.local()


def _buffer(nbytes: int) -> memoryview:
  # Reused: mapping and faulting fresh pages costs as much as reading from a fast disk.
  held = getattr(_local, "buffer", None)
  if held is None or len(held) < nbytes:
    held = _local.buffer = memoryview(mmap.mmap(-1, max(nbytes, BLOCK * 4)))
  return held[:nbytes]


def _pages_in_memory(fd: int) -> tuple[int, int]:
  """Pages of a file in the page cache, and all its pages (mincore(2)). All, if the system does not say."""
  size = os.fstat(fd).st_size
  pages = -(-size // mmap.PAGESIZE)
  if size == 0:
    return 0, 0
  libc = ctypes.CDLL(None, use_errno=True)
  libc.mmap.restype = ctypes.c_void_p
  libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
  libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
  libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
  address = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
  if address in (None, ctypes.c_void_p(-1).value):
    return pages, pages
  try:
    vector = (ctypes.c_ubyte * pages)()
    if libc.mincore(address, size, vector) != 0:
      return pages, pages
    return sum(v & 1 for v in vector), pages
  finally:
    libc.munmap(address, size)
