"""Ordinary use and common mistakes, each tried in a real process, over ckpt_jax and over plain Orbax.

A row of the table is a scenario; the JSON holds, for each side, whether it ended well, and what was seen. It ends well
if nothing is lost in silence: the right thing happens, or one error explains the failure.
"""

from __future__ import annotations

import importlib.metadata
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

from ckpt_jax.bench.common import Worker, facts_of
from ckpt_jax.bench.files import filled, markdown
from ckpt_jax.bench.people_sides import SIDES
from ckpt_jax.errors import CheckpointError
from ckpt_jax.multihost import Job

_MODULE = "ckpt_jax.bench.people_worker"
_LIMIT_S = 240.0  # for one scenario, which takes seconds on an idle machine
PEOPLE: dict[str, str] = {
  "two_managers": "two runs in one process, and the save of one fails",
  "four_threads": "four threads, each with a run of its own (a sweep)",
  "two_threads_one_manager": "two threads save into one run",
  "ctrl_c": "Ctrl-C while waiting for a save, then waiting again",
  "cell_twice": "a notebook cell that opens and saves, run twice",
  "orbax_run": "a run of plain Orbax (steps 0 to 5) opened, and one step saved, with defaults",
  "flax_files": "training begun where `flax.training.checkpoints` files are (step 7)",
  "step_prefix": "training begun in a run with `step_prefix` (step 12)",
  "padded_steps": "training begun in a run with padded step numbers (step 12)",
  "step_directory": "training begun in a step's own directory, RUN/3",
  "unset_variable": "the run is `$RUN`, which is not set",
  "began_anew": "training begun again at 0 in a run that is at step 1000",
  "last_step": "20 steps of training, saved every 5 as the README says",
  "step_removed": "a step removed by hand while the run is open, and saved again",
  "preempted": "SIGTERM between two saves of one process",
  "serving": "SIGTERM to a process that only restores",
  "evaluator": "an evaluator restores the newest step while the trainer keeps one",
  "forked_worker": "forked workers (data loaders) beside an open run",
  "job_of_many": "a job of two processes saves an eager scalar",
  "hydra_path": "a run in `layers=[64,64],lr=0.1/` (Hydra)",
  "odd_names": 'leaves `{"a": {"b": x}, "a.b": y}`',
  "nnx_sequential": "an `nnx.Sequential` saved as it is",
  "single_array": "a state that is one array",
  "float_into_float32": "a Python float restored into float32",
  "weak_types": "a weakly typed scalar (optax hyperparameters)",
  "x64_to_x32": "int64 saved under x64, restored without",
  "abstract_mesh": "`like=eval_shape(init)` under `jax.set_mesh`",
  "destroyed_item": "a step of several items, one of them destroyed on disk: `verify`, or restore",
  "unreadable": "the newest step cannot be opened for now (permissions)",
  "donation": "the first step after a restore donates the state",
  "infinity_meant": "a mask of -inf and `best_loss = inf` in the state",
  "nan_by_accident": "parameters turn NaN, one step is kept",
}


def one(side: str, name: str) -> dict[str, Any]:
  """Tries one scenario once. Returns `good`, and `seen` in words."""
  work = pathlib.Path(tempfile.mkdtemp(prefix="ckpt-jax-people-"))
  try:
    good, seen = _SPECIAL.get(name, _plain)(side, name, work)
  finally:
    shutil.rmtree(work, ignore_errors=True)
  return {"good": good, "seen": seen}


def _worker(side: str, name: str, work: pathlib.Path, under: Sequence[str] = ()) -> Worker:
  return Worker(_MODULE, side, name, str(work), under=under)


def _verdict(facts: dict[str, Any], code: int | None) -> tuple[bool, str]:
  if "good" in facts:
    return bool(facts["good"]), str(facts["seen"])
  return False, "hangs" if code is None else f"the process ended with {code} before it said anything"


def _plain(side: str, name: str, work: pathlib.Path) -> tuple[bool, str]:
  process = _worker(side, name, work)
  return _verdict(process.facts, process.end())


def _unreadable(side: str, name: str, work: pathlib.Path) -> tuple[bool, str]:
  # Root reads everything unless it gives up that capability.
  if os.geteuid() == 0 and shutil.which("setpriv") is None:
    raise CheckpointError(f"{name}: needs setpriv (util-linux) to be refused anything as root")
  refused = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
  process = _worker(side, name, work, refused)
  return _verdict(process.facts, process.end())


