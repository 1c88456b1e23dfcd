"""What a step leaves in the page cache, and what keeping it out costs: ckpt_jax both ways, raw Orbax, and one raw file.

All sides save and restore the same state in one process, in turn, so that what else the machine does meets all of
them. Free memory is not filled with page cache first, as `ckpt-jax bench` does for its suites: that is the point.
"""

from __future__ import annotations

import datetime
import mmap
import os
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from ckpt_jax.bench import suites
from ckpt_jax.bench.common import emit, job_events, medians, quiet, rotated
from ckpt_jax.bench.runner import machine
from ckpt_jax.bench.suites import SUITES, state_of
from ckpt_jax.bench.variants import VARIANTS, Target, jax_target, on_devices
from ckpt_jax.bench.worker import drop_cache, give_memory_back

DIRECT, BUFFERED, ORBAX = "ckpt_jax, file_io direct", "ckpt_jax, file_io buffered", suites.ORBAX_PLAIN
RAW_DIRECT, RAW_BUFFERED = "one file, O_DIRECT + fsync", "one file, buffered + fsync"
_BLOCK = 16 * 2**20
_SETTLE_S = 0.2  # the last pages are dropped behind the commit


def direct(
  suite: str, rounds: int, directory: str | None = None, progress: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
  """Saves and restores a state of the suites by each side. Returns JSON-able data.

  Args:
    suite: a suite of one process on a disk.
    rounds: that count, after one that does not.
    directory: where to write; None: the system's temporary directory.
    progress: called with a line before the measurement.
  """
  progress(f"{suite}: {rounds + 1} rounds of 5 sides")
  with tempfile.TemporaryDirectory(dir=directory) as work:
    about = {"measured": datetime.date.today().isoformat(), "suite": suite, "rounds": rounds, "machine": machine(work)}
    devices = SUITES[suite].devices
    events = job_events("direct", [__name__, suite, str(rounds), work], devices=devices)
  turns: dict[str, list[dict[str, float]]] = {}
  for event in events:
    turns.setdefault(event.pop("side"), []).append(event)
  return about | {"sides": {side: _summary(events[1:]) for side, events in turns.items()}}


def _summary(events: list[dict[str, float]]) -> dict[str, Any]:
  """Medians; of the commit also the spread: the distance of the quartiles over the median, and the range."""
  commits = [e["commit_s"] for e in events]
  middle = statistics.median(commits)
  low, _, high = statistics.quantiles(commits, n=4) if len(commits) > 1 else [middle] * 3
  return medians(events, 3) | {
    "commit_spread": round((high - low) / middle, 3),
    "commit_range_s": [round(min(commits), 3), round(max(commits), 3)],
  }


# -- in the process


class _RawFile:
  """All bytes of a state in one file, as `Target` saves and restores, through the page cache or past it."""

  def __init__(self, state: Any, place: str, flag: int):
    import jax

    self._leaves = [memoryview(x).cast("B") for x in jax.device_get(jax.tree.leaves(state)) if x.ndim]
    self._place, self._flag = place, flag
    self._buffer = mmap.mmap(-1, _BLOCK)  # aligned to a page, as O_DIRECT asks for

  def save(self, step: int) -> None:
    os.makedirs(f"{self._place}/{step}")
    descriptor = os.open(f"{self._place}/{step}/all", os.O_WRONLY | os.O_CREAT | self._flag)
    at = 0
    for leaf in self._leaves:
      while leaf:
        n = min(len(leaf), _BLOCK - at)
        self._buffer[at : at + n] = leaf[:n]
        leaf, at = leaf[n:], at + n
        if at == _BLOCK:
          os.write(descriptor, self._buffer)
          at = 0
    os.write(descriptor, memoryview(self._buffer)[: -(-at // mmap.PAGESIZE) * mmap.PAGESIZE])
    os.fsync(descriptor)
    os.close(descriptor)

  def wait(self) -> None:
    pass

  def restore(self, step: int) -> None:
    descriptor = os.open(f"{self._place}/{step}/all", os.O_RDONLY | self._flag)
    while os.readv(descriptor, [self._buffer]):
      pass
    os.close(descriptor)


def _sides(work: str, state: Any) -> dict[str, Target | _RawFile]:
  """A side keeps its steps in the directory of its name."""

  def ours(name: str, file_io: str) -> Target:
    return jax_target(VARIANTS[suites.OURS], state, f"{work}/{name}", config={"limits": {"file_io": file_io}})

  return {
    DIRECT: ours(DIRECT, "direct"),
    BUFFERED: ours(BUFFERED, "buffered"),
    ORBAX: jax_target(VARIANTS[ORBAX], state, f"{work}/{ORBAX}"),
    RAW_DIRECT: _RawFile(state, f"{work}/{RAW_DIRECT}", os.O_DIRECT),
    RAW_BUFFERED: _RawFile(state, f"{work}/{RAW_BUFFERED}", 0),
  }


def main() -> None:
  """The process: `python -m ckpt_jax.bench.direct SUITE ROUNDS DIRECTORY`."""
  suite_name, rounds, work = sys.argv[1], int(sys.argv[2]), sys.argv[3]
  import jax

  from ckpt_jax.storage.page_cache import cached_nbytes

  quiet()
  suite = SUITES[suite_name]
  state = on_devices(state_of(suite), suite)
  sides = _sides(work, state)
  for turn in range(rounds + 1):
    for side in rotated(sides, turn):
      target = sides[side]
      place = os.path.join(work, side, str(turn))
      os.sync()
      before, started = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
      target.save(turn)
      target.wait()
      event: dict[str, Any] = {"side": side, "commit_s": time.perf_counter() - started}
      used = resource.getrusage(resource.RUSAGE_SELF)
      event |= {"user_s": used.ru_utime - before.ru_utime, "system_s": used.ru_stime - before.ru_stime}
      time.sleep(_SETTLE_S)
      cached, total = cached_nbytes(place)
      event["cached_share"] = cached / total
      for key in ("restore_right_after_s", "restore_cold_s"):
        if key == "restore_cold_s":
          drop_cache(place)
        give_memory_back()
        started = time.perf_counter()
        jax.block_until_ready(target.restore(turn))
        event[key] = time.perf_counter() - started
      emit(**event)
      shutil.rmtree(place)


if __name__ == "__main__":
  main()
