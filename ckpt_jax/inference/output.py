"""The directory of an export while it is written: resumable, and never taken for an export before it is one.

On a file system everything is written beside the target, in `.NAME.exporting`, synced, and renamed at the end. A bucket
has no rename: files are written in place, and the record, without which nothing takes the directory for an export,
comes last. A note for each finished unit lets an interrupted export go on; notes of another export are not believed.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
from collections.abc import Iterator
from typing import Any

import xxhash
from etils import epath

from ckpt_jax.errors import CheckpointError, OutOfSpaceError, StorageError
from ckpt_jax.failures import is_out_of_space, root_cause
from ckpt_jax.integrity.exported import Hashed, wrong_files
from ckpt_jax.run.notes import read_note, write_note
from ckpt_jax.run.steps import EXPORT
from ckpt_jax.storage import look
from ckpt_jax.storage.durable import Sealing, seal, sync_directory
from ckpt_jax.storage.space import free_bytes
from ckpt_jax.storage.urls import is_object_store

_log = logging.getLogger(__name__)
_NOTES = ".ckpt_jax-exporting"  # removed at the end
_PLAN = "plan"


class Output:
  """Where an export is written.

  Attributes:
    target: what becomes the export.
    place: where files are written: `target` itself in a bucket, a directory beside it on a disk.
  """

  def __init__(self, target: epath.Path, *, overwrite: bool):
    """Writes nothing yet.

    Raises:
      CheckpointError: if something is there, and `overwrite` is not set.
    """
    self.target = target
    self._in_bucket = is_object_store(target)
    self.place = target if self._in_bucket else target.parent / f".{target.name}.exporting"
    self._notes = self.place / _NOTES
    there = [name for name in look.names(target) if name != _NOTES]
    unfinished = self._in_bucket and EXPORT not in there and look.exists(self._notes / _PLAN)
    self._replaces = bool(there) and not unfinished
    if look.exists(target) and not look.is_dir(target):
      raise CheckpointError(f"{target}: is a file; export to a new directory", topic="export-and-safetensors")
    if self._replaces and not overwrite:
      raise CheckpointError(
        f"{target}: exists and is not empty; export elsewhere, or pass overwrite=True (--overwrite)",
        topic="export-and-safetensors",
      )

  @contextlib.contextmanager
  def open(self, plan: str, nbytes: int) -> Iterator[None]:
    """Within it units may be written; what was left by an export of another `plan` is removed first.

    `plan` describes all bytes of the export, and there will be `nbytes` of them.

    Raises:
      OutOfSpaceError: if the disk has no room, before or while files are written; then nothing is left.
      StorageError: for another failure to write; what is finished is kept for the next attempt.
      CheckpointError: if another process is writing the same export.
    """
    try:
      with self._alone():
        if self._in_bucket and self._replaces:
          self.target.rmtree()
        if read_note(self._notes / _PLAN).get("plan") != plan:
          self._discard()
          write_note(self._notes / _PLAN, {"plan": plan})
        self._check_room(nbytes)
        yield
    except OSError as e:
      if isinstance(e, OutOfSpaceError) or is_out_of_space(e):
        self._discard()
        if isinstance(e, OutOfSpaceError):
          raise
        raise OutOfSpaceError(f"{self.target}: the storage is full; nothing was left there") from e
      if isinstance(e, CheckpointError):
        raise
      raise StorageError(f"{self.target}: cannot be written: {root_cause(e)}") from e

  def finished(self, number: int) -> dict[str, Any] | None:
    """What `finish_unit` noted of a unit, if its files are still what was written; None if it is to be written."""
    note = read_note(self._notes / str(number))
    if not note:
      return None
    files = {name: [(int(n), h, t) for n, h, t in pieces] for name, pieces in note["files"].items()}
    if any(wrong_files(self.place, files)):
      return None
    _log.info("%s: %s were written before", self.target, ", ".join(files))
    return note | {"files": files}

  def finish_unit(self, number: int, note: dict[str, Any]) -> None:
    """Notes that all files of a unit are written; `note["files"]` has their pieces."""
    write_note(self._notes / str(number), note)

  def write(self, name: str, content: bytes) -> None:
    """Writes a small file."""
    (self.place / name).write_bytes(content)

  def commit(self, record: bytes) -> None:
    """Makes it an export."""
    if self._in_bucket:
      self.write(EXPORT, record)
      self._notes.rmtree()
      return
    shutil.rmtree(self._notes)
    self.write(EXPORT, record)
    seal(os.fspath(self.place), Sealing())
    old = self.target.parent / f".{self.target.name}.replaced"
    if self._replaces:
      os.rename(self.target, old)
    os.rename(self.place, self.target)  # an empty directory gives way
    sync_directory(os.fspath(self.target.parent))
    shutil.rmtree(old, ignore_errors=True)

  def close_files(self, files: dict[str, list[Hashed]], closing: dict[str, bytes]) -> None:
    """Writes the files that close an export, after all others, and adds their pieces to `files`."""
    for name, content in closing.items():
      self.write(name, content)
      files[name] = [(len(content), xxhash.xxh3_64_hexdigest(content), "")]

  def _check_room(self, nbytes: int) -> None:
    free = free_bytes(self.place)
    there = sum(os.path.getsize(file) for file in look.files_below(self.place)) if free is not None else 0
    if free is not None and free + there < nbytes:
      raise OutOfSpaceError(
        f"{self.target}: the export needs {nbytes / 1e6:.2f} MB and {(free + there) / 1e6:.2f} MB are free"
      )

  @contextlib.contextmanager
  def _alone(self) -> Iterator[None]:
    """Keeps other processes of this host out; in a bucket nothing can."""
    if self._in_bucket:
      yield
      return
    self.place.parent.mkdir(parents=True, exist_ok=True)
    lock = self.place.parent / f".{self.target.name}.lock"
    with open(lock, "w") as file:
      try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:
        raise CheckpointError(
          f"{self.target}: another process is exporting to it; wait for its end", topic="export-and-safetensors"
        ) from None
      except OSError:  # a file system without locks
        _log.debug("%s: no locks there", lock)
      try:
        yield
      finally:
        lock.unlink(missing_ok=True)

  def _discard(self) -> None:
    if not self._in_bucket:
      shutil.rmtree(self.place, ignore_errors=True)
      return
    with contextlib.suppress(FileNotFoundError):
      self.place.rmtree()
