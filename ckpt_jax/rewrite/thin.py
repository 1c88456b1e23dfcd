"""Thinning: older steps are reduced to their parameters, in the background, one step after the other.

Two thirds of a step are optimizer state from which nobody resumes after a while. A thinned step keeps its number,
metrics, extras and time; its `StepInfo.resumable` is False.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import datetime
import functools
import logging
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

from etils import epath

from ckpt_jax.errors import CheckpointError
from ckpt_jax.job.threads import Worker
from ckpt_jax.layout import contents
from ckpt_jax.rewrite.copy import copy_leaves, leaf_names
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
  """Reduces a committed step to the leaves under the paths `keep`: a new copy, checked, then swapped in.

  Returns:
    Whether it was done; False if the step was deleted meanwhile.

  Raises:
    NoCheckpointError: if there is no such step.
    CheckpointError: if there is no leaf under one of the paths, or the step is no OCDBT database.
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
        f"{old}: its leaves under {', '.join(keep)} do not make a tree of their own; it stays whole",
        topic="rewriting-steps",
      )

  return rewrite_step(directory, step, write, check, swapping=swapping)


def kept_names(item: epath.Path, keep: Sequence[str]) -> list[tuple[str, ...]]:
  """The leaves of an item under the paths `keep` (`params`, or `model/params`).

  Raises:
    CheckpointError: if there is no leaf under one of the paths; the message names the top of the tree.
  """
  names = leaf_names(item)
  kept: set[tuple[str, ...]] = set()
  for path in keep:
    prefix = path.strip("/") + "/"
    found = {name for name in names if f"{'/'.join(name)}/".startswith(prefix)}
    if not found:
      top = ", ".join(sorted({"".join(name[:1]) for name in names})[:20])
      raise CheckpointError(
        f"{item}: thin.keep: no leaf is under {path!r}; at the top there are {top}", topic="rewriting-steps"
      )
    kept |= found
  return [name for name in names if name in kept]


def thinned_nbytes(step_dir: epath.Path, keep: Sequence[str]) -> int:
  """Bytes that a step would have after thinning.

  Raises:
    CheckpointError: if there is no leaf under one of the paths.
  """
  paths = {"/".join(name) for name in kept_names(contents.item_directory(step_dir), keep)}
  return sum(leaf.nbytes for leaf in contents.saved_leaves(step_dir) if leaf.path in paths)


@dataclasses.dataclass(eq=False)
class Thinner:
  """Thins steps in a thread of its own.

  Between two chunks it waits while a save is being written. If the process dies meanwhile, the next open cleans up
  (`finish_rewrites`) and the next retention asks again.

  Attributes:
    directory: the run.
    keep: paths in the state whose leaves stay.
    deleter: of the same run; the two never move the same step, and neither moves one while a manager opens.
    active: False on all processes but one, whose calls do nothing.
    busy: whether a save is being written.
    restoring: steps that must stay whole, looked at again before each swap.
    done: called with each step that was thinned.
    timeout: seconds that `finish` waits.
  """

  directory: epath.Path
  keep: Sequence[str]
  deleter: StepDeleter
  active: bool = True
  busy: Callable[[], bool] = lambda: False
  restoring: Collection[int] = ()
  done: Callable[[int], None] = lambda step: None
  timeout: float = 60.0

  def __post_init__(self) -> None:
    self._jobs: dict[int, concurrent.futures.Future[None]] = {}
    self._refused: set[int] = set()
    self._stop = threading.Event()
    self._lock = threading.Lock()
    self._worker: Worker | None = None

  def thin(self, steps: Collection[int]) -> None:
    """Queues steps to be thinned and returns. Steps that cannot be thinned are not tried again by this object."""
    if not self.active:
      return
    with self._lock:
      for step in sorted(set(steps) - self._refused):
        if step not in self._jobs or self._jobs[step].done():
          if self._worker is None:
            self._stop.clear()
            self._worker = Worker("ckpt_jax_thinner")
          self._jobs[step] = self._worker.submit(functools.partial(self._thin, step))

  def wait(self, timeout: float | None = None) -> bool:
    """Waits until no step is queued. False if the time ran out."""
    return not concurrent.futures.wait(self._jobs.values(), self.timeout if timeout is None else timeout).not_done

  def finish(self) -> None:
    """Waits up to the timeout until no step is queued, and stops. Steps that are left stay whole."""
    if self._worker is None:
      return
    if not self.wait():
      left = sorted(step for step, job in self._jobs.items() if not job.done())
      _log.info("%s: steps %s are not thinned yet; the next job thins them", self.directory, left)
    self._stop.set()
    self._worker.close()
    self._worker.join(5)
    self._worker = None

  def _thin(self, step: int) -> None:
    try:
      if self._stop.is_set() or not self._allowed(step):
        return
      if thin_step(self.directory, step, self.keep, pause=self._pause, swapping=self._swapping(step)):
        _log.info("%s: step %d holds only %s now", self.directory, step, ", ".join(self.keep))
        self.done(step)
    except _Stopped:
      pass
    except Exception as e:
      if not self._stop.is_set():
        self._refused.add(step)
        _log.warning("%s: step %d is not thinned: %s", self.directory, step, e)

  def _pause(self) -> None:
    deadline = time.monotonic() + _YIELD_S
    while self.busy() and time.monotonic() < deadline and not self._stop.is_set():
      self._stop.wait(0.02)
    if self._stop.is_set():
      raise _Stopped

  @contextlib.contextmanager
  def _swapping(self, step: int) -> Iterator[None]:
    with self.deleter.moving():
      # Time has passed since retention decided: the step may be needed whole by now.
      if self._stop.is_set() or not self._allowed(step):
        raise _Stopped
      yield

  def _allowed(self, step: int) -> bool:
    if step in self.restoring or step in noted_steps(self.directory, PINS):
      return False
    newest = newest_resumable(self.directory)
    return newest is not None and newest > step
