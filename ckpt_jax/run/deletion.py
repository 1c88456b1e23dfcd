"""Removal of steps: in the background, in parallel, and to the end even if the process dies half-way.

A step is first marked (RUN/.ckpt_jax/deleting/STEP), which makes it no longer count, then emptied, then its mark is
removed. The next process that opens the run finishes what is marked. A mark names the commit that it means, so that a
step saved again under the same number is never taken for the old one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
import os
import queue
import threading
import time
import types
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from ckpt_jax.orbax.format import AGGREGATE, COMMIT_MARKER, COMMITTED_AT, CUSTOM, ITEM_METADATA, STEP_METADATA
from ckpt_jax.run.notes import DELETING, note_of, noted_steps, read_note, write_note
from ckpt_jax.run.steps import OURS, is_step, step_metadata, step_path
from ckpt_jax.storage.parallel import in_threads
from ckpt_jax.storage.paths import files_beneath
from ckpt_jax.storage.urls import is_object_store

_log = logging.getLogger(__name__)
_WORKERS = 8
_HEADS = (ITEM_METADATA, AGGREGATE, COMMIT_MARKER, STEP_METADATA)  # the files that make a directory a step


@dataclasses.dataclass(eq=False, kw_only=True)
class StepDeleter:
  """Deletes steps in a thread of its own; an Orbax CheckpointDeleter.

  Callers wait only for the mark, one small write a step. After an error the mark stays, and the next open tries again.

  Attributes:
    directory: the run.
    active: False on all processes but one, where calls do nothing.
    timeout: seconds that `finish` waits.
    files_per_second: the most files to remove in a second; 0 for no limit.
    why: the reason, for the log, why Orbax's manager deletes a step.
    removed: called with each step that is gone, and why.
    failed: steps that could not be marked or removed, and why.
  """

  directory: epath.Path = dataclasses.field(kw_only=False)
  active: bool = True
  timeout: float = 60.0
  files_per_second: float = 0
  why: Callable[[int], str] = lambda step: ""
  removed: Callable[[int, str], None] = lambda step, why: None

  def __post_init__(self) -> None:
    self.failed: dict[int, str] = {}
    self._pause = 1 / self.files_per_second if self.files_per_second else 0.0
    self._waiting: queue.SimpleQueue[int | None] = queue.SimpleQueue()
    self._open: set[int] = set()  # given to delete() and not removed yet
    self._commits: dict[int, dict[str, Any]] = {}  # of steps that this process committed, see `_commit`
    self._changed = threading.Condition()
    self._thread: threading.Thread | None = None
    self._stop = threading.Event()
    self._removing = threading.Lock()  # held while one step is removed or replaced
    self._moving = threading.RLock()  # held while a directory vanishes, or a manager opens

  def committed(self, step: int) -> None:
    """Notes a step that this process has just committed, so that its mark takes one request to a bucket, not three."""
    if self.active and is_object_store(self.directory):
      self._commits[step] = _commit(step_path(self.directory, step))

  def paused(self) -> contextlib.AbstractContextManager[Any]:
    """Removes nothing meanwhile: an Orbax manager fails to open if a directory that it has listed vanishes."""
    return self._moving

  @contextlib.contextmanager
  def moving(self) -> Iterator[None]:
    """Held by a caller that replaces a step's directory: nothing is removed meanwhile, and no manager opens."""
    with self._removing, self._moving:
      yield

  @property
  def pending(self) -> set[int]:
    """Steps that are not removed yet."""
    with self._changed:
      return set(self._open)

  def delete(self, step: int, why: str = "") -> None:
    """Marks a step and returns. See `delete_steps`."""
    self.delete_steps([step], {step: why})

  def delete_steps(self, steps: Sequence[int], why: Mapping[int, str] = types.MappingProxyType({})) -> None:
    """Marks steps, which no longer count from then on, and returns; `why` has the reason of each, for the log.

    A step whose mark cannot be written stays.
    """
    if not self.active or not steps:
      return
    reasons = [why.get(step) or self.why(step) for step in steps]
    marked = in_threads(self._mark, steps, reasons)
    self._enqueue([step for step, ok in zip(steps, marked, strict=True) if ok])

  def resume(self) -> list[int]:
    """Continues with the steps that an earlier process marked and did not remove. Returns them."""
    if not self.active:
      return []
    left = []
    for step in sorted(noted_steps(self.directory, DELETING) - self.pending):
      if self._saved_anew(step):
        _log.warning("%s: step %d was saved again after its deletion began; it stays", self.directory, step)
        note_of(self.directory, DELETING, step).unlink(missing_ok=True)
      else:
        left.append(step)
    if left:
      _log.info("%s: finishing the deletion of steps %s", self.directory, left)
    self._enqueue(left)
    return left

  def wait_for(self, steps: Collection[int] | None = None, timeout: float | None = None) -> bool:
    """Waits until these steps (default: all given so far) are removed. False if the time ran out."""
    limit = self.timeout if timeout is None else timeout
    with self._changed:
      return self._changed.wait_for(
        lambda: not (self._open if steps is None else self._open & set(steps)), timeout=limit
      )

  def close(self) -> None:
    """Does nothing: Orbax calls it whenever a manager is replaced, and deleting goes on behind the next one."""

  def finish(self) -> None:
    """Waits up to the timeout, and stops. The steps left then are marked, and the next open removes them."""
    if self._thread is None:
      return
    if not self.wait_for():
      _log.warning(
        "%s: %d steps are not removed after %.0f s (timeouts.delete); they are marked, and the next open or "
        "`ckpt-jax prune` goes on",
        self.directory,
        len(self.pending),
        self.timeout,
      )
    self._stop.set()
    self._waiting.put(None)
    self._thread.join(timeout=5)
    self._thread = None

  # -- inside

  def _enqueue(self, steps: Sequence[int]) -> None:
    with self._changed:
      self._open |= set(steps)
    for step in steps:
      self._waiting.put(step)
    if steps and self._thread is None:
      self._stop.clear()
      # A daemon: a process that ends without close() must not hang on a slow bucket; the marks remain.
      self._thread = threading.Thread(target=self._work, name="ckpt_jax_deleter", daemon=True)
      self._thread.start()

  def _work(self) -> None:
    while not self._stop.is_set() and (step := self._waiting.get()) is not None:
      try:
        with self._removing:
          self._remove(step)
      except Exception as e:
        self.failed[step] = str(getattr(e, "strerror", None) or e)
        _log.warning("%s: step %d is not removed yet: %s; the next open tries again", self.directory, step, e)
      with self._changed:
        self._open.discard(step)
        self._changed.notify_all()

  def _mark(self, step: int, why: str) -> bool:
    step_dir = step_path(self.directory, step)
    commit = self._commits.pop(step, None)
    if commit is None and not step_dir.exists():
      return False
    file = note_of(self.directory, DELETING, step)
    mark = {**(commit or _commit(step_dir)), "time": time.time(), "why": why}
    try:
      write_note(file, mark)
    except OSError as e:
      if e.errno in (errno.ENOSPC, errno.EDQUOT) and not is_object_store(file):
        # Not even a mark fits. The files that make it a step go first, as always, and leave room for the mark.
        self._remove_heads(os.fspath(step_dir))
        with contextlib.suppress(OSError):
          write_note(file, mark)
        return True
      self.failed[step] = e.strerror or str(e)
      _log.warning("%s: cannot be written, step %d stays: %s", file, step, e)
      return False
    return True

  def _saved_anew(self, step: int) -> bool:
    directory = step_path(self.directory, step)
    if not is_step(directory):
      return False
    mark = read_note(note_of(self.directory, DELETING, step))
    if not mark:
      return True  # a mark cut short by a crash: nothing was removed yet, and the rules will decide on the step again
    commit = (_metadata(directory) or {}).get(COMMITTED_AT)
    return commit is not None and mark.get("commit") != commit

  def _remove(self, step: int) -> None:
    directory, file = step_path(self.directory, step), note_of(self.directory, DELETING, step)
    mark = read_note(file)
    if is_object_store(directory):
      with self._moving:
        directory.rmtree(missing_ok=True)  # commit markers first, in batches: see ObjectBackend.rmtree
    else:
      self._remove_files(os.fspath(directory))
    if self._stop.is_set():
      return
    file.unlink(missing_ok=True)
    self.failed.pop(step, None)
    foreign, why = mark.get("ours") is False, mark.get("why") or "it was marked for deletion"
    self.removed(step, why)
    _log.log(
      logging.WARNING if foreign else logging.INFO,
      "%s: removed step %d%s: %s",
      self.directory,
      step,
      ", which another program wrote" if foreign else "",
      why,
    )

  def _remove_files(self, directory: str) -> None:
    self._remove_heads(directory)
    in_threads(self._unlink, sorted(files_beneath(directory)), threads=1 if self._pause else _WORKERS)
    for folder, _, _ in os.walk(directory, topdown=False):
      # Another process may be removing it too.
      with self._moving, contextlib.suppress(FileNotFoundError):
        if not self._stop.is_set():
          os.rmdir(folder)

  def _remove_heads(self, directory: str) -> None:
    """Removes the files that make it a step, so that readers that know no marks do not take the rest for one.

    Commit metadata goes last, since it distinguishes this commit from a later one.
    """
    files = [file for file in files_beneath(directory) if os.path.basename(file) in _HEADS]
    for file in sorted(files, key=lambda f: os.path.basename(f) == STEP_METADATA):
      self._unlink(file)

  def _unlink(self, file: str) -> None:
    if self._pause:
      self._stop.wait(self._pause)
    with self._moving:
      pass
    if not self._stop.is_set():
      with contextlib.suppress(FileNotFoundError):
        os.unlink(file)


def _commit(step_dir: epath.Path) -> dict[str, Any]:
  """What a mark says of the commit that it is meant for."""
  data = _metadata(step_dir)
  return {
    "commit": (data or {}).get(COMMITTED_AT),
    "ours": None if data is None else OURS in (data.get(CUSTOM) or {}),
  }


def _metadata(step_dir: epath.Path) -> dict[str, Any] | None:
  """Orbax's metadata of a step; None if it cannot be read, which must not keep a step alive."""
  try:
    return step_metadata(step_dir)
  except Exception:
    return None
