"""The restarts of a run, from its records: how long jobs lived, how they ended, and what their saves cost."""

from __future__ import annotations

from collections.abc import Iterable

from etils import epath

from ckpt_jax.errors import NoCheckpointError
from ckpt_jax.run.events import Attempt
from ckpt_jax.run.journal import Records, sum_up

CLOSED, PREEMPTED = "closed", "preempted"


def read_attempts(directory: epath.Path) -> list[Attempt]:
  """The lives of the job that committed a step, oldest first."""
  return [attempt for attempt in sum_up(directory) if attempt.saves]


def recorded(directory: epath.Path, records: Records) -> list[Attempt]:
  """The same of records that were read.

  Raises:
    NoCheckpointError: if there is none.
  """
  attempts = [attempt for attempt in records.attempts if attempt.saves]
  if not attempts:
    raise NoCheckpointError(
      f"{directory}: no recorded saves. A Checkpointer records them unless observe.events is false; other programs, "
      "and ckpt_jax before it had records, do not",
      topic="no-records",
    )
  return attempts


def exposure(attempts: Iterable[Attempt]) -> tuple[float, int]:
  """Seconds that the attempts ran, and how many of them were interrupted.

  A killed job is assumed to have lived half an interval beyond its last record.
  """
  seconds, interrupted = 0.0, 0
  for a in attempts:
    seconds += a.lived_s + (0.0 if a.end else a.half_interval_s)
    interrupted += a.end != CLOSED
  return seconds, interrupted
