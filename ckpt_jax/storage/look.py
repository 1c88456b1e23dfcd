"""Looking at files without taking one that cannot be looked at for one that is not there.

`os.path.exists` and epath's answer no to a directory without permission, a stale NFS handle and an I/O error alike. A
step that counts as gone for that would be passed over, moved aside or trained anew: here it is a StorageError.
"""

from __future__ import annotations

import os
import stat

from etils import epath

from ckpt_jax.errors import StorageError
from ckpt_jax.failures import without_secrets
from ckpt_jax.storage.kvstore import is_object_store

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
