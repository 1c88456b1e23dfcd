"""Whether a copy of the state fits into host memory while it is written."""

from __future__ import annotations

import logging
from typing import Any, Literal

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from ckpt_jax.config.units import size_text
from ckpt_jax.layout.sharding import largest_shard_nbytes, local_nbytes
from ckpt_jax.tuning.profile import available_memory

_log = logging.getLogger(__name__)
_HEADROOM = 1.1  # what Orbax and TensorStore need beside the copy itself


def chunk_nbytes(directory: epath.Path, state: Any, limit: int | Literal["auto"]) -> int | None:
  """None if a copy of this process's shards fits; else how much of it to hold at a time. All processes call it alike.

  Args:
    directory: the run, for messages.
    state: what is to be saved.
    limit: `limits.host_memory`.
  """
  free = available_memory()
  free = free if limit == "auto" else min(free, limit)
  needed = int(local_nbytes(state) * _HEADROOM)
  if _all_processes(needed <= free):
    return None
  chunk = max(int(largest_shard_nbytes(state) * _HEADROOM), min(10**9, free // 4))
  _log.log(
    logging.WARNING if needed > free else logging.INFO,  # another process's shortage is its own to warn of
    "%s: a copy of this process's shards needs %s of host memory and %s are free: saving in chunks, and "
    "training waits until they are written. More memory, or more processes, bring asynchronous saving back.",
    directory,
    size_text(needed),
    size_text(free),
  )
  return chunk


def _all_processes(answer: bool) -> bool:
  """True only if every process says so: all must take the same road through a save."""
  if jax.process_count() == 1:
    return answer
  return bool(np.all(multihost_utils.process_allgather(np.array(answer))))
