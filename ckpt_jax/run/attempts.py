"""The restarts of a run: RUN/.ckpt_jax/attempts/ID, a small JSON file for each job that saved into it.

Process 0 rewrites it at each commit, so that a killed job leaves behind how long it lived.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import logging
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

from etils import epath

from ckpt_jax.run.notes import NOTES, read_note, write_note
from ckpt_jax.storage import look

_log = logging.getLogger(__name__)
ATTEMPTS = "attempts"
CLOSED, PREEMPTED = "closed", "preempted"


@dataclasses.dataclass(frozen=True)
class Attempt:
  """One life of a job.

  Attributes:
    started, alive: seconds since the epoch: when the run was opened, and the last commit or the end.
    end: `closed`, `preempted`, or None for a job that was killed, or still runs.
    saves: committed saves.
    blocking_s, background_s: means over its last saves. The first one of a process, which is more expensive, counts: a
      job of short lives pays it often.
    nbytes: bytes of the last state.
    first_step, last_step: steps of its first and last commit.
  """

  started: float
  alive: float
  end: str | None
  saves: int
  blocking_s: float
  background_s: float
  nbytes: int
  first_step: int
  last_step: int


class AttemptLog:
  """Writes the attempt of this process. Nothing is written before the first commit, so that readers leave no trace."""

  def __init__(self, directory: epath.Path, *, active: bool = True, clock: Callable[[], float] = time.time):
    """Writes nothing yet; with `active=False`, as on all processes but one, nothing at all."""
    self._active = active
    self._clock = clock
    self._started = clock()
    self._file = directory / NOTES / ATTEMPTS / f"{int(self._started * 1e6)}-{os.getpid()}"
    self._costs: list[tuple[float, float]] = []
    self._last: dict[str, Any] = {}

  def committed(self, step: int, nbytes: int, blocking_s: float, background_s: float) -> None:
    """Records a commit."""
    self._costs = [*self._costs[-49:], (blocking_s, background_s)]
    first, saves = self._last.get("first_step", step), self._last.get("saves", 0)
    self._last = {"first_step": first, "last_step": step, "nbytes": nbytes, "saves": saves + 1}
    self._write(None)

  def ended(self, how: str) -> None:
    """Records an end that was no failure of the job."""
    if self._last:
      self._write(how)

  def _write(self, end: str | None) -> None:
    if not self._active:
      return
    blocking, background = (statistics.fmean(costs) for costs in zip(*self._costs, strict=True))
    times = {"started": self._started, "alive": self._clock(), "blocking_s": blocking, "background_s": background}
    try:
      write_note(self._file, self._last | times | {"end": end})
    except OSError as e:  # a note is not worth a failed save
      _log.warning("%s: cannot be written: %s", self._file, e)


def read_attempts(directory: epath.Path) -> list[Attempt]:
  """The attempts of a run, oldest first. Unreadable ones are left out."""
  place = directory / NOTES / ATTEMPTS
  with concurrent.futures.ThreadPoolExecutor(16) as pool:
    notes = list(pool.map(lambda name: read_note(place / name), look.names(place)))
  names = [field.name for field in dataclasses.fields(Attempt)]
  found = [Attempt(**{name: note[name] for name in names}) for note in notes if note.keys() >= set(names)]
  return sorted(found, key=lambda a: a.started)


def exposure(attempts: list[Attempt]) -> tuple[float, int]:
  """Seconds that the attempts ran, and how many of them were interrupted.

  A killed job is assumed to have lived half an interval beyond its last commit.
  """
  seconds, interrupted = 0.0, 0
  for a in attempts:
    seconds += max(a.alive - a.started, 0.0)
    if a.end != CLOSED:
      interrupted += 1
    if a.end is None:
      seconds += max(a.alive - a.started, 0.0) / max(a.saves, 1) / 2
  return seconds, interrupted
