"""Removing steps: in the background, in parallel, and to the end even if the process dies half-way.

A step is first marked (RUN/.ckpt_jax/deleting/STEP), from when on it is no step any more, then emptied, then its mark
is removed. Whoever opens the run next finishes what is marked. A mark names the commit that it means, so that a step
saved anew under the same number is never taken for the old one.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import json
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
from ckpt_jax.run.steps import DELETING, NOTES, OURS, is_step, noted_steps, step_metadata, step_path
from ckpt_jax.storage.urls import is_object_store

_log = logging.getLogger(__name__)
_WORKERS = 8
_MARKS_AT_ONCE = 16
_HEADS = (ITEM_METADATA, AGGREGATE, COMMIT_MARKER, STEP_METADATA)


class StepDeleter:
  """Deletes steps in a thread of its own; an Orbax CheckpointDeleter.

  Nothing here waits for storage but the marking, and that is one small write a step. An error keeps the mark and is
  logged; the next open tries again.

  Attributes:
    directory: the run.
    freed: bytes removed so far, on local paths; buckets do not say.
    failed: steps that could not be marked or removed, and why.
  """

  def __init__(
    self,
    directory: epath.Path,
    *,
    active: bool = True,
    timeout: float = 60.0,
    files_per_second: float = 0,
    why: Callable[[int], str] = lambda step: "",
  ):
    """Starts nothing yet.

    Args:
      directory: the run.
      active: False on all processes but one: their calls do nothing.
      timeout: seconds that `finish` waits.
      files_per_second: the most files removed in a second; 0 is no limit.
      why: says why Orbax's manager has a step deleted, for the log.
    """
    self.directory = directory
    self.freed = 0
    self.failed: dict[int, str] = {}
    self._why = why
    self._active = active
    self._timeout = timeout
    self._pause = 1 / files_per_second if files_per_second else 0.0
    self._waiting: queue.SimpleQueue[int | None] = queue.SimpleQueue()
    self._open: set[int] = set()  # given to delete() and not gone yet
    self._changed = threading.Condition()
    self._thread: threading.Thread | None = None
    self._stop = threading.Event()
    self._go = threading.Event()
    self._go.set()
    self._removing = threading.Lock()  # held while a step's directory changes, by this thread or by another one
    self._moving = threading.Lock()

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Removes no file meanwhile: an Orbax manager that opens fails if a directory that it has listed vanishes."""
    self._go.clear()
    with self._moving:  # what moves now comes to its end; nothing starts to
      pass
    try:
      yield
    finally:
      self._go.set()

  @contextlib.contextmanager
  def moving(self) -> Iterator[None]:
    """For who replaces a step's directory: nothing is removed meanwhile, and no manager opens."""
    with self._removing, self._no_manager_opens():
      yield

  @contextlib.contextmanager
  def _no_manager_opens(self) -> Iterator[None]:
    while True:
      self._go.wait()
      with self._moving:
        if self._go.is_set():
          yield
          return

  @property
  def pending(self) -> set[int]:
    """Steps whose removal has not ended."""
    with self._changed:
      return set(self._open)

  def delete(self, step: int, why: str = "") -> None:
    """Marks a step and returns; it is no step from now on."""
    self.delete_steps([step], {step: why} if why else {})

  def delete_steps(self, steps: Sequence[int], why: Mapping[int, str] = types.MappingProxyType({})) -> None:
    """Marks steps and returns; they are no steps from now on. A step whose mark cannot be written stays.

    Args:
      steps: committed ones.
      why: the reason of each, for the log.
    """
    if not self._active or not steps:
      return
    reasons = [why.get(step) or self._why(step) for step in steps]
    with concurrent.futures.ThreadPoolExecutor(min(_MARKS_AT_ONCE, len(steps))) as pool:
      marked = [step for step, ok in zip(steps, pool.map(self._mark, steps, reasons), strict=True) if ok]
    self._enqueue(marked)

  def resume(self) -> list[int]:
    """Takes up what an earlier process has marked and not removed. Returns those steps."""
    if not self._active:
      return []
    left = sorted(noted_steps(self.directory, DELETING) - self.pending)
    anew = [step for step in left if self._saved_anew(step)]
    for step in anew:
      _log.warning("%s: step %d was saved anew after its deletion was begun; it stays", self.directory, step)
      self._mark_file(step).unlink(missing_ok=True)
    left = [step for step in left if step not in anew]
    if left:
      _log.info("%s: finishing the deletion of %s", self.directory, left)
      self._enqueue(left)
    return left

  def wait_for(self, steps: Collection[int] | None = None, timeout: float | None = None) -> bool:
    """Waits until these steps (default: all given so far) are gone. False if the time ran out."""
    limit = self._timeout if timeout is None else timeout
    with self._changed:
      return self._changed.wait_for(
        lambda: not (self._open if steps is None else self._open & set(steps)), timeout=limit
      )

  def close(self) -> None:
    """Nothing: Orbax calls it whenever a manager is replaced, and deleting goes on behind the next one."""

  def finish(self) -> None:
    """Waits for the rest up to the timeout, and stops. What is left then is marked, and the next open removes it."""
    if self._thread is None:
      return
    if not self.wait_for():
      _log.warning(
        "%s: %d steps are not removed after %.0f s (timeouts.delete); they are marked, and the next open or "
        "`ckpt-jax prune` goes on",
        self.directory,
        len(self.pending),
        self._timeout,
      )
    self._stop.set()
    self._waiting.put(None)
    self._thread.join(timeout=5)
    self._thread = None

  # -- inside

  def _enqueue(self, steps: Sequence[int]) -> None:
    if not steps:
      return
    with self._changed:
      self._open |= set(steps)
    for step in steps:
      self._waiting.put(step)
    if self._thread is None:
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

  def _mark_file(self, step: int) -> epath.Path:
    return self.directory / NOTES / DELETING / str(step)

  def _mark(self, step: int, why: str) -> bool:
    step_dir = step_path(self.directory, step)
    if not step_dir.exists():
      return False
    file = self._mark_file(step)
    data = _metadata(step_dir)
    ours = None if data is None else OURS in (data.get(CUSTOM) or {})
    commit = None if data is None else data.get(COMMITTED_AT)
    mark = json.dumps({"commit": commit, "time": time.time(), "why": why, "ours": ours})
    try:
      file.parent.mkdir(parents=True, exist_ok=True)
      file.write_text(mark)
    except OSError as e:
      if e.errno in (errno.ENOSPC, errno.EDQUOT) and not is_object_store(file):
        # Not even a mark fits. What makes it a step goes first, as always, and leaves room for the mark.
        self._remove_heads(os.fspath(step_dir))
        with contextlib.suppress(OSError):
          file.write_text(mark)
        return True
      self.failed[step] = e.strerror or str(e)
      _log.warning("%s: cannot be written, step %d stays: %s", file, step, e)
      return False
    return True

  def _saved_anew(self, step: int) -> bool:
    directory = step_path(self.directory, step)
    if not is_step(directory):
      return False
    marked = self._read_mark(step)
    if not marked:
      return True  # a mark cut short by a crash: nothing was removed yet, and the rules will judge the step again
    return marked.get("commit") != _commit(directory) and _commit(directory) is not None

  def _read_mark(self, step: int) -> dict[str, Any]:
    try:
      mark = json.loads(self._mark_file(step).read_text())
    except (OSError, ValueError):
      return {}
    return mark if isinstance(mark, dict) else {}

  def _remove(self, step: int) -> None:
    directory = step_path(self.directory, step)
    mark = self._read_mark(step)
    if directory.exists():
      if is_object_store(directory):
        with self._no_manager_opens():
          directory.rmtree(missing_ok=True)  # commit markers first, in batches: see ObjectBackend.rmtree
      else:
        self._remove_files(os.fspath(directory))
    if not self._stop.is_set():
      self._mark_file(step).unlink(missing_ok=True)
      self.failed.pop(step, None)
      foreign = mark.get("ours") is False
      _log.log(
        logging.WARNING if foreign else logging.INFO,
        "%s: removed step %d%s: %s",
        self.directory,
        step,
        ", which another program wrote" if foreign else "",
        mark.get("why") or "it was marked for deletion",
      )

  def _remove_files(self, directory: str) -> None:
    folders, files = [], []
    for folder, _, names in os.walk(directory):
      folders.append(folder)
      files += [os.path.join(folder, name) for name in names]
    self._remove_heads(directory)
    rest = sorted(f for f in files if os.path.basename(f) not in _HEADS)
    with concurrent.futures.ThreadPoolExecutor(1 if self._pause else _WORKERS) as pool:
      for _ in pool.map(self._unlink, rest):
        pass
    if self._stop.is_set():
      return
    for folder in reversed(folders):  # os.walk names parents first
      with self._no_manager_opens(), contextlib.suppress(FileNotFoundError):  # another process may be removing it too
        os.rmdir(folder)

  def _remove_heads(self, directory: str) -> None:
    """What makes it a step goes first, so that a reader without the marks does not take the rest for one; commit
    metadata last of it, since it tells this commit from a later one."""
    files = [os.path.join(folder, name) for folder, _, names in os.walk(directory) for name in names if name in _HEADS]
    for file in sorted(files, key=lambda f: os.path.basename(f) == STEP_METADATA):
      self._unlink(file)

  def _unlink(self, file: str) -> None:
    if self._stop.is_set():
      return
    if self._pause:
      self._stop.wait(self._pause)
    self._go.wait()
    try:
      size = os.lstat(file).st_size
      os.unlink(file)
    except FileNotFoundError:
      return
    self.freed += size


def _metadata(step_dir: epath.Path) -> dict[str, Any] | None:
  """What Orbax notes about a step; None if that cannot be read, which must not keep a step alive."""
  try:
    return step_metadata(step_dir)
  except Exception:
    return None


def _commit(step_dir: epath.Path) -> Any:
  """What tells one commit of a step number from another; None if the step does not say."""
  return (_metadata(step_dir) or {}).get(COMMITTED_AT)
