"""What we change of Orbax's CheckpointManager, by its private names.

It is given the steps that there are, reports when a save has ended, hands deletions to our deleter, and can be left
behind while a write hangs. tests/orbax/test_private.py guards the names.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import sys
import threading
from collections.abc import Callable, Collection, Iterable
from typing import Any

import orbax.checkpoint as ocp

from ckpt_jax.orbax import saves
from ckpt_jax.orbax.private import before_executors_shut_down


def end_save(manager: ocp.CheckpointManager, ended: threading.Event, timeout: float) -> bool:
  """Waits, after `manager.save` has raised, for the threads that it had started; False if `timeout` seconds pass.

  Why private: `save` may raise while the thread that commits is already running (its retention policy raises, no more
  threads can be started). An error in that thread would be raised by the next save.
  """
  last = manager._finalize_thread.get()  # pylint: disable=protected-access
  if last is not None and last.is_alive():
    return ended.wait(timeout)
  saving = manager._checkpointer._async_manager  # type: ignore[attr-defined]  # pylint: disable=protected-access
  if saving._thread is not None and saving._thread.ident is not None:
    saving._thread.join(timeout)
    if saving._thread.is_alive():
      return False
  with contextlib.suppress(BaseException):
    saving.check_for_errors()
  return True


def forget_failure(manager: ocp.CheckpointManager) -> None:
  """Has `manager` forget a save that has failed, and whose error was taken.

  Why private: Orbax would raise the error again in each thread that asks, also in the next save, along with errors of
  the metadata that the failed save was still writing.
  """
  with contextlib.suppress(BaseException):
    manager.wait_until_finished()
  manager._finalize_thread.set(None)  # pylint: disable=protected-access
  store = manager._non_blocking_metadata_store  # pylint: disable=protected-access
  while store._write_futures:
    with contextlib.suppress(Exception):
      store.wait_until_finished()


_left_behind: list[threading.Thread] = []


def leave_behind(manager: ocp.CheckpointManager, writing: Iterable[threading.Thread]) -> None:
  """Gives up on a manager whose background save hangs in the threads `writing`, also when the interpreter ends.

  Why private: Orbax's threads are no daemons and it has no way to abandon them; `cancel()` cannot reach a thread that
  waits for the kernel.
  """
  saving = manager._checkpointer._async_manager._thread  # type: ignore[attr-defined]  # pylint: disable=protected-access
  threads = (manager._finalize_thread.get(), saving, *writing)  # pylint: disable=protected-access
  _left_behind.extend(thread for thread in threads if thread is not None)


def never_wait_for_hanging_threads() -> None:
  """Ends the process at the end of the program even if a thread that was left behind still hangs.

  Why private: see `before_executors_shut_down`. Python joins all threads at its end, so the job would idle forever.
  The exit code is 1: the intended one is unknown here, and a job with a hanging write is no success.
  """

  def leave() -> None:
    if any(thread.is_alive() for thread in _left_behind):
      sys.stderr.write("ckpt_jax: a background write still hangs; leaving without it\n")
      sys.stdout.flush()
      sys.stderr.flush()
      os._exit(1)

  before_executors_shut_down(leave)


class RunManager(ocp.CheckpointManager):
  """Orbax's manager, given the steps of the run instead of listing them itself, which also reports the end of a save.

  Why private: `check_for_errors()` raises nothing after a failed background save; `wait_until_finished()` does, but
  blocks without a limit (google/orbax#392, #605), returns silently from a cancelled save, and returns at once after a
  Ctrl-C within it, since Python then believes that the thread it waited for has ended (python/cpython#90882).

  Orbax opens two files of each step and takes two turns in thread pools for it, whenever a manager opens:
  7 s for 5,000 steps, at the first save once more. It also takes leftovers and half deleted steps for steps. Its
  `lightweight_initialize` spares the files alone.
  """

  def __init__(
    self,
    directory: Any,
    steps: Callable[[], Iterable[tuple[int, datetime.datetime]]],
    ended: Callable[[int, BaseException | None], None] = lambda step, error: None,
    meet: Callable[[str], None] = lambda what: None,
    **options: Any,
  ):
    """Opens the run.

    Args:
      directory, options: Orbax's.
      steps: asked when it opens and reloads.
      ended: called in the background when the last thread of a save ends, with its step, and its error if it failed.
      meet: waits for all processes, in the thread that opens or saves; see `saves.met_by`.
    """
    self._steps_there = steps
    self._ended = ended
    self._meet = meet
    with saves.met_by(meet):
      super().__init__(directory, **options)
    saves.quiet_threads(self)

  def save(self, *args: Any, **options: Any) -> bool:
    """See Orbax's."""
    with saves.met_by(self._meet):
      return super().save(*args, **options)

  def _finalize(self, step: int, steps_to_remove: list[int]) -> None:
    error: BaseException | None = None
    with saves.quietly():
      try:
        super()._finalize(step, steps_to_remove)
      except BaseException as e:
        error = e
        raise
      finally:
        self._ended(step, error)

  def _load_checkpoint_infos(self, skip_metadata_read: bool = False) -> list[Any]:
    from orbax.checkpoint._src.metadata.checkpoint_info import CheckpointInfo

    del skip_metadata_read
    return [CheckpointInfo(step=step, time=time, metrics=None) for step, time in self._steps_there()]

  def is_due(self, step: int) -> bool:
    """What the policy says of a step, be it above the newest one or not.

    Why private: at or below the newest step `should_save` is False without asking the policy, so that a step that was
    not due looks like one that was dropped (google/orbax#527).
    """
    from orbax.checkpoint._src.metadata.checkpoint_info import CheckpointInfo

    now = datetime.datetime.now(datetime.timezone.utc)
    context = ocp.checkpoint_managers.DecisionContext(
      is_saving_in_progress=self.is_saving_in_progress(),
      reached_preemption=self.reached_preemption(step),
      multiprocessing_options=self._multiprocessing_options,
    )
    info = CheckpointInfo(step=step, time=now, metrics=None)
    return bool(self._save_decision_policy.should_save(info, previous_steps=self._checkpoints, context=context))


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
