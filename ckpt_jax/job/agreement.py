"""One answer for all processes: process 0 looks at storage or the clock, and tells the others."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils

from ckpt_jax import errors
from ckpt_jax.job.rendezvous import Rendezvous


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


def decided_by_process_zero(decide: Callable[[], Sequence[int]], rendezvous: Rendezvous, timeout: float) -> list[int]:
  """What `decide` returns on process 0, or the error that it raises there, on every process.

  An error that is no CheckpointError, a bug, is raised as it is on process 0 and as a CheckpointError on the others,
  which would wait for the timeout otherwise.

  Args:
    decide: called on process 0 only; may take its time.
    rendezvous: where the others wait meanwhile.
    timeout: seconds that the others wait for it.
  """
  if jax.process_count() == 1:
    return list(decide())
  told: list[int] = []
  bug: Exception | None = None
  if jax.process_index() == 0:
    try:
      found = list(decide())
      told = [0, *found] if found else []
    except errors.CheckpointError as e:
      told = [1, *json.dumps([type(e).__name__, str(e), getattr(e, "step", None)]).encode()]
    except Exception as e:
      bug = e
      told = [1, *json.dumps(["CheckpointError", f"process 0 failed: {type(e).__name__}: {e}", None]).encode()]
  # The collective beneath gives up after 30 s (gloo).
  rendezvous.wait("what process 0 decides", timeout + 60)
  told = from_process_zero(told)
  if bug is not None:
    raise bug
  if told and told[0] == 1:
    name, message, step = json.loads(bytes(told[1:]))
    kind = getattr(errors, name, errors.CheckpointError)
    raise kind(message, step) if issubclass(kind, errors.SaveFailedError) else kind(message)
  return told[1:]
