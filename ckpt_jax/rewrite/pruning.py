"""Retention applied by hand to a run that no job is writing: a plan that can be printed, and its execution."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection

from etils import epath

from ckpt_jax.config import ThinConfig
from ckpt_jax.errors import CheckpointError
from ckpt_jax.job.progress import OnProgress, reported
from ckpt_jax.layout.homes import shared_by_step
from ckpt_jax.policies.retention import Retention, RetentionContext
from ckpt_jax.rewrite.thin import thin_step, thinned_nbytes
from ckpt_jax.run.deletion import StepDeleter
from ckpt_jax.run.events import Deletion
from ckpt_jax.run.journal import record
from ckpt_jax.run.steps import DELETING, StepInfo, list_steps, noted_steps, step_path
from ckpt_jax.storage.space import shared_nbytes
from ckpt_jax.storage.urls import is_object_store

_TIMEOUT_S = 24 * 3600.0  # after Ctrl-C the marks stay, and the next prune continues


@dataclasses.dataclass(frozen=True)
class Pruning:
  """What a prune does to a run.

  Attributes:
    directory: the run.
    rules: the retention that decided.
    steps: all committed steps, oldest first.
    reasons: step -> the rules that keep it; empty for a step that is deleted.
    over_budget: steps that only the budget deletes.
    thinned: steps that stay, but lose the leaves that `thin` does not keep, and their bytes afterwards.
    notes: warnings, e.g. that the budget cannot be met.
    shared: bytes that the steps have together, counted once too often for each further step that has them.
    staying: the part of the removed steps that others have too, so that deleting frees nothing.
  """

  directory: epath.Path
  rules: Retention
  steps: list[StepInfo]
  reasons: dict[int, tuple[str, ...]]
  over_budget: frozenset[int]
  thinned: dict[int, int]
  notes: tuple[str, ...]
  shared: int = 0
  staying: int = 0

  @property
  def removed(self) -> list[int]:
    """Steps that are deleted."""
    return [s.step for s in self.steps if not self.reasons[s.step]]

  @property
  def kept_nbytes(self) -> int:
    """Bytes of all steps afterwards."""
    return max(0, sum(s.nbytes for s in self.steps) - self.shared - self.freed_nbytes())

  def freed_nbytes(self, without: Collection[int] = ()) -> int:
    """Bytes that deleting and thinning free, if the steps `without` stay as they are."""
    after = dict.fromkeys(self.removed, 0) | self.thinned
    gone = sum(s.nbytes - after[s.step] for s in self.steps if s.step in after and s.step not in without)
    return max(0, gone - self.staying)

  def carry_out(self, on_progress: OnProgress | None = None) -> tuple[list[int], dict[int, str]]:
    """Deletes and thins; finishes what an earlier prune was stopped at.

    Returns:
      The thinned steps, and why steps that should be deleted or thinned are not.
    """
    gone: list[Deletion] = []
    deleter = StepDeleter(
      self.directory, timeout=_TIMEOUT_S, removed=lambda step, why: gone.append(Deletion(step=step, why=why))
    )
    resumed = set(deleter.resume())
    thinned: list[int] = []
    failed: dict[int, str] = {}
    keep = self.rules.thin.keep if isinstance(self.rules.thin, ThinConfig) else ()
    total = len(resumed) + len(self.removed) + len(self.thinned)
    with reported(on_progress, "pruning", total, lambda: len(gone) + len(thinned) + len(failed), "steps"):
      why = {step: self.rules.why_removed(step, self.over_budget) for step in self.removed}
      deleter.delete_steps(self.removed, why)
      for step in sorted(self.thinned):
        try:
          if thin_step(self.directory, step, keep, swapping=deleter.moving()):
            thinned.append(step)
        except (CheckpointError, OSError) as e:
          failed[step] = str(e)
      deleter.finish()
    record(self.directory, *gone)
    left = {step for step in self.removed if step_path(self.directory, step).exists()}
    left |= resumed & noted_steps(self.directory, DELETING)
    return thinned, failed | {step: deleter.failed.get(step, "it is still there") for step in left}


def plan_pruning(directory: epath.Path, rules: Retention) -> Pruning:
  """Applies `rules` to the committed steps of a run, as a running job would; changes nothing.

  Raises:
    CheckpointError: if a step that is to be thinned has no leaf that `thin` keeps.
  """
  steps = list_steps(directory)
  shared = {} if rules.budget is None else shared_by_step(directory, [s.step for s in steps])
  decided = rules.decide(steps, context=RetentionContext(shared=shared))
  nbytes = {s.step: s.nbytes for s in steps}
  thinned: dict[int, int] = {}
  if isinstance(rules.thin, ThinConfig):
    seen: dict[int, int] = {}  # steps of one size have the same leaves
    for step in sorted(decided.thinned):
      if nbytes[step] not in seen:
        seen[nbytes[step]] = thinned_nbytes(step_path(directory, step), rules.thin.keep)
      thinned[step] = seen[nbytes[step]]
  found = Pruning(directory, rules, steps, decided.reasons, decided.over_budget, thinned, decided.notes)
  if is_object_store(directory):  # whose copies are no links
    return found
  twice, staying = (
    shared_nbytes(os.fspath(step_path(directory, step)) for step in some) for some in (nbytes, found.removed)
  )
  return dataclasses.replace(found, shared=twice, staying=staying)
