"""Every error that ckpt_jax raises.

One root, so that a trainer can write `except ckpt_jax.CheckpointError`. Each message says what happened, to which leaf,
path or key, and what to do next.
"""

from __future__ import annotations


class CheckpointError(Exception):
  """Base of all errors raised on purpose by this package."""


class ConfigError(CheckpointError, ValueError):
  """A configuration key or value is wrong. The message gives file, line and the nearest right name."""


class StorageError(CheckpointError, OSError):
  """Storage refused, failed or timed out."""


class OutOfSpaceError(StorageError):
  """The storage has no room for the write."""


class NoCheckpointError(CheckpointError, FileNotFoundError):
  """The run, or the step asked for, has no committed checkpoint."""


class NotARunError(CheckpointError):
  """A directory holds checkpoints that are no steps of a run. The message says what there is and how to open it."""


class StructureMismatchError(CheckpointError, ValueError):
  """`like` and the checkpoint differ. The message lists every difference by leaf path."""


class UnknownLeafError(StructureMismatchError, ConfigError):
  """An argument such as `only` names no leaf: both a StructureMismatchError and a ConfigError."""


class CorruptCheckpointError(CheckpointError):
  """A committed step cannot be read back as it was written."""


class RestoreTimeoutError(CheckpointError, TimeoutError):
  """A restore waited too long. The message says for what, and for which processes of the job."""


class SaveFailedError(CheckpointError):
  """A save did not commit. Raised once, at the next save(), wait() or close() after a background failure.

  Attributes:
    step: the step that was lost. Earlier committed steps are untouched.
  """

  def __init__(self, message: str, step: int | None = None):
    super().__init__(message)
    self.step = step


class SaveOutOfSpaceError(SaveFailedError, OutOfSpaceError):
  """A save did not commit because the storage was full: both a SaveFailedError and an OutOfSpaceError."""


class SaveStorageError(SaveFailedError, StorageError):
  """A save did not commit because the storage does not let us write: both a SaveFailedError and a StorageError."""


class UnhealthyStateError(CheckpointError):
  """The state holds non-finite values and the configuration refuses to save it."""