def _preempted(side: str, name: str, work: pathlib.Path) -> tuple[bool, str]:
  process = _worker(side, "train_until_sigterm", work)
  process.until("at")
  time.sleep(1.0)
  process.child.terminate()
  code = process.end(60)
  last = process.facts.get("at", -1)
  steps = SIDES["ckpt_jax"]().steps(work / "run")
  seen = f"training was at step {last}, newest step {steps[-1] if steps else None}, exit code {_code(code)}"
  return bool(steps and steps[-1] >= last and code not in (0, None)), seen


def _code(code: int | None) -> str:
  return "none: it runs on" if code is None else str(128 - code if code < 0 else code)


def _serving(side: str, name: str, work: pathlib.Path) -> tuple[bool, str]:
  process = _worker(side, "serve_until_sigterm", work)
  process.until("at")
  process.child.terminate()
  code = process.end(30)
  return code is not None, f"exit code {_code(code)}"


def _evaluator(side: str, name: str, work: pathlib.Path) -> tuple[bool, str]:
  trainer = _worker(side, "train_and_keep_one", work)
  process = _worker(side, "evaluator", work)
  code = process.end()
  (work / "stop").touch()
  trainer.end(60)
  return _verdict(process.facts, code)


def _job_of_many(side: str, name: str, work: pathlib.Path) -> tuple[bool, str]:
  facts: dict[str, Any] = {}
  good_everywhere: list[bool] = []

  def listen(_: int, line: str) -> None:
    said = facts_of(line)
    facts.update(said)
    if "good" in said:
      good_everywhere.append(said["good"])

  job = Job(["-m", _MODULE, side, name, str(work)], processes=2, on_line=listen, env={"PYTHONWARNINGS": "ignore"})
  try:
    ended = job.wait(_LIMIT_S)
  finally:
    job.stop(grace=0)
  code = max(r.returncode for r in ended)
  good, seen = _verdict(facts, code)
  return good and good_everywhere == [True, True], seen


_SPECIAL: dict[str, Callable[[str, str, pathlib.Path], tuple[bool, str]]] = {
  "unreadable": _unreadable,
  "preempted": _preempted,
  "serving": _serving,
  "evaluator": _evaluator,
  "job_of_many": _job_of_many,
}


def campaign(
  names: list[str], minutes: float, results: dict[str, Any], log: Callable[[str], None], *, again: bool = False
) -> dict[str, Any]:
  """Tries the scenarios that `results` lacks, or all of `names` again, until the time is over. Returns `results`."""
  deadline = time.monotonic() + minutes * 60
  rows = results.setdefault("people", {})
  for name in names:
    for side in SIDES:
      row = rows.setdefault(name, {})
      if (side in row and not again) or time.monotonic() >= deadline:
        continue
      row[side] = one(side, name)
      log(f"{side}, {name}: {'good' if row[side]['good'] else 'BAD'}: {row[side]['seen']}")
  results["versions"] = {p: importlib.metadata.version(p) for p in ("orbax-checkpoint", "jax", "flax")}
  results["people"] = {name: rows[name] for name in PEOPLE if rows.get(name)}
  return results


def table(results: dict[str, Any]) -> str:
  """The results as Markdown."""
  version = results.get("versions", {}).get("orbax-checkpoint", "")
  found = results["people"].items()
  rows = [(PEOPLE[name], *(_cell(sides.get(side)) for side in SIDES)) for name, sides in found]
  good = {side: sum(bool(s.get(side, {}).get("good")) for s in results["people"].values()) for side in SIDES}
  count = len(results["people"])
  text = f"{good['ckpt_jax']} of {count} end well with ckpt_jax, {good['orbax']} of {count} with plain Orbax."
  return f"{markdown(('what people do', 'ckpt_jax', f'plain Orbax {version}'), rows)}\n\n{text}"


def _cell(tried: dict[str, Any] | None) -> str:
  if tried is None:
    return "-"
  text = tried["seen"].replace("|", "\\|").replace("<", "&lt;").replace("][", "]\\[")
  return text if tried["good"] else f"**{text}**"


def render(results: dict[str, Any], page: str) -> str:
  """A page with the table in its place."""
  return filled(page, "people", table(results))
