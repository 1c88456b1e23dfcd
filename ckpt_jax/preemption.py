"""SIGTERM: what a scheduler sends before it takes the machine away."""

from __future__ import annotations

import ctypes
import logging
import signal
import threading
from types import FrameType
from typing import Any

import jax

_log = logging.getLogger(__name__)


class PreemptionNotice:
  """Knows whether this process has been told to end, and keeps the user's own SIGTERM handler alive.

  Under `jax.distributed.initialize()` jax itself catches SIGTERM and agrees with all processes on a step at which to
  save; nothing is installed here, since a Python handler would silently disable that. A handler that the user had
  installed before is lost to jax, so `run_users_handler` calls it after the save. Without `jax.distributed` nobody
  listens: then this installs a handler that notes the signal and goes on to the user's.
  """

  def __init__(self):
    self.received = False
    self._frame: FrameType | None = None
    self._users = signal.getsignal(signal.SIGTERM)
    self._installed = False
    self._pending_users_call = False
    if jax.distributed.is_initialized():
      if callable(self._users) and _python_handles_sigterm():
        _log.warning(
          "a SIGTERM handler was installed after jax.distributed.initialize(); that disables jax's preemption notice "
          "and no save will follow a SIGTERM. Install the handler before initialize(): it is called after the save."
        )
      self._pending_users_call = callable(self._users)
    elif threading.current_thread() is threading.main_thread():
      signal.signal(signal.SIGTERM, self._on_signal)
      self._installed = True
    else:
      _log.warning("created outside of the main thread: SIGTERM will not save; create the Checkpointer in the main one")

  def _on_signal(self, signum: int, frame: FrameType | None) -> None:
    self.received = True
    if callable(self._users):
      self._users(signum, frame)

  def run_users_handler(self) -> None:
    """Calls the handler that jax displaced, once."""
    if self._pending_users_call and callable(self._users):
      self._pending_users_call = False
      self._users(signal.SIGTERM, None)

  def close(self) -> None:
    """Puts the user's handler back, unless somebody has installed another one meanwhile."""
    if self._installed and signal.getsignal(signal.SIGTERM) == self._on_signal:
      signal.signal(signal.SIGTERM, self._users if self._users is not None else signal.SIG_DFL)
    self._installed = False


def _python_handles_sigterm() -> bool:
  """Whether the kernel would call CPython's handler for SIGTERM rather than jax's.

  Python cannot tell: `signal.getsignal` knows its own table only. All Python handlers share one C function, so the
  one of SIGINT, which Python handles by default, is compared with SIGTERM's.
  """
  try:
    libc = ctypes.CDLL(None, use_errno=True)
    handlers: list[Any] = []
    for number in (signal.SIGTERM, signal.SIGINT):
      action = (ctypes.c_void_p * 64)()  # struct sigaction starts with the handler on Linux
      if libc.sigaction(int(number), None, ctypes.byref(action)) != 0:
        return False
      handlers.append(action[0])
    return handlers[0] == handlers[1] and handlers[0] not in (None, 1)
  except (OSError, AttributeError):
    return False
