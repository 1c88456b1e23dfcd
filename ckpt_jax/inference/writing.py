"""Writes the files of an export in threads, while the next values are read and converted."""

from __future__ import annotations

import concurrent.futures
import contextlib
import itertools
import os
import queue
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import xxhash
from etils import epath

from ckpt_jax.errors import CheckpointError, StorageError
from ckpt_jax.failures import without_secrets
from ckpt_jax.inference.files import Piece, Unit
from ckpt_jax.integrity.exported import Hashed
from ckpt_jax.storage.clients import filesystem
from ckpt_jax.storage.urls import is_object_store

_FILES_AT_ONCE = 8
_UPLOAD_NBYTES = 32 << 20  # of one request of an upload in parts


class _GivenUp(CheckpointError):
  pass


class _Budget:
  """Bytes that wait to be written, at most `most` at a time; a larger block goes alone."""

  def __init__(self, most: int):
    self._most = most
    self._held = 0
    self._free = threading.Condition()
    self.error: BaseException | None = None

  def take(self, nbytes: int) -> None:
    with self._free:
      self._free.wait_for(lambda: self.error is not None or not self._held or self._held + nbytes <= self._most)
      if self.error is not None:
        raise self.error
      self._held += nbytes

  def give(self, nbytes: int) -> None:
    with self._free:
      self._held -= nbytes
      self._free.notify_all()

  def fail(self, error: BaseException) -> None:
    with self._free:
      self.error = self.error or error
      self._free.notify_all()


class Files:
  """Writes the files of units, one unit after the other, several files at a time."""

  def __init__(self, place: epath.Path, most: int):
    """Writes below `place`, and holds at most `most` bytes."""
    self._place = place
    self._budget = _Budget(most)
    self._pool = concurrent.futures.ThreadPoolExecutor(_FILES_AT_ONCE, "ckpt_jax-export")
    self._open: list[queue.SimpleQueue[np.ndarray | None]] = []
    self._feed: Iterator[tuple[queue.SimpleQueue[np.ndarray | None], int]] = iter(())
    self._now: tuple[queue.SimpleQueue[np.ndarray | None], int] | None = None
    self._writes: dict[str, concurrent.futures.Future[list[Hashed]]] = {}

  def begin(self, unit: Unit) -> None:
    """Starts a unit, whose bytes then come in the order of its pieces."""
    self._writes = {}
    self._now = None
    self._feed = self._files(unit.pieces)

  def _files(self, pieces: Sequence[Piece]) -> Iterator[tuple[queue.SimpleQueue[np.ndarray | None], int]]:
    """The files that take values, and how many bytes of them; each is begun when its turn comes."""
    for name, group in itertools.groupby(pieces, lambda piece: piece.file):
      own = list(group)
      values: queue.SimpleQueue[np.ndarray | None] = queue.SimpleQueue()
      self._open.append(values)
      self._writes[name] = self._pool.submit(self._write, name, own, values)
      if wanted := sum(piece.nbytes for piece in own if piece.text is None):
        yield values, wanted

  def take(self, values: np.ndarray) -> None:
    """Takes the next values, and waits while too many bytes are still to be written.

    Raises:
      OSError: if a file cannot be written.
    """
    data = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    while len(data):
      file, wanted = self._now or next(self._feed)
      part, data = data[:wanted], data[wanted:]
      self._budget.take(len(part))
      file.put(part)
      self._now = (file, wanted - len(part)) if wanted > len(part) else None

  def end(self) -> dict[str, list[Hashed]]:
    """Waits for the files of the unit, and returns the pieces of each. Raises what `take` raises."""
    if self._now is not None or next(self._feed, None) is not None:
      raise AssertionError("a unit ended before all of its bytes were there")
    found = {name: write.result() for name, write in self._writes.items()}
    self._open.clear()
    return found

  def close(self) -> None:
    """Gives up what is not finished, and ends the threads."""
    for values in self._open:
      values.put(None)
    self._budget.fail(_GivenUp("the export was given up"))
    self._pool.shutdown(wait=True)

  # -- in the threads

  def _write(self, name: str, pieces: Sequence[Piece], values: queue.SimpleQueue[np.ndarray | None]) -> list[Hashed]:
    try:
      with _created(self._place / name) as file:
        return [self._write_piece(file, piece, values) for piece in pieces]
    except BaseException as e:
      self._budget.fail(e)
      raise

  def _write_piece(self, file: Any, piece: Piece, values: queue.SimpleQueue[np.ndarray | None]) -> Hashed:
    hash_ = xxhash.xxh3_64()
    if piece.text is not None:
      hash_.update(piece.text)
      file.write(piece.text)
      return piece.nbytes, hash_.hexdigest(), piece.tensor
    left = piece.nbytes
    while left:
      data: Any = values.get()
      if data is None:
        raise _GivenUp("the export was given up")
      if len(data) > left:  # the next piece of this file begins in it
        raise AssertionError("values of two arrays in one block")
      hash_.update(data)
      file.write(data)
      left -= len(data)
      self._budget.give(len(data))
    return piece.nbytes, hash_.hexdigest(), piece.tensor


@contextlib.contextmanager
def _created(path: epath.Path) -> Iterator[Any]:
  """A new file to be written from its beginning to its end; an object exists only once all of it was written."""
  if not is_object_store(path):
    os.makedirs(path.parent, exist_ok=True)
    with open(path, "wb") as file:
      yield file
    return
  upload: Any = None
  try:
    upload = filesystem(path).open(os.fspath(path), "wb", block_size=_UPLOAD_NBYTES)
    yield upload
    upload.close()
  except BaseException as e:
    if upload is not None:
      upload.closed = True  # else it would store what it has when it is collected
      with contextlib.suppress(Exception):
        upload.discard()
    if isinstance(e, (_GivenUp, StorageError)) or not isinstance(e, Exception):
      raise
    raise StorageError(f"{path}: {without_secrets(' '.join(str(e).split())) or type(e).__name__}") from e
