"""The write of one step: what it costs, how far it has come, and the error to raise if it fails."""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from collections.abc import Callable, Sequence

import jax
from etils import epath

from ckpt_jax.errors import CheckpointError, SaveFailedError, SaveOutOfSpaceError, SaveStorageError, UnhealthyStateError
from ckpt_jax.failures import is_out_of_space, is_read_only, root_cause
from ckpt_jax.integrity.record import is_unhealthy
from ckpt_jax.layout.ring import Ring
from ckpt_jax.orbax.saves import Operation
from ckpt_jax.run.events import ProcessCost, slowest
from ckpt_jax.run.steps import committed_steps
from ckpt_jax.storage.traffic import traffic


@dataclasses.dataclass
class SaveRecord:
  """What one save cost.

  Attributes:
    step: the step saved.
    nbytes: bytes of the whole state.
    blocking_s: seconds that `save` blocked training, without the wait for the state to be computed: jax dispatches
      steps ahead of the device, and whatever reads the state first waits for it.
    waited_s: the part of `blocking_s` spent waiting for the background write of the previous save.
    snapshot_s: the part of `blocking_s` from the call of Orbax until training may overwrite the arrays.
    background_s: seconds from the return of `save` to the commit; None while it runs, and for a save that failed.
    commit_s: the part of `background_s` after all processes had written; on process 0.
    unchanged_nbytes: bytes of the state, over all processes, that were not written, since the step before has them.
    processes: what each process spent, on process 0 once it is committed; of more than 64 the slowest.
  """

  step: int
  nbytes: int
  blocking_s: float = 0.0
  waited_s: float = 0.0
  snapshot_s: float = 0.0
  background_s: float | None = None
  commit_s: float | None = None
  unchanged_nbytes: int = 0
  processes: tuple[ProcessCost, ...] = ()


class Write:
  """The write of one step. It counts as committed once storage holds it, never because nothing was raised.

  Attributes:
    record: what it costs.
    operation: its part inside Orbax.
    ring: what brings the arrays to host memory.
    deadline: when it counts as hanging, on the clock of `time.monotonic()`.
    ended: set once nothing writes the step any more.
    error: why it failed, once `ended` is set.
    durable: whether the step is committed: process 0 has seen it, the others have heard so from process 0.
    unchanged: bytes that this process need not write, as far as it is known.
  """

  def __init__(
    self,
    record: SaveRecord,
    operation: Operation,
    ring: Ring,
    timeout: float,
    finished: Callable[[SaveRecord], None],
    started: float | None = None,
  ):
    """Starts the clock.

    Args:
      record: what is known of the save so far.
      operation: its part inside Orbax.
      ring: what brings the arrays to host memory.
      timeout: seconds until it counts as hanging.
      finished: called once the step is committed and `save` has returned, whichever comes last.
      started: when training began to wait, on the clock of `time.perf_counter()`; default: now.
    """
    self.record = record
    self.operation = operation
    self.ring = ring
    self.deadline = time.monotonic() + timeout
    self.ended = threading.Event()
    self.error: BaseException | None = None
    self.durable = False
    self.unchanged: Callable[[], int] = lambda: 0
    self._finished = finished
    self._committing = self._given_up = False
    self._started = time.perf_counter() if started is None else started
    self._before = traffic()
    self._returned_at: float | None = None
    self._written_at: float | None = None  # by this process
    self._all_written_at: float | None = None
    self._others: list[ProcessCost] = []
    self._lock = threading.Lock()

  @property
  def left(self) -> float:
    """Seconds until it counts as hanging."""
    return max(0.0, self.deadline - time.monotonic())

  def nbytes_written(self) -> int:
    """What this process has written since it began, whatever for, or need not write."""
    return traffic().since(self._before).nbytes_written + self.unchanged()

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
      if self._all_written_at is not None:
        self.record.commit_s = time.perf_counter() - self._all_written_at
    if returned is not None:
      self._finish()

  def returned(self) -> None:
    """Notes that training goes on."""
    with self._lock:
      self._returned_at = time.perf_counter()
      self.record.blocking_s = self._returned_at - self._started
      early = self.durable
      if early:
        self.record.background_s = 0.0
    if early:
      self._finish()

  def written(self) -> str:
    """Notes that this process has written its part. Returns what that cost, for process 0."""
    self._written_at = time.perf_counter()
    return json.dumps(self._cost())

  def all_written(self, costs: Sequence[str] = ()) -> None:
    """Notes that all processes have written their parts. `costs`: what `written` returned on each; none without."""
    self._all_written_at = time.perf_counter()
    self._written_at = self._written_at or self._all_written_at
    self._others = [ProcessCost(*json.loads(cost)) for cost in costs[1:]] or self._others

  def _cost(self) -> ProcessCost:
    returned = self._returned_at or time.perf_counter()
    write_s = max(0.0, self._written_at - returned) if self._written_at else 0.0
    requests, retries, nbytes, _ = traffic().since(self._before)
    blocking_s = returned - self._started
    snapshot_s = self.record.snapshot_s
    return ProcessCost(
      jax.process_index(), blocking_s, snapshot_s, write_s, requests, retries, nbytes, self.unchanged()
    )

  def _finish(self) -> None:
    if jax.process_index() == 0:
      costs = [self._cost(), *self._others]
      self.record.unchanged_nbytes = sum(cost.nbytes_unchanged for cost in costs)
      self.record.processes = slowest(costs)
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

  `uncommitted`: whether its commit had not started, so that the step will never be committed.
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
