"""Looks at files without taking one that cannot be read for one that is missing.

`os.path.exists` and epath answer no for a directory without permission, a stale NFS handle and an I/O error alike. A
step that counts as missing would be passed over, moved aside or trained anew. All functions here raise StorageError for
what cannot be read, and FileNotFoundError only for what is missing.
"""

from __future__ import annotations

import os
import socket
import stat
import time

from etils import epath

from ckpt_jax.errors import StorageError
from ckpt_jax.failures import is_read_only, why_read_only, without_secrets
from ckpt_jax.storage.objects import BACKEND
from ckpt_jax.storage.urls import is_object_store

# How long to watch a step that cannot be read for a deletion by others, and to wait for the end of it.
_LOOKS, _BETWEEN_LOOKS_S, _DELETION_S = 5, 0.05, 60.0
PATIENCE_S = 60.0  # for what another host wrote: NFS may answer from a cached directory for so long
_NOT_THERE = (FileNotFoundError, NotADirectoryError)


def cannot_be_read(path: epath.Path, error: OSError) -> StorageError:
  """The error for a path that exists and cannot be read."""
  if isinstance(error, StorageError):
    return error
  why = without_secrets(str(error.strerror or error))
  if is_read_only(error) and not is_object_store(path):
    why += f"; {why_read_only(os.fspath(path), error)}"
  return StorageError(f"{path}: cannot be read: {why}")


class _Reading:
  """Raises FileNotFoundError for what is missing or no file, and StorageError for what cannot be read.

  A class, since a generator that raises another error keeps the frames of its callers in a cycle (Python 3.12 and
  newer), and with them whatever they hold, until the garbage collector finds it.
  """

  def __init__(self, path: epath.Path):
    self._path = path

  def __enter__(self) -> None:
    pass

  def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
    if isinstance(error, (*_NOT_THERE, IsADirectoryError)):
      raise FileNotFoundError(f"{self._path}: {error.strerror or error}") from error
    if isinstance(error, OSError):
      raise cannot_be_read(self._path, error) from error


def wait_for_other_host(directory: epath.Path) -> None:
  """Waits until this process sees a directory that another one has made.

  Raises:
    StorageError: if it does not.
  """
  deadline = time.monotonic() + PATIENCE_S
  while not is_object_store(directory) and not exists(directory):
    if time.monotonic() >= deadline:
      raise StorageError(
        f"{directory}: was made by another process of this job and is not there for this one {PATIENCE_S:.0f} s later: "
        f"the run is not on storage that all of them share, or it is not mounted on {socket.gethostname()}",
        topic="disk-of-one-host",
      )
    time.sleep(0.1)


def exists(path: epath.Path) -> bool:
  """Whether a file or directory exists."""
  return path.exists() if is_object_store(path) else _mode(path) is not None


def is_dir(path: epath.Path) -> bool:
  """Whether a directory exists."""
  return path.is_dir() if is_object_store(path) else stat.S_ISDIR(_mode(path) or 0)


def _mode(path: epath.Path) -> int | None:
  try:
    with _Reading(path):
      return os.stat(path).st_mode
  except FileNotFoundError:
    return None


def names(directory: epath.Path) -> list[str]:
  """The names in a directory; none if it does not exist."""
  try:
    with _Reading(directory):
      return [path.name for path in directory.iterdir()]
  except FileNotFoundError:
    return []


def read_bytes(file: epath.Path, most: int = -1) -> bytes:
  """The content of a file, or its first `most` bytes. A directory counts as a missing file."""
  with _Reading(file), file.open("rb") as opened:
    return opened.read(most)


def file_nbytes(file: epath.Path) -> int:
  """Bytes of a file on a disk; 0 for an object, since asking costs as much as reading it."""
  if is_object_store(file):
    return 0
  with _Reading(file):
    return os.stat(file).st_size


def identity(directory: epath.Path) -> tuple[int, ...] | None:
  """Device and inode, by which a directory differs from a later one in its place; None where there are none."""
  try:
    found = None if is_object_store(directory) else os.stat(directory)
  except OSError:
    return None
  return found and (found.st_dev, found.st_ino)


def is_vanishing(directory: epath.Path) -> bool:
  """Whether another program, or a person, is deleting a directory, in which case the deletion is waited for."""

  def count() -> int:
    try:
      return len(files_below(directory))
    except StorageError:
      return 0

  before = count()
  for _ in range(_LOOKS):
    time.sleep(_BETWEEN_LOOKS_S)
    if count() < before:
      deadline = time.monotonic() + _DELETION_S
      while exists(directory) and time.monotonic() < deadline:
        time.sleep(_BETWEEN_LOOKS_S)
      return True
  return not exists(directory)


def files_below(directory: epath.Path) -> list[epath.Path]:
  """All files in a directory and its subdirectories, sorted."""
  if is_object_store(directory):
    return sorted(directory / key for key in BACKEND.tree(directory))

  def refuse(error: OSError) -> None:
    if not isinstance(error, _NOT_THERE):
      raise cannot_be_read(directory, error) from error

  found = []
  for folder, _, files in os.walk(directory, onerror=refuse):
    found += [directory / os.path.relpath(os.path.join(folder, file), directory) for file in files]
  return sorted(found)


def read_through(file: epath.Path, block: int) -> int:
  """Reads all of a listed file in blocks of this many bytes, and returns its length; a missing one cannot be read."""
  try:
    with file.open("rb") as opened:
      return sum(map(len, iter(lambda: opened.read(block), b"")))
  except OSError as e:
    raise cannot_be_read(file, e) from e
