"""How far a piece of work is: what `on_progress=` functions get, and a thread that reports it for others."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
from collections.abc import Callable, Iterator

_log = logging.getLogger(__name__)
_EVERY_S = 0.2


@dataclasses.dataclass(frozen=True)
class Progress:
  """How far a piece of work is, on this process.

  Attributes:
    what: e.g. `restoring step 300`; it stays the same from the first report to the last.
    done, total: in `unit`; `total` is None while it is not known.
    unit: `B` for bytes, `s` for seconds, or what is counted, e.g. `steps`.
    finished: whether this is the last report, be it because of an error.
  """

  what: str
  done: float
  total: float | None
  unit: str = "B"
  finished: bool = False


OnProgress = Callable[[Progress], None]
"""Called with the `Progress` of what is going on."""


class Counter:
  """Counts what is done; any thread may add to it."""

  def __init__(self) -> None:
    self._done = 0.0
    self._lock = threading.Lock()

  def add(self, amount: float) -> None:
    """Counts more."""
    with self._lock:
      self._done += amount

  def __call__(self) -> float:
    return self._done


@contextlib.contextmanager
def reported(
  on_progress: OnProgress | None,
  what: str,
  total: float | Callable[[], float | None] | None,
  done: Callable[[], float],
  unit: str = "B",
) -> Iterator[None]:
  """Reports five times a second what `done` returns, in a thread of its own, until the block ends.

  `total` may be a function, of work that finds out. Work that ends sooner is not reported at all. An error of
  `on_progress` is logged, and ends the reports.
  """
  if on_progress is None:
    yield
    return
  ended = threading.Event()

  def now(finished: bool = False) -> Progress:
    return Progress(what, done(), total() if callable(total) else total, unit, finished)

  def report() -> None:
    begun = False
    try:
      while not ended.wait(_EVERY_S):
        begun = True
        on_progress(now())
      if begun:
        on_progress(now(finished=True))
    except Exception as e:  # somebody else's; the work goes on
      _log.warning("%s: its progress cannot be shown: %s: %s", what, type(e).__name__, e)

  thread = threading.Thread(target=report, name="ckpt_jax_progress", daemon=True)
  with contextlib.suppress(RuntimeError):  # no more threads
    thread.start()
  try:
    yield
  finally:
    ended.set()
    if thread.ident is not None:
      thread.join(1.0)
