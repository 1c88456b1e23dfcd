"""Reads that nobody waits for any more end early: after a Ctrl-C, or an error elsewhere."""

from __future__ import annotations

import contextlib
import contextvars
import threading
from collections.abc import Iterator

from ckpt_jax.errors import CheckpointError

_stop: contextvars.ContextVar[threading.Event | None] = contextvars.ContextVar("ckpt_jax_stop", default=None)


@contextlib.contextmanager
def stopped_by(stop: threading.Event) -> Iterator[None]:
  """Within it, `check` raises once `stop` is set."""
  token = _stop.set(stop)
  try:
    yield
  finally:
    _stop.reset(token)


def check() -> None:
  """Raises CheckpointError if what this thread does was given up."""
  stop = _stop.get()
  if stop is not None and stop.is_set():
    raise CheckpointError("given up")
