"""What unfinished saves leave behind: found, told from what must stay, and removed.

Only what is ours goes: a step that the lease says was begun by us, or a directory whose metadata holds our key. Only
under the lease, so that nobody alive is writing it. And never a committed step: on a disk only directories with
Orbax's temporary name are looked at, in a bucket only steps without a commit marker. A run that was copied elsewhere
has neither (google/orbax#394).
"""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import shutil
import threading
import time
import uuid
from collections.abc import Collection

from etils import epath

from ckpt_jax.errors import CheckpointError, CorruptCheckpointError
from ckpt_jax.orbax.format import TEMPORARY
from ckpt_jax.run.steps import NOTES, is_step, naming_in, our_metadata, step_path
from ckpt_jax.storage.objects import BACKEND
from ckpt_jax.storage.urls import is_object_store

_log = logging.getLogger(__name__)
TRASH = "trash"
_TEMPORARY = re.compile(rf"(.+){re.escape(TEMPORARY)}(-\d+)?")


@dataclasses.dataclass(frozen=True)
class Leftovers:
  """Unfinished saves in a run: `ours` by step, and the names of those that something else left."""

  ours: dict[int, epath.Path]
  foreign: tuple[str, ...]


def find(directory: epath.Path, begun: Collection[int]) -> Leftovers:
  """Looks for leftovers; `begun` are the steps that we began and did not commit."""
  ours: dict[int, epath.Path] = {}
  foreign = []
  if is_object_store(directory):
    # Only what we know to have begun: another step without a marker may be a copy that is still under way.
    for step in begun:
      path = step_path(directory, step)
      if not is_step(path) and path.exists():
        ours[step] = path
    return Leftovers(ours, ())
  for name in _names(directory):
    number = _temporary(directory, name)
    if number is None:
      continue
    if number in begun or _is_ours(directory / name):
      ours[number] = directory / name
    else:
      foreign.append(name)
  return Leftovers(ours, tuple(sorted(foreign)))


def temporary_steps(directory: epath.Path) -> list[str]:
  """Paths of all directories on a disk that Orbax's naming calls temporary."""
  return [os.path.join(os.fspath(directory), n) for n in _names(directory) if _temporary(directory, n) is not None]


def _temporary(directory: epath.Path, name: str) -> int | None:
  """The step that a temporary directory of this name was to become."""
  match = _TEMPORARY.fullmatch(name)
  return None if match is None else naming_in(directory).step(match[1])


def _names(directory: epath.Path) -> list[str]:
  try:
    return os.listdir(os.fspath(directory))
  except FileNotFoundError:
    return []


def _is_ours(path: epath.Path) -> bool:
  try:
    return bool(our_metadata(path))
  except (CorruptCheckpointError, AttributeError, OSError):
    return False


def clear(directory: epath.Path, begun: Collection[int]) -> list[int]:
  """Removes our leftovers; call it under the lease. Returns the steps whose leftovers are out of the way.

  On a disk they are moved aside at once and emptied in the background; in a bucket they are gone on return.
  """
  found = find(directory, begun)
  cleared = []
  for step, path in found.ours.items():
    try:
      if is_object_store(directory):
        if not is_step(path):
          path.rmtree()
      else:
        trash = directory / NOTES / TRASH
        trash.mkdir(parents=True, exist_ok=True)
        os.rename(os.fspath(path), os.fspath(trash / f"{path.name}-{uuid.uuid4().hex[:8]}"))
      cleared.append(step)
      _log.info("%s: removing what an unfinished save left of step %d", directory, step)
    except (OSError, CheckpointError) as e:
      _log.warning("%s: the leftover cannot be removed: %s", path, e)
  for name in found.foreign:
    _tell_once(f"{directory / name}: left by a save of another program; it takes space, and is not ours to remove")
  empty_trash(directory)
  return cleared


_told: set[str] = set()


def _tell_once(message: str) -> None:
  if message not in _told:
    _told.add(message)
    _log.warning("%s", message)


_emptying: dict[str, threading.Thread] = {}
_emptying_lock = threading.Lock()


def empty_trash(directory: epath.Path) -> None:
  """Empties what was moved aside, in the background; what a crash leaves of it goes with the next call."""
  if is_object_store(directory):
    return
  trash = os.fspath(directory / NOTES / TRASH)
  if not os.path.isdir(trash) or not os.listdir(trash):
    return
  with _emptying_lock:
    running = _emptying.get(trash)
    if running is None or not running.is_alive():
      # A daemon: what is left is taken up by the next open.
      _emptying[trash] = threading.Thread(target=_empty, args=(trash,), name="ckpt_jax_trash", daemon=True)
      _emptying[trash].start()


def wait_for_trash(directory: epath.Path, timeout: float) -> None:
  """Waits until what was moved aside is gone, or the time is over."""
  thread = _emptying.get(os.fspath(directory / NOTES / TRASH))
  if thread is not None:
    thread.join(timeout)


def _empty(trash: str) -> None:
  for _ in range(100):  # what is moved aside meanwhile is taken along
    names = _listed(trash)
    if not names:
      break
    for name in names:
      shutil.rmtree(os.path.join(trash, name), ignore_errors=True)
    if _listed(trash) == names:
      _log.warning("%s: cannot be emptied; the next open tries again", trash)
      return


def _listed(trash: str) -> list[str]:
  try:
    return os.listdir(trash)
  except (FileNotFoundError, NotADirectoryError):  # the run was deleted or moved
    return []


def set_aside(directory: epath.Path, step: int) -> None:
  """Makes room for a step where something lies that Orbax does not count as one: it would delete it, whatever it is.

  An empty directory is removed. On a disk anything else is renamed, a damaged step too.

  Raises:
    CheckpointError: in a bucket, where renaming is copying.
  """
  path = step_path(directory, step)
  if is_object_store(directory):
    # Asked of the bucket itself: what this process wrote there a moment ago may have been removed by hand.
    if not is_step(path) and BACKEND.tree(path):
      raise CheckpointError(
        f"{path}: something lies there that is no committed step, and saving would delete it. If it is a copy that was "
        "cut off, finish it; else remove it, or save another step"
      )
    return
  name = os.fspath(path)
  if not os.path.lexists(name):
    return
  try:
    os.rmdir(name)
    return
  except OSError:
    pass
  aside = f"{name}.set-aside-{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{uuid.uuid4().hex[:4]}"
  try:
    os.rename(name, aside)
  except OSError as e:
    raise CheckpointError(f"{name}: is no committed step and cannot be moved out of the way: {e.strerror}") from e
  _log.warning("%s: is no committed step; moved to %s to make room for one", name, os.path.basename(aside))
