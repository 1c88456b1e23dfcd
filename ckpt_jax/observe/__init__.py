"""What people see of a run: its records, metrics, goodput."""

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
  "Deletion",
  "End",
  "Event",
  "Failure",
  "Fallback",
  "PlanMade",
  "ProcessCost",
  "Quarantine",
  "Records",
  "Restore",
  "RetryStorm",
  "Save",
  "Start",
  "read_records",
  "scalars",
]
