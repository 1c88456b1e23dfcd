"""Saves of a state of which 1% of the bytes move: what is written, and what it costs, beside raw Orbax.

All sides save the same values in one process, in turn, so that what else the machine does meets all of them. Training
hands frozen parameters on in two ways: as the same arrays, or, donated with the rest, as other arrays of the same bits.
"""

from __future__ import annotations

import datetime
import functools
import json
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
from ckpt_jax.errors import CheckpointError
from ckpt_jax.multihost import launch

SAME, DONATED, OFF = "ckpt_jax", "ckpt_jax, all donated", "ckpt_jax, unchanged off"
ORBAX, ORBAX_PLAIN = "orbax", "orbax-uncompressed"
_FROZEN, _ROWS, _COLUMNS, _RANK = 128, 1024, 1024, 5  # 537 MB of float32, and 1% of that
_BEFORE = 4  # saves until what does not change is known, in storage once, and linked
_TIMEOUT_S = 900
_Save = Callable[[int, Any], float]  # returns the seconds that it blocked


def lora(rounds: int, directory: str | None = None, progress: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
  """Saves a frozen model with adapters by each side. Returns JSON-able data.

  Args:
    rounds: saves that count, after the first few.
    directory: where to write; None: the system's temporary directory.
    progress: called with a line before the measurement.
  """
  progress(f"{rounds + _BEFORE} saves of 5 sides")
  with tempfile.TemporaryDirectory(dir=directory) as work:
    about = {"measured": datetime.date.today().isoformat(), "rounds": rounds, "machine": machine(work)}
    (result,) = launch(["-m", __name__, str(rounds), work], processes=1, timeout=_TIMEOUT_S)
  if result.returncode:
    raise CheckpointError(f"lora: {result.log[-2000:]}")
  events = [json.loads(line) for line in result.log.splitlines() if line.startswith('{"side"')]
  sides: dict[str, Any] = {}
  for event in events:
    side = sides.setdefault(event["side"], {"first_written_nbytes": event["written_nbytes"]})
    if event["step"] >= _BEFORE:
      for key in ("written_nbytes", "blocking_s", "commit_s", "cpu_s"):
        side.setdefault(key, []).append(event[key])
  for side in sides.values():
    side |= {key: round(statistics.median(found), 4) for key, found in side.items() if isinstance(found, list)}
  state_nbytes = 4 * _FROZEN * (_ROWS * _COLUMNS + 2 * _RANK * _ROWS)
  return about | {"state_nbytes": state_nbytes, "trainable": round(2 * _RANK / _COLUMNS, 4), "sides": sides}


# -- in the process


def _sides(work: str) -> dict[str, tuple[_Save, Callable[[], None]]]:
  """How each side saves and waits; a side keeps its steps in the directory of its name."""
  import orbax.checkpoint as ocp

  import ckpt_jax

  def ours(name: str, unchanged: str) -> tuple[_Save, Callable[[], None]]:
    c = ckpt_jax.Checkpointer(os.path.join(work, name), {"layout": {"unchanged": unchanged}})
    return functools.partial(_timed, lambda step, state: c.save(step, state)), c.wait

  def orbaxs(name: str, **options: Any) -> tuple[_Save, Callable[[], None]]:
    m = ocp.CheckpointManager(os.path.join(work, name), item_handlers=ocp.PyTreeCheckpointHandler(**options))
    save = functools.partial(_timed, lambda step, state: m.save(step, args=ocp.args.PyTreeSave(state)))
    return save, m.wait_until_finished

  return {
    SAME: ours(SAME, "auto"),
    DONATED: ours(DONATED, "auto"),
    OFF: ours(OFF, "off"),
    ORBAX: orbaxs(ORBAX),
    ORBAX_PLAIN: orbaxs(ORBAX_PLAIN, use_compression=False),
  }


def _timed(save: Callable[[int, Any], Any], step: int, state: Any) -> float:
  started = time.perf_counter()
  save(step, state)
  return time.perf_counter() - started


def _files(step_dir: str) -> dict[int, int]:
  found = (os.lstat(os.path.join(top, name)) for top, _, names in os.walk(step_dir) for name in names)
  return {info.st_ino: info.st_size for info in found}


def main() -> None:
  """The process: `python -m ckpt_jax.bench.lora ROUNDS DIRECTORY`."""
  rounds, work = int(sys.argv[1]), sys.argv[2]
  import jax
  import numpy as np
  from absl import logging

  logging.set_verbosity("error")
  rng = np.random.default_rng(0)
  frozen = {f"w{i}": jax.numpy.asarray(rng.standard_normal((_ROWS, _COLUMNS), np.float32)) for i in range(_FROZEN)}
  adapters = {f"w{i}": rng.standard_normal((2 * _RANK, _ROWS), np.float32) for i in range(_FROZEN)}
  copied = {name: jax.numpy.array(x, copy=True) for name, x in frozen.items()}
  pass_on = jax.jit(lambda tree: jax.tree.map(lambda x: x, tree), donate_argnums=0)
  sides = _sides(work)
  for step in range(_BEFORE + rounds):
    moving = {name: jax.numpy.asarray(x + np.float32(step)) for name, x in adapters.items()}
    for side in [*sides][step % len(sides) :] + [*sides][: step % len(sides)]:
      if side == DONATED:
        copied = pass_on(copied)
      save, wait = sides[side]
      state = {"params": copied if side == DONATED else frozen, "lora": moving}
      jax.block_until_ready(state)
      os.sync()
      before, started = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
      blocking = save(step, state)
      wait()
      used = resource.getrusage(resource.RUSAGE_SELF)
      event: dict[str, Any] = {"side": side, "step": step, "blocking_s": blocking}
      event["commit_s"] = time.perf_counter() - started
      event["cpu_s"] = used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime
      known = _files(os.path.join(work, side, str(step - 1)))
      there = _files(os.path.join(work, side, str(step)))
      event["written_nbytes"] = sum(nbytes for inode, nbytes in there.items() if inode not in known)
      print(json.dumps(event), flush=True)
      shutil.rmtree(os.path.join(work, side, str(step - 2)), ignore_errors=True)


if __name__ == "__main__":
  main()
