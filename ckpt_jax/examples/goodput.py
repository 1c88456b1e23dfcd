"""Checks the simulator against reality: a small trainer, killed again and again, against what the model says of it.

  python -m ckpt_jax.examples.goodput [--kills 24] [--mtti 12] [--interval 2]

Goodput is measured as committed steps times the time of an undisturbed step, over the time from the first start to the
last kill. The model is told what the run itself measured (time to come back, blocking and background time of a save)
and when the kills came.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import signal
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

STEP_S = 0.05


def train(run: str, interval: float, log: str) -> None:
  """One life: restore, then train until killed."""
  import jax
  import jax.numpy as jnp

  import ckpt_jax as ckpt

  @jax.jit
  def update(state):
    return {"w": state["w"] * 0.999 + 1e-3, "count": state["count"] + 1}

  with (
    open(log, "a", buffering=1) as events,
    ckpt.Checkpointer(run, ckpt.Config(schedule={"every": interval}, retention={"last": 2})) as c,
  ):
    restored = c.restore_or_init(lambda: {"w": jnp.ones((512, 512)), "count": jnp.int32(0)})
    state = jax.block_until_ready(update(restored.state))
    events.write(json.dumps({"up": time.time()}) + "\n")
    c.schedule.begun(restored.next_step)  # the model counts the first interval from here
    for step in range(restored.next_step, 10**9):
      started = time.perf_counter()
      time.sleep(STEP_S)
      state = jax.block_until_ready(update(state))
      took = time.perf_counter() - started
      saved = c.save(step, state)
      events.write(json.dumps({"step": step, "s": took, "saved": saved}) + "\n")


def measure(kills: int, mtti: float, interval: float, seed: int) -> dict:
  """Runs `kills` lives of the trainer and returns what was measured, and what the model says."""
  from ckpt_jax import run as runs
  from ckpt_jax.planning.simulate import Job, closed_form, simulate
  from ckpt_jax.policies.attempts import read_attempts

  lives = np.random.default_rng(seed).exponential(mtti, kills)
  with tempfile.TemporaryDirectory() as directory:
    run, log = pathlib.Path(directory) / "run", pathlib.Path(directory) / "log"
    down, lived = [], []
    for i, life in enumerate(lives):
      started, since = time.time(), time.perf_counter()
      command = [sys.executable, "-m", "ckpt_jax.examples.goodput"]
      command += ["--child", str(run), str(log), "--interval", str(interval)]
      child = subprocess.Popen(command)
      try:
        code = child.wait(timeout=float(life))
        raise SystemExit(f"the trainer ended by itself with code {code}")
      except subprocess.TimeoutExpired:
        child.send_signal(signal.SIGKILL)
        child.wait(timeout=30)
      lived.append(time.perf_counter() - since)
      ups = [e["up"] for e in _events(log) if "up" in e and e["up"] >= started]
      down += [up - started for up in ups]
      print(
        f"life {i + 1}/{kills}: {lived[-1]:.1f} s, newest step {runs.committed_steps(runs.run_directory(run))[-1:]}"
      )
    steps = runs.committed_steps(runs.run_directory(run))
    attempts = [a for a in read_attempts(runs.run_directory(run)) if a.saves > 1]
    step_s = statistics.median(e["s"] for e in _events(log) if "step" in e)
    job = Job(
      mtti,
      statistics.median(a.blocking_s for a in attempts),
      statistics.median(a.background_s for a in attempts),
      statistics.median(down),
    )
  # The schedule counts from the start of one save to that of the next, and is asked once a step.
  work = interval - job.blocking_s + step_s / 2
  measured = (steps[-1] + 1) * step_s / sum(lived) if steps else 0.0
  told = simulate(job, work, lifetimes=lived)
  return {
    "kills": kills,
    "seconds": sum(lived),
    "job": job,
    "measured": measured,
    "predicted": told.goodput,
    "expected": closed_form(job, work),
    "off_by": told.goodput / measured - 1 if measured else float("inf"),
  }


def _events(log: pathlib.Path) -> list[dict]:
  found = []
  for line in log.read_text().splitlines() if log.exists() else []:
    try:
      found.append(json.loads(line))
    except ValueError:  # cut short by a kill
      continue
  return found


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--kills", type=int, default=24)
  parser.add_argument("--mtti", type=float, default=12.0, help="seconds")
  parser.add_argument("--interval", type=float, default=2.0, help="seconds between saves")
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.child:
    train(args.child[0], args.interval, args.child[1])
    return
  found = measure(args.kills, args.mtti, args.interval, args.seed)
  print(found["job"])
  print(
    f"goodput over {found['kills']} kills in {found['seconds']:.0f} s: measured {found['measured']:.1%}, predicted for "
    f"these kills {found['predicted']:.1%} ({found['off_by']:+.1%}), expected of such a job {found['expected']:.1%}"
  )
  if abs(found["off_by"]) > 0.1:
    raise SystemExit("the prediction is off by more than 10%")


if __name__ == "__main__":
  main()
