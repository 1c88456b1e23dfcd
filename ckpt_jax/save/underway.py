"""A save between its begin and its commit, as the threads that write it report it."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable

from ckpt_jax.orbax.saves import Operation


@dataclasses.dataclass
class SaveRecord:
  """What one save cost.

  Attributes:
    step: the step saved.
    nbytes: bytes of the whole state.
    blocking_s: seconds that `save` kept the training loop, without those that it waited for the state to be computed:
      jax dispatches steps ahead of the device, and whoever reads the state first waits for it.
    waited_s: the part of `blocking_s` spent on waiting for the previous save's background write.
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
    operation: Orbax's side of it.
    deadline: when it counts as hanging, by `time.monotonic()`.
    ended: set once nothing writes the step any more.
    error: what it died of, if `ended`.
    durable: whether the step is committed: on process 0 it was seen to be, on others process 0 has said so.
  """

  def __init__(self, record: SaveRecord, operation: Operation, timeout: float, told: Callable[[SaveRecord], None]):
    """Begins.

    Args:
      record: as far as it is known.
      operation: see above.
      timeout: seconds until it counts as hanging.
      told: called once the step is committed and `save` has returned, whichever comes last.
    """
    self.record = record
    self.operation = operation
    self.deadline = time.monotonic() + timeout
    self.ended = threading.Event()
    self.error: BaseException | None = None
    self.durable = False
    self._told = told
    self._committing = self._given_up = False
    self._returned_at: float | None = None
    self._lock = threading.Lock()

  @property
  def left(self) -> float:
    """Seconds until it counts as hanging."""
    return max(0.0, self.deadline - time.monotonic())

  def begin_commit(self) -> bool:
    """Asked before the commit itself; False if the write was given up."""
    with self._lock:
      self._committing = not self._given_up
      return self._committing

  def give_up(self) -> bool:
    """Makes sure that the step will not be committed any more; False if it is too late for that."""
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
      self._told(self.record)

  def returned(self, started: float) -> None:
    """Notes that training goes on; `started` is when it began to wait, by `time.perf_counter()`."""
    with self._lock:
      self._returned_at = time.perf_counter()
      self.record.blocking_s = self._returned_at - started
      early = self.durable
      if early:
        self.record.background_s = 0.0
    if early:
      self._told(self.record)
