"""What a run remembers of its restarts: RUN/.ckpt_jax/attempts/ID, a small JSON for each job that saved into it.

Rewritten at each commit in one go, by process 0, so that a killed job leaves behind how long it lived.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import logging
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

from etils import epath

from ckpt_jax.run.steps import NOTES

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
    blocking_s, background_s: means over its last saves. The first one of a process, which is dearer, counts: a job of
      short lives pays it often.
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
    self._active = active
    self._clock = clock
    self._started = clock()
    self._file = directory / NOTES / ATTEMPTS / f"{int(self._started * 1e6)}-{os.getpid()}"
    self._costs: list[tuple[float, float]] = []
    self._last: dict[str, Any] = {}

  def committed(self, step: int, nbytes: int, blocking_s: float, background_s: float) -> None:
    """Notes a commit."""
    self._costs = [*self._costs[-49:], (blocking_s, background_s)]
    self._last = {
      "first_step": self._last.get("first_step", step),
      "last_step": step,
      "nbytes": nbytes,
      "saves": self._last.get("saves", 0) + 1,
    }
    self._write(None)

  def ended(self, how: str) -> None:
    """Notes an end that was no failure of the job."""
    if self._last:
      self._write(how)

  def _write(self, end: str | None) -> None:
    if not self._active:
      return
    data = self._last | {
      "started": self._started,
      "alive": self._clock(),
      "end": end,
      "blocking_s": statistics.fmean(b for b, _ in self._costs),
      "background_s": statistics.fmean(w for _, w in self._costs),
    }
    try:
      self._file.parent.mkdir(parents=True, exist_ok=True)
      self._file.write_text(json.dumps(data))
    except OSError as e:  # a note is not worth a failed save
      _log.warning("%s: cannot be written: %s", self._file, e)


def read_attempts(directory: epath.Path) -> list[Attempt]:
  """The attempts of a run, oldest first. What cannot be read is left out."""
  try:
    files = list((directory / NOTES / ATTEMPTS).iterdir())
  except (FileNotFoundError, NotADirectoryError):
    return []
  if not files:
    return []
  with concurrent.futures.ThreadPoolExecutor(min(16, len(files))) as pool:
    found = [a for a in pool.map(_read, files) if a is not None]
  return sorted(found, key=lambda a: a.started)


def exposure(attempts: list[Attempt]) -> tuple[float, int]:
  """Seconds that the ended attempts ran, and how many were interrupted.

  A killed job is taken to have lived half an interval beyond its last commit.
  """
  seconds, interrupted = 0.0, 0
  for a in attempts:
    seconds += max(a.alive - a.started, 0.0)
    if a.end != CLOSED:
      interrupted += 1
    if a.end is None:
      seconds += max(a.alive - a.started, 0.0) / max(a.saves, 1) / 2
  return seconds, interrupted


def _read(file: epath.Path) -> Attempt | None:
  try:
    data = json.loads(file.read_text())
    return Attempt(**{field.name: data[field.name] for field in dataclasses.fields(Attempt)})
  except (OSError, ValueError, KeyError, TypeError):
    return None
