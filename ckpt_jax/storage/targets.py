"""Where `probe` measures: a fresh directory of files, or a fresh prefix of objects, with the same few operations.

The methods of a target may run in several threads at a time.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import pathlib
import random
import shutil
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

from etils import epath

from ckpt_jax.errors import StorageError
from ckpt_jax.storage.clients import filesystem, kvstore_spec
from ckpt_jax.storage.connect import connect
from ckpt_jax.storage.page_cache import CAN_RELEASE, pages_in_memory, write_behind

BLOCK = 2**20


class _Scratch(threading.local):
  """A buffer a thread: mapping and faulting fresh pages costs as much as reading from a fast disk."""

  def __init__(self) -> None:
    self.buffer = memoryview(mmap.mmap(-1, 4 * BLOCK))


_scratch = _Scratch()


class FileTarget:
  """Files in a new directory, through system calls: buffered, with fsync, as TensorStore's file driver does.

  `create` stores 64 bytes, durably; `stat`, `list`, `rename` and `delete` are one operation of the file system each.

  Attributes:
    cold_by: how `make_cold` makes the next reads come from the storage itself; None: it cannot.
    fsync_s: seconds of each fsync.
  """

  can_rename = True

  def __init__(self, directory: pathlib.Path):
    self._directory = directory
    self.cold_by: str | None = None
    self.fsync_s: list[float] = []

  def free_nbytes(self) -> int:
    """Free bytes of the file system."""
    return shutil.disk_usage(self._directory).free

  def write(self, name: str, data: memoryview, *, behind: bool = False) -> None:
    """Stores `data`, past the page cache with `behind`, and returns once it is durable."""
    dropping = write_behind(os.fspath(self._directory)) if behind else contextlib.nullcontext()
    with dropping, open(self._directory / name, "wb") as file:
      for start in range(0, len(data), BLOCK):
        file.write(data[start : start + BLOCK])
      file.flush()
      started = time.perf_counter()
      os.fsync(file.fileno())
      self.fsync_s.append(time.perf_counter() - started)

  def read(self, name: str, start: int, end: int) -> int:
    """Reads bytes [start, end) and returns how many there were."""
    with open(self._directory / name, "rb", buffering=0) as file:
      file.seek(start)
      left = end - start
      while left and (count := file.readinto(_scratch.buffer[:left])):
        left -= count
      return end - start - left

  def read_direct(self, name: str, nbytes: int) -> bool:
    """Reads the first `nbytes`, whole blocks, with O_DIRECT; False if the file system refuses."""
    try:
      descriptor = os.open(self._directory / name, os.O_RDONLY | os.O_DIRECT)
    except (OSError, AttributeError):  # AttributeError: not Linux
      return False
    try:
      for at in range(0, nbytes, len(_scratch.buffer)):
        os.preadv(descriptor, [_scratch.buffer], at)
    except OSError:
      return False
    finally:
      os.close(descriptor)
    return True

  def make_cold(self, names: list[str]) -> None:
    """Makes the next reads come from the storage itself, if it can; `cold_by` says how."""
    if not CAN_RELEASE:
      return
    cached = total = 0
    for name in names:
      with open(self._directory / name, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        in_memory, pages = pages_in_memory(file.fileno())
      cached, total = cached + in_memory, total + pages
    self.cold_by = "page cache dropped (posix_fadvise), seen by mincore" if cached <= 0.02 * total else None

  def create(self, name: str) -> None:
    self.write(name, memoryview(b"x" * 64))

  def stat(self, name: str) -> None:
    os.stat(self._directory / name)

  def list(self) -> None:
    os.listdir(self._directory)

  def rename(self, name: str, new: str) -> None:
    os.rename(self._directory / name, self._directory / new)

  def delete(self, name: str) -> None:
    os.unlink(self._directory / name)


class ObjectTarget:
  """Objects under a new prefix, as a FileTarget: data by TensorStore's driver, ranges and metadata by fsspec.

  `write`, `read`, `create`, `stat`, `list` and `delete` are one request each; `make_cold` has nothing to do, and
  `rename` is not there.
  """

  can_rename = False
  cold_by: str | None = "object store, no cache on this host"

  def __init__(self, url: str):
    import tensorstore as ts

    self._url = url
    self._fs = filesystem(url)
    self._nbytes: dict[str, int] = {}
    self._store: Any = ts.KvStore.open(kvstore_spec(url + "/")).result()

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

  def list(self) -> None:
    self._fs.ls(self._url, detail=False, refresh=True)

  def rename(self, name: str, new: str) -> None:
    raise NotImplementedError

  def delete(self, name: str) -> None:
    self._fs.rm([f"{self._url}/{name}"], recursive=False)


Target = FileTarget | ObjectTarget


@contextlib.contextmanager
def file_target(path: pathlib.Path, needed: int) -> Iterator[FileTarget]:
  """A directory of its own under `path` (made if need be); everything that was made is removed at the end.

  Raises:
    StorageError: if fewer than `needed` bytes are free, or if it cannot be written.
  """
  missing = [folder for folder in (path, *path.parents) if not folder.exists()]
  try:
    free = shutil.disk_usage((missing or [path / "new"])[-1].parent).free
    if free < needed:
      raise StorageError(
        f"{path}: the probe needs {needed / 1e6:.0f} MB and {free / 1e6:.0f} MB are free; free some space first",
        topic="out-of-space",
      )
    directory = path / f".ckpt_jax-probe-{uuid.uuid4().hex[:12]}"
    try:
      directory.mkdir(parents=True)
      yield FileTarget(directory)
    finally:
      shutil.rmtree(directory, ignore_errors=True)
      for folder in missing:
        with contextlib.suppress(OSError):  # somebody else may have put something there
          folder.rmdir()
  except StorageError:
    raise
  except OSError as e:
    raise StorageError(f"{path}: cannot be probed: {e.strerror or e}") from e


@contextlib.contextmanager
def object_target(url: str) -> Iterator[ObjectTarget]:
  """A prefix of its own under `url`, whose objects are removed at the end."""
  connect(url)
  prefix = f"{url.rstrip('/')}/ckpt_jax-probe-{uuid.uuid4().hex[:12]}"
  where = epath.Path(prefix)
  where.exists()  # a bucket that is missing or refuses access raises here, before anything else
  try:
    yield ObjectTarget(prefix)
  finally:
    with contextlib.suppress(FileNotFoundError):
      where.rmtree()


def random_bytes(nbytes: int) -> memoryview:
  """Bytes that no file system or network compresses or deduplicates."""
  some = random.Random(os.urandom(8)).randbytes(min(nbytes, 64 * BLOCK))  # not the caller's generator
  return memoryview(some * -(-nbytes // len(some)))[:nbytes]
