"""Tuning for a whole state by real saves and restores of a sample of it, as `ckpt-jax tune` does."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import datetime
import time
from collections.abc import Callable, Sequence
from typing import Any

from etils import epath

import ckpt_jax
from ckpt_jax.bench.trial import bounded, spread, trials
from ckpt_jax.config import Config
from ckpt_jax.config.units import count, decimal_text
from ckpt_jax.layout.codec import kind_of
from ckpt_jax.layout.contents import LeafInfo
from ckpt_jax.layout.structure import flatten
from ckpt_jax.run.steps import run_directory
from ckpt_jax.storage.space import free_bytes
from ckpt_jax.tuning.plan import Plan, make_plan
from ckpt_jax.tuning.profile import StateProfile, profile_state
from ckpt_jax.tuning.sampling import sample_kinds
from ckpt_jax.tuning.search import LEAST_ROUNDS, SINGLE_SHARE, Sample, Tuned, Update, candidates, search
from ckpt_jax.tuning.tuned_file import to_yaml

_LEAST_NBYTES = 16 << 20
_LEAST_TIMEOUT_S = 60.0  # of a trial; else the budget: storage that hangs ends the search
_SYNTHETIC_ARRAYS, _SYNTHETIC_NBYTES = 128, 512 << 20
SYNTHETIC = f"{_SYNTHETIC_ARRAYS} made-up arrays of random float32, {_SYNTHETIC_NBYTES >> 20} MiB"


@dataclasses.dataclass(frozen=True)
class Task:
  """What to tune.

  Attributes:
    path: where runs will be.
    profile: of the whole state that they save.
    sample: a part of its values, or all of them.
    what: the state's description.
    user: settings that stay.
    pack: whether packing of small arrays may be tried.
  """

  path: str
  profile: StateProfile
  sample: Any
  what: str
  user: Config
  pack: bool = False


def synthetic_state() -> Any:
  """A made-up state, SYNTHETIC."""
  import jax.numpy as jnp
  import numpy as np

  rng = np.random.default_rng(0)
  shape = (_SYNTHETIC_NBYTES // _SYNTHETIC_ARRAYS // 4096, 1024)
  return {f"w{i}": jnp.asarray(rng.standard_normal(shape, dtype=np.float32)) for i in range(_SYNTHETIC_ARRAYS)}


def saved_state(step_dir: epath.Path, leaves: Sequence[LeafInfo], limit: int) -> tuple[StateProfile, dict[str, Any]]:
  """The profile of a step's whole state, by its metadata, and a sample of its values.

  The sample is of arrays, spread evenly over the state's bytes; those above a quarter of `limit` are cut between their
  chunks. Memory: the sample and one such part, or one chunk if that is larger. Reads only the sample. Not through a
  Checkpointer, which would take over the run: a job may be writing there.

  Args:
    step_dir: a committed step.
    leaves: its leaves.
    limit: bytes of the sample.
  """
  import jax
  import numpy as np

  from ckpt_jax.restore import stream
  from ckpt_jax.restore.step import Step

  arrays = [x for x in leaves if not x.scalar and x.has_numbers]
  whole = profile_state([jax.ShapeDtypeStruct(x.shape, np.dtype(x.dtype)) for x in arrays], sample=False)
  step = Step(step_dir, Config())
  parts = [part for group in stream.parts(step, [x.path for x in arrays], max(limit // 4, 1)) for part in group]
  chosen = [parts[i] for i in spread([part.nbytes for part in parts], limit)] or parts[:1]
  read = stream.stream(step, [[part] for part in chosen])
  sample = {f"{i}/{group[0].plan.name}": _on_device(value) for i, (group, (value,)) in enumerate(read)}
  nbytes: collections.Counter[str] = collections.Counter()
  for leaf in arrays:
    nbytes[kind_of(leaf.path, np.dtype(leaf.dtype))] += leaf.nbytes
  kinds = tuple(dataclasses.replace(kind, nbytes=nbytes[kind.name]) for kind in sample_kinds(flatten(sample)))
  return dataclasses.replace(whole, kinds=kinds), sample


def _on_device(value: Any) -> Any:
  """As training holds it: numpy arrays are saved in another way. One that jax would convert stays."""
  import jax

  return jax.device_put(value) if jax.dtypes.canonicalize_dtype(value.dtype) == value.dtype else value


def tune(
  task: Task, plan: Plan, budget_s: float, limit: int, progress: Callable[[Update], None] = lambda _: None
) -> tuple[Tuned, str]:
  """Searches around `plan`, which is for the whole state, with a sample of it.

  Args:
    task: what to tune.
    plan: where the search starts.
    budget_s: seconds to measure for.
    limit: bytes that the sample may have.
    progress: called when a trial begins and when it ends.

  Returns:
    The best settings for the whole state, and the YAML file that explains them.
  """
  began = time.monotonic()
  with contextlib.ExitStack() as stack:
    sample_plan, measure = _opened(stack, task, plan, bounded(task.sample, limit), budget_s)
    left = max(budget_s - (time.monotonic() - began), 1e-3)
    tuned = search(sample_plan, task.user, measure, left, pack=task.pack, progress=progress)
  now = datetime.datetime.now(datetime.timezone.utc)
  header = [
    f"ckpt-jax {ckpt_jax.__version__} tune, {now:%Y-%m-%d %H:%M} UTC, on {plan.host.host} ({plan.host.cores} cores), "
    f"{plan.storage.kind} at {task.path}",
    f"State: {task.what}; measured on {decimal_text(sample_plan.state.nbytes)} in "
    f"{count(sample_plan.state.leaves, 'array')}, in {time.monotonic() - began:.0f} s. Medians:",
  ]
  changes = dict(tuned.best.changes)
  for key in ("limits.save_concurrency", "limits.restore_concurrency"):
    if isinstance(changes.get(key), int):  # a limit that suits the sample may be below an array of the whole state
      changes[key] = max(changes[key], plan.state.largest_local_nbytes)
  whole = dataclasses.replace(tuned, config=plan.apply(task.user).changed(changes))
  return whole, to_yaml(whole, plan, task.user, header)


def _opened(
  stack: contextlib.ExitStack, task: Task, plan: Plan, sample: Any, budget_s: float
) -> tuple[Plan, Callable[[Config], Sample]]:
  """The plan for a sample, and trials of it, so small that the budget suffices for enough rounds.

  The size follows from the plan's prediction, then from one trial, which also compiles and connects. Each candidate
  keeps a step, and has two while it saves: all of them together take half of the free space at most.
  """
  sample_plan = make_plan(sample, plan.storage, plan.host, task.user)
  number = len(candidates(sample_plan, task.user, pack=task.pack)) + 1  # and what helped together
  free = free_bytes(run_directory(task.path))
  if free is not None and sample_plan.state.nbytes > free // (4 * number):
    sample = bounded(sample, max(1, free // (4 * number)))
    sample_plan = make_plan(sample, plan.storage, plan.host, task.user)
  trial_s = SINGLE_SHARE * budget_s / LEAST_ROUNDS / number
  took = sample_plan.commit_s + sample_plan.restore_s
  for last in (False, True):
    nbytes = sample_plan.state.nbytes
    sample = bounded(sample, max(_LEAST_NBYTES, int(nbytes * min(1.0, trial_s / max(took, 1e-9)))))
    sample_plan = make_plan(sample, plan.storage, plan.host, task.user)
    measure = stack.enter_context(trials(task.path, sample, max(_LEAST_TIMEOUT_S, budget_s)))
    started = time.monotonic()
    measure(sample_plan.apply(task.user))
    took = time.monotonic() - started
    if last or took <= 2 * trial_s or sample_plan.state.nbytes <= _LEAST_NBYTES:
      return sample_plan, measure
    stack.close()
  raise AssertionError("unreachable")
