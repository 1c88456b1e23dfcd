"""The saves of one process, kept apart inside Orbax: their numbers, threads, coroutines and log lines.

Its private names of Orbax are guarded by tests/orbax/test_private.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import threading
import time
from collections.abc import Callable, Coroutine, Generator, Iterator
from typing import Any

import orbax.checkpoint as ocp
from orbax.checkpoint._src.futures import future, signaling_client, synchronization
from orbax.checkpoint._src.multihost import multihost

_lock = threading.Lock()
_begun: contextvars.ContextVar[Operation | None] = contextvars.ContextVar("ckpt_jax_operation", default=None)
_meet: contextvars.ContextVar[Callable[[str], None] | None] = contextvars.ContextVar("ckpt_jax_meet", default=None)
_quiet: contextvars.ContextVar[bool] = contextvars.ContextVar("ckpt_jax_quiet", default=False)
_PREFIX = "ckpt_jax "
_CALLER_FIRST_S = 0.02


class Operation:
  """One save, from Orbax's point of view.

  Why private: Orbax numbers the saves of a process with one counter (`OperationIdGenerator`), which each save increases
  when it begins and reads several times until it returns. Of two saves that begin in two threads one reads the number
  of the other: its parts wait for the other one's directory, and write into a place that is not there yet, or wait for
  ever. Ours go by names of their own, so that neither another Checkpointer nor a plain Orbax manager can meet them.

  Attributes:
    name: its id inside Orbax.
  """

  def __init__(self, name: str, check: Callable[[], None] = lambda: None):
    """Begins nothing.

    Args:
      name: the same on all processes, and of no other save.
      check: called before a part of the save begins; raises if another process has failed.
    """
    self.name = f"{_PREFIX}{name}"
    self._check = check
    self._failed = False
    self._threads: list[threading.Thread] = []
    self._parts: list[_Part] = []
    self._returned = threading.Event()
    with _lock:
      _keep_apart()

  @contextlib.contextmanager
  def begun(self) -> Iterator[None]:
    """What this thread saves through Orbax within the block belongs to this operation.

    Its background threads leave the interpreter to this one meanwhile, for a moment at most: each turn that they took
    would cost training up to 5 ms (`sys.getswitchinterval`), where such a block takes 10 ms.
    """
    token = _begun.set(self)
    try:
      yield
    finally:
      _begun.reset(token)
      self._returned.set()

  @property
  def threads(self) -> list[threading.Thread]:
    """Those that write parts of the step, and still run."""
    return [thread for thread in self._threads if thread.is_alive()]

  def fail(self) -> None:
    """Called on process 0 if the save has failed, in a job of many: wakes the parts that wait for its directory.

    They look whether it has failed, on all processes, and end instead of waiting until the save times out.
    """
    self._failed = True
    for thread in self._threads:
      signals = {*thread._receive_signals, *thread._send_signals}  # type: ignore[attr-defined]  # pylint: disable=protected-access
      future.set_signals(sorted(signals, key=str), operation_id=self.name)

  def may_begin(self) -> None:
    """Called by each part before it begins; raises if the save has failed, here or on another process."""
    self._returned.wait(_CALLER_FIRST_S)
    if self._failed:
      raise asyncio.CancelledError("another part of the save has failed")
    self._check()

  def end(self, timeout: float) -> bool:
    """Ends the threads of a save that has failed; False if one still runs after `timeout` seconds.

    In a job of one process only: the signals that wake a thread here would wake it on other processes too.

    Why private: each part of a save runs in a thread that waits for the step's directory, and is not notified if the
    directory cannot be made (a read-only disk): the threads, and with them the end of the program, would wait for
    300 s. A part that was never begun leaves a coroutine that was never awaited, of which Python warns.
    """
    deadline = time.monotonic() + timeout
    for thread in self._threads:
      with contextlib.suppress(RuntimeError):  # its event loop has just ended
        thread.cancel()  # type: ignore[attr-defined]
    for thread in self._threads:
      future.set_signals(thread._receive_signals, operation_id=self.name)  # type: ignore[attr-defined]  # pylint: disable=protected-access
    for thread in self._threads:
      threading.Thread.join(thread, max(0.0, deadline - time.monotonic()))  # Orbax's own would raise
    if self.threads:
      return False
    for part in self._parts:
      part.close()
    future.AwaitableSignalsContract.remove_all_awaitable_signals(self.name)
    return True


class _Part:
  """A coroutine that can be closed although it was never begun."""

  def __init__(self, coroutine: Coroutine[Any, Any, Any], may_begin: Callable[[], None]):
    self._coroutine = coroutine
    self._may_begin = may_begin

  def __await__(self) -> Generator[Any, Any, Any]:
    try:
      self._may_begin()
    except BaseException:
      self.close()
      raise
    return self._coroutine.__await__()

  def close(self) -> None:
    with contextlib.suppress(RuntimeError):  # it runs
      self._coroutine.close()


_apart = False


def _keep_apart() -> None:
  global _apart
  if _apart:
    return
  signaling_client.get_signaling_client()  # Orbax makes two, if two threads are the first to ask
  generator: Any = synchronization.OperationIdGenerator
  next_id, current_id = generator.next_operation_id, generator.get_current_operation_id
  plain = future.CommitFuture

  def next_operation_id() -> Any:
    operation = _begun.get()
    return next_id() if operation is None else operation.name  # others' counter stays as it is

  def get_current_operation_id() -> str:
    operation = _begun.get()
    return current_id() if operation is None else operation.name

  class CommitFuture(plain):  # type: ignore[valid-type,misc]
    """Orbax's, known to the operation that it is a part of."""

    def __init__(self, coro: Any, **options: Any):
      operation = _begun.get()
      if operation is not None and asyncio.iscoroutine(coro):
        coro = _Part(coro, operation.may_begin)
        operation._parts.append(coro)
      super().__init__(coro, **options)
      if operation is not None:
        operation._threads.append(self._t)

  generator.next_operation_id = staticmethod(next_operation_id)
  generator.get_current_operation_id = staticmethod(get_current_operation_id)
  future.CommitFuture = CommitFuture  # type: ignore[misc]
  _apart = True


