"""Byte ranges of files, on disks and in buckets, without the rest of the file."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import tensorstore as ts
from etils import epath

from ckpt_jax.errors import StorageError
from ckpt_jax.failures import without_secrets
from ckpt_jax.storage.clients import kvstore_spec
from ckpt_jax.storage.look import cannot_be_read
from ckpt_jax.storage.urls import is_object_store


class Ranges:
  """The files of a directory. Methods may be called from several threads."""

  def __init__(self, directory: epath.Path):
    """Opens nothing yet."""
    self._directory = directory
    self._store: Any = None

  def into(self, memory: np.ndarray, name: str, start: int) -> None:
    """Fills contiguous memory with the bytes of a file from `start` on.

    Raises:
      FileNotFoundError: if there is no such file.
      EOFError: if it ends too early.
      StorageError: if it cannot be read.
    """
    data: Any = memory.reshape(-1).view(np.uint8)
    if is_object_store(self._directory):
      data[:] = np.frombuffer(self._request(name, start, len(data)), np.uint8)
      return
    file = self._directory / name
    try:
      descriptor = os.open(file, os.O_RDONLY)
      try:
        at = 0
        while at < len(data):
          if not (count := os.preadv(descriptor, [data[at:]], start + at)):
            raise EOFError(f"{file}: ends before byte {start + len(data)}")
          at += count
      finally:
        os.close(descriptor)
    except (FileNotFoundError, NotADirectoryError) as e:
      raise FileNotFoundError(f"{file}: no such file") from e
    except OSError as e:
      raise cannot_be_read(file, e) from e

  def read(self, name: str, start: int, nbytes: int) -> bytes:
    """The bytes of a file from `start` on. Raises what `into` raises."""
    memory = np.empty(nbytes, np.uint8)
    self.into(memory, name, start)
    return memory.tobytes()

  def _request(self, name: str, start: int, nbytes: int) -> bytes:
    if not nbytes:
      return b""
    file = f"{self._directory}/{name}"
    try:
      if self._store is None:
        self._store = ts.KvStore.open(kvstore_spec(f"{self._directory}/")).result()
      found = self._store.read(name, byte_range=slice(start, start + nbytes)).result()
    except Exception as e:
      if "OUT_OF_RANGE" in str(e) or "416" in str(e):
        raise EOFError(f"{file}: ends before byte {start + nbytes}") from e
      raise StorageError(f"{file}: cannot be read: {without_secrets(' '.join(str(e).split()))}") from e
    if found.state != "value":
      raise FileNotFoundError(f"{file}: no such object")
    if len(found.value) < nbytes:
      raise EOFError(f"{file}: ends before byte {start + nbytes}")
    return found.value
