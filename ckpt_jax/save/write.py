"""The write of one step: what it costs, how far it has come, and the error to raise if it fails."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable

from etils import epath

from ckpt_jax.errors import CheckpointError, SaveFailedError, SaveOutOfSpaceError, SaveStorageError, UnhealthyStateError
from ckpt_jax.failures import is_out_of_space, is_read_only, root_cause
from ckpt_jax.integrity.record import is_unhealthy
from ckpt_jax.orbax.saves import Operation
from ckpt_jax.run.steps import committed_steps


@dataclasses.dataclass
class SaveRecord:
  """What one save cost.

  Attributes:
    step: the step saved.
    nbytes: bytes of the whole state.
    blocking_s: seconds that `save` blocked training, without the wait for the state to be computed: jax dispatches
      steps ahead of the device, and whatever reads the state first waits for it.
    waited_s: the part of `blocking_s` spent waiting for the background write of the previous save.
    background_s: seconds from the return of `save` to the commit; None while it runs, and for a save that failed.
  """

  step: int
  nbytes: int
  blocking_s: float = 0.0
  waited_s: float = 0.0
  background_s: float | None = None


class Write:
  """The write of one step. It counts as committed once storage holds it, never because nothing was raised.

  Attributes:
    record: what it costs.
    operation: its part inside Orbax.
    deadline: when it counts as hanging, on the clock of `time.monotonic()`.
    ended: set once nothing writes the step any more.
    error: why it failed, once `ended` is set.
    durable: whether the step is committed: process 0 has seen it, the others have heard so from process 0.
  """

  def __init__(self, record: SaveRecord, operation: Operation, timeout: float, finished: Callable[[SaveRecord], None]):
    """Starts the clock.

    Args:
      record: what is known of the save so far.
      operation: its part inside Orbax.
      timeout: seconds until it counts as hanging.
      finished: called once the step is committed and `save` has returned, whichever comes last.
    """
    self.record = record
    self.operation = operation
    self.deadline = time.monotonic() + timeout
    self.ended = threading.Event()
    self.error: BaseException | None = None
    self.durable = False
    self._finished = finished
    self._committing = self._given_up = False
    self._returned_at: float | None = None
    self._lock = threading.Lock()

  @property
  def left(self) -> float:
    """Seconds until it counts as hanging."""
    return max(0.0, self.deadline - time.monotonic())

  def begin_commit(self) -> bool:
    """Whether the commit may start: False if the write was given up."""
    with self._lock:
      self._committing = not self._given_up
      return self._committing

  def give_up(self) -> bool:
    """Makes sure that the step will not be committed any more; False if its commit has started already."""
    with self._lock:
      self._given_up = not self._committing
      return self._given_up

  def committed(self) -> None:
    """Notes that storage holds the step."""
    with self._lock:
      self.durable = True
      returned = self._returned_at
      if returned is not None:
        self.record.background_s = time.perf_counter() - returned
    if returned is not None:
      self._finished(self.record)

  def returned(self, started: float) -> None:
    """Notes that training goes on; it had waited since `started`, on the clock of `time.perf_counter()`."""
    with self._lock:
      self._returned_at = time.perf_counter()
      self.record.blocking_s = self._returned_at - started
      early = self.durable
      if early:
        self.record.background_s = 0.0
    if early:
      self._finished(self.record)


def not_saved(directory: epath.Path, step: int, error: BaseException, *, committed: bool) -> CheckpointError:
  """The error to raise for a save that failed.

  Args:
    directory: the run; the message names its newest committed step.
    step: the step that was to be saved.
    error: why its write failed.
    committed: storage has the step all the same, but not every process of the job knows.
  """
  unhealthy = is_unhealthy(error)
  if unhealthy is not None:
    return UnhealthyStateError(str(unhealthy))
  cause = root_cause(error)
  if committed:
    return SaveFailedError(
      f"{directory}: step {step} is committed, but not every process has learned of it: {cause}", step
    )
  steps = committed_steps(directory)
  kept = f"the newest committed step is {steps[-1]}" if steps else "no step is committed"
  message = f"{directory}: step {step} was not saved: {cause}; {kept}"
  if is_out_of_space(error):
    return SaveOutOfSpaceError(f"{message}. The storage is full: free space, or keep fewer steps (retention)", step)
  return (SaveStorageError if is_read_only(error) else SaveFailedError)(message, step)


def left_hanging(directory: epath.Path, step: int, timeout: float, *, uncommitted: bool) -> SaveFailedError:
  """The error to raise for a save that did not end within `timeout` seconds (`timeouts.save`) and was given up.

  Args:
    directory: the run.
    step: the step that was to be saved.
    timeout: `timeouts.save`, in seconds.
    uncommitted: whether its commit had not started, so that the step will never be committed.
  """
  late = f"did not end within {timeout:.0f} s (timeouts.save) and still hangs; the storage does not answer"
  if uncommitted:
    return SaveFailedError(
      f"{directory}: step {step} was not saved: its background write {late}. Earlier steps are untouched, and "
      "this step will not be committed any more",
      step,
    )
  return SaveFailedError(
    f"{directory}: it is not known whether step {step} is saved: its commit {late}. Earlier steps are untouched; "
    "steps() will show whether this one is there",
    step,
  )
