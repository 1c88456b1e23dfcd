"""Who writes how much, and how much a restore onto an orthogonal mesh reads: ckpt_jax beside raw Orbax, real processes.

All sides save the same state in one job, in turn, so that what else the machine does meets all of them.
"""

from __future__ import annotations

import collections
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

from ckpt_jax.bench import suites
from ckpt_jax.bench.common import conditions, emit, job_events, medians, quiet, rotated
from ckpt_jax.bench.variants import VARIANTS, Target, jax_target
from ckpt_jax.bench.worker import drop_cache
from ckpt_jax.multihost import who_wrote

OURS, UNCUT, ORBAX = "ckpt_jax", "ckpt_jax, reshard off", "orbax"
# No axis of most of these divides by 3, 5, 6 or 7.
MIXED = [*[(1024, 512)] * 8, (17,), (3, 5, 7), (333, 77), (4096, 33), (128,), (50257, 16), (2, 3, 257), (1000, 64)]
# One block of a transformer, three times, and what is beside it in embeddings.
BLOCK = [(1024, 1024)] * 4 + [(1024, 4096), (4096, 1024), (1024,), (1024,)]


def shares(counts: Sequence[int], rounds: int, progress: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
  """Saves replicated leaves of mixed shapes from several numbers of processes. Returns JSON-able data.

  Args:
    counts: numbers of processes, each with a replica.
    rounds: saves that count, after one that does not.
    progress: called with a line before each measurement.
  """
  found = conditions(rounds=rounds)
  for count in counts:
    progress(f"{count} processes")
    with tempfile.TemporaryDirectory() as directory:
      sides = _job("shares", count, rounds, directory)
      for side, entry in sides.items():
        report = who_wrote(os.path.join(directory, side), 0)
        written = {p.process: p.nbytes for p in report.processes}
        entry["written"] = [written.get(process, 0) for process in range(count)]
        entry["chunks"] = sum(p.chunks for p in report.processes)
        entry["most_over_mean"] = round(max(written.values()) * count / report.nbytes, 4)
        entry["written_twice"] = len(report.overlaps)
    found[str(count)] = sides
  return found


def reshard(processes: int, rounds: int, progress: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
  """Saves leaves whose rows are spread over processes, restores them with their columns spread.

  Args:
    processes: how many, with one device each.
    rounds: saves and restores that count, after one that does not.
    progress: called with a line before each measurement.
  """
  progress(f"{processes} processes")
  with tempfile.TemporaryDirectory() as directory:
    sides = _job("reshard", processes, rounds, directory)
  return conditions(rounds=rounds, processes=processes, sides=sides)


def _job(what: str, processes: int, rounds: int, directory: str) -> dict[str, dict[str, Any]]:
  """Medians over rounds: seconds of the slowest process; CPU seconds and bytes of all."""
  command = [__name__, what, str(rounds), directory]
  turns: dict[str, dict[int, list[dict[str, Any]]]] = collections.defaultdict(lambda: collections.defaultdict(list))
  for event in job_events(f"{what} on {processes} processes", command, processes=processes):
    turns[event.pop("side")][event.pop("turn")].append(event)
  found: dict[str, dict[str, Any]] = {}
  for side, by_turn in turns.items():
    by_turn.pop(0)
    found[side] = medians([_of_job(events) for events in by_turn.values()], 3)
    if needed := found[side].get("needed"):
      found[side]["read_over_needed"] = round(found[side]["read"] / needed, 3)
  return found


def _of_job(events: list[dict[str, Any]]) -> dict[str, float]:
  """What the processes took together in one turn: a job is as slow as its slowest process."""
  slowest = ("commit_s", "restore_s")
  return {key: (max if key in slowest else sum)(event[key] for event in events) for key in events[0]}


# -- in the processes


def _bytes_read() -> int:
  import tensorstore as ts

  metrics = ts.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
  return int(sum(v["value"] for m in metrics for v in m["values"]))


def _sides(directory: str, what: str, like: Any) -> dict[str, Target]:
  direct = {"restore": {"strategy": "direct"}}
  found = {
    OURS: jax_target(VARIANTS[suites.OURS], like, f"{directory}/{OURS}", config=direct),
    ORBAX: jax_target(VARIANTS[suites.ORBAX_PLAIN], like, f"{directory}/{ORBAX}"),
  }
  if what == "reshard":
    uncut = direct | {"layout": {"reshard": "off"}}
    found[UNCUT] = jax_target(VARIANTS[suites.OURS], like, f"{directory}/{UNCUT}", config=uncut)
  return found


def main() -> None:
  """One process of a job: `python -m ckpt_jax.bench.shares shares|reshard ROUNDS DIRECTORY`."""
  what, rounds, directory = sys.argv[1], int(sys.argv[2]), sys.argv[3]
  from ckpt_jax import multihost

  multihost.initialize()
  import jax
  import numpy as np
  from jax.experimental import multihost_utils
  from jax.sharding import NamedSharding
  from jax.sharding import PartitionSpec as P

  quiet()
  mesh = jax.make_mesh((jax.device_count(),), ("x",))
  rng = np.random.default_rng(0)
  shapes = MIXED if what == "shares" else BLOCK * 3

  def on(shape: tuple[int, ...], axis: int) -> NamedSharding:
    return NamedSharding(mesh, P(*[None] * axis, "x") if what == "reshard" and len(shape) > 1 else P())

  values = {f"w{i}": rng.standard_normal(shape, dtype=np.float32) for i, shape in enumerate(shapes)}
  state = {n: jax.make_array_from_callback(x.shape, on(x.shape, 0), x.__getitem__) for n, x in values.items()}
  like = {n: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on(x.shape, 1)) for n, x in values.items()}
  needed = sum(x.dtype.itemsize * int(np.prod(x.sharding.shard_shape(x.shape))) for x in like.values())
  sides = _sides(directory, what, like)
  for turn in range(rounds + 1):
    for side in rotated(sides, turn):
      target = sides[side]
      target.state = state
      multihost_utils.sync_global_devices(f"{turn} {side}")
      cpu, started = time.process_time(), time.perf_counter()
      target.save(turn)
      target.wait()
      event: dict[str, Any] = {"side": side, "turn": turn, "commit_s": time.perf_counter() - started}
      event["commit_cpu_s"] = time.process_time() - cpu
      if what == "reshard":
        if jax.process_index() == 0:
          drop_cache(os.path.join(directory, side, str(turn)))
        multihost_utils.sync_global_devices(f"{turn} {side} dropped")
        before, cpu, started = _bytes_read(), time.process_time(), time.perf_counter()
        got = target.restore(turn)
        event |= {"restore_s": time.perf_counter() - started, "restore_cpu_s": time.process_time() - cpu}
        event |= {"read": _bytes_read() - before, "needed": needed}
        for name, x in values.items():
          for shard in got[name].addressable_shards:
            assert np.asarray(shard.data).tobytes() == x[shard.index].tobytes(), name
      emit(**event)


if __name__ == "__main__":
  main()
