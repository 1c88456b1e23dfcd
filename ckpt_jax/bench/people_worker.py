"""Runs one scenario of `people.PEOPLE`, over ckpt_jax or over plain Orbax:

    python -m ckpt_jax.bench.people_worker SIDE NAME DIRECTORY

SIDE is `ckpt_jax` or `orbax`. It prints one JSON object a line; the last one with `good` is the verdict, and `seen`
describes it. Scenarios about the state itself are in `people_states`.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import pathlib
import random
import shutil
import signal
import sys
import threading
import time
from typing import Any

from ckpt_jax import multihost
from ckpt_jax.bench import people_sides
from ckpt_jax.bench.common import emit, public_functions
from ckpt_jax.bench.people_sides import SIDES, Orbax, Side, Verdict, large, line, small

# -- one process, several of everything


def two_managers(side: Side, work: pathlib.Path) -> Verdict:
  a, b = side.open(work / "a"), side.open(work / "b")
  side.save(b, 0, large(0))
  side.wait(b)
  shutil.rmtree(work / "a", ignore_errors=True)
  (work / "a").write_text("a file where the directory was")
  said = side.save(b, 1, large(1))
  try:
    side.save(a, 1, small())
    side.wait(a)
  except Exception as e:
    emit(expected=line(e))
  try:
    side.wait(b)
  except Exception as e:
    return False, f"the other's save failed too: {line(e)}"
  there = 1 in side.steps(work / "b")
  return there or not said, "the other's step is committed" if there else "the other's step is lost without an error"


def four_threads(side: Side, work: pathlib.Path) -> Verdict:
  said: list[str] = []

  def trial(number: int) -> None:
    path = work / str(number)
    try:
      with side.open(path) as m:
        for step in range(3):
          side.save(m, step, small(step))
          side.wait(m)
      said.append("" if side.steps(path) == [0, 1, 2] else "steps are missing")
    except BaseException as e:
      said.append(line(e))

  threads = [threading.Thread(target=trial, args=(i,), daemon=True) for i in range(4)]
  for thread in threads:
    thread.start()
  deadline = time.monotonic() + 60
  for thread in threads:
    thread.join(max(0.0, deadline - time.monotonic()))
  hanging = sum(thread.is_alive() for thread in threads)
  wrong = [text for text in said if text]
  if hanging or wrong:
    return False, f"{hanging} of 4 hang, {len(wrong)} failed" + (f": {wrong[0]}" if wrong else "")
  return True, "each committed its 3 steps"


def two_threads_one_manager(side: Side, work: pathlib.Path) -> Verdict:
  m, numbers, refused = side.open(work / "run"), itertools.count(), list[str]()

  def save() -> None:
    for _ in range(5):
      try:
        side.save(m, next(numbers), small())
      except Exception as e:
        refused.append(line(e))

  threads = [threading.Thread(target=save, daemon=True) for _ in range(2)]
  for thread in threads:
    thread.start()
  deadline = time.monotonic() + 60
  for thread in threads:
    thread.join(max(0.0, deadline - time.monotonic()))
  if any(thread.is_alive() for thread in threads):
    return False, "hangs"
  side.wait(m)
  count = len(side.steps(work / "run"))
  return count + len(refused) == 10, f"{count} of 10 steps are committed, {len(refused)} refused" + (
    f" ({refused[0]})" if refused else ""
  )


def ctrl_c(side: Side, work: pathlib.Path) -> Verdict:
  m, rng, early, tries = side.open(work / "run"), random.Random(0), 0, 5
  side.save(m, 0, small())
  side.wait(m)
  for step in range(1, tries + 1):
    side.save(m, step, large(step))
    timer = threading.Timer(rng.uniform(0.01, 0.1), os.kill, (os.getpid(), signal.SIGINT))
    with contextlib.suppress(KeyboardInterrupt):
      timer.start()
      side.wait(m)
      time.sleep(5)
    side.wait(m)
    early += not (work / "run" / str(step)).is_dir()  # Orbax renames a step to this when it commits
    while not (work / "run" / str(step)).is_dir() and list((work / "run").glob(f"{step}.orbax*")):
      time.sleep(0.05)
  return early == 0, f"{early} of {tries} times the second wait returned before the commit"


def cell_twice(side: Side, work: pathlib.Path) -> Verdict:
  m = None
  for step in range(2):
    m = side.open(work / "run")
    side.save(m, step, small(step))
    side.wait(m)
  del m
  steps = side.steps(work / "run")
  return steps == [0, 1], f"steps {steps}"


# -- where training begins and ends


def orbax_run(side: Side, work: pathlib.Path) -> Verdict:
  raw = Orbax()
  with raw.open(work / "run") as m:
    for step in range(6):
      raw.save(m, step, small(step))
  with side.open(work / "run") as ours:
    side.save(ours, 6, small(6))
  left = sorted(int(p.name) for p in (work / "run").iterdir() if p.name.isdigit())
  return left == list(range(7)), f"steps left: {left}"


def _begins(side: Side, path: Any, wanted: int) -> Verdict:
  import jax.numpy as jnp

  try:
    with side.open(path) as m:
      step = side.start(m, lambda: {"w": jnp.zeros(1000)})
  except Exception as e:
    return True, f"an error: {line(e)}"
  return step == wanted, f"training begins at step {step}" + ("" if step == wanted else ", without a word")


def flax_files(side: Side, work: pathlib.Path) -> Verdict:
  import warnings

  from flax import serialization

  warnings.simplefilter("ignore")
  (work / "run").mkdir()
  (work / "run" / "checkpoint_7").write_bytes(serialization.to_bytes(small(7)))
  return _begins(side, work / "run", 8)


def step_prefix(side: Side, work: pathlib.Path) -> Verdict:
  import orbax.checkpoint as ocp

  with ocp.CheckpointManager(work / "run", options=ocp.CheckpointManagerOptions(step_prefix="ckpt")) as m:
    m.save(12, args=ocp.args.StandardSave(small(12)))
  return _begins(side, work / "run", 13)


def padded_steps(side: Side, work: pathlib.Path) -> Verdict:
  import orbax.checkpoint as ocp

  with ocp.CheckpointManager(work / "run", options=ocp.CheckpointManagerOptions(step_format_fixed_length=8)) as m:
    m.save(12, args=ocp.args.StandardSave(small(12)))
  return _begins(side, work / "run", 13)


def step_directory(side: Side, work: pathlib.Path) -> Verdict:
  raw = Orbax()
  with raw.open(work / "run") as m:
    raw.save(m, 3, small(3))
  return _begins(side, work / "run" / "3", 4)


def unset_variable(side: Side, work: pathlib.Path) -> Verdict:
  os.chdir(work)
  return _begins(side, os.environ.get("NOT_SET_ANYWHERE", ""), -1)


def began_anew(side: Side, work: pathlib.Path) -> Verdict:
  with side.open(work / "run") as m:
    side.save(m, 1000, small())
  with side.open(work / "run") as m:
    try:
      said = [bool(side.save(m, step, small())) for step in range(5)]
    except Exception as e:
      return True, f"an error: {line(e)}"
  saved = len(side.steps(work / "run")) - 1
  return saved == 5, f"{said.count(False)} of 5 saves were skipped without an error"


def last_step(side: Side, work: pathlib.Path) -> Verdict:
  with side.open(work / "run", every=5) as m:
    for step in range(20):
      side.save(m, step, small(step), final=step == 19)
  newest = side.steps(work / "run")[-1]
  return newest == 19, f"newest step {newest} of 0 to 19"


def step_removed(side: Side, work: pathlib.Path) -> Verdict:
  with side.open(work / "run") as m:
    for step in range(3):
      side.save(m, step, small(step))
    side.wait(m)
    shutil.rmtree(work / "run" / "2")
    try:
      said = side.save(m, 2, small(2))
      side.wait(m)
    except Exception as e:
      return True, f"an error: {line(e)}"
  there = 2 in side.steps(work / "run")
  return there or not said, f"save(2) said {said}, and step 2 is {'there' if there else 'not there'}"


# -- processes


def train_until_sigterm(side: Side, work: pathlib.Path) -> Verdict:
  """Training that saves rarely, until SIGTERM."""
  with side.open(work / "run", every=1000) as m:
    for step in range(100_000):
      side.save(m, step, small(step))
      emit(at=step)
      time.sleep(0.02)
  return False, "SIGTERM did not end it"


def serve_until_sigterm(side: Side, work: pathlib.Path) -> Verdict:
  """A process that restores and serves, until SIGTERM."""
  with side.open(work / "run") as m:
    side.save(m, 0, small())
  m = side.open(work / "run")
  side.restore(m, 0)
  emit(at=0)
  time.sleep(300)
  return False, "SIGTERM did not end it"


def train_and_keep_one(side: Side, work: pathlib.Path) -> Verdict:
  """A trainer for `evaluator`."""
  step = 0
  with side.open(work / "run", last=1) as m:
    while not (work / "stop").exists():
      side.save(m, step, {f"w{i}": small(step)["w"] for i in range(20)})
      step += 1
  return True, f"{step} steps saved"


def evaluator(side: Side, work: pathlib.Path) -> Verdict:
  like = {f"w{i}": small()["w"] for i in range(20)}
  while not (work / "run").is_dir() or not any(p.name.isdigit() for p in (work / "run").iterdir()):
    time.sleep(0.05)
  m, errors, wrong, seen = side.open(work / "run"), list[str](), 0, set[int]()
  for _ in range(60):
    try:
      state = side.restore(m, like=like)
      values = {int(leaf[0]) for leaf in state.values()}
      seen |= values
      wrong += len(values) > 1
    except Exception as e:
      errors.append(line(e))
  text = f"{len(errors)} of 60 restores failed, {len(seen)} different steps seen"
  return not errors and not wrong, text + (f"; {errors[0]}" if errors else "")


def forked_worker(side: Side, work: pathlib.Path) -> Verdict:
  import multiprocessing
  import warnings

  warnings.simplefilter("ignore")
  fork = multiprocessing.get_context("fork")
  m = side.open(work / "run")
  side.save(m, 0, small())
  side.wait(m)
  child = fork.Process(target=abs, args=(1,))
  child.start()
  child.join(20)
  code = child.exitcode
  child.kill()
  child = fork.Process(target=time.sleep, args=(60,))
  child.start()
  time.sleep(0.5)
  child.terminate()
  child.join(10)
  ended = not child.is_alive()
  child.kill()
  side.save(m, 1, small(1))
  side.wait(m)
  good = code == 0 and ended and side.steps(work / "run") == [0, 1]
  return good, f"a worker that returns exits with {code}; terminate() {'ends' if ended else 'does not end'} another"


def job_of_many(side: Side, work: pathlib.Path) -> Verdict:
  import jax
  import jax.numpy as jnp
  from jax.sharding import NamedSharding, PartitionSpec

  mesh = jax.make_mesh((jax.device_count(),), ("x",))
  spread = NamedSharding(mesh, PartitionSpec("x"))
  w = jax.make_array_from_callback((8, 8), spread, lambda index: jnp.ones((8, 8))[index])
  state = {"w": w, "step": jnp.int32(5)}  # an eager scalar, which is local to each process
  m = side.open(work / "run")
  try:
    side.save(m, 0, state)
    side.wait(m)
  except Exception as e:
    return "step" in str(e), f"save refuses it: {line(e)}"
  try:
    got = side.restore(m, 0, like=state)
  except Exception as e:
    return False, f"saved, and restore fails: {line(e)}"
  right = int(got["step"].addressable_data(0)) == 5
  return right, f"saved and restored, the scalar is {int(got['step'].addressable_data(0))}"


SCENARIOS = public_functions(globals())


def main() -> None:
  """Runs the scenario of the command line, and prints its verdict."""
  from ckpt_jax.bench.people_states import STATES

  side, name, work = SIDES[sys.argv[1]](), sys.argv[2], pathlib.Path(sys.argv[3])
  people_sides.where = str(work)
  multihost.initialize()
  try:
    good, seen = {**SCENARIOS, **STATES}[name](side, work)
  except Exception as e:
    good, seen = False, line(e)
  emit(good=good, seen=seen)
  os._exit(0)  # a process that hangs at its end has printed its verdict


if __name__ == "__main__":
  main()
