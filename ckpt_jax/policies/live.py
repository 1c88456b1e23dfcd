"""Retention inside a running job: what Orbax's manager knows of each step, completed with sizes, health and pins."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import jax
from etils import epath
from orbax.checkpoint import checkpoint_managers as ocp_policies

from ckpt_jax import run
from ckpt_jax.errors import CheckpointError
from ckpt_jax.policies.agree import from_process_zero
from ckpt_jax.policies.retention import Retention, RetentionContext

_log = logging.getLogger(__name__)


class LiveRetention(ocp_policies.PreservationPolicy):
  """Asks `rules` on process 0 and tells the others, so that all managers agree on which steps there are.

  Storage is read once for each step at most, and only for what the rules need: one listing of the pins at each save,
  the health of the newest steps, and sizes if there is a budget.

  Attributes:
    rules: the retention in force.
    restoring: steps that this process is reading.
  """

  def __init__(self, rules: Retention, directory: epath.Path):
    self.rules = rules
    self.restoring: set[int] = set()
    self._directory = directory
    self._known: dict[int, tuple[int, bool | None]] = {}  # step -> bytes, healthy
    self._told: set[str] = set()

  def note(self, step: int, nbytes: int, healthy: bool | None) -> None:
    """Tells what a save is about to write, which storage cannot know before the commit."""
    self._known[step] = (nbytes, healthy)

  def should_preserve(self, checkpoints: Sequence[Any], *, context: Any = None) -> Sequence[bool]:
    if self.rules.keeps_all or not checkpoints:
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
    if self.rules.budget is not None:
      self._read([n for n in numbers if n not in self._known])
    else:
      for step in numbers:
        if step not in self._known:
          self._read([step])
        if self._known[step][1] is not False:
          break
    steps = []
    for c in checkpoints:
      nbytes, healthy = self._known.get(c.step, (0, None))
      steps.append(run.StepInfo(c.step, c.time, nbytes, c.metrics or {}, healthy))
    pinned = run.noted_steps(self._directory, run.PINS)
    decided = self.rules.decide(steps, context=RetentionContext(pinned, self.restoring))
    for note in set(decided.notes) - self._told:
      self._told.add(note)
      _log.warning("%s: %s", self._directory, note)
    self._known = {step: facts for step, facts in self._known.items() if decided.reasons.get(step)}
    return decided.removed

  def _read(self, steps: Sequence[int]) -> None:
    if not steps:
      return
    with concurrent.futures.ThreadPoolExecutor(min(16, len(steps))) as pool:
      for step, facts in zip(steps, pool.map(self._facts, steps), strict=True):
        self._known[step] = facts

  def _facts(self, step: int) -> tuple[int, bool | None]:
    try:
      info = run.step_info(self._directory, step)
    except (CheckpointError, OSError):
      return 0, False  # nothing that the newest healthy step could be
    return info.nbytes, info.healthy


@dataclasses.dataclass(frozen=True)
class Pruning:
  """What a prune would do.

  Attributes:
    steps: all committed steps, oldest first.
    reasons: step -> the rules that keep it; empty if it goes.
    over_budget: steps that only the budget removes.
    notes: what the reader should know.
  """

  steps: list[run.StepInfo]
  reasons: dict[int, tuple[str, ...]]
  over_budget: frozenset[int]
  notes: tuple[str, ...]

  @property
  def removed(self) -> list[run.StepInfo]:
    return [s for s in self.steps if not self.reasons[s.step]]


def plan_pruning(path: str, rules: Retention) -> Pruning:
  """Applies `rules` to the committed steps of a run, as the live policy would; deletes nothing."""
  steps = run.list_steps(path)
  decided = rules.decide(steps)
  return Pruning(steps, decided.reasons, decided.over_budget, decided.notes)
