"""What unfinished saves leave behind: found, distinguished from what must stay, and removed.

Only what is ours is removed: a step that the lease says we began, or a directory whose metadata holds our key. It is
removed only under the lease, so that no living job is writing it, and a committed step never is: on a disk only
directories with Orbax's temporary name are considered, in a bucket only steps without a commit marker. A run that was
copied elsewhere has neither (google/orbax#394).
"""

from __future__ import annotations

import functools
import logging
import os
import re
import shutil
import threading
import uuid
from collections.abc import Collection

from etils import epath

from ckpt_jax.errors import CheckpointError
from ckpt_jax.orbax.format import TEMPORARY
from ckpt_jax.run.notes import NOTES
from ckpt_jax.run.steps import is_step, naming_in, our_metadata, step_path
from ckpt_jax.storage import look
from ckpt_jax.storage.urls import is_object_store

_log = logging.getLogger(__name__)
TRASH = "trash"
_TEMPORARY = re.compile(rf"(.+){re.escape(TEMPORARY)}(-\d+)?")


def find(directory: epath.Path, begun: Collection[int]) -> tuple[dict[int, epath.Path], list[epath.Path]]:
  """Leftovers in a run: ours by step, and those of other programs. `begun`: steps that we began and did not commit."""
  if is_object_store(directory):
    # Only steps that we began: another one without a marker may be a copy in progress.
    paths = {step: step_path(directory, step) for step in begun}
    return {step: path for step, path in paths.items() if not is_step(path) and path.exists()}, []
  ours: dict[int, epath.Path] = {}
  foreign = []
  for path in temporary_steps(directory):
    step = _step_of(path)
    if step in begun or _is_ours(path):
      ours[step] = path
    else:
      foreign.append(path)
  return ours, foreign


def temporary_steps(directory: epath.Path) -> list[epath.Path]:
  """All directories on a disk that Orbax's naming marks as unfinished steps."""
  found = [directory / name for name in sorted(look.names(directory)) if _TEMPORARY.fullmatch(name)]
  return [path for path in found if _step_of(path) >= 0]


def _step_of(path: epath.Path) -> int:
  """The step that a temporary directory was to become; -1 if it was none."""
  match = _TEMPORARY.fullmatch(path.name)
  step = None if match is None else naming_in(path.parent).step(match[1])
  return -1 if step is None else step


def _is_ours(path: epath.Path) -> bool:
  try:
    return bool(our_metadata(path))
  except (CheckpointError, OSError):
    return False


def clear(directory: epath.Path, begun: Collection[int]) -> list[int]:
  """Removes our leftovers; call it under the lease. Returns the steps that have none any more, of `begun` and others.

  On a disk leftovers are moved to the trash and removed in the background; in a bucket they are gone on return.
  """
  ours, foreign = find(directory, begun)
  cleared = [step for step in begun if step not in ours]
  for step, path in ours.items():
    try:
      if is_object_store(directory):
        path.rmtree()
      else:
        trash = directory / NOTES / TRASH
        trash.mkdir(parents=True, exist_ok=True)
        os.rename(path, trash / f"{path.name}-{uuid.uuid4().hex[:8]}")
      cleared.append(step)
      _log.info("%s: removing what an unfinished save left of step %d", directory, step)
    except OSError as e:
      _log.warning("%s: the leftover cannot be removed: %s", path, e)
  for path in foreign:
    _warn_once(f"{path}: left by a save of another program; it takes space, and is not ours to remove")
  empty_trash(directory)
  return cleared


@functools.cache
def _warn_once(message: str) -> None:
  _log.warning("%s", message)


_emptying: dict[str, threading.Thread] = {}


def empty_trash(directory: epath.Path) -> None:
  """Empties the trash of a run on a disk in the background; the next call removes what a crash leaves of it."""
  trash = directory / NOTES / TRASH
  if is_object_store(directory) or not look.names(trash):
    return
  running = _emptying.get(os.fspath(trash))
  if running is None or not running.is_alive():
    thread = threading.Thread(target=_empty, args=(trash,), name="ckpt_jax_trash", daemon=True)
    _emptying[os.fspath(trash)] = thread
    thread.start()


def wait_for_trash(directory: epath.Path, timeout: float) -> None:
  """Waits until the trash is empty, or the time has run out."""
  thread = _emptying.get(os.fspath(directory / NOTES / TRASH))
  if thread is not None:
    thread.join(timeout)


def _empty(trash: epath.Path) -> None:
  before: set[str] = set()
  while (names := set(look.names(trash))) - before:
    for name in names:
      shutil.rmtree(trash / name, ignore_errors=True)
    before = names
  if names:
    _log.warning("%s: cannot be emptied; the next open tries again", trash)
