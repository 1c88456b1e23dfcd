"""Tuning for a whole state by real saves and restores of a sample of it, as `ckpt-jax tune` does."""

from __future__ import annotations

import dataclasses
import datetime
import time
from collections.abc import Callable
from typing import Any

from etils import epath

import ckpt_jax
from ckpt_jax.bench.trial import bounded, spread, trials
from ckpt_jax.config import Config
from ckpt_jax.job.progress import OnProgress, reported
from ckpt_jax.layout import contents
from ckpt_jax.restore.read import RestoreRequest, read_state
from ckpt_jax.tuning.plan import Plan, make_plan
from ckpt_jax.tuning.search import Tuned, changed, search, to_yaml

# Share of the budget that one save and restore of the sample may take, as the plan predicts it.
_TRIAL_SHARE = 1 / 16
_LEAST_NBYTES = 16 << 20
_SYNTHETIC_ARRAYS, _SYNTHETIC_NBYTES = 128, 512 << 20


def saved_state(step_dir: epath.Path, limit: int) -> Any:
  """The state of a step, or leaves spread evenly over its bytes that take at most `limit` bytes together."""
  leaves = contents.saved_leaves(step_dir)
  names = [leaves[i].path for i in spread([leaf.nbytes for leaf in leaves], limit)]
  # Not through a Checkpointer, which would take over the run: a job may be writing there.
  return read_state(step_dir, Config(), RestoreRequest(only=None if len(names) == len(leaves) else names))


def synthetic_state() -> tuple[Any, str]:
  """A made-up state, and its description."""
  import numpy as np

  rng = np.random.default_rng(0)
  shape = (_SYNTHETIC_NBYTES // _SYNTHETIC_ARRAYS // 4096, 1024)
  state = {f"w{i}": rng.standard_normal(shape, dtype=np.float32) for i in range(_SYNTHETIC_ARRAYS)}
  return state, f"{_SYNTHETIC_ARRAYS} arrays of random float32 (give --like or --state for yours)"


@dataclasses.dataclass(frozen=True)
class Task:
  """What to tune.

  Attributes:
    path: where runs will be.
    state: the whole state that they save.
    what: its description.
    user: settings that stay.
    pack: whether packing of small arrays may be tried.
  """

  path: str
  state: Any
  what: str
  user: Config
  pack: bool = False


def tune(
  task: Task,
  plan: Plan,
  budget_s: float,
  limit: int,
  progress: Callable[[str], None] = lambda _: None,
  on_progress: OnProgress | None = None,
) -> tuple[Tuned, str]:
  """Searches around `plan`, which is for the whole state, with a sample of it.

  Args:
    task: what to tune.
    plan: where the search starts.
    budget_s: seconds to measure for.
    limit: bytes that the sample may have.
    progress: called with each result.
    on_progress: called with the seconds of the budget that are spent.

  Returns:
    The best settings for the whole state, and the YAML file that explains them.
  """
  predicted = plan.commit_s + plan.restore_s
  affordable = int(plan.state.nbytes * budget_s * _TRIAL_SHARE / max(predicted, 1e-9))
  sample = bounded(task.state, max(_LEAST_NBYTES, min(limit, affordable)))
  sample_plan = make_plan(sample, plan.storage, plan.host, task.user)
  began = time.monotonic()
  with (
    trials(task.path, sample) as measure,
    reported(on_progress, "tuning", budget_s, lambda: time.monotonic() - began, "s"),
  ):
    tuned = search(sample_plan, task.user, measure, budget_s, pack=task.pack, progress=progress)
  now = datetime.datetime.now(datetime.timezone.utc)
  header = [
    f"ckpt-jax {ckpt_jax.__version__} tune, {now:%Y-%m-%d %H:%M} UTC, on {plan.host.host} ({plan.host.cores} cores), "
    f"{plan.storage.kind} at {task.path}",
    f"State: {task.what}, {plan.state.nbytes:,} bytes in {plan.state.leaves:,} arrays; measured on "
    f"{sample_plan.state.nbytes:,} bytes in {sample_plan.state.leaves:,}, in {tuned.seconds:.0f} s. Medians:",
  ]
  changes = dict(tuned.best.changes)
  for key in ("limits.save_concurrency", "limits.restore_concurrency"):
    if isinstance(changes.get(key), int):  # a limit that suits the sample may be below an array of the whole state
      changes[key] = max(changes[key], plan.state.largest_local_nbytes)
  whole = dataclasses.replace(tuned, config=changed(plan.apply(task.user), changes))
  return whole, to_yaml(whole, plan, task.user, header)
