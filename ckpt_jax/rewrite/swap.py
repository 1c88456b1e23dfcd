"""Replaces a committed step by another form of itself; a crash at any moment leaves one whole form.

The new form is written beside the run's steps, checked, and only then declared ready by a small note. The swap that
follows can be repeated from any point: the next open of the run finds the note and finishes it. Number, metrics, extras
and commit time stay.

On a file system the swap is two renames. In a bucket, which has no rename, the old objects are deleted, commit marker
first, and the new ones copied, marker last; in between the step is not committed.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from typing import Any

from etils import epath

from ckpt_jax.errors import CheckpointError, NoCheckpointError, StorageError
from ckpt_jax.integrity.record import carry_record
from ckpt_jax.orbax.format import COMMITTED_AT, CUSTOM, STEP_METADATA
from ckpt_jax.run.checksums import with_digest
from ckpt_jax.run.quarantine import move_step
from ckpt_jax.run.steps import DELETING, NOTES, OURS, is_step, noted_steps, step_directory, step_metadata, step_path
from ckpt_jax.storage import look
from ckpt_jax.storage.durable import Sealing, seal, sync_directory
from ckpt_jax.storage.urls import is_object_store

_log = logging.getLogger(__name__)
REWRITING = "rewriting"  # RUN/.ckpt_jax/rewriting/STEP/{new,old} and STEP.ready
Write = Callable[[epath.Path, epath.Path], dict[str, Any]]
Check = Callable[[epath.Path, epath.Path], None]


def rewrite_step(
  directory: epath.Path,
  step: int,
  write: Write,
  check: Check,
  *,
  swapping: contextlib.AbstractContextManager[Any] | None = None,
) -> bool:
  """Replaces a committed step, and returns whether it did; False if it was deleted or saved again meanwhile.

  Args:
    write: called with the step's directory and an empty one. Writes items into the second (the others are copied as
      they are), and returns the new `run.our_metadata` of the step.
    check: called with both directories once the new one is complete; raises if its content is wrong.
    swapping: entered for the swap.

  Raises:
    NoCheckpointError: if there is no such step.
    CheckpointError: from `write` and `check`; the step is unchanged.
    StorageError: if storage fails; the step is unchanged, or the next open finishes the swap.
  """
  old = step_directory(directory, step)
  commit = step_metadata(old).get(COMMITTED_AT)
  place = directory / NOTES / REWRITING / str(step)
  new = place / "new"
  try:
    _remove(place)
    new.mkdir(parents=True)
    ours = write(old, new)
    _copy_rest(old, new)
    _write_metadata(old, new, ours)
    carry_record(old, new)
    check(old, new)
    if not is_object_store(new):
      seal(os.fspath(new), Sealing())  # survives a power cut; a bucket's objects do as soon as they are written
    with swapping or contextlib.nullcontext():
      if not _is_same(directory, step, commit):
        _remove(place)
        return False
      _ready_note(directory, step).write_text(json.dumps({"commit": commit}))
      _swap(directory, step)
  except Exception as e:
    if not _ready_note(directory, step).exists():  # else the next open finishes what was begun
      _remove(place)
      if not _is_same(directory, step, commit):  # it was deleted meanwhile, which may raise anything
        return False
    if isinstance(e, OSError) and not isinstance(e, CheckpointError):
      raise StorageError(f"{directory}: step {step} cannot be rewritten: {new}: {e.strerror or e}") from e
    raise
  return True


def finish_rewrites(directory: epath.Path) -> list[int]:
  """Finishes interrupted swaps, and removes new forms that were never ready. Returns the steps swapped.

  No other process may be rewriting steps of this run.
  """
  names = look.names(directory / NOTES / REWRITING)
  ready = [int(n.removesuffix(".ready")) for n in names if n.endswith(".ready")]
  finished = []
  for step in ready:
    note = _ready_note(directory, step)
    try:
      commit = json.loads(note.read_text()).get("commit")
    except ValueError:  # cut short: nothing was swapped yet
      note.unlink(missing_ok=True)
      continue
    if _is_same(directory, step, commit) or not is_step(step_path(directory, step)):
      _swap(directory, step)
      finished.append(step)
    else:
      note.unlink(missing_ok=True)  # saved again under this number
  for name in names:
    if not name.endswith(".ready"):
      _remove(directory / NOTES / REWRITING / name)
  if finished:
    _log.info("%s: finished the rewriting of steps %s", directory, finished)
  return finished


# -- inside


def _ready_note(directory: epath.Path, step: int) -> epath.Path:
  return directory / NOTES / REWRITING / f"{step}.ready"


def _is_same(directory: epath.Path, step: int, commit: Any) -> bool:
  """Whether the committed step is the one that was read, and not marked for deletion."""
  if step in noted_steps(directory, DELETING):
    return False
  with contextlib.suppress(CheckpointError):
    step_dir = step_directory(directory, step)
    return step_metadata(step_dir).get(COMMITTED_AT) == commit
  return False


def _swap(directory: epath.Path, step: int) -> None:
  step_dir, place = step_path(directory, step), directory / NOTES / REWRITING / str(step)
  new, old = place / "new", place / "old"
  if is_object_store(directory):
    if new.exists():
      with contextlib.suppress(FileNotFoundError):
        step_dir.rmtree()  # commit markers first
      move_step(new, step_dir)
  elif new.exists():
    if step_dir.exists():
      os.rename(step_dir, old)
    if old.exists():  # else the step was deleted
      os.rename(new, step_dir)
      sync_directory(os.fspath(directory))
  _ready_note(directory, step).unlink(missing_ok=True)
  _remove(place)


def _copy_rest(old: epath.Path, new: epath.Path) -> None:
  """Copies the files and items that `write` left out."""
  for path in old.iterdir():
    if path.name != STEP_METADATA and not (new / path.name).exists():
      _copy_tree(path, new / path.name)


def _copy_tree(source: epath.Path, target: epath.Path) -> None:
  if not source.is_dir():
    source.copy(target)
    return
  target.mkdir(parents=True, exist_ok=True)
  for path in source.iterdir():
    _copy_tree(path, target / path.name)


def _write_metadata(old: epath.Path, new: epath.Path, ours: dict[str, Any]) -> None:
  data = step_metadata(old)
  if not data:
    raise NoCheckpointError(
      f"{old}: has no {STEP_METADATA}; steps of an old Orbax are not rewritten", topic="rewriting-steps"
    )
  data[CUSTOM] = (data.get(CUSTOM) or {}) | {OURS: with_digest(ours)}
  (new / STEP_METADATA).write_text(json.dumps(data))


def _remove(directory: epath.Path) -> None:
  if is_object_store(directory):
    with contextlib.suppress(FileNotFoundError):
      directory.rmtree()
  else:
    shutil.rmtree(directory, ignore_errors=True)
