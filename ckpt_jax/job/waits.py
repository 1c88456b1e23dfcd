"""All processes of a job through one restore: they wait for each other with a limit, and fail with the same error."""

from __future__ import annotations

import concurrent.futures
import json
import logging
import queue
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import jax

from ckpt_jax import errors
from ckpt_jax.errors import CheckpointError, RestoreTimeoutError
from ckpt_jax.job import threads
from ckpt_jax.job.rendezvous import PeerFailedError, Rendezvous
from ckpt_jax.job.threads import transfers_asked_for
from ckpt_jax.orbax import private

_log = logging.getLogger(__name__)
T = TypeVar("T")
# A wait may last so many times what the whole restore was expected to take, and at least so many seconds: a prediction
# knows nothing of a busy store, or of a host that swaps.
_PATIENCE = 10.0
_LEAST_S = 60.0
_LEAVE_S = 10.0  # how long the end of the interpreter waits for a read that was given up
_TELL_S = 30.0  # how often a wait for devices says that it goes on


class Together:
  """The waits of one restore. Made and used alike by all processes.

  Args:
    rendezvous: of the Checkpointer.
    limit: seconds that the restore may take, `timeouts.restore`.

  Attributes:
    expected_s: what the restore is expected to take; raises the limit of each wait.
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

  def meet(self, what: str, error: BaseException | None = None, text: str = "") -> list[str]:
    """Waits for all processes, and gives each what all have to say.

    Args:
      what: what is waited for.
      error: what went wrong on this process; all raise it then.
      text: what this process has to say.

    Raises:
      RestoreTimeoutError: naming the processes that did not arrive.
      CheckpointError: of the kind of the first `error` that a process brought, with the same message everywhere.
    """
    try:
      return self._meet(what, error, text)
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

  def _meet(self, what: str, error: BaseException | None, text: str) -> list[str]:
    if error is not None and (jax.process_count() == 1 or not isinstance(error, CheckpointError)):
      if jax.process_count() > 1:
        self._rendezvous.fail(f"{type(error).__name__}: {error}")
      raise error
    said = json.dumps({"text": text} if error is None else {"error": type(error).__name__, "message": str(error)})
    try:
      answers = [json.loads(answer) for answer in self._rendezvous.exchange(what, said, self.patience())]
    except TimeoutError as e:
      raise RestoreTimeoutError(f"restore: {e} (timeouts.restore is {self._limit:.0f} s)") from None
    except PeerFailedError as e:
      raise CheckpointError(f"restore: {e}") from None
    failed = {p: answer for p, answer in enumerate(answers) if "error" in answer}
    if failed:
      raise _common(failed, len(answers)) from error
    return [answer["text"] for answer in answers]

  def wait(self, what: str, future: concurrent.futures.Future[T]) -> T:
    """The result of something that this process, or the devices of all, are doing.

    Raises:
      RestoreTimeoutError: saying what did not end, and which processes are behind.
    """
    patience = self.patience()
    deadline = time.monotonic() + patience
    while True:
      try:
        return future.result(timeout=min(_TELL_S, max(0.0, deadline - time.monotonic())))
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
    """Counts a step that all processes take, so that a wait can say who is behind."""
    self._done += 1
    self._rendezvous.note(str(self._done))

  def _behind(self) -> str:
    done = {p: int(text) for p, text in self._rendezvous.notes().items()}
    behind = [p for p in range(jax.process_count()) if done.get(p, 0) < self._done]
    return f"; processes that are behind: {', '.join(map(str, behind[:20]))}" if behind else ""


def _common(failed: dict[int, dict[str, str]], count: int) -> CheckpointError:
  first = min(failed)
  kind = getattr(errors, failed[first]["error"], CheckpointError)
  if not (isinstance(kind, type) and issubclass(kind, CheckpointError)):
    kind = CheckpointError
  message = failed[first]["message"]
  same = [p for p, answer in failed.items() if answer["message"] == message]
  if len(same) < count:
    who = ", ".join(map(str, same[:10])) + (" and others" if len(failed) > min(len(same), 10) else "")
    message = f"process {who}: {message}" if len(same) == 1 else f"processes {who}: {message}"
  return kind(message)


_workers: weakref.WeakSet[Worker] = weakref.WeakSet()


class Worker:
  """A thread that does one thing after the other. It keeps the interpreter from ending for some seconds only.

  jax holds 64 bits in it if it does so where a job is handed in: `with jax.enable_x64(True):` is of a thread, and in
  another one jax would cut what is read to 32.
  """

  def __init__(self, name: str):
    self._stop = threading.Event()
    self._jobs: queue.SimpleQueue[tuple[concurrent.futures.Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
    self._thread = threading.Thread(target=self._run, name=name, daemon=True)
    self._thread.start()
    _workers.add(self)

  def submit(self, job: Callable[[], T]) -> concurrent.futures.Future[T]:
    """Queues a job."""
    future: concurrent.futures.Future[T] = concurrent.futures.Future()
    x64 = bool(jax.config.jax_enable_x64)  # type: ignore[attr-defined]

    def alike() -> T:
      with jax.enable_x64(x64):
        return job()

    self._jobs.put((future, alike))
    return future

  def close(self) -> None:
    """Ends the thread, and its reads as soon as it can; does not wait, since storage may hang."""
    self._stop.set()
    self._jobs.put(None)

  def join(self, timeout: float) -> None:
    """Waits for the end of the thread."""
    self._thread.join(timeout)

  @transfers_asked_for()
  def _run(self) -> None:
    with threads.stopped_by(self._stop):
      self._work()

  def _work(self) -> None:
    while (entry := self._jobs.get()) is not None:
      future, job = entry
      try:
        threads.check()
        future.set_result(job())
      except BaseException as e:  # told to whoever waits for it
        future.set_exception(e)


def _wait_for_workers() -> None:
  """At the end of the interpreter: a thread that wakes up within TensorStore or XLA later would abort the process.

  One that hangs for good does not wake up.
  """
  deadline = time.monotonic() + _LEAVE_S
  for worker in list(_workers):
    worker.close()
  for worker in list(_workers):
    worker.join(max(0.0, deadline - time.monotonic()))


private.before_executors_shut_down(_wait_for_workers)
