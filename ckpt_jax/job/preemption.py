"""SIGTERM, which a scheduler sends before it takes the machine away. Answered only while a Checkpointer here saves.

The process has one handler for all Checkpointers: installed at the first `save` of the first one, and removed when the
last one that has saved is closed or dropped. Then the user's own handler or the default action is back, which also
stays untouched in a process that only restores and in forked children.

A SIGTERM is never swallowed. The next `save` of a listening Checkpointer answers it. If none follows, it is answered
when the last Checkpointer goes. A second SIGTERM, some seconds after the first, ends at once a process in which no save
has answered the first one.
"""

from __future__ import annotations

import _thread
import contextlib
import ctypes
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import jax

_log = logging.getLogger(__name__)
# Wrappers (bash, tini, srun) and process groups often deliver one notice twice; a person who insists is slower.
_INSISTS_S = 3.0


class PreemptionNotice:
  """One Checkpointer's part in the answer to SIGTERM, from `listen` to `close`.

  Under `jax.distributed.initialize()` jax itself catches SIGTERM and agrees with all processes on a step at which to
  save. Nothing is installed then, since a Python handler would silently disable that; jax displaces the handler that
  the user had installed before, so `run_users_handler` calls it after the save. Without `jax.distributed` a handler is
  installed that notes the signal and calls the user's.
  """

  def __init__(self):
    self._displaced: Any = None

  def listen(self) -> None:
    """From now on this process answers SIGTERM with a save. May be called again."""
    if self in _process.listeners:
      return
    if jax.distributed.is_initialized():
      users = signal.getsignal(signal.SIGTERM)
      if callable(users) and _python_handles_sigterm():
        _log.warning(
          "a SIGTERM handler was installed after jax.distributed.initialize(); that disables jax's preemption notice "
          "and no save will follow a SIGTERM. Install the handler before initialize(): it is called after the save."
        )
      self._displaced = users if callable(users) else None
    _process.listeners.add(self)
    _sync_in_main_thread()

  @property
  def received(self) -> bool:
    """Whether this process got a notice to end that this Checkpointer has to answer."""
    return _process.noticed and self in _process.listeners

  def note(self) -> None:
    """Records that jax has received the notice."""
    _process.notice()

  def saved(self, step: int) -> None:
    """Records that this Checkpointer has saved a step."""
    _process.steps[self] = step
    if _process.noticed:
      _process.saved.add(self)

  @property
  def is_complete(self) -> bool:
    """Whether all Checkpointers of this process have saved the step that this one saved last.

    With several, each may save once more, so that all resume at the same step.
    """
    mine = _process.steps.get(self)
    return mine is not None and all(_process.steps.get(other) == mine for other in _process.listeners)

  @property
  def is_alone(self) -> bool:
    """Whether this one has saved since the notice, and no other one after it."""
    return self in _process.saved and _process.steps[self] == max(_process.steps[other] for other in _process.saved)

  def answered(self) -> None:
    """Records that the process is about to exit because of the notice."""
    _process.answered = True

  def run_users_handler(self) -> None:
    """Calls the handler that jax displaced, once."""
    users, self._displaced = self._displaced, None
    if users is not None:
      users(signal.SIGTERM, None)

  def close(self) -> bool:
    """Ends this part. True if SIGTERM came and no Checkpointer has answered it, or will."""
    if self not in _process.listeners:
      return False
    _process.listeners.discard(self)
    _process.saved.discard(self)
    _process.steps.pop(self, None)
    last = not _process.listeners
    unanswered = last and _process.noticed and not _process.answered and _ends_by_default()
    if last and not unanswered:
      _process.noticed = _process.answered = False
    _sync_in_main_thread()
    return unanswered


def in_a_thread(function: Callable[[], None], name: str) -> None:
  """Runs `function` in a daemon thread. May be called from a signal handler or a finalizer: it takes no lock."""
  # Thread.start() takes one that the interrupted thread may hold, so another thread starts it.
  start = threading.Thread(target=function, name=name, daemon=True).start
  with contextlib.suppress(RuntimeError):  # the interpreter is ending
    _thread.start_new_thread(start, ())


def end_by_sigterm() -> None:
  """Sends this process the SIGTERM that was held back; by default it ends here."""
  _process.noticed = False
  os.kill(os.getpid(), signal.SIGTERM)


