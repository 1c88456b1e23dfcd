"""Work that an interrupt of its caller does not tear: it goes on, and the next call learns its outcome."""

from __future__ import annotations

import contextvars
import math
import threading
import time
from collections.abc import Callable

from ckpt_jax.job.threads import with_x64_of_caller

_SLICE_S = 0.5


def wait_for(event: threading.Event, timeout: float = math.inf) -> bool:
  """`event.wait`, which a Ctrl-C always ends soon.

  A signal that arrives after Python's last check for signals and before the thread sleeps is noticed only when the
  thread wakes up. Therefore it sleeps in slices.
  """
  deadline = time.monotonic() + timeout
  while not event.wait(max(0.0, min(_SLICE_S, deadline - time.monotonic()))):
    if time.monotonic() >= deadline:
      return False
  return True


class Errand:
  """One piece of work, in a thread of its own, while its caller waits.

  Ctrl-C, or a signal handler that raises, interrupts only the waiting thread, between any two instructions. A save cut
  off between a file and the note of it could neither be waited for nor be distinguished from one that failed.

  Context variables are the caller's. Of jax's settings that apply to a thread (`jax.set_mesh`, `jax.transfer_guard`,
  `jax.default_device`) only x64 is.
  """

  def __init__(self, work: Callable[[], None]):
    self._work: Callable[[], None] | None = with_x64_of_caller(work)
    self._claimed = threading.Lock()
    self._done = threading.Event()
    self._lost = False
    self._error: BaseException | None = None
    self._thread = threading.Thread(target=contextvars.copy_context().run, args=(self._run,), name="ckpt_jax_errand")

  def start(self) -> None:
    """Begins. Call it once."""
    try:
      self._thread.start()
    except RuntimeError:  # no more threads
      self._run()

  def wait(self) -> bool:
    """Returns when the work has ended; False if it never began. May be called again, by any thread."""
    # An interrupt may have struck before the thread existed: then it never will.
    if self._thread.ident is None and self._claimed.acquire(blocking=False):
      self._lost, self._work = True, None
      self._done.set()
    wait_for(self._done)
    return not self._lost

  def outcome(self) -> None:
    """Raises the error of the work, once."""
    error, self._error = self._error, None
    if error is not None:
      try:
        raise error
      finally:
        del error  # its traceback would hold it, and the state that was to be saved

  def _run(self) -> None:
    if not self._claimed.acquire(blocking=False):
      return
    work, self._work = self._work, None
    try:
      assert work is not None
      work()
    except BaseException as e:
      self._error = e
    finally:
      del work
      self._done.set()
