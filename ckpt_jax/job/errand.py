"""Work that an interrupt of its caller does not tear: it goes on, and whoever comes next learns what came of it."""

from __future__ import annotations

import contextlib
import contextvars
import math
import threading
import time
from collections.abc import Callable

import jax

_SLICE_S = 0.5


def wait_for(event: threading.Event, timeout: float = math.inf) -> bool:
  """`event.wait`, which a Ctrl-C always ends soon.

  One that comes after Python's last look at signals, and before the thread sleeps, is seen when it wakes up: so it
  sleeps in slices.
  """
  deadline = time.monotonic() + timeout
  while not event.wait(max(0.0, min(_SLICE_S, deadline - time.monotonic()))):
    if time.monotonic() >= deadline:
      return False
  return True


class Errand:
  """One piece of work, in a thread of its own, while its caller waits.

  Ctrl-C, or a signal handler that raises, reaches the thread that waits, between any two instructions, and nobody else.
  A save that is cut off between a file and the note of it could neither be waited for nor be told from one that failed.

  Context variables are the caller's. Of jax's settings that hold for a thread (`jax.set_mesh`, `jax.transfer_guard`,
  `jax.default_device`) only x64 is.
  """

  def __init__(self, work: Callable[[], None]):
    self._work: Callable[[], None] | None = work
    self._claimed = threading.Lock()
    self._done = threading.Event()
    self._lost = False
    self._error: BaseException | None = None
    self._x64 = jax.config.read("jax_enable_x64")
    self._thread = threading.Thread(target=contextvars.copy_context().run, args=(self._run,), name="ckpt_jax_errand")

  def start(self) -> None:
    """Begins. Call it once."""
    try:
      self._thread.start()
    except RuntimeError:  # no more threads
      self._run()

  def wait(self) -> bool:
    """Returns when the work has ended; False if it was never begun. May be called again, by any thread."""
    # An interrupt may have struck before the thread was there: then it will never be.
    if self._thread.ident is None and self._claimed.acquire(blocking=False):
      self._lost, self._work = True, None
      self._done.set()
    wait_for(self._done)
    return not self._lost

  def outcome(self) -> None:
    """Raises what the work raised, once."""
    error, self._error = self._error, None
    if error is not None:
      try:
        raise error
      finally:
        del error  # it would hold itself, and the state that was to be saved

  def _run(self) -> None:
    if not self._claimed.acquire(blocking=False):
      return
    try:
      assert self._work is not None
      differs = jax.config.read("jax_enable_x64") != self._x64
      with jax.enable_x64(self._x64) if differs else contextlib.nullcontext():
        self._work()
    except BaseException as e:
      self._error = e
    finally:
      self._work = None
      self._done.set()
