"""Steps that no longer count and are not deleted: damaged ones in quarantine, and those behind a rollback.

On a disk a step is renamed to RUN/.ckpt_jax/KIND/STEP-TIME; moving it back undoes it. A bucket has no rename, so there
a small mark RUN/.ckpt_jax/aside/STEP says that the step does not count, and its objects are moved only when the run
saves that step number again. `put_back` undoes either.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import datetime
import json
import logging
import os
import time
from collections.abc import Collection
from typing import Any

from etils import epath

from ckpt_jax.errors import CheckpointError, CorruptCheckpointError, NoCheckpointError, StorageError
from ckpt_jax.orbax.format import ARRAY_METADATAS, COMMIT_MARKER, MANIFEST, VALUES, is_process_database
from ckpt_jax.run.steps import ASIDE, NOTES, counts, naming_in, noted_steps, step_path, uncounted_steps
from ckpt_jax.storage import look
from ckpt_jax.storage.paths import literal
from ckpt_jax.storage.urls import is_object_store

_log = logging.getLogger(__name__)
QUARANTINE, SET_ASIDE = "quarantine", "set_aside"
_COPIES = 16


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
  """Makes `steps` count no longer. To be called by one process.

  Args:
    directory: the run.
    steps: steps that are there, damaged or not.
    kind: QUARANTINE or SET_ASIDE.
    reasons: why, by step; kept beside the step.

  Raises:
    StorageError: if it cannot be done.
  """
  for step in sorted(steps, reverse=True):  # newest first, so that a crash leaves the rest in order
    reason = {"kind": kind, "reason": reasons.get(step, ""), "time": time.time()}
    try:
      if is_object_store(directory):
        _mark(directory, step).parent.mkdir(parents=True, exist_ok=True)
        _mark(directory, step).write_text(json.dumps(reason))
      else:
        place = _place(directory, step, kind)
        place.parent.mkdir(parents=True, exist_ok=True)
        os.rename(step_path(directory, step), place)
        with contextlib.suppress(OSError):
          _note_of(place).write_text(json.dumps(reason))
    except OSError as e:
      raise StorageError(f"{directory}: step {step} cannot be put into {kind}: {e.strerror or e}") from e


def make_room(directory: epath.Path, step: int) -> None:
  """Moves a step of a bucket that does not count away for good, since its number is about to be saved again."""
  if not is_object_store(directory) or step not in noted_steps(directory, ASIDE):
    return
  from ckpt_jax.storage.objects import BACKEND

  mark = _read_note(_mark(directory, step))
  source, target = step_path(directory, step), _place(directory, step, mark.get("kind", QUARANTINE))
  with concurrent.futures.ThreadPoolExecutor(_COPIES) as pool:
    for _ in pool.map(lambda key: BACKEND.copy(source / key, target / key, True), list(BACKEND.tree(source))):
      pass
  _note_of(target).write_text(json.dumps(mark))
  source.rmtree(missing_ok=True)
  _mark(directory, step).unlink(missing_ok=True)


def listed(directory: epath.Path) -> list[AsideStep]:
  """All steps that were put aside, by number; of one number, the last put aside comes last."""
  found = [
    (int(name.split("-", 1)[0]), kind, directory / NOTES / kind / name)
    for kind in (QUARANTINE, SET_ASIDE)
    for name in look.names(directory / NOTES / kind)
    if name.split("-", 1)[0].isdigit() and not name.endswith(".json")
  ]
  if is_object_store(directory):
    found += [(step, "", step_path(directory, step)) for step in noted_steps(directory, ASIDE)]

  def described(step: int, kind: str, path: epath.Path) -> AsideStep:
    note = _read_note(_note_of(path) if kind else _mark(directory, step))
    time_ = note.get("time")
    when = datetime.datetime.fromtimestamp(time_, datetime.timezone.utc) if isinstance(time_, (int, float)) else None
    return AsideStep(step, kind or note.get("kind", QUARANTINE), str(note.get("reason", "")), when, str(path))

  with concurrent.futures.ThreadPoolExecutor(_COPIES) as pool:
    steps = list(pool.map(lambda f: described(*f), found))
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
    raise NoCheckpointError(f"{directory}: no step {step} was put aside; there are {there or 'none'}")
  chosen = found[-1]
  source, target = literal(chosen.path), step_path(directory, step)
  if source != target and target.exists():
    raise CheckpointError(
      f"{directory}: there is a step {step} already; roll back behind it first, which sets it aside, or look at the "
      f"other one where it is: {source}"
    )
  try:
    if not is_object_store(directory):
      os.rename(source, target)
    elif source != target:
      _copy_back(source, target)
    (_mark(directory, step) if source == target else _note_of(source)).unlink(missing_ok=True)
  except OSError as e:
    raise StorageError(f"{directory}: step {step} cannot be put back: {e.strerror or e}") from e
  _log.warning("%s: step %d, %s (%s), counts again", directory, step, chosen.where, chosen.reason or "no reason noted")
  return chosen


def _copy_back(source: epath.Path, target: epath.Path) -> None:
  from ckpt_jax.storage.objects import BACKEND

  keys = list(BACKEND.tree(source))
  markers = [key for key in keys if key.endswith(COMMIT_MARKER)]
  with concurrent.futures.ThreadPoolExecutor(_COPIES) as pool:
    for _ in pool.map(lambda k: BACKEND.copy(source / k, target / k, True), [k for k in keys if k not in markers]):
      pass
  for key in sorted(markers, key=lambda k: k.count("/"), reverse=True):  # the step's own last of all
    BACKEND.copy(source / key, target / key, True)
  source.rmtree(missing_ok=True)


def remove_aside(directory: epath.Path, kind: str, steps: Collection[int]) -> list[int]:
  """Deletes what was put aside of `steps`. Returns those that there were.

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
      marked = path == step_path(directory, found.step)
      (_mark(directory, found.step) if marked else _note_of(path)).unlink(missing_ok=True)
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

  Orbax renames a step to its number when it commits, so that these were committed and have lost files since. In a
  bucket the same thing is a save that did not end.
  """
  if is_object_store(directory):
    return {}
  found = {}
  uncounted = uncounted_steps(directory)
  names = look.names(directory)
  called = naming_in(directory, names)
  for name in names:
    step, step_dir = called.step(name), directory / name
    if step is None or step in uncounted or counts(step_dir) or not look.is_dir(step_dir):
      continue
    if any(holds_arrays(step_dir / item) for item in look.names(step_dir)):
      found[step] = CorruptCheckpointError(f"{step_dir}: holds arrays, but its metadata files are gone")
  return found


def holds_arrays(item: epath.Path) -> bool:
  """Whether a directory holds what Orbax writes for arrays, described or not."""
  names = set(look.names(item))
  return bool(names & {MANIFEST, VALUES, ARRAY_METADATAS}) or any(is_process_database(n) for n in names)


def _mark(directory: epath.Path, step: int) -> epath.Path:
  return directory / NOTES / ASIDE / str(step)


def _note_of(path: epath.Path) -> epath.Path:
  """The file beside a step that was moved, which says why."""
  return path.parent / f"{path.name}.json"


def _read_note(file: epath.Path) -> dict[str, Any]:
  try:
    note = json.loads(file.read_text())
  except (OSError, ValueError):
    return {}
  return note if isinstance(note, dict) else {}


def _place(directory: epath.Path, step: int, kind: str) -> epath.Path:
  stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
  place = directory / NOTES / kind / f"{step}-{stamp}"
  count = 1
  while place.exists():
    count += 1
    place = directory / NOTES / kind / f"{step}-{stamp}-{count}"
  return place
