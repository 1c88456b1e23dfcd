"""Retention inside a running job: what Orbax's manager knows of each step, completed with sizes, health and pins."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import logging
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
from etils import epath
from orbax.checkpoint import checkpoint_managers as ocp_policies

from ckpt_jax import run
from ckpt_jax.config import ThinConfig
from ckpt_jax.errors import CheckpointError
from ckpt_jax.policies.agree import from_process_zero
from ckpt_jax.policies.retention import Retention, RetentionContext
from ckpt_jax.policies.thinning import thinned_nbytes

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class _Facts:
  """What the manager does not know of a step."""

  nbytes: int = 0
  healthy: bool | None = None
  resumable: bool = True


class LiveRetention(ocp_policies.PreservationPolicy):
  """Asks `rules` on process 0 and tells the others, so that all managers agree on which steps there are.

  Storage is read once for each step at most, and only for what the rules need: one listing of the pins at each save,
  the health of the newest steps, and sizes if there is a budget.

  Attributes:
    rules: the retention in force.
    restoring: steps that this process is reading.
    thin: is given the steps to thin, on process 0.
  """

  def __init__(self, rules: Retention, directory: epath.Path):
    self.rules = rules
    self.restoring: set[int] = set()
    self.thin: Callable[[Collection[int]], None] = lambda steps: None
    self._directory = directory
    self._known: dict[int, _Facts] = {}
    self._told: set[str] = set()

  def note(self, step: int, nbytes: int, healthy: bool | None) -> None:
    """Tells what a save is about to write, which storage cannot know before the commit."""
    self._known[step] = _Facts(nbytes, healthy)

  def forget(self, step: int) -> None:
    """Tells that a step has changed in storage."""
    self._known.pop(step, None)

  def should_preserve(self, checkpoints: Sequence[Any], *, context: Any = None) -> Sequence[bool]:
    if (self.rules.keeps_all and self.rules.thin is None) or not checkpoints:
      return [True] * len(checkpoints)
    removed: list[int] = []
    if jax.process_index() == 0:
      try:
        removed = self._decide(checkpoints)
      except (CheckpointError, OSError) as e:  # an unreadable note must neither lose a step nor fail a save
        _log.warning("%s: retention cannot be decided, every step stays: %s", self._directory, e)
    gone = set(from_process_zero(removed))
    return [c.step not in gone for c in checkpoints]

  def _decide(self, checkpoints: Sequence[Any]) -> list[int]:
    numbers = sorted((c.step for c in checkpoints), reverse=True)
    if self.rules.budget is not None or self.rules.thin is not None:
      self._read([n for n in numbers if n not in self._known])
    else:
      for step in numbers:
        if step not in self._known:
          self._read([step])
        if self._known[step].healthy is not False and self._known[step].resumable:
          break
    steps = []
    for c in checkpoints:
      facts = self._known.get(c.step, _Facts())
      metrics = c.metrics or {}
      steps.append(run.StepInfo(c.step, c.time, facts.nbytes, metrics, facts.healthy, resumable=facts.resumable))
    pinned = run.noted_steps(self._directory, run.PINS)
    decided = self.rules.decide(steps, context=RetentionContext(pinned, self.restoring))
    for note in set(decided.notes) - self._told:
      self._told.add(note)
      _log.warning("%s: %s", self._directory, note)
    self._known = {step: facts for step, facts in self._known.items() if decided.reasons.get(step)}
    self.thin(decided.thinned)
    return decided.removed

  def _read(self, steps: Sequence[int]) -> None:
    if not steps:
      return
    with concurrent.futures.ThreadPoolExecutor(min(16, len(steps))) as pool:
      for step, facts in zip(steps, pool.map(self._facts, steps), strict=True):
        self._known[step] = facts

  def _facts(self, step: int) -> _Facts:
    try:
      info = run.step_info(self._directory, step)
    except (CheckpointError, OSError):
      return _Facts(healthy=False)  # nothing that the newest healthy step could be
    return _Facts(info.nbytes, info.healthy, info.resumable)


@dataclasses.dataclass(frozen=True)
class Pruning:
  """What a prune would do.

  Attributes:
    steps: all committed steps, oldest first.
    reasons: step -> the rules that keep it; empty if it goes.
    over_budget: steps that only the budget removes.
    thinned: steps that stay, but lose what `thin` does not keep, and their bytes afterwards.
    notes: what the reader should know.
  """

  steps: list[run.StepInfo]
  reasons: dict[int, tuple[str, ...]]
  over_budget: frozenset[int]
  thinned: dict[int, int]
  notes: tuple[str, ...]

  @property
  def removed(self) -> list[run.StepInfo]:
    return [s for s in self.steps if not self.reasons[s.step]]

  @property
  def kept_nbytes(self) -> int:
    """Bytes of all steps afterwards."""
    return sum(self.thinned.get(s.step, s.nbytes) for s in self.steps if self.reasons[s.step])

  @property
  def freed_nbytes(self) -> int:
    return sum(s.nbytes for s in self.steps) - self.kept_nbytes


def plan_pruning(path: str, rules: Retention) -> Pruning:
  """Applies `rules` to the committed steps of a run, as the live policy would; changes nothing.

  Raises:
    CheckpointError: if a step that is to be thinned cannot be.
  """
  steps = run.list_steps(path)
  decided = rules.decide(steps)
  nbytes = {s.step: s.nbytes for s in steps}
  after: dict[int, int] = {}
  if isinstance(rules.thin, ThinConfig):
    directory = run.run_directory(path)
    seen: dict[int, int] = {}  # steps of one size have the same leaves
    for step in sorted(decided.thinned):
      if nbytes[step] not in seen:
        seen[nbytes[step]] = thinned_nbytes(directory / str(step), rules.thin.keep)
      after[step] = seen[nbytes[step]]
  return Pruning(steps, decided.reasons, decided.over_budget, after, decided.notes)
