"""One answer for all processes: process 0 looks at storage or the clock, or all give their numbers to all."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from ckpt_jax import errors
from ckpt_jax.errors import CheckpointError
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


def from_all_processes(mine: np.ndarray) -> np.ndarray:
  """64-bit numbers of every process, [processes, *shape], on every process. All call it alike; one process: no cost."""
  if jax.process_count() == 1:
    return mine[None]
  # As bytes: jax without x64 would cut 64-bit numbers to 32.
  everyone = np.asarray(multihost_utils.process_allgather(mine.view(np.uint8)), np.uint8).reshape(-1)
  return everyone.view(mine.dtype).reshape(jax.process_count(), *mine.shape)


def decided_by_process_zero(decide: Callable[[], Sequence[Any]], rendezvous: Rendezvous, timeout: float) -> list[Any]:
  """The result of `decide`, which JSON can hold, on process 0, or the error that it raises there, on every process.

  A bug, an error that is not a CheckpointError, is raised as it is on process 0 and as a CheckpointError on the others,
  which wait at `rendezvous` for `timeout` seconds and a minute.
  """
  if jax.process_count() == 1:
    return list(decide())
  said = ""
  bug: Exception | None = None
  if jax.process_index() == 0:
    try:
      said = json.dumps({"decided": list(decide())})
    except CheckpointError as e:
      said = json.dumps(error_to_json(e))
    except Exception as e:
      bug = e
      failed = CheckpointError(f"process 0 failed: {type(e).__name__}: {e}", topic="another-process-failed")
      said = json.dumps(error_to_json(failed))
  answer = json.loads(rendezvous.exchange("what process 0 decides", said, timeout + 60)[0])
  if bug is not None:
    raise bug
  if "error" in answer:
    raise error_from_json(answer)
  return answer["decided"]


def error_to_json(error: BaseException) -> dict[str, Any]:
  """An error, for the other processes."""
  said = {name: getattr(error, name, None) for name in ("step", "topic")}
  return {"error": type(error).__name__, "message": str(error), **said}


def error_from_json(data: dict[str, Any]) -> CheckpointError:
  """The error of another process; a CheckpointError if its class is unknown."""
  kind = getattr(errors, data["error"], CheckpointError)
  if not (isinstance(kind, type) and issubclass(kind, CheckpointError)):
    kind = CheckpointError
  step = [data["step"]] if issubclass(kind, errors.SaveFailedError) else []
  return kind(data["message"], *step, topic=data["topic"])
