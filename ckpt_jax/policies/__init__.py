"""When to save and what to keep, as Orbax policies: they also work in a plain `ocp.CheckpointManager`."""

from ckpt_jax.policies.retention import Retention
from ckpt_jax.policies.schedule import AnyOf, EveryMinutes, EverySteps, OnPreemption

__all__ = ["AnyOf", "EveryMinutes", "EverySteps", "OnPreemption", "Retention"]
