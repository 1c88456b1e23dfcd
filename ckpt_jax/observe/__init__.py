"""What people see of a run: its records, metrics, goodput."""

from ckpt_jax.job.progress import OnProgress, Progress
from ckpt_jax.observe.progress import Bar
from ckpt_jax.observe.sinks import scalars
from ckpt_jax.run.events import (
  Attempt,
  Deletion,
  End,
  Event,
  Failure,
  Fallback,
  PlanMade,
  ProcessCost,
  Quarantine,
  Restore,
  RetryStorm,
  Save,
  Start,
)
from ckpt_jax.run.journal import Records, read_records

__all__ = [
  "Attempt",
  "Bar",
  "Deletion",
  "End",
  "Event",
  "Failure",
  "Fallback",
  "OnProgress",
  "PlanMade",
  "ProcessCost",
  "Progress",
  "Quarantine",
  "Records",
  "Restore",
  "RetryStorm",
  "Save",
  "Start",
  "read_records",
  "scalars",
]