class _Process:
  """The state of this process. Plain sets and flags without a lock: signal handlers and finalizers run at any time."""

  def __init__(self):
    self.listeners: set[PreemptionNotice] = set()
    self.steps: dict[PreemptionNotice, int] = {}  # the last step that each has saved
    self.saved: set[PreemptionNotice] = set()  # those that have saved since the notice
    self.noticed = False
    self.noticed_at = 0.0
    self.answered = False  # a save was made for it; the process is about to exit
    self.handler: _Handler | None = None

  def notice(self) -> bool:
    """Records a notice. False if it is a second one, seconds after an unanswered first."""
    now = time.monotonic()
    if not self.noticed:
      self.noticed, self.noticed_at = True, now
      # In another thread: the interrupted one may hold a lock of logging's handlers.
      text = (
        "received SIGTERM: the next save is made whatever the schedule says, and the process exits then; a second "
        "SIGTERM ends it at once"
      )
      in_a_thread(lambda: _log.warning("%s", text), "ckpt_jax_notice")
      return True
    return self.answered or bool(self.saved) or now - self.noticed_at < _INSISTS_S


class _Handler:
  """Our SIGTERM handler, in front of the one that was installed before."""

  def __init__(self):
    self.before: Any = signal.getsignal(signal.SIGTERM)
    # None is a handler of a C library, e.g. of faulthandler, which Python can neither call nor name.
    self._action = _sigaction(signal.SIGTERM) if self.before is None else None
    self._pid = os.getpid()

  def __call__(self, signum: int, frame: FrameType | None) -> None:
    # Called without listeners if the user's newer handler calls this one, or for a moment.
    held_back = os.getpid() == self._pid and bool(_process.listeners) and _process.notice()
    if callable(self.before):
      self.before(signum, frame)
    elif not held_back and self.before is not signal.SIG_IGN:
      self._put_back()
      signal.raise_signal(signal.SIGTERM)

  def remove(self) -> None:
    """Puts back the handler before, unless another one was installed meanwhile."""
    now: Any = signal.getsignal(signal.SIGTERM)
    if now is self:
      self._put_back()

  def _put_back(self) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL if self.before is None else self.before)
    if self._action is not None:
      _libc().sigaction(int(signal.SIGTERM), ctypes.byref(self._action), None)


_process = _Process()


def _ends_by_default() -> bool:
  """Whether SIGTERM would have ended this process without a Checkpointer. The user's own handler has been called."""
  handler = _process.handler
  return handler is not None and not callable(handler.before) and handler.before is not signal.SIG_IGN


def _sync() -> None:
  """Installs or removes the handler, depending on the listeners; only in the main thread, as Python demands."""
  # A loop: a finalizer that runs in the middle of this may take the last listener away.
  while (wanted := bool(_process.listeners) and not jax.distributed.is_initialized()) != (_process.handler is not None):
    if wanted:
      _process.handler = _Handler()
      signal.signal(signal.SIGTERM, _process.handler)
    else:
      handler, _process.handler = _process.handler, None
      assert handler is not None
      handler.remove()


@ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)
def _pending_sync(_: Any) -> int:
  _sync()
  return 0


def _sync_in_main_thread() -> None:
  if threading.current_thread() is threading.main_thread():
    _sync()
  else:  # e.g. asyncio.to_thread(c.save, ...), or a Checkpointer that another thread drops
    ctypes.pythonapi.Py_AddPendingCall(_pending_sync, None)


_masks: dict[int, set[Any]] = {}  # signals that were blocked before a fork, by thread


def _before_fork() -> None:
  # A child gets SIGTERM only once our handler, which would lose it, is gone; else Pool.terminate() would hang.
  if _process.handler is not None or jax.distributed.is_initialized():
    _masks[threading.get_ident()] = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


def _after_fork() -> None:
  mask = _masks.pop(threading.get_ident(), None)
  if mask is not None:
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _forked() -> None:
  """In a forked child, which never saves, SIGTERM does what it did before we came."""
  global _process
  handler, _process = _process.handler, _Process()
  if handler is not None:
    handler.remove()
  elif jax.distributed.is_initialized():
    # jax catches it below Python, in forked children too, where its own thread is missing.
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM) or signal.SIG_DFL)
  _after_fork()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_forked)


def _libc() -> Any:
  return ctypes.CDLL(None, use_errno=True)


def _sigaction(number: int) -> Any:
  """The kernel's struct sigaction of a signal; None where it cannot be read."""
  action = (ctypes.c_void_p * 64)()
  try:
    return action if _libc().sigaction(int(number), None, ctypes.byref(action)) == 0 else None
  except (OSError, AttributeError):
    return None


def _python_handles_sigterm() -> bool:
  """Whether the kernel would call CPython's handler for SIGTERM rather than jax's.

  `signal.getsignal` knows only Python's own table. All Python handlers share one C function, so SIGTERM's is compared
  with that of SIGINT, which Python handles by default.
  """
  term, interrupt = _sigaction(signal.SIGTERM), _sigaction(signal.SIGINT)
  if term is None or interrupt is None:
    return False
  return term[0] == interrupt[0] and term[0] not in (None, 1)  # struct sigaction starts with the handler on Linux
