"""When to save and what to keep, as Orbax policies: they also work in a plain `ocp.CheckpointManager`."""

from ckpt_jax.policies.retention import Decisions, Retention, RetentionContext
from ckpt_jax.policies.schedule import AnyOf, EveryMinutes, EverySteps, OnPreemption

__all__ = [
  "AnyOf",
  "Decisions",
  "EveryMinutes",
  "EverySteps",
  "OnPreemption",
  "Retention",
  "RetentionContext",
]
