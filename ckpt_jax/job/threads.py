"""Threads of our own: with the settings of their caller, stopped early once their result is not needed."""

from __future__ import annotations

import concurrent.futures
import contextlib
import contextvars
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax

from ckpt_jax.errors import CheckpointError
from ckpt_jax.orbax import private

T = TypeVar("T")
_LEAVE_S = 10.0  # how long the end of the interpreter waits for reads that were given up
_stop: contextvars.ContextVar[threading.Event | None] = contextvars.ContextVar("ckpt_jax_stop", default=None)


def check() -> None:
  """Raises CheckpointError if the work of this thread was given up."""
  stop = _stop.get()
  if stop is not None and stop.is_set():
    raise CheckpointError("given up", topic="save-failed")


@contextlib.contextmanager
def transfers_asked_for() -> Iterator[None]:
  """Within it, this thread copies between host and devices whatever `jax.transfer_guard` says.

  The guard finds unintended copies, and a save or a restore intends them. As a context manager it applies to one
  thread, as `jax.config` to all: each thread of ours enters this.
  """
  with jax.transfer_guard("allow"):
    yield


def with_x64_of_caller(work: Callable[[], T]) -> Callable[[], T]:
  """`work` for another thread, which `with jax.enable_x64(True)` of the caller does not reach."""
  x64 = jax.config.read("jax_enable_x64")

  def same() -> T:
    # Only if needed: jax compiles anew for a setting that is explicit.
    with jax.enable_x64(x64) if jax.config.read("jax_enable_x64") != x64 else contextlib.nullcontext():
      return work()

  return same


_workers: weakref.WeakSet[Worker] = weakref.WeakSet()


class Worker:
  """A thread that does one job after the other. It delays the end of the interpreter by a few seconds only."""

  def __init__(self, name: str):
    self._stop = threading.Event()
    self._jobs: queue.SimpleQueue[tuple[concurrent.futures.Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
    self._thread = threading.Thread(target=self._run, name=name, daemon=True)
    self._thread.start()
    _workers.add(self)

  def submit(self, job: Callable[[], T]) -> concurrent.futures.Future[T]:
    """Queues a job."""
    future: concurrent.futures.Future[T] = concurrent.futures.Future()
    self._jobs.put((future, with_x64_of_caller(job)))
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
    _stop.set(self._stop)  # of this thread
    while (entry := self._jobs.get()) is not None:
      future, job = entry
      try:
        check()
        future.set_result(job())
      except BaseException as e:  # raised where the result is awaited
        future.set_exception(e)
      del entry, future, job


def _wait_for_workers() -> None:
  """At the end of the interpreter: a thread that wakes up later within TensorStore or XLA would abort the process.

  A read that hangs for good does not wake up.
  """
  deadline = time.monotonic() + _LEAVE_S
  for worker in list(_workers):
    worker.close()
  for worker in list(_workers):
    worker.join(max(0.0, deadline - time.monotonic()))


private.before_executors_shut_down(_wait_for_workers)
