"""Who is told of a commit: the log, the schedule, the run's memory of its attempts, and what it will fill."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from etils import epath

from ckpt_jax.config.units import size_text
from ckpt_jax.run.attempts import AttemptLog
from ckpt_jax.save.filling import Outlook
from ckpt_jax.save.underway import SaveRecord

_log = logging.getLogger(__name__)


class CommitNotes:
  """Tells of saves and commits. On process 0, and in Orbax's threads too."""

  def __init__(self, directory: epath.Path, schedule: Any, attempt: AttemptLog, outlook: Outlook):
    """Args as named; `schedule` may be a policy of Orbax's own, which does not listen."""
    self._directory = directory
    self._schedule = schedule
    self._attempt = attempt
    self._outlook = outlook

  def begun(self, step: int) -> None:
    """A save has begun. Raises what the schedule raises, which may be the user's own."""
    self._tell("begun", step)

  def committed(self, first: Callable[[], None], record: SaveRecord) -> None:
    """A save is committed, and what it costs is known. `first` is called before anything else."""
    assert record.background_s is not None
    first()
    _log.info(
      "%s: step %d is committed: %s in %.2f s (%s/s) behind training, which waited %.2f s",
      self._directory,
      record.step,
      size_text(record.nbytes),
      record.background_s,
      size_text(record.nbytes / max(record.background_s, 1e-3)),
      record.blocking_s,
    )
    # What a save waited for its predecessor is not its own cost.
    blocking = record.blocking_s - record.waited_s
    try:
      self._tell("finished", blocking, record.background_s)
    except Exception as e:  # the user's own; the step is committed all the same
      _log.warning("%s: the schedule failed when it was told of a commit: %r", self._directory, e)
    self._attempt.committed(record.step, record.nbytes, blocking, record.background_s)
    self._outlook.committed(record.step, record.nbytes)

  def _tell(self, event: str, *arguments: Any) -> None:
    listener = getattr(self._schedule, event, None)
    if listener is not None:
      listener(*arguments)
