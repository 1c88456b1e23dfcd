"""Measures goodput: a small trainer is killed again and again, under YoungDaly and under fixed schedules.

Three arms save to an emulated bucket behind a link of a few megabytes a second, with too little host memory for a
copy, so that a save stops training for as long as the link takes; a fourth saves to the local disk behind training.
All arms run at the same time and are killed by the same clock: lives are drawn from an exponential distribution (one
from each of as many equal parts of it as there are kills, shuffled) and count from the first step of each life.

Goodput is the committed steps times the time of an undisturbed step, over the time from the first start to the last
kill. The simulator gets what the run itself measured (the time to restart, and the blocking and background time of a
save) and the times of the kills, and has to predict it.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import itertools
import json
import multiprocessing
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from ckpt_jax.bench.common import facts_of, output
from ckpt_jax.errors import CheckpointError

STEP_S = 0.05
MTTI_S = 12.0
_MBIT = 50.0
_STATE_NBYTES = 1_000_000
_LOCAL_EVERY_S = 2.0
_START_TIMEOUT = 120.0
# Each life is a process of its own, forked from one that has imported everything but has not touched a device: a
# restart costs a tenth of a second of this machine's time, and the arms do not starve each other.
_FRESH = multiprocessing.get_context("forkserver")


@dataclasses.dataclass(frozen=True)
class Arm:
  """A trainer under one schedule: its configuration, its run, and environment variables that lead to the run."""

  name: str
  schedule: dict[str, Any]
  run: str
  env: dict[str, str]
  directory: pathlib.Path

  @property
  def log(self) -> pathlib.Path:
    """The file of its events."""
    return self.directory / f"{self.name}.jsonl"


def measure(kills: int, seed: int, progress: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
  """Measures one round of all arms: `kills` lives each, about `kills` * 16 s. Needs root, for the link.

  Args:
    kills: lives of each arm.
    seed: seed of the lifetimes.
    progress: called with a line about each life.
  """
  lives = lifetimes(kills, seed)
  os.environ["JAX_PLATFORMS"], os.environ["XLA_FLAGS"] = "cpu", ""
  _FRESH.set_forkserver_preload(["jax", "orbax.checkpoint", "gcsfs", "ckpt_jax.checkpointer", __name__])
  with tempfile.TemporaryDirectory() as directory:
    here = pathlib.Path(directory)
    young_daly = {"overhead": "50%", "mtti": MTTI_S}
    with contextlib.ExitStack() as stack:
      buckets = [stack.enter_context(_slow_bucket(here, str(i))) for i in range(3)]
      tried = Arm("tried", young_daly, buckets[0].url + "/tried", buckets[0].env, here)
      progress("an undisturbed run, to learn the interval that YoungDaly settles on")
      _life(tried, 20.0)
      saves = [e for e in _events(tried.log) if "saved" in e]
      work = statistics.median(np.diff([e["time"] for e in saves])) - statistics.median(e["blocking"] for e in saves)
      steps = work / _mean_step_s(tried)
      arms = [Arm("young_daly", young_daly, buckets[0].url + "/run", buckets[0].env, here)]
      for name, factor, bucket in (("half", 0.5, buckets[1]), ("double", 2.0, buckets[2])):
        every = {"every_steps": max(1, round(steps * factor))}
        arms.append(Arm(name, every, bucket.url + "/run", bucket.env, here))
      arms.append(Arm("local", {"every": _LOCAL_EVERY_S}, str(here / "run"), {}, here))
      with concurrent.futures.ThreadPoolExecutor(len(arms)) as pool:
        lived = list(pool.map(lambda arm: _lives(arm, lives, progress), arms))
      # Undisturbed: these arms write nothing behind training, and other work of the machine slows all of them alike.
      step_s = _mean_step_s(*arms[:3])
      found = {arm.name: _outcome(arm, times, step_s) for arm, times in zip(arms, lived, strict=True)}
  return {"seed": seed, "kills": kills, "mtti_s": MTTI_S, "step_s": step_s, "arms": found}


def lifetimes(kills: int, seed: int) -> list[float]:
  """Seconds from the first step of a life to its kill."""
  random = np.random.default_rng(seed)
  parts = (random.permutation(kills) + random.random(kills)) / kills
  return (-MTTI_S * np.log1p(-parts)).tolist()


def summary(rounds: list[dict[str, Any]]) -> dict[str, Any]:
  """Goodput of each arm over all rounds, what was predicted, and by how much YoungDaly is ahead of the others."""
  found: dict[str, Any] = {}
  for name in rounds[0]["arms"]:
    arms = [r["arms"][name] for r in rounds]
    total = sum(a["seconds"] for a in arms)
    good = sum(a["committed_s"] for a in arms)
    predicted = sum(a["predicted"] * a["seconds"] for a in arms)
    found[name] = {
      "kills": sum(a["kills"] for a in arms),
      "goodput": good / total,
      "goodput_while_up": good / sum(a["up_s"] for a in arms),
      "predicted": predicted / total,
      "predicted_off_by": predicted / good - 1,
    }
  ours = found["young_daly"]["goodput"]
  for name in ("half", "double"):
    ahead = [r["arms"]["young_daly"]["goodput"] - r["arms"][name]["goodput"] for r in rounds]
    found[name]["young_daly_ahead_by"] = ours - found[name]["goodput"]
    found[name]["young_daly_ahead_by_round"] = ahead
  return found


def _lives(arm: Arm, lives: list[float], progress: Callable[[str], None]) -> list[tuple[float, float]]:
  found = []
  for i, life in enumerate(lives):
    found.append(_life(arm, life))
    progress(f"{arm.name}: life {i + 1}/{len(lives)}, {found[-1][1]:.1f} s up, {found[-1][0]:.1f} s in all")
  return found


def _life(arm: Arm, life: float) -> tuple[float, float]:
  """Starts the trainer; kills it `life` seconds after its first step. Returns seconds in all, and since that step."""
  since = time.time()
  child = _FRESH.Process(target=_train, args=(arm.run, arm.schedule, str(arm.log), arm.env), daemon=True)
  child.start()
  try:
    while not (up := [e["up"] for e in _events(arm.log) if e.get("up", 0) > since]):
      if not child.is_alive() or time.time() > since + _START_TIMEOUT:
        break
      time.sleep(0.02)
    if up:
      child.join(timeout=max(up[0] + life - time.time(), 0))
    if not child.is_alive() or not up:
      raise CheckpointError(
        f"the trainer {arm.name} ended by itself, or was not up after {_START_TIMEOUT:.0f} s: {_tail(arm)}"
      )
  finally:
    ended = time.time()
    child.kill()
    child.join(timeout=30)
  return ended - since, ended - up[0]


def _tail(arm: Arm) -> str:
  file = arm.log.with_suffix(".stderr")
  return file.read_text(encoding="utf-8")[-2000:] if file.exists() else ""


def _outcome(arm: Arm, lived: list[tuple[float, float]], step_s: float) -> dict[str, Any]:
  from ckpt_jax.planning.simulate import Job, simulate

  listed = json.loads(output(f"the steps of {arm.name}", ["ckpt_jax", "ls", arm.run, "--json"], arm.env, 120))
  committed = max(s["step"] for s in listed) + 1
  events = _events(arm.log)
  saves = [e for e in events if "saved" in e]
  # Means, first saves included: short lives are full of them.
  job = Job(
    MTTI_S,
    statistics.mean(e["blocking"] for e in saves),
    statistics.mean(e["background"] for e in saves),
    statistics.mean(total - up for total, up in lived),
  )
  gaps = [b["time"] - a["time"] for a, b in itertools.pairwise(saves) if a["life"] == b["life"]]
  steps = arm.schedule.get("every_steps")
  if not steps and not gaps:
    raise CheckpointError(f"{arm.name}: no life saw two saves; more kills are needed to say how often it saves")
  work = steps * step_s if steps else statistics.median(gaps) - job.blocking_s
  total, up = sum(t for t, _ in lived), sum(u for _, u in lived)
  return {
    "schedule": arm.schedule,
    "kills": len(lived),
    "seconds": total,
    "up_s": up,
    "committed_s": committed * step_s,
    "goodput": committed * step_s / total,
    "predicted": simulate(job, work, lifetimes=[t for t, _ in lived]).goodput,
    "saves": len(saves),
    "work_between_saves_s": work,
    "job": dataclasses.asdict(job),
  }


@contextlib.contextmanager
def _slow_bucket(directory: pathlib.Path, name: str) -> Iterator[Any]:
  from ckpt_jax.bench.buckets import gcs_server
  from ckpt_jax.bench.link import limited_link

  objects = directory / f"objects{name}"
  objects.mkdir()
  with limited_link(_MBIT) as link, gcs_server(objects, link=link) as bucket:
    yield bucket


def _mean_step_s(*arms: Arm) -> float:
  return statistics.mean(e["s"] for arm in arms for e in _events(arm.log) if "s" in e)


def _events(log: pathlib.Path) -> list[dict[str, Any]]:
  lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
  return [event for line in lines if (event := facts_of(line))]


def _train(run: str, schedule: dict[str, Any], log: str, env: dict[str, str]) -> None:
  """One life: restore, then train until killed."""
  os.environ.update(env)
  stderr = os.open(os.path.splitext(log)[0] + ".stderr", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
  os.dup2(stderr, 1)
  os.dup2(stderr, 2)
  import jax
  import jax.numpy as jnp

  import ckpt_jax as ckpt

  @jax.jit
  def update(state):
    return {"w": [w * 0.999 + 1e-3 for w in state["w"]], "count": state["count"] + 1}

  def init():
    return {"w": [jnp.ones(_STATE_NBYTES // 4 // 8) for _ in range(8)], "count": jnp.int32(0)}

  remote = "://" in run
  limits = {"host_memory": 1} if remote else {}
  config = ckpt.Config(schedule=schedule, retention={"last": 2}, limits=limits)
  life = os.getpid()
  with open(log, "a", buffering=1, encoding="utf-8") as events, ckpt.Checkpointer(run, config) as c:

    def note(**facts: Any) -> None:
      events.write(json.dumps(facts | {"life": life}) + "\n")

    restored = c.restore_or_init(init)
    state = jax.block_until_ready(update(restored.state))
    note(up=time.time())
    seen = 0
    for step in range(restored.next_step, 10**9):
      started = time.perf_counter()
      if step > restored.next_step:
        time.sleep(STEP_S)
        state = jax.block_until_ready(update(state))
        note(s=time.perf_counter() - started)
      asked = time.time()
      c.save(step, state)
      for save in c.saves[seen:]:
        if save.background_s is not None:
          note(saved=save.step, time=asked, blocking=save.blocking_s, background=save.background_s)
          seen += 1
