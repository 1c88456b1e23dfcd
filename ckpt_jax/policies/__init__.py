"""When to save and what to keep, as Orbax policies: they also work in a plain `ocp.CheckpointManager`."""

from ckpt_jax.policies.retention import Decisions, Retention, RetentionContext
from ckpt_jax.policies.schedule import AllOf, AnyOf, AtSteps, EveryMinutes, EverySteps, Never, OnPreemption
from ckpt_jax.policies.youngdaly import YoungDaly

__all__ = [
  "AllOf",
  "AnyOf",
  "AtSteps",
  "Decisions",
  "EveryMinutes",
  "EverySteps",
  "Never",
  "OnPreemption",
  "Retention",
  "RetentionContext",
  "YoungDaly",
]
