"""Looking at files without taking one that cannot be looked at for one that is not there.

`os.path.exists` and epath's answer no to a directory without permission, a stale NFS handle and an I/O error alike. A
step that counts as gone for that would be passed over, moved aside or trained anew: here it is a StorageError.
"""

from __future__ import annotations

import os
import stat
import time

from etils import epath

from ckpt_jax.errors import StorageError
from ckpt_jax.failures import without_secrets
from ckpt_jax.storage.objects import BACKEND
from ckpt_jax.storage.urls import is_object_store

# How long to watch a step that cannot be read for somebody who is deleting it, and to wait for its end.
_LOOKS, _BETWEEN_LOOKS_S, _DELETION_S = 5, 0.05, 60.0
_NOT_THERE = (FileNotFoundError, NotADirectoryError)


def exists(path: epath.Path) -> bool:
  """Whether a file or directory is there.

  Raises:
    StorageError: if that cannot be found out.
  """
  return path.exists() if is_object_store(path) else _mode(path) is not None


def is_dir(path: epath.Path) -> bool:
  """Whether a directory is there.

  Raises:
    StorageError: if that cannot be found out.
  """
  if is_object_store(path):
    return path.is_dir()
  mode = _mode(path)
  return mode is not None and stat.S_ISDIR(mode)


def names(directory: epath.Path) -> list[str]:
  """What a directory holds; nothing if it is not there.

  Raises:
    StorageError: if it cannot be listed.
  """
  try:
    return [path.name for path in directory.iterdir()]
  except _NOT_THERE:
    return []
  except OSError as e:
    raise cannot_be_read(directory, e) from e


def read_bytes(file: epath.Path, most: int = -1) -> bytes:
  """The content of a file, or the first bytes of it.

  Raises:
    FileNotFoundError: if it is not there, nor a directory in its place.
    StorageError: if it cannot be read.
  """
  try:
    if most < 0:
      return file.read_bytes()
    with file.open("rb") as opened:
      return opened.read(most)
  except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as e:
    raise FileNotFoundError(f"{file}: {e.strerror or e}") from e
  except OSError as e:
    raise cannot_be_read(file, e) from e


def file_nbytes(file: epath.Path) -> int:
  """Bytes of a file of a disk; 0 for an object, since asking costs as much as reading it.

  Raises:
    FileNotFoundError: if it is not there.
    StorageError: if that cannot be found out.
  """
  if is_object_store(file):
    return 0
  try:
    return os.stat(file).st_size
  except _NOT_THERE as e:
    raise FileNotFoundError(f"{file}: {e.strerror}") from e
  except OSError as e:
    raise cannot_be_read(file, e) from e


def identity(directory: epath.Path) -> tuple[int, ...] | None:
  """What tells this directory from one that takes its place later; None if it is not there, or does not say."""
  try:
    if is_object_store(directory):
      return None
    found = os.stat(directory)
  except OSError:
    return None
  return found.st_dev, found.st_ino


def is_vanishing(directory: epath.Path) -> bool:
  """Whether somebody is deleting a directory who leaves no mark: another program, or a person."""
  before = _count(directory)
  for _ in range(_LOOKS):
    time.sleep(_BETWEEN_LOOKS_S)
    if _count(directory) < before:
      deadline = time.monotonic() + _DELETION_S
      while exists(directory) and time.monotonic() < deadline:
        time.sleep(_BETWEEN_LOOKS_S)
      return True
  return not exists(directory)


def _count(directory: epath.Path) -> int:
  try:
    return len(files_below(directory))
  except StorageError:
    return 0


def files_below(directory: epath.Path) -> list[epath.Path]:
  """All files in a directory and in those within, in order.

  Raises:
    StorageError: if one of the directories cannot be listed.
  """
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
  """Reads all of a file, in blocks of so many bytes, and returns its length.

  Raises:
    StorageError: if it cannot be read.
  """
  try:
    with file.open("rb") as opened:
      return sum(map(len, iter(lambda: opened.read(block), b"")))
  except OSError as e:
    raise cannot_be_read(file, e) from e


def cannot_be_read(path: epath.Path, error: OSError) -> StorageError:
  """The error for what is there and cannot be read."""
  if isinstance(error, StorageError):
    return error
  return StorageError(f"{path}: cannot be read: {without_secrets(str(error.strerror or error))}")


def _mode(path: epath.Path) -> int | None:
  try:
    return os.stat(path).st_mode
  except _NOT_THERE:
    return None
  except OSError as e:
    raise cannot_be_read(path, e) from e
