"""What threads of ours do: reads that nobody waits for any more end early, and transfers are allowed."""

from __future__ import annotations

import contextlib
import contextvars
import threading
from collections.abc import Iterator

import jax

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


@contextlib.contextmanager
def transfers_asked_for() -> Iterator[None]:
  """Within it, this thread copies between host and devices whatever `jax.transfer_guard` says.

  The guard finds copies that nobody meant to make; whoever saves or restores a state asks for them. It is of the thread
  where it is a context manager, and of all threads where it is `jax.config`'s: each thread of ours enters this.
  """
  with jax.transfer_guard("allow"):
    yield
