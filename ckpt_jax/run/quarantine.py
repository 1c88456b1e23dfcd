"""Steps that no longer count and are not deleted: damaged ones in quarantine, and those set aside by a rollback.

On a disk a step is renamed to RUN/.ckpt_jax/KIND/STEP-TIME; moving it back undoes that. A bucket has no rename, so a
small mark RUN/.ckpt_jax/aside/STEP says that the step does not count, and its objects are moved only when the run saves
that step number again. `put_back` undoes either.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import logging
import os
import time
import uuid
from collections.abc import Collection

from etils import epath

from ckpt_jax.errors import CheckpointError, CorruptCheckpointError, NoCheckpointError, StorageError
from ckpt_jax.failures import storage_errors
from ckpt_jax.orbax.format import ARRAY_METADATAS, COMMIT_MARKER, MANIFEST, VALUES, is_process_database
from ckpt_jax.run.notes import ASIDE, NOTES, note_of, noted_steps, read_note, write_note
from ckpt_jax.run.steps import counts, is_step, naming_in, step_path, uncounted_steps
from ckpt_jax.storage import look
from ckpt_jax.storage.clone import doubt_links
from ckpt_jax.storage.objects import BACKEND
from ckpt_jax.storage.parallel import in_threads
from ckpt_jax.storage.paths import literal
from ckpt_jax.storage.urls import is_object_store

_log = logging.getLogger(__name__)
QUARANTINE, SET_ASIDE = "quarantine", "set_aside"


@dataclasses.dataclass(frozen=True)
class AsideStep:
  """A step that was put aside.

  Attributes:
    step: its number.
    kind: QUARANTINE or SET_ASIDE.
    reason: why.
    time: when, UTC; None if that was not noted.
    path: the directory that holds it.
  """

  step: int
  kind: str
  reason: str
  time: datetime.datetime | None
  path: str

  @property
  def where(self) -> str:
    """`in quarantine` or `set aside`."""
    return "in quarantine" if self.kind == QUARANTINE else "set aside"


def put_aside(directory: epath.Path, steps: Collection[int], kind: str, reasons: dict[int, str]) -> None:
  """Makes steps, damaged or not, no longer count. To be called by one process.

  `kind` is QUARANTINE or SET_ASIDE; `reasons`, by step, are kept beside the steps.

  Raises:
    StorageError: if it fails.
  """
  for step in sorted(steps, reverse=True):  # newest first, so that a crash leaves the rest in order
    note = {"kind": kind, "reason": reasons.get(step, ""), "time": time.time()}
    try:
      if is_object_store(directory):
        write_note(note_of(directory, ASIDE, step), note)
      else:
        place = _new_place(directory, step, kind)
        if kind == QUARANTINE:
          doubt_links(os.fspath(step_path(directory, step)))
        move_step(step_path(directory, step), place)
        with contextlib.suppress(OSError):
          write_note(_note_beside(place), note)
    except OSError as e:
      raise StorageError(f"{directory}: step {step} cannot be put into {kind}: {e.strerror or e}") from e


def is_put_aside(step_dir: epath.Path) -> bool:
  """Whether a step of a bucket is still in its place, but no longer counts; on a disk it would have been renamed."""
  run = step_dir.parent
  return is_object_store(run) and naming_in(run).step(step_dir.name) in noted_steps(run, ASIDE)


def vacate(directory: epath.Path, step: int) -> None:
  """Makes room for a step that is about to be saved; whatever Orbax found in its place it would delete.

  A step of a bucket that was put aside moves to its place among those for good. An empty directory is removed. On a
  disk anything else is renamed, a damaged step too.

  Raises:
    CheckpointError: if something else is there in a bucket, where a rename would be a copy.
    StorageError: if it cannot be moved.
  """
  path = step_path(directory, step)
  with storage_errors(f"{path}: what is stored there cannot be moved away"):
    if not is_object_store(directory):
      _rename_away(path)
    # Asked of the bucket itself: what this process wrote there a moment ago may have been removed by hand.
    elif not BACKEND.tree(path):
      return
    elif step in noted_steps(directory, ASIDE):
      mark = note_of(directory, ASIDE, step)
      note = read_note(mark)
      place = _new_place(directory, step, note.get("kind", QUARANTINE))
      move_step(path, place)
      write_note(_note_beside(place), note)
      mark.unlink(missing_ok=True)
    elif not is_step(path):
      raise CheckpointError(
        f"{path}: there are objects that are no committed step, and saving would delete them. If they are a copy that "
        "was cut off, finish it; else remove them, or save another step",
        topic="steps-in-the-way",
      )


def _rename_away(path: epath.Path) -> None:
  if not os.path.lexists(path):
    return
  with contextlib.suppress(OSError):
    os.rmdir(path)
    return
  aside = f"{path.name}.set-aside-{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{uuid.uuid4().hex[:4]}"
  try:
    os.rename(path, path.parent / aside)
  except OSError as e:
    raise CheckpointError(
      f"{path}: is no committed step and cannot be moved out of the way: {e.strerror}", topic="steps-in-the-way"
    ) from e
  _log.warning("%s: is no committed step; moved to %s to make room for one", path, aside)


def listed(directory: epath.Path) -> list[AsideStep]:
  """All steps that were put aside, by number; those of one number in the order in which they were put aside."""
  found = [
    (int(name.split("-", 1)[0]), kind, directory / NOTES / kind / name)
    for kind in (QUARANTINE, SET_ASIDE)
    for name in look.names(directory / NOTES / kind)
    if name.split("-", 1)[0].isdigit() and not name.endswith(".json")
  ]
  if is_object_store(directory):
    found += [(step, "", step_path(directory, step)) for step in noted_steps(directory, ASIDE)]

  def described(step: int, kind: str, path: epath.Path) -> AsideStep:
    note = read_note(_note_of(directory, step, path))
    time_ = note.get("time")
    when = datetime.datetime.fromtimestamp(time_, datetime.timezone.utc) if isinstance(time_, (int, float)) else None
    return AsideStep(step, kind or note.get("kind", QUARANTINE), str(note.get("reason", "")), when, str(path))

  steps = in_threads(lambda f: described(*f), found)
  return sorted(steps, key=lambda a: (a.step, a.time.timestamp() if a.time else 0.0, a.path))


def put_back(directory: epath.Path, step: int) -> AsideStep:
  """Makes a step that was put aside count again; of several with this number, the one put aside last.

  To be called by one process, while no job writes into the run.

  Raises:
    NoCheckpointError: if none was put aside under this number.
    CheckpointError: if the number is taken.
    StorageError: if it cannot be moved.
  """
  all_steps = listed(directory)
  found = [a for a in all_steps if a.step == step]
  if not found:
    there = ", ".join(f"{a.step} ({a.where})" for a in all_steps)
    raise NoCheckpointError(
      f"{directory}: no step {step} was put aside; there are {there or 'none'}", topic="quarantine"
    )
  chosen = found[-1]
  source, target = literal(chosen.path), step_path(directory, step)
  if source != target and target.exists():
    raise CheckpointError(
      f"{directory}: there is a step {step} already; roll back behind it first, which sets it aside, or look at the "
      f"other one where it is: {source}",
      topic="steps-in-the-way",
    )
  try:
    if source != target:
      move_step(source, target)
    _note_of(directory, step, source).unlink(missing_ok=True)
  except OSError as e:
    raise StorageError(f"{directory}: step {step} cannot be put back: {e.strerror or e}") from e
  _log.warning("%s: step %d, %s (%s), counts again", directory, step, chosen.where, chosen.reason or "no reason noted")
  return chosen


def move_step(source: epath.Path, target: epath.Path) -> None:
  """Moves the directory of a step. A bucket has no rename: there its objects are copied, commit markers last."""
  if not is_object_store(source):
    target.parent.mkdir(parents=True, exist_ok=True)
    os.rename(source, target)
    return
  keys = list(BACKEND.tree(source))
  markers = [key for key in keys if key.endswith(COMMIT_MARKER)]
  in_threads(lambda k: BACKEND.copy(source / k, target / k, True), [k for k in keys if k not in markers])
  for key in sorted(markers, key=lambda k: k.count("/"), reverse=True):  # the step's own last of all
    BACKEND.copy(source / key, target / key, True)
  source.rmtree(missing_ok=True)


def remove_aside(directory: epath.Path, kind: str, steps: Collection[int]) -> list[int]:
  """Deletes the steps of `steps` that were put aside. Returns them.

  Raises:
    StorageError: naming those that are still there.
  """
  removed, failed = set(), {}
  for found in listed(directory):
    if found.kind != kind or found.step not in steps:
      continue
    path = literal(found.path)
    try:
      path.rmtree(missing_ok=True)
      _note_of(directory, found.step, path).unlink(missing_ok=True)
    except OSError as e:
      failed[found.step] = e.strerror or str(e)
      continue
    removed.add(found.step)
    _log.info("%s: removed step %d, which was %s: %s", directory, found.step, found.where, found.reason)
  if failed:
    reasons = "; ".join(f"step {step}: {why}" for step, why in sorted(failed.items()))
    raise StorageError(f"{directory}: steps count no longer and could not be removed: {reasons}")
  return sorted(removed)


def damaged_steps(directory: epath.Path) -> dict[int, CorruptCheckpointError]:
  """Directories of a disk that hold an Orbax step without the metadata that makes it one.

  Orbax renames a step to its number when it commits, so these were committed and have lost files since. In a bucket
  the same sight is a save that did not end.
  """
  if is_object_store(directory):
    return {}
  found = {}
  uncounted, names = uncounted_steps(directory), look.names(directory)
  naming = naming_in(directory, names)
  for name in names:
    step, step_dir = naming.step(name), directory / name
    if step is None or step in uncounted or counts(step_dir) or not look.is_dir(step_dir):
      continue
    if any(holds_arrays(step_dir / item) for item in look.names(step_dir)):
      found[step] = CorruptCheckpointError(f"{step_dir}: holds arrays, but its metadata files are gone")
  return found


def holds_arrays(item: epath.Path) -> bool:
  """Whether a directory holds the files that Orbax writes for arrays, described or not."""
  names = set(look.names(item))
  return bool(names & {MANIFEST, VALUES, ARRAY_METADATAS}) or any(is_process_database(n) for n in names)


def _note_of(directory: epath.Path, step: int, path: epath.Path) -> epath.Path:
  """The note of a step that was put aside: its mark where it is in place, else the file beside it."""
  return note_of(directory, ASIDE, step) if path == step_path(directory, step) else _note_beside(path)


def _note_beside(path: epath.Path) -> epath.Path:
  return path.parent / f"{path.name}.json"


def _new_place(directory: epath.Path, step: int, kind: str) -> epath.Path:
  stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
  taken = set(look.names(directory / NOTES / kind))
  names = [f"{step}-{stamp}", *(f"{step}-{stamp}-{count}" for count in range(2, len(taken) + 2))]
  return directory / NOTES / kind / next(name for name in names if name not in taken)