_meets = False


@contextlib.contextmanager
def met_by(meet: Callable[[str], None]) -> Iterator[None]:
  """Within it, where Orbax would wait for all processes it calls `meet`, with what it waits for, in words.

  Why private: Orbax waits in the thread of `save`, seven times a save, by a collective of the devices: without a time
  limit, for a process that is gone or has failed on its way, and in the queue of the devices, which nothing leaves any
  more. `barrier_sync_fn` is for its waits in the background alone.
  """
  global _meets
  with _lock:
    if not _meets:
      plain = multihost.sync_global_processes

      def sync_global_processes(name: str, **options: Any) -> None:
        ours = None if options.get("barrier_sync_fn") else _meet.get()
        if ours is None:
          plain(name, **options)
        else:
          ours(f"all processes to reach {name}")

      multihost.sync_global_processes = sync_global_processes
      _meets = True
  token = _meet.set(meet)
  try:
    yield
  finally:
    _meet.reset(token)


@contextlib.contextmanager
def quietly() -> Iterator[None]:
  """Within it, and in the threads of our saves, Orbax's log lines below WARNING, and its tracebacks, are not shown.

  A save of Orbax logs some 40 lines at INFO, and a failing one several tracebacks of an error that is raised anyway.
  They are shown as ever if the user has set the level of the `absl` logger, if the level of `ckpt_jax` is DEBUG, and
  for plain Orbax managers used beside ours.
  """
  token = _quiet.set(True)
  try:
    yield
  finally:
    _quiet.reset(token)


def quiet_threads(manager: ocp.CheckpointManager) -> None:
  """Has the threads that `manager` will start be quiet too.

  Why private: Orbax starts its threads without the context of the starting thread.
  """
  saving = manager._checkpointer._async_manager  # type: ignore[attr-defined]  # pylint: disable=protected-access
  run = saving._thread_func

  def run_quietly(*arguments: Any) -> None:
    with quietly():
      run(*arguments)

  saving._thread_func = run_quietly
  store = manager._non_blocking_metadata_store._single_thread_executor  # type: ignore[attr-defined]  # pylint: disable=protected-access
  store._initializer = lambda: _quiet.set(True)


def _shown(record: logging.LogRecord) -> bool:
  if record.levelno >= logging.WARNING and not record.exc_info:
    return True
  # The threads that write parts of a step know which save that is.
  own = str(getattr(threading.current_thread(), "_operation_id", "")).startswith(_PREFIX)
  if not (own or _quiet.get()):
    return True
  return logging.getLogger("absl").level != logging.NOTSET or logging.getLogger("ckpt_jax").isEnabledFor(logging.DEBUG)


logging.getLogger("absl").addFilter(_shown)
