"""Saves of a state of which 1% of the bytes move: what is written, and what it costs, beside raw Orbax.

All sides save the same values in one process, in turn, so that what else the machine does meets all of them. Training
hands frozen parameters on in two ways: as the same arrays, or, donated with the rest, as other arrays of the same bits.
"""

from __future__ import annotations

import datetime
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from ckpt_jax.bench import suites
from ckpt_jax.bench.common import emit, job_events, quiet, rotated
from ckpt_jax.bench.runner import machine
from ckpt_jax.bench.suites import ORBAX, ORBAX_PLAIN
from ckpt_jax.bench.variants import VARIANTS, Target, jax_target
from ckpt_jax.storage.paths import files_beneath

SAME, DONATED, OFF = "ckpt_jax", "ckpt_jax, all donated", "ckpt_jax, unchanged off"
_FROZEN, _ROWS, _COLUMNS, _RANK = 128, 1024, 1024, 5  # 537 MB of float32, and 1% of that
_BEFORE = 4  # saves until what does not change is known, in storage once, and linked


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
    events = job_events("lora", [__name__, str(rounds), work])
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


def _sides(work: str, state: Any) -> dict[str, Target]:
  """A side keeps its steps in the directory of its name."""

  def ours(name: str, unchanged: str) -> Target:
    return jax_target(VARIANTS[suites.OURS], state, f"{work}/{name}", config={"layout": {"unchanged": unchanged}})

  return {
    SAME: ours(SAME, "auto"),
    DONATED: ours(DONATED, "auto"),
    OFF: ours(OFF, "off"),
    ORBAX: jax_target(VARIANTS[ORBAX], state, f"{work}/{ORBAX}"),
    ORBAX_PLAIN: jax_target(VARIANTS[ORBAX_PLAIN], state, f"{work}/{ORBAX_PLAIN}"),
  }


def _files(step_dir: str) -> dict[int, int]:
  found = map(os.lstat, files_beneath(step_dir))
  return {info.st_ino: info.st_size for info in found}


def main() -> None:
  """The process: `python -m ckpt_jax.bench.lora ROUNDS DIRECTORY`."""
  rounds, work = int(sys.argv[1]), sys.argv[2]
  import jax
  import numpy as np

  quiet()
  rng = np.random.default_rng(0)
  frozen = {f"w{i}": jax.numpy.asarray(rng.standard_normal((_ROWS, _COLUMNS), np.float32)) for i in range(_FROZEN)}
  adapters = {f"w{i}": rng.standard_normal((2 * _RANK, _ROWS), np.float32) for i in range(_FROZEN)}
  copied = {name: jax.numpy.array(x, copy=True) for name, x in frozen.items()}
  pass_on = jax.jit(lambda tree: jax.tree.map(lambda x: x, tree), donate_argnums=0)
  sides: dict[str, Target] = {}
  for step in range(_BEFORE + rounds):
    moving = {name: jax.numpy.asarray(x + np.float32(step)) for name, x in adapters.items()}
    sides = sides or _sides(work, {"params": frozen, "lora": moving})
    for side in rotated(sides, step):
      if side == DONATED:
        copied = pass_on(copied)
      target = sides[side]
      target.state = jax.block_until_ready({"params": copied if side == DONATED else frozen, "lora": moving})
      os.sync()
      cpu, started = time.process_time(), time.perf_counter()
      target.save(step)
      event: dict[str, Any] = {"side": side, "step": step, "blocking_s": time.perf_counter() - started}
      target.wait()
      event |= {"commit_s": time.perf_counter() - started, "cpu_s": time.process_time() - cpu}
      known = _files(os.path.join(work, side, str(step - 1)))
      there = _files(os.path.join(work, side, str(step)))
      event["written_nbytes"] = sum(nbytes for inode, nbytes in there.items() if inode not in known)
      emit(**event)
      shutil.rmtree(os.path.join(work, side, str(step - 2)), ignore_errors=True)


if __name__ == "__main__":
  main()
