"""Python's cyclic garbage collector, paused while a save or restore builds hundreds of thousands of small objects.

Without the pause, 5,000 leaves set off full collections, each of which visits everything that the process holds. With
a million other objects (jax, flax, optax, a tokenizer) that is a third of the CPU time of a save, during which training
has no GIL, and a third to a half of that of a packed restore. `gc.freeze()` and higher thresholds only move it to
after the save, since the objects that survive young collections count towards the next full one.
"""

from __future__ import annotations

import contextlib
import gc
import os
import threading
from collections.abc import Iterator

_pauses: set[threading.Event] = set()  # that have not ended; no lock, since signal handlers save too


def pause(until: threading.Event, seconds: float) -> None:
  """Turns off automatic collections for the whole process until `until` is set, for `seconds` at most.

  Cycles that become garbage meanwhile are collected afterwards, and `gc.collect()` works as always. Pauses may overlap.
  Does nothing if the user has turned collections off; a user who does so meanwhile finds them on again after the pause.
  """
  if not (_pauses or gc.isenabled()):
    return

  def resume() -> None:
    until.wait(seconds)
    _end(until)

  _pauses.add(until)
  gc.disable()
  try:
    threading.Thread(target=resume, name="ckpt_jax_garbage", daemon=True).start()
  except RuntimeError:  # no more threads
    _end(until)


def _end(until: threading.Event) -> None:
  _pauses.discard(until)
  if not _pauses:
    gc.enable()


@contextlib.contextmanager
def paused(seconds: float = 60.0) -> Iterator[None]:
  """Turns off automatic collections inside the block, for `seconds` at most; see `pause`."""
  done = threading.Event()
  pause(done, seconds)
  try:
    yield
  finally:
    done.set()


def _forked() -> None:
  """Ends the pauses in a forked child, which lacks the threads that would."""
  if _pauses:
    _pauses.clear()
    gc.enable()


os.register_at_fork(after_in_child=_forked)
