"""Steps that no longer count and are not deleted: damaged ones in quarantine, and those behind a rollback.

On a disk a step is renamed to RUN/.ckpt_jax/KIND/STEP-TIME; moving it back undoes it. A bucket has no rename, so there
a small mark RUN/.ckpt_jax/aside/STEP says that the step does not count, and its objects are moved only when the run
saves that step number again.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import logging
import os
import time
from collections.abc import Collection, Iterator

from etils import epath

from ckpt_jax import run
from ckpt_jax.errors import CorruptCheckpointError, StorageError
from ckpt_jax.storage.kvstore import is_object_store

_log = logging.getLogger(__name__)
QUARANTINE, SET_ASIDE = "quarantine", "set_aside"
_COPIES = 16


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
        os.rename(run.step_path(directory, step), place)
        with contextlib.suppress(OSError):
          (place.parent / f"{place.name}.json").write_text(json.dumps(reason))
    except OSError as e:
      raise StorageError(f"{directory}: step {step} cannot be put into {kind}: {e.strerror or e}") from e


def make_room(directory: epath.Path, step: int) -> None:
  """Moves a step of a bucket that does not count away for good, since its number is about to be saved again."""
  if not is_object_store(directory) or step not in run.noted_steps(directory, run.ASIDE):
    return
  from ckpt_jax.storage.objects import BACKEND

  try:
    kind = json.loads(_mark(directory, step).read_text()).get("kind", QUARANTINE)
  except ValueError:
    kind = QUARANTINE
  source, target = run.step_path(directory, step), _place(directory, step, kind)
  with concurrent.futures.ThreadPoolExecutor(_COPIES) as pool:
    for _ in pool.map(lambda key: BACKEND.copy(source / key, target / key, True), list(BACKEND.tree(source))):
      pass
  source.rmtree(missing_ok=True)
  _mark(directory, step).unlink(missing_ok=True)


def aside(directory: epath.Path, kind: str) -> dict[int, list[epath.Path]]:
  """What was put aside, by step: the directories or objects that hold it."""
  found: dict[int, list[epath.Path]] = {}
  for name in _names(directory / run.NOTES / kind):
    number = name.split("-", 1)[0]
    if number.isdigit() and not name.endswith(".json"):
      found.setdefault(int(number), []).append(directory / run.NOTES / kind / name)
  if is_object_store(directory):
    for step in run.noted_steps(directory, run.ASIDE):
      with contextlib.suppress(ValueError, OSError):
        if json.loads(_mark(directory, step).read_text()).get("kind") == kind:
          found.setdefault(step, []).append(run.step_path(directory, step))
  return found


def remove_aside(directory: epath.Path, kind: str, steps: Collection[int]) -> list[int]:
  """Deletes what was put aside of `steps`. Returns those that there were."""
  there = {step: paths for step, paths in aside(directory, kind).items() if step in steps}
  for step, paths in there.items():
    for path in paths:
      path.rmtree(missing_ok=True)
      (path.parent / f"{path.name}.json").unlink(missing_ok=True)
    if is_object_store(directory):
      _mark(directory, step).unlink(missing_ok=True)
  return sorted(there)


def damaged_steps(directory: epath.Path) -> dict[int, CorruptCheckpointError]:
  """Directories of a disk that hold an Orbax step without the metadata that makes it one.

  Orbax renames a step to its number when it commits, so that these were committed and have lost files since. In a
  bucket the same thing is a save that did not end.
  """
  if is_object_store(directory):
    return {}
  found = {}
  uncounted = run.uncounted_steps(directory)
  names = list(_names(directory))
  called = run.naming(directory, names)
  for name in names:
    step, step_dir = called.step(name), directory / name
    if step is None or step in uncounted or run.is_step(step_dir) or not step_dir.is_dir():
      continue
    if any(_holds_arrays(item) for item in step_dir.iterdir() if item.is_dir()):
      found[step] = CorruptCheckpointError(f"{step_dir}: holds arrays, but its metadata files are gone")
  return found


def _holds_arrays(item: epath.Path) -> bool:
  names = set(_names(item))
  return bool(names & {"manifest.ocdbt", "d", "array_metadatas"}) or any(n.startswith("ocdbt.process_") for n in names)


def _names(directory: epath.Path) -> Iterator[str]:
  try:
    return iter([p.name for p in directory.iterdir()])
  except (FileNotFoundError, NotADirectoryError):
    return iter(())


def _mark(directory: epath.Path, step: int) -> epath.Path:
  return directory / run.NOTES / run.ASIDE / str(step)


def _place(directory: epath.Path, step: int, kind: str) -> epath.Path:
  stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
  place = directory / run.NOTES / kind / f"{step}-{stamp}"
  count = 1
  while place.exists():
    count += 1
    place = directory / run.NOTES / kind / f"{step}-{stamp}-{count}"
  return place
