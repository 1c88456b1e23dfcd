"""Steps ascend: which step numbers may be saved next, and whether the end of training was saved."""

from __future__ import annotations

import logging

import jax
from etils import epath

from ckpt_jax.errors import CheckpointError
from ckpt_jax.save.saver import Saver

_log = logging.getLogger(__name__)


class StepOrder:
  """Decides whether a save that is due may begin. All processes of the job call it alike.

  Orbax silently drops a save at or below the newest step (google/orbax#527), so that training that has started over, or
  gone back, is never saved. Here it is an error.
  """

  def __init__(self, directory: epath.Path, saver: Saver):
    self._saved: int | None = None  # the last step that this job has saved
    self._restored: int | None = None  # the last step that it has restored
    self._from: int | None = None  # the later of both, from which it continues
    self._offered: int | None = None  # the last step that the schedule skipped, if nothing newer was saved since
    self._directory = directory
    self._saver = saver

  def is_due(self, step: int) -> bool:
    """Whether the schedule, or a preemption, asks for this step."""
    return self._saver.manager.is_due(step)

  def skipped(self, step: int) -> None:
    """Notes that the schedule did not ask for this step."""
    self._offered = step

  def begins(self, step: int) -> None:
    """Notes that a save of this step begins."""
    self._saved = self._from = step
    if self._offered is not None and self._offered <= step:
      self._offered = None

  def restored(self, step: int | None) -> None:
    """Notes that this step was restored."""
    self._restored = self._from = step

  def admits(self, step: int, *, force: bool) -> bool:
    """True if this step can be saved, False if it need not be: this job has saved or restored it, and it is the newest.

    Storage is listed only if `step` is not above every known step, since steps may have been deleted by hand.

    Raises:
      CheckpointError: if the step is saved already, or below the newest one and not forced.
    """
    known = self._saver.manager.all_steps()
    if not known or step > max(known):
      return True
    there = self._saver.steps_in_storage(step)
    if not there or step > there[-1]:
      return True
    if step in there:
      if not force and step == there[-1] and step in (self._saved, self._restored):
        return False
      raise CheckpointError(
        f"{self._directory}: step {step} is saved already; steps are never overwritten, with force=True neither. "
        f"{self._ways_out(step, there)}",
        topic="steps-ascend",
      )
    if force:
      return True
    raise CheckpointError(
      f"{self._directory}: step {step} was not saved, since step {there[-1]} is committed and steps ascend. "
      f"{self._ways_out(step, there)}. To save step {step} beside the newer ones, save it with force=True",
      topic="steps-ascend",
    )

  def warn_of_lost_end(self) -> None:
    """Logs, once, that the last steps of training were offered to `save` and are not saved."""
    offered, self._offered = self._offered, None
    if offered is None or jax.process_index() > 0 or (self._restored is not None and self._restored >= offered):
      return
    saved = "this job has saved none" if self._saved is None else f"the last that this job has saved is {self._saved}"
    _log.warning(
      "%s: step %d was offered to save() last, the schedule skipped it, and %s. If training ended there, its end is "
      "lost: save the last step with save(..., final=True), or name it in the schedule (last: %d)",
      self._directory,
      offered,
      saved,
      offered,
    )

  def _ways_out(self, step: int, there: list[int]) -> str:
    below = [s for s in there if s < step]
    anew = "To train anew, use a new directory"
    if not below:
      return f"{anew} (rollback(N) makes an older step N the newest, and there is none below {step})"
    back = self._from if self._from in below else below[-1]
    return f"To train on from an older step, call rollback({back}) first: newer steps are set aside. {anew}"
