"""Goodput of a run across its restarts, from its records: the share of the time that became steps that stayed."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

from etils import epath

from ckpt_jax.errors import NoCheckpointError
from ckpt_jax.run.attempts import exposure, recorded
from ckpt_jax.run.events import Attempt
from ckpt_jax.run.journal import Records


@dataclasses.dataclass(frozen=True)
class Goodput:
  """What a run did with its time, in seconds.

  Attributes:
    seconds: from its first start to its last record.
    steps: committed steps that were not trained again; `step_s`: duration of one, between saves.
    productive_s: steps * step_s.
    saving_s: training waited in `save`.
    redone_s: work that was lost and trained again. Of a job that was killed nobody knows how far it was: half the time
      between two of its saves is assumed.
    down_s: between the end of one job and the first step of the next.
    other_s: the rest: compilation, evaluation, slower steps.
    attempts, interruptions: how many jobs there were, and how many did not end by themselves.
  """

  seconds: float
  steps: int
  step_s: float
  saving_s: float
  redone_s: float
  down_s: float
  attempts: int
  interruptions: int

  @property
  def productive_s(self) -> float:
    """See the class."""
    return self.steps * self.step_s

  @property
  def other_s(self) -> float:
    """See the class."""
    return max(0.0, self.seconds - self.productive_s - self.saving_s - self.redone_s - self.down_s)

  @property
  def share(self) -> float:
    """Goodput: productive_s / seconds."""
    return self.productive_s / self.seconds if self.seconds else 0.0


def goodput(directory: epath.Path, records: Records) -> Goodput:
  """The goodput of a run.

  Args:
    directory: the run, for messages.
    records: its records.

  Raises:
    NoCheckpointError: if it has no records of saves, or no job committed two steps, from which a step's time follows.
  """
  attempts = recorded(directory, records)
  work_steps = sum(a.work_steps for a in attempts)
  if not work_steps:
    raise NoCheckpointError(
      f"{directory}: no job has recorded two steps yet, from which the time of a step would follow", topic="no-records"
    )
  step_s = sum(a.work_s for a in attempts) / work_steps
  first, last = attempts[0], attempts[-1]
  lost, down = _lost_and_down(attempts, step_s)
  return Goodput(
    seconds=max(last.time - first.started, 1e-9),
    steps=max(0, last.last_step - _base(first, step_s)),
    step_s=step_s,
    saving_s=sum(a.blocking_sum + a.waited_sum for a in attempts),
    redone_s=lost,
    down_s=down,
    attempts=len(attempts),
    interruptions=exposure(attempts)[1],
  )


def _base(first: Attempt, step_s: float) -> int:
  """The step before the first one that was trained here."""
  if first.restored is not None:
    return first.restored
  # A run whose numbers go on from elsewhere cannot have trained all steps below its first.
  return -1 if (first.first_step + 1) * step_s <= first.lived_s else first.first_step


def _lost_and_down(attempts: Sequence[Attempt], step_s: float) -> tuple[float, float]:
  lost = 0.0
  down = max(0.0, (attempts[0].trained_from or attempts[0].started) - attempts[0].started)
  for before, after in itertools.pairwise(attempts):
    gap = max(0.0, (after.trained_from or after.started) - before.time)
    unseen = min(gap, before.half_interval_s) if before.end is None else 0.0
    back = max(0, before.last_step - after.restored) if after.restored is not None else 0
    lost += unseen + back * step_s
    down += gap - unseen
  return lost, down
