"""Checkpoints for JAX and Flax trainers: a thin layer over Orbax that decides, checks and explains.

A worked example. The same lines start a run, and continue it after a crash, on one host or on hundreds:

    import jax.numpy as jnp
    import ckpt_jax as ckpt

    def init_fn():  # the state to begin with, in its shardings; run only if there is nothing to restore
      return {"params": {"w": jnp.zeros((4, 4))}, "step": jnp.int32(0)}

    with ckpt.Checkpointer("~/runs/a", ckpt.Config(schedule={"every_steps": 10}, retention={"last": 3})) as c:
      restored = c.restore_or_init(init_fn)
      state = restored.state
      for step in range(restored.next_step, 100):
        state = {"params": {"w": state["params"]["w"] + 1}, "step": state["step"] + 1}  # your train_step
        c.save(step, state, metrics={"loss": 1.0 / (step + 1)}, final=step == 99)
    # leaving the block has waited for the last write, and raised what went wrong

    c.steps()  # [StepInfo(70: ...), StepInfo(80: ...), ...]
    print(c.plan.explain())  # the settings that were left to `auto`, and why

`save` returns once the arrays may be overwritten; the write goes on behind training. What it accepts, `restore` gives
back bit for bit, on any mesh. Settings may also be a YAML file: `Checkpointer(run, "config.yaml")`.

By topic:

    save and restore     Checkpointer (save, restore, restore_or_init, wait, steps, pin, rollback), Restored, StepInfo
    configure            Config, load_config; policies: schedules and retention as objects
    know the storage     detect, probe -> StorageKind, StorageProfile; make_plan -> Plan
    before there is one  estimate -> SizeEstimate
    check and compare    verify -> Finding; diff -> Diff
    inference            export; load_quantized, load_safetensors, dequantize, QuantizedArray
    what happened        observe: records of a run, progress, goodput
    many processes       multihost: start a job of several processes on one host
    errors               CheckpointError, the base of all: ConfigError, StorageError <- OutOfSpaceError,
                         NoCheckpointError, NotARunError, StructureMismatchError, CorruptCheckpointError,
                         SaveFailedError, UnhealthyStateError, RestoreTimeoutError

`help(ckpt_jax.Checkpointer)` has all of its methods, `help(ckpt_jax.Config)` every key, `ckpt-jax --help` the commands.
Names are loaded on first use, so that `import ckpt_jax` costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ckpt_jax.errors import (
  CheckpointError,
  ConfigError,
  CorruptCheckpointError,
  NoCheckpointError,
  NotARunError,
  OutOfSpaceError,
  RestoreTimeoutError,
  SaveFailedError,
  StorageError,
  StructureMismatchError,
  UnhealthyStateError,
)
from ckpt_jax.version import __version__

if TYPE_CHECKING:
  from ckpt_jax import observe, policies
  from ckpt_jax.checkpointer import Checkpointer
  from ckpt_jax.config import Config, load_config
  from ckpt_jax.inference.export import export
  from ckpt_jax.inference.load import load_quantized, load_safetensors
  from ckpt_jax.inference.quantize import QuantizedArray, dequantize
  from ckpt_jax.planning.estimate import SizeEstimate, estimate
  from ckpt_jax.restore.diff import Diff, diff
  from ckpt_jax.restore.result import Restored
  from ckpt_jax.restore.verify import Finding, verify
  from ckpt_jax.run.steps import StepInfo
  from ckpt_jax.storage.kinds import StorageKind, detect
  from ckpt_jax.storage.probe import StorageProfile, probe
  from ckpt_jax.tuning.plan import Plan, make_plan

_LAZY = {
  "Checkpointer": "ckpt_jax.checkpointer",
  "Restored": "ckpt_jax.restore.result",
  "StepInfo": "ckpt_jax.run.steps",
  "Finding": "ckpt_jax.restore.verify",
  "verify": "ckpt_jax.restore.verify",
  "Config": "ckpt_jax.config",
  "load_config": "ckpt_jax.config",
  "Plan": "ckpt_jax.tuning.plan",
  "Diff": "ckpt_jax.restore.diff",
  "diff": "ckpt_jax.restore.diff",
  "SizeEstimate": "ckpt_jax.planning.estimate",
  "estimate": "ckpt_jax.planning.estimate",
  "StorageKind": "ckpt_jax.storage.kinds",
  "StorageProfile": "ckpt_jax.storage.probe",
  "QuantizedArray": "ckpt_jax.inference.quantize",
  "dequantize": "ckpt_jax.inference.quantize",
  "export": "ckpt_jax.inference.export",
  "load_quantized": "ckpt_jax.inference.load",
  "load_safetensors": "ckpt_jax.inference.load",
  "detect": "ckpt_jax.storage.kinds",
  "make_plan": "ckpt_jax.tuning.plan",
  "probe": "ckpt_jax.storage.probe",
}
_SUBMODULES = ("observe", "policies", "multihost")

__all__ = [
  "CheckpointError",
  "Checkpointer",
  "Config",
  "ConfigError",
  "CorruptCheckpointError",
  "Diff",
  "Finding",
  "NoCheckpointError",
  "NotARunError",
  "OutOfSpaceError",
  "Plan",
  "QuantizedArray",
  "RestoreTimeoutError",
  "Restored",
  "SaveFailedError",
  "SizeEstimate",
  "StepInfo",
  "StorageError",
  "StorageKind",
  "StorageProfile",
  "StructureMismatchError",
  "UnhealthyStateError",
  "__version__",
  "dequantize",
  "detect",
  "diff",
  "estimate",
  "export",
  "load_config",
  "load_quantized",
  "load_safetensors",
  "make_plan",
  "observe",
  "policies",
  "probe",
  "verify",
]


def __getattr__(name: str) -> Any:
  if name in _LAZY:
    return getattr(importlib.import_module(_LAZY[name]), name)
  if name in _SUBMODULES:
    return importlib.import_module(f"ckpt_jax.{name}")
  raise AttributeError(f"module 'ckpt_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
  return sorted(__all__)
