"""The processes of a job in one restore: they wait for each other with a limit, and fail with the same error."""

from __future__ import annotations

import concurrent.futures
import json
import logging
import time
from collections.abc import Callable
from typing import Any, TypeVar

import jax

from ckpt_jax.errors import CheckpointError, RestoreTimeoutError
from ckpt_jax.job.agreement import meet
from ckpt_jax.job.rendezvous import Combine, PeerFailedError, Rendezvous

_log = logging.getLogger(__name__)
T = TypeVar("T")
# A wait may last this many times the predicted duration of the whole restore, and at least this many seconds: the
# prediction knows nothing of a busy store, or of a host that swaps.
_PATIENCE = 10.0
_LEAST_S = 60.0
_LOG_EVERY_S = 30.0


class Together:
  """The waits of one restore, which may take `limit` seconds. Made and used alike by all processes.

  Attributes:
    expected_s: predicted seconds of the restore; raises the limit of each wait.
  """

  def __init__(self, rendezvous: Rendezvous, limit: float):
    self._rendezvous = rendezvous
    self._limit = limit
    self._started = time.monotonic()
    self._done = 0
    self._told: BaseException | None = None
    self.expected_s = 0.0
    rendezvous.begin()

  def patience(self) -> float:
    """Seconds that a wait beginning now may last."""
    elapsed = time.monotonic() - self._started
    wanted = max(_LEAST_S, _PATIENCE * self.expected_s, _PATIENCE * elapsed)
    return max(0.1, min(wanted, self._limit - elapsed))

  def meet(self, what: str, error: BaseException | None = None, text: str = "", combine: Combine = list) -> list[str]:
    """Waits for all processes to do `what`, and returns the texts of all of them, by process.

    If this process had an `error`, all raise. `combine`: see `Rendezvous.exchange`.

    Raises:
      RestoreTimeoutError: naming the processes that did not arrive.
      CheckpointError: of the kind of the first `error`, with the same message on all processes.
    """
    try:
      return self._meet(what, error, text, combine)
    except CheckpointError as e:
      self._told = e
      raise

  def decided(self, what: str, decide: Callable[[], Any]) -> Any:
    """What `decide` returns on process 0, which alone calls it, on every process; it must fit into JSON.

    Raises:
      RestoreTimeoutError, CheckpointError: as `meet`; what `decide` raises is raised on every process.
    """
    error: BaseException | None = None
    text = "null"
    if jax.process_index() == 0:
      try:
        text = json.dumps(decide())
      except Exception as e:
        error = e
    return json.loads(self.meet(what, error, text)[0])

  def told(self, error: BaseException) -> bool:
    """Whether all processes know of `error` already."""
    return error is self._told

  def _meet(self, what: str, error: BaseException | None, text: str, combine: Combine) -> list[str]:
    try:
      return meet(self._rendezvous, what, text, timeout=self.patience(), error=error, combine=combine)
    except TimeoutError as e:
      if e is error:
        raise
      raise RestoreTimeoutError(f"restore: {e} (timeouts.restore is {self._limit:.0f} s)") from None
    except PeerFailedError as e:
      raise CheckpointError(f"restore: {e}", topic="another-process-failed") from None

  def wait(self, what: str, future: concurrent.futures.Future[T]) -> T:
    """The result of work that this process, or the devices of all, are doing.

    Raises:
      RestoreTimeoutError: naming the work, and the processes that are behind.
    """
    patience = self.patience()
    deadline = time.monotonic() + patience
    while True:
      try:
        return future.result(timeout=min(_LOG_EVERY_S, max(0.0, deadline - time.monotonic())))
      except concurrent.futures.TimeoutError:
        if future.done():
          raise
      if time.monotonic() >= deadline:
        message = (
          f"restore: waited {patience:.0f} s for {what} (timeouts.restore is {self._limit:.0f} s){self._behind()}"
        )
        self._rendezvous.fail(message)
        self._told = RestoreTimeoutError(message)
        raise self._told
      _log.warning("restore: still waiting for %s%s", what, self._behind())

  def step_done(self) -> None:
    """Counts a step that all processes take, so that a wait can name those that are behind."""
    self._done += 1
    self._rendezvous.note(str(self._done))

  def _behind(self) -> str:
    done = {p: int(text) for p, text in self._rendezvous.notes().items()}
    behind = [p for p in range(jax.process_count()) if done.get(p, 0) < self._done]
    return f"; processes that are behind: {', '.join(map(str, behind[:20]))}" if behind else ""
