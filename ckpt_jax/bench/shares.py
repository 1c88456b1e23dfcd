"""Who writes how much, and how much a restore onto an orthogonal mesh reads: ckpt_jax beside raw Orbax, real processes.

All sides save the same state in one job, in turn, so that what else the machine does meets all of them.
"""

from __future__ import annotations

import collections
import datetime
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

from ckpt_jax.bench.worker import drop_cache
from ckpt_jax.errors import CheckpointError
from ckpt_jax.multihost import launch, who_wrote

OURS, UNCUT, ORBAX = "ckpt_jax", "ckpt_jax, reshard off", "orbax"
# No axis of most of these divides by 3, 5, 6 or 7.
MIXED = [*[(1024, 512)] * 8, (17,), (3, 5, 7), (333, 77), (4096, 33), (128,), (50257, 16), (2, 3, 257), (1000, 64)]
# One block of a transformer, three times, and what is beside it in embeddings.
BLOCK = [(1024, 1024)] * 4 + [(1024, 4096), (4096, 1024), (1024,), (1024,)]
_TIMEOUT_S = 600


def shares(counts: Sequence[int], rounds: int, progress: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
  """Saves replicated leaves of mixed shapes from several numbers of processes. Returns JSON-able data.

  Args:
    counts: numbers of processes, each with a replica.
    rounds: saves that count, after one that does not.
    progress: called with a line before each measurement.
  """
  found = _about(rounds)
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
    return _about(rounds) | {"processes": processes, "sides": _job("reshard", processes, rounds, directory)}


def _about(rounds: int) -> dict[str, Any]:
  return {"measured": datetime.date.today().isoformat(), "cpus": os.cpu_count(), "rounds": rounds}


def _job(what: str, processes: int, rounds: int, directory: str) -> dict[str, dict[str, Any]]:
  """Medians over rounds: seconds of the slowest process; CPU seconds and bytes of all."""
  results = launch(["-m", __name__, what, str(rounds), directory], processes=processes, timeout=_TIMEOUT_S)
  if bad := [r for r in results if r.returncode]:
    raise CheckpointError(f"{what} on {processes} processes: {bad[0].log[-2000:]}")
  turns: dict[str, dict[int, list[dict[str, Any]]]] = collections.defaultdict(lambda: collections.defaultdict(list))
  for result in results:
    for event in (json.loads(line) for line in result.log.splitlines() if line.startswith('{"side"')):
      turns[event.pop("side")][event.pop("turn")].append(event)
  found: dict[str, dict[str, Any]] = {}
  for side, by_turn in turns.items():
    by_turn.pop(0)
    found[side] = {
      key: round(
        statistics.median(
          (max if key.endswith("_s") and "cpu" not in key else sum)(e[key] for e in events)
          for events in by_turn.values()
        ),
        3,
      )
      for key in by_turn[1][0]
    }
    if needed := found[side].get("needed"):
      found[side]["read_over_needed"] = round(found[side]["read"] / needed, 3)
  return found


# -- in the processes


def _bytes_read() -> int:
  import tensorstore as ts

  metrics = ts.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
  return int(sum(v["value"] for m in metrics for v in m["values"]))


def _cpu_s() -> float:
  used = resource.getrusage(resource.RUSAGE_SELF)
  return used.ru_utime + used.ru_stime


def _sides(directory: str, what: str) -> dict[str, tuple[Callable[[int, Any], None], Callable[[int, Any], Any]]]:
  """How each side saves, to the commit, and restores."""
  import jax
  import orbax.checkpoint as ocp

  import ckpt_jax

  def ours(name: str, layout: dict[str, Any]) -> tuple[Callable[[int, Any], None], Callable[[int, Any], Any]]:
    settings = {
      "retention": {"last": None},
      "layout": {"unchanged": "off", **layout},
    }  # each save is to write all of it
    c = ckpt_jax.Checkpointer(os.path.join(directory, name), settings)

    def save(step: int, state: Any) -> None:
      c.save(step, state)
      c.wait()

    return save, lambda step, like: c.restore(step, like=like, strategy="direct").state

  manager = ocp.CheckpointManager(
    os.path.join(directory, ORBAX),
    options=ocp.CheckpointManagerOptions(max_to_keep=None),
    item_handlers=ocp.PyTreeCheckpointHandler(use_compression=False),
  )

  def save(step: int, state: Any) -> None:
    manager.save(step, args=ocp.args.PyTreeSave(state))
    manager.wait_until_finished()

  def restore(step: int, like: Any) -> Any:
    args = ocp.checkpoint_utils.construct_restore_args(like)
    return jax.block_until_ready(manager.restore(step, args=ocp.args.PyTreeRestore(item=like, restore_args=args)))

  found = {OURS: ours(OURS, {}), ORBAX: (save, restore)}
  if what == "reshard":
    found[UNCUT] = ours(UNCUT, {"reshard": "off"})
  return found


def main() -> None:
  """One process of a job: `python -m ckpt_jax.bench.shares shares|reshard ROUNDS DIRECTORY`."""
  what, rounds, directory = sys.argv[1], int(sys.argv[2]), sys.argv[3]
  from ckpt_jax import multihost

  multihost.initialize()
  import jax
  import numpy as np
  from absl import logging
  from jax.experimental import multihost_utils
  from jax.sharding import NamedSharding
  from jax.sharding import PartitionSpec as P

  logging.set_verbosity("error")
  mesh = jax.make_mesh((jax.device_count(),), ("x",))
  rng = np.random.default_rng(0)
  shapes = MIXED if what == "shares" else BLOCK * 3

  def on(shape: tuple[int, ...], axis: int) -> NamedSharding:
    return NamedSharding(mesh, P(*[None] * axis, "x") if what == "reshard" and len(shape) > 1 else P())

  values = {f"w{i}": rng.standard_normal(shape, dtype=np.float32) for i, shape in enumerate(shapes)}
  state = {n: jax.make_array_from_callback(x.shape, on(x.shape, 0), x.__getitem__) for n, x in values.items()}
  like = {n: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on(x.shape, 1)) for n, x in values.items()}
  needed = sum(x.dtype.itemsize * int(np.prod(x.sharding.shard_shape(x.shape))) for x in like.values())
  sides = _sides(directory, what)
  for turn in range(rounds + 1):
    for side in [*sides][turn % len(sides) :] + [*sides][: turn % len(sides)]:
      save, restore = sides[side]
      multihost_utils.sync_global_devices(f"{turn} {side}")
      cpu, started = _cpu_s(), time.perf_counter()
      save(turn, state)
      event: dict[str, Any] = {"side": side, "turn": turn, "commit_s": time.perf_counter() - started}
      event["commit_cpu_s"] = _cpu_s() - cpu
      if what == "reshard":
        if jax.process_index() == 0:
          drop_cache(os.path.join(directory, side, str(turn)))
        multihost_utils.sync_global_devices(f"{turn} {side} dropped")
        before, cpu, started = _bytes_read(), _cpu_s(), time.perf_counter()
        got = restore(turn, like)
        event |= {"restore_s": time.perf_counter() - started, "restore_cpu_s": _cpu_s() - cpu}
        event |= {"read": _bytes_read() - before, "needed": needed}
        for name, x in values.items():
          for shard in got[name].addressable_shards:
            assert np.asarray(shard.data).tobytes() == x[shard.index].tobytes(), name
      print(json.dumps(event), flush=True)


if __name__ == "__main__":
  main()
