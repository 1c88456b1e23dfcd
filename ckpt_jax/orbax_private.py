"""The only file that touches private names, Orbax's and Python's. tests/test_orbax_private.py fails when they move."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection
from typing import Any

import orbax.checkpoint as ocp


def background_error(manager: ocp.CheckpointManager) -> BaseException | None:
  """The exception of a background save that has ended, without waiting for one that still runs.

  Why private: `check_for_errors()` raises nothing after a failed background save, since the manager's own finalize
  thread has already taken the exception; only `wait_until_finished()` gives it, and that one blocks
  (google/orbax#605).
  """
  thread = manager._finalize_thread.get()  # pylint: disable=protected-access
  return None if thread is None or thread.is_alive() else thread.exception


def use_deleter(manager: ocp.CheckpointManager, deleter: Any) -> None:
  """Makes `manager` hand the steps that its retention drops to `deleter` (delete, delete_steps, close).

  Why private: Orbax's own background deleter takes one step after the other, ends for good at the first error, forgets
  after a crash what it had begun, and `close()` waits for it without a limit; there is no option for another one
  (AI-Hypercomputer/maxtext#3488).
  """
  manager._checkpoint_deleter.close()  # pylint: disable=protected-access
  manager._checkpoint_deleter = deleter  # pylint: disable=protected-access


def forget_steps(manager: ocp.CheckpointManager, steps: Collection[int]) -> None:
  """Drops steps from what `manager` believes to be there: those whose deletion was begun before a crash.

  Why private: on POSIX Orbax takes any directory with a number for a step, half deleted ones too, and `delete()` would
  wait for their removal.
  """
  manager._checkpoints.delete_if(lambda info: info.step in steps)  # pylint: disable=protected-access


def before_executors_shut_down(callback: Callable[[], None]) -> None:
  """Runs `callback` when the interpreter ends, while threads can still be started.

  Why private: `atexit` runs after `concurrent.futures` refuses new work, so a background write that still has work to
  submit fails there (a script without close() committed nothing, 3 of 3). CPython offers no public hook that is
  earlier; `concurrent.futures.thread` itself uses this one (python/cpython#86128).
  """
  threading._register_atexit(callback)  # type: ignore[attr-defined]  # pylint: disable=protected-access
