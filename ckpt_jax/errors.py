"""Every error that ckpt_jax raises.

One root, so that a trainer can write `except ckpt_jax.CheckpointError`. Each message says what happened, to which leaf,
path or key, and what to do next. A note below it (PEP 678) names the topic of docs/troubleshooting.md, which `ckpt-jax
explain` prints without a network.
"""

from __future__ import annotations

from typing import Any


class CheckpointError(Exception):
  """Base of all errors raised on purpose by this package.

  Attributes:
    topic: the section of docs/troubleshooting.md about it. A class has one for all its errors, and `topic=` names
      another one for a particular situation.
  """

  topic = "anything-else"

  def __init__(self, *args: Any, topic: str | None = None):
    super().__init__(*args)
    if topic is not None:
      self.topic = topic
    self.add_note(f"What to do: ckpt-jax explain {self.topic}")


class ConfigError(CheckpointError, ValueError):
  """A configuration key or value is wrong. The message gives file, line and the nearest right name."""

  topic = "configuration"


class StorageError(CheckpointError, OSError):
  """Storage refused, failed or timed out."""

  topic = "storage-failure"


class OutOfSpaceError(StorageError):
  """The storage has no room for the write."""

  topic = "out-of-space"


class NoCheckpointError(CheckpointError, FileNotFoundError):
  """The run, or the step asked for, has no committed checkpoint."""

  topic = "no-checkpoint"


class NotARunError(CheckpointError):
  """A directory holds checkpoints that are no steps of a run. The message says what there is and how to open it."""

  topic = "not-a-run"


class StructureMismatchError(CheckpointError, ValueError):
  """`like` and the checkpoint differ. The message lists every difference by leaf path."""

  topic = "structure-mismatch"


class UnknownLeafError(StructureMismatchError, ConfigError):
  """An argument such as `only` names no leaf: both a StructureMismatchError and a ConfigError."""


class CorruptCheckpointError(CheckpointError):
  """A committed step cannot be read back as it was written."""

  topic = "damaged-step"


class RestoreTimeoutError(CheckpointError, TimeoutError):
  """A restore waited too long. The message says for what, and for which processes of the job."""

  topic = "restore-timeout"


class SaveFailedError(CheckpointError):
  """A save did not commit. Raised once, at the next save(), wait() or close() after a background failure.

  Attributes:
    step: the step that was lost. Earlier committed steps are untouched.
  """

  topic = "save-failed"

  def __init__(self, message: str, step: int | None = None, *, topic: str | None = None):
    super().__init__(message, topic=topic)
    self.step = step


class SaveOutOfSpaceError(SaveFailedError, OutOfSpaceError):
  """A save did not commit because the storage was full: both a SaveFailedError and an OutOfSpaceError."""

  topic = "out-of-space"


class SaveStorageError(SaveFailedError, StorageError):
  """A save did not commit because the storage does not let us write: both a SaveFailedError and a StorageError."""

  topic = "storage-failure"


class UnhealthyStateError(CheckpointError):
  """The state holds non-finite values and the configuration refuses to save it."""

  topic = "unhealthy-state"
