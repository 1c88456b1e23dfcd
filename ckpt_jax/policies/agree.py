"""One answer for all processes: process 0 looks at storage or the clock, and tells the others."""

from __future__ import annotations

import json
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils

from ckpt_jax import errors


def from_process_zero(steps: Sequence[int]) -> list[int]:
  """Process 0's step numbers, on every process. All of them must call it at the same point; one process: no cost."""
  if jax.process_count() == 1:
    return list(steps)
  count = int(multihost_utils.broadcast_one_to_all(np.int32(len(steps))))
  if count == 0:
    return []
  mine = list(steps) if jax.process_index() == 0 else [0] * count
  # As bytes: jax without x64 would cut 64-bit numbers to 32.
  sent = multihost_utils.broadcast_one_to_all(np.array(mine, np.int64).view(np.uint8))
  return [int(s) for s in np.asarray(sent, np.uint8).view(np.int64)]


# The first of these that a process raises is what all raise: a fault of storage or of the call says nothing of a step.
_PRECEDENCE = (errors.StorageError, errors.ConfigError, errors.StructureMismatchError, errors.NoCheckpointError)
_MAX_MESSAGE = 8000


def raise_together(error: Exception | None) -> None:
  """Raises on every process what any of them has to report; None if this one has nothing.

  All must call it at the same point. A process that kept its error to itself would leave the others waiting.
  """
  if jax.process_count() == 1:
    if error is not None:
      raise error
    return
  mine = b"" if error is None else json.dumps([type(error).__name__, str(error)[:_MAX_MESSAGE]]).encode()
  sizes = np.asarray(multihost_utils.process_allgather(np.int32(len(mine)))).reshape(-1)
  if not sizes.any():
    return
  padded = np.frombuffer(mine.ljust(int(sizes.max())), np.uint8)
  everyone = np.asarray(multihost_utils.process_allgather(padded), np.uint8).reshape(len(sizes), -1)
  raised = []
  for process, size in enumerate(sizes):
    if size:
      name, message = json.loads(bytes(everyone[process][:size]))
      kind = getattr(errors, name, None)
      if kind is None:
        kind, message = errors.CheckpointError, f"{name}: {message}"
      raised.append((_rank(kind), process, kind, message))
  _, process, kind, message = min(raised, key=lambda r: r[:2])
  if process == jax.process_index() and error is not None:
    raise error
  raise kind(f"process {process}: {message}")


def _rank(kind: type[Exception]) -> int:
  for rank, first in enumerate(_PRECEDENCE):
    if issubclass(kind, first):
      return rank
  return len(_PRECEDENCE) + issubclass(kind, errors.CorruptCheckpointError)
