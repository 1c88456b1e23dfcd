"""What a step leaves in the page cache, and what keeping it out costs: ckpt_jax both ways, raw Orbax, and one raw file.

All sides save and restore the same state in one process, in turn, so that what else the machine does meets all of
them. Free memory is not filled with page cache first, as `ckpt-jax bench` does for its suites: that is the point.
"""

from __future__ import annotations

import datetime
import functools
import json
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

from ckpt_jax.bench.runner import machine
from ckpt_jax.bench.suites import SUITES
from ckpt_jax.bench.worker import drop_cache, give_memory_back
from ckpt_jax.errors import CheckpointError
from ckpt_jax.multihost import launch

DIRECT, BUFFERED, ORBAX = "ckpt_jax, file_io direct", "ckpt_jax, file_io buffered", "orbax-uncompressed"
RAW_DIRECT, RAW_BUFFERED = "one file, O_DIRECT + fsync", "one file, buffered + fsync"
_BLOCK = 16 * 2**20
_TIMEOUT_S = 900
_SETTLE_S = 0.2  # the last pages are dropped behind the commit
_Save = Callable[[int], None]
_Restore = Callable[[int], Any]


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
    (result,) = launch(["-m", __name__, suite, str(rounds), work], processes=1, devices=devices, timeout=_TIMEOUT_S)
  if result.returncode:
    raise CheckpointError(f"direct: {result.log[-2000:]}")
  turns: dict[str, list[dict[str, float]]] = {}
  for event in (json.loads(line) for line in result.log.splitlines() if line.startswith('{"side"')):
    turns.setdefault(event.pop("side"), []).append(event)
  return about | {"sides": {side: _summary(events[1:]) for side, events in turns.items()}}


def _summary(events: list[dict[str, float]]) -> dict[str, Any]:
  """Medians; of the commit also the spread: the distance of the quartiles over the median, and the range."""
  commits = [e["commit_s"] for e in events]
  middle = statistics.median(commits)
  low, _, high = statistics.quantiles(commits, n=4) if len(commits) > 1 else [middle] * 3
  medians = {key: round(statistics.median(e[key] for e in events), 3) for key in events[0]}
  return medians | {
    "commit_spread": round((high - low) / middle, 3),
    "commit_range_s": [round(min(commits), 3), round(max(commits), 3)],
  }


# -- in the process


def _sides(work: str, state: Any) -> dict[str, tuple[_Save, _Restore]]:
  """How each side saves, to the commit, and restores; a side keeps its steps in the directory of its name."""
  import jax
  import orbax.checkpoint as ocp

  import ckpt_jax

  like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)

  def ours(name: str, file_io: str) -> tuple[_Save, _Restore]:
    # The state is the same in each save, and is to be written each time.
    config = {"limits": {"file_io": file_io}, "retention": {"last": None}, "layout": {"unchanged": "off"}}
    c = ckpt_jax.Checkpointer(os.path.join(work, name), config)

    def save(step: int) -> None:
      c.save(step, state)
      c.wait()

    return save, lambda step: c.restore(step, like=like).state

  manager = ocp.CheckpointManager(
    os.path.join(work, ORBAX),
    options=ocp.CheckpointManagerOptions(max_to_keep=None),
    item_handlers=ocp.PyTreeCheckpointHandler(use_compression=False),
  )

  def save(step: int) -> None:
    manager.save(step, args=ocp.args.PyTreeSave(state))
    manager.wait_until_finished()

  restore_args = ocp.args.PyTreeRestore(item=like, restore_args=ocp.checkpoint_utils.construct_restore_args(like))
  leaves = [memoryview(x).cast("B") for x in jax.device_get(jax.tree.leaves(state)) if x.ndim]
  found = {DIRECT: ours(DIRECT, "direct"), BUFFERED: ours(BUFFERED, "buffered")}
  found[ORBAX] = save, lambda step: manager.restore(step, args=restore_args)
  for name, flag in ((RAW_DIRECT, os.O_DIRECT), (RAW_BUFFERED, 0)):
    place = os.path.join(work, name)
    buffer = mmap.mmap(-1, _BLOCK)  # aligned to a page, as O_DIRECT asks for
    found[name] = functools.partial(_write, place, leaves, buffer, flag), functools.partial(_read, place, buffer, flag)
  return found


def _write(place: str, leaves: list[memoryview], buffer: mmap.mmap, flag: int, step: int) -> None:
  os.makedirs(f"{place}/{step}")
  descriptor = os.open(f"{place}/{step}/all", os.O_WRONLY | os.O_CREAT | flag)
  at = 0
  for leaf in leaves:
    while leaf:
      n = min(len(leaf), _BLOCK - at)
      buffer[at : at + n] = leaf[:n]
      leaf, at = leaf[n:], at + n
      if at == _BLOCK:
        os.write(descriptor, buffer)
        at = 0
  os.write(descriptor, memoryview(buffer)[: -(-at // mmap.PAGESIZE) * mmap.PAGESIZE])
  os.fsync(descriptor)
  os.close(descriptor)


def _read(place: str, buffer: mmap.mmap, flag: int, step: int) -> None:
  descriptor = os.open(f"{place}/{step}/all", os.O_RDONLY | flag)
  while os.readv(descriptor, [buffer]):
    pass
  os.close(descriptor)


def main() -> None:
  """The process: `python -m ckpt_jax.bench.direct SUITE ROUNDS DIRECTORY`."""
  suite_name, rounds, work = sys.argv[1], int(sys.argv[2]), sys.argv[3]
  import jax
  from absl import logging

  from ckpt_jax.bench.suites import state_of
  from ckpt_jax.bench.variants import on_devices
  from ckpt_jax.storage.page_cache import cached_nbytes

  logging.set_verbosity("error")
  suite = SUITES[suite_name]
  state = on_devices(state_of(suite), suite)
  sides = _sides(work, state)
  for turn in range(rounds + 1):
    for side in [*sides][turn % len(sides) :] + [*sides][: turn % len(sides)]:
      save, restore = sides[side]
      place = os.path.join(work, side, str(turn))
      os.sync()
      before, started = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
      save(turn)
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
        jax.block_until_ready(restore(turn))
        event[key] = time.perf_counter() - started
      print(json.dumps(event), flush=True)
      shutil.rmtree(place)


if __name__ == "__main__":
  main()
