"""Turning older steps into ones that hold the parameters alone: in the background, one step after the other.

Two thirds of a step are optimizer state that nobody resumes from after a while. A thinned step keeps its number,
metrics, extras and time; `StepInfo.resumable` is False from then on.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import queue
import threading
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

from etils import epath

from ckpt_jax.errors import CheckpointError
from ckpt_jax.layout import contents
from ckpt_jax.rewrite.copy import copy_leaves, leaf_names, under
from ckpt_jax.rewrite.repack import carry_packed
from ckpt_jax.rewrite.swap import rewrite_step
from ckpt_jax.run.deletion import StepDeleter
from ckpt_jax.run.steps import PINS, THINNED, newest_resumable, noted_steps, our_metadata, step_info

_log = logging.getLogger(__name__)
_YIELD_S = 60.0  # how long one chunk waits for a save that is being written, so that endless saves do not stop thinning


class _Stopped(Exception):
  pass


def thin_step(
  directory: epath.Path,
  step: int,
  keep: Sequence[str],
  *,
  pause: Callable[[], None] = lambda: None,
  swapping: contextlib.AbstractContextManager[Any] | None = None,
) -> bool:
  """Leaves only what lies under the paths `keep` in a committed step: new copy, checked, swapped.

  Returns:
    Whether it was done; False if the step was deleted meanwhile.

  Raises:
    NoCheckpointError: if there is no such step.
    CheckpointError: if it cannot be thinned: no leaf lies under `keep`, or it was not written through OCDBT.
  """

  def write(old: epath.Path, new: epath.Path) -> dict[str, Any]:
    item = contents.item_directory(old)
    ours = our_metadata(old)
    names = kept_names(item, keep)
    copy_leaves(item, new / item.name, names, pause=pause)
    carry_packed(item, new / item.name, {".".join(name) for name in names})
    paths = {"/".join(name) for name in names}
    before = {"nbytes": ours.get("nbytes"), "leaves": ours.get("leaves")}
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return ours | {
      "metrics": ours.get("metrics") or step_info(directory, step).metrics,
      "encoded": {path: note for path, note in ours.get("encoded", {}).items() if path in paths},
      "nbytes": thinned_nbytes(old, keep),
      "leaves": len(names),
      THINNED: {"keep": list(keep), "time": now, "before": before},
    }

  def check(old: epath.Path, new: epath.Path) -> None:
    want = kept_names(contents.item_directory(old), keep)
    before = {leaf.path: leaf for leaf in contents.saved_leaves(old)}
    after = {leaf.path: leaf for leaf in contents.saved_leaves(new)}
    paths = {"/".join(name) for name in want}
    if after != {path: leaf for path, leaf in before.items() if path in paths}:
      raise CheckpointError(
        f"{old}: its leaves under {', '.join(keep)} do not make a tree of their own; it stays whole"
      )

  return rewrite_step(directory, step, write, check, swapping=swapping)


def kept_names(item: epath.Path, keep: Sequence[str]) -> list[tuple[str, ...]]:
  """The leaves of an item that lie under the paths `keep`.

  Raises:
    CheckpointError: if one of the paths leads to none; the message names those at the top.
  """
  names = leaf_names(item)
  for path in keep:
    if not under(names, [path]):
      top = ", ".join(sorted({"".join(name[:1]) for name in names})[:20])
      raise CheckpointError(f"{item}: thin.keep: no leaf lies under {path!r}; at the top there are {top}")
  return under(names, keep)


def thinned_nbytes(step_dir: epath.Path, keep: Sequence[str]) -> int:
  """Bytes that a step would have after thinning.

  Raises:
    CheckpointError: if one of the paths leads to no leaf.
  """
  paths = {"/".join(name) for name in kept_names(contents.item_directory(step_dir), keep)}
  return sum(leaf.nbytes for leaf in contents.saved_leaves(step_dir) if leaf.path in paths)


class Thinner:
  """Thins steps in a thread of its own.

  Between two chunks it waits while a save is being written. What it does when a process dies is undone by the next open
  (`rewrite.finish_rewrites`), and done again when retention is asked next.
  """

  def __init__(
    self,
    directory: epath.Path,
    keep: Sequence[str],
    deleter: StepDeleter,
    *,
    active: bool = True,
    busy: Callable[[], bool] = lambda: False,
    restoring: Collection[int] = (),
    done: Callable[[int], None] = lambda step: None,
    timeout: float = 60.0,
  ):
    """Starts nothing yet.

    Args:
      directory: the run.
      keep: paths in the state whose leaves stay.
      deleter: of the same run; both never move the same step, and neither moves one while a manager opens.
      active: False on all processes but one: their calls do nothing.
      busy: whether a save is being written.
      restoring: steps that must stay whole, looked at again before each swap.
      done: called with each step that was thinned.
      timeout: seconds that `finish` waits.
    """
    self._directory = directory
    self._keep = tuple(keep)
    self._deleter = deleter
    self._active = active
    self.busy = busy
    self._restoring = restoring
    self._done = done
    self._timeout = timeout
    self._waiting: queue.SimpleQueue[int | None] = queue.SimpleQueue()
    self._open: set[int] = set()
    self._refused: set[int] = set()
    self._changed = threading.Condition()
    self._stop = threading.Event()
    self._thread: threading.Thread | None = None

  def thin(self, steps: Collection[int]) -> None:
    """Asks for steps to be thinned and returns. What was refused once is not tried again by this object."""
    with self._changed:
      new = [] if not self._active else sorted(set(steps) - self._open - self._refused)
      self._open |= set(new)
    for step in new:
      self._waiting.put(step)
    if new and self._thread is None:
      self._stop.clear()
      self._thread = threading.Thread(target=self._work, name="ckpt_jax_thinner", daemon=True)
      self._thread.start()

  @property
  def pending(self) -> set[int]:
    """Steps asked for that are neither thinned nor refused yet."""
    with self._changed:
      return set(self._open)

  def wait(self, timeout: float | None = None) -> bool:
    """Waits until nothing is pending. False if the time ran out."""
    with self._changed:
      return self._changed.wait_for(lambda: not self._open, timeout=self._timeout if timeout is None else timeout)

  def finish(self) -> None:
    """Waits for what is pending up to the timeout, and stops. What is left stays whole."""
    if self._thread is None:
      return
    if not self.wait():
      _log.info("%s: steps %s are not thinned yet; the next job goes on", self._directory, sorted(self.pending))
    self._stop.set()
    self._waiting.put(None)
    self._thread.join(timeout=5)
    self._thread = None

  # -- inside

  def _work(self) -> None:
    while not self._stop.is_set() and (step := self._waiting.get()) is not None:
      try:
        self._thin(step)
      except _Stopped:
        pass
      except Exception as e:
        self._refused.add(step)
        _log.warning("%s: step %d is not thinned: %s", self._directory, step, e)
      with self._changed:
        self._open.discard(step)
        self._changed.notify_all()

  def _thin(self, step: int) -> None:
    if not self._allowed(step):
      return
    if thin_step(self._directory, step, self._keep, pause=self._pause, swapping=self._swapping(step)):
      _log.info("%s: step %d holds %s alone now", self._directory, step, ", ".join(self._keep))
      self._done(step)

  def _pause(self) -> None:
    deadline = time.monotonic() + _YIELD_S
    while self.busy() and time.monotonic() < deadline and not self._stop.is_set():
      self._stop.wait(0.02)
    if self._stop.is_set():
      raise _Stopped

  @contextlib.contextmanager
  def _swapping(self, step: int) -> Any:
    with self._deleter.moving():
      # Time has passed since retention decided: the step may be needed whole by now.
      if self._stop.is_set() or not self._allowed(step):
        raise _Stopped
      yield

  def _allowed(self, step: int) -> bool:
    if step in self._restoring or step in noted_steps(self._directory, PINS):
      return False
    newest = newest_resumable(self._directory)
    return newest is not None and newest > step
