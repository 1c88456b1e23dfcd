"""Saves of a state of which 1% of the bytes move: what is written, and what it costs, beside raw Orbax.

All sides save the same values in one process, in turn, so that what else the machine does meets all of them. Training
hands frozen parameters on in two ways: as the same arrays, or, donated with the rest, as other arrays of the same bits.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

from ckpt_jax.bench import suites
from ckpt_jax.bench.common import conditions, emit, job_events, medians, quiet, rotated
from ckpt_jax.bench.runner import machine
from ckpt_jax.bench.suites import ORBAX, ORBAX_PLAIN
from ckpt_jax.bench.variants import VARIANTS, Target, jax_target
from ckpt_jax.storage.paths import files_beneath

SAME, DONATED, OFF = "ckpt_jax", "ckpt_jax, all donated", "ckpt_jax, unchanged off"
_MATRICES = 128
_SIZES = {1024: 5, 2048: 10}  # rows, as many as columns, and rank of the adapters: 0.54 and 2.2 GB, 1% of it adapters
_BEFORE = 4  # saves until what does not change is known, in storage once, and linked


def lora(rounds: int, directory: str | None = None, progress: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
  """Saves a frozen model with adapters by each side. Returns JSON-able data.

  Args:
    rounds: saves that count, after the first few; half as many of the larger state.
    directory: where to write; None: the system's temporary directory.
    progress: called with a line before the measurement.
  """
  states = []
  about = conditions(machine=machine(directory or tempfile.gettempdir()))
  for (rows, rank), saves in zip(_SIZES.items(), (rounds, -(-rounds // 2)), strict=True):
    nbytes = 4 * _MATRICES * rows * (rows + 2 * rank)
    progress(f"{saves + _BEFORE} saves of {nbytes / 1e9:.1f} GB by 5 sides")
    with tempfile.TemporaryDirectory(dir=directory) as work:
      events = job_events("lora", [__name__, str(saves), str(rows), work])
    trainable = round(2 * rank / (rows + 2 * rank), 4)
    states.append({"state_nbytes": nbytes, "trainable": trainable, "rounds": saves, "sides": _sides_of(events)})
  return about | {"states": states}


def _sides_of(events: Sequence[dict[str, Any]]) -> dict[str, Any]:
  sides: dict[str, list[dict[str, Any]]] = {}
  for event in events:
    sides.setdefault(event.pop("side"), []).append(event)
  columns = ("written_nbytes", "blocking_s", "commit_s", "cpu_s")
  return {
    side: {"first_written_nbytes": saves[0]["written_nbytes"]}
    | medians([{key: save[key] for key in columns} for save in saves[_BEFORE:]])
    for side, saves in sides.items()
  }


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
  """The process: `python -m ckpt_jax.bench.lora ROUNDS ROWS DIRECTORY`."""
  rounds, rows, work = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
  import jax
  import numpy as np

  quiet()
  rng = np.random.default_rng(0)
  frozen = {f"w{i}": jax.numpy.asarray(rng.standard_normal((rows, rows), np.float32)) for i in range(_MATRICES)}
  adapters = {f"w{i}": rng.standard_normal((2 * _SIZES[rows], rows), np.float32) for i in range(_MATRICES)}
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
