"""The save that a preemption notice asks for, and the exit after it."""

from __future__ import annotations

import logging
from typing import NoReturn

from ckpt_jax.errors import CheckpointError
from ckpt_jax.run.attempts import PREEMPTED
from ckpt_jax.save.session import Session

_log = logging.getLogger(__name__)


class LastSave:
  """What `Checkpointer.save` does after SIGTERM. Its methods are called within the session's lock."""

  def __init__(self, session: Session):
    """Of this session."""
    self._session = session
    self._run, self._saver, self._notice = session.run, session.saver, session.run.notice

  def is_asked_for(self, step: int) -> bool:
    """Whether the job has been told to end; all processes agree."""
    if self._notice is None:
      return False
    if self._saver.manager.reached_preemption(step):
      self._notice.note()
    return self._notice.received

  def clear_the_way(self, step: int) -> None:
    """Waits for the save before this one, whatever became of it: nothing may keep the last one from being made.

    Raises:
      SystemExit: if there is nothing to save.
    """
    try:
      self._saver.wait()
    except CheckpointError as e:  # an earlier save; this one may succeed
      _log.error("preempted: %s", e)
    if self._notice is not None and self._notice.is_alone:
      self.exit()
    if step in self._saver.manager.all_steps():
      _log.warning(
        "preempted: %s: step %d is there already, and steps are never overwritten", self._run.directory, step
      )
      self.exit()

  def wait(self, step: int) -> None:
    """Waits for the last save, which has begun, to commit."""
    _log.warning("preempted: waiting for step %d to commit, then exiting", step)
    self._saver.wait()

  def saved(self, step: int, *, last: bool) -> None:
    """A save has begun, and if it is the `last` one it has committed.

    Raises:
      SystemExit: if every Checkpointer of this process has made its last save.
    """
    if self._notice is not None:
      self._notice.saved(step)
      if last and self._notice.is_complete:
        self.exit()

  def exit(self) -> NoReturn:
    """Closes the session, calls the user's own handler and raises SystemExit."""
    self._saver.wait()  # a failure here is raised, and retried by a trainer that goes on
    if self._notice is not None:
      self._notice.answered()
    self._session.close(PREEMPTED)
    if self._notice is not None:
      self._notice.run_users_handler()
    records = self._saver.records
    what = f"the last step saved is {records[-1].step}" if records else "no step was saved by this process"
    _log.warning("preempted: %s: %s; exiting", self._run.directory, what)
    raise SystemExit(self._run.config.preemption.exit_code)
