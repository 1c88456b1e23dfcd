"""One save and one restore of a state under a configuration, on real storage; what `ckpt-jax tune` measures with."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from ckpt_jax.bench.worker import drop_cache
from ckpt_jax.checkpointer import Checkpointer
from ckpt_jax.config import Config
from ckpt_jax.errors import CheckpointError
from ckpt_jax.layout.structure import path_name
from ckpt_jax.run.steps import is_object_store, run_directory, tree_nbytes
from ckpt_jax.storage.connect import connect
from ckpt_jax.tuning.search import Sample

PyTree = Any


class Trials:
  """Saves and restores `state` in a directory of its own, one run for each configuration, which keeps one step."""

  def __init__(self, directory: epath.Path, state: PyTree, timeout_s: float | None = None):
    self._directory = directory
    self._timeouts = {} if timeout_s is None else {"save": timeout_s, "restore": timeout_s}
    self._state = state
    self._like = jax.tree.map(_abstract, state)
    self._open: dict[str, Checkpointer] = {}
    self._step = 0

  def __call__(self, config: Config) -> Sample:
    """One trial: the save is timed to its commit, the restore from cold storage where the page cache can be dropped."""
    c = self._checkpointer(config)
    self._step += 1
    # Write out the page cache first, so that a trial pays for its own bytes only.
    os.sync()
    started = time.perf_counter()
    c.save(self._step, self._state)
    returned = time.perf_counter()
    c.wait()
    committed = time.perf_counter()
    step = c.directory / str(self._step)
    nbytes = tree_nbytes(step)
    if not is_object_store(step):
      drop_cache(os.fspath(step))
    reading = time.perf_counter()
    jax.block_until_ready(c.restore(self._step, like=self._like).state)
    return Sample(returned - started, committed - started, time.perf_counter() - reading, nbytes)

  def _checkpointer(self, config: Config) -> Checkpointer:
    settings = Config(
      layout=config.layout.model_copy(update={"unchanged": "off"}),  # it is the same state in each trial
      limits=config.limits,
      timeouts=config.timeouts.model_copy(update=self._timeouts),
      storage=config.storage,
      retention={"last": 1},
      preemption={"enabled": False},
    )
    key = json.dumps(settings.to_dict(), sort_keys=True)
    if key not in self._open:
      c = self._open[key] = Checkpointer(self._directory / str(len(self._open)), settings)
      # The first save of a run opens more than the later ones do. Not a tiny one: the room that a compressed step needs
      # is estimated from the step before it.
      c.save(0, {"warm": np.random.default_rng(0).standard_normal(1 << 18, dtype=np.float32)})
      c.wait()
    return self._open[key]

  def close(self) -> None:
    """Closes every run that was opened."""
    for c in self._open.values():
      with contextlib.suppress(CheckpointError):
        c.close()


@contextlib.contextmanager
def trials(path: str | os.PathLike[str], state: PyTree, timeout_s: float | None = None) -> Iterator[Trials]:
  """Trials under `path`, which is created if necessary. Everything created is removed afterwards, on Ctrl-C too.

  A save or a restore that takes longer than `timeout_s` is an error (default: `timeouts` of the configuration).
  """
  connect(path)
  root = run_directory(path)
  made = [p for p in (root, *root.parents) if not is_object_store(p) and not p.exists()]
  directory = root / f".ckpt_jax-tune-{uuid.uuid4().hex[:12]}"
  directory.mkdir(parents=True)
  found = Trials(directory, state, timeout_s)
  try:
    yield found
  finally:
    found.close()
    with contextlib.suppress(FileNotFoundError):
      directory.rmtree()
    for parent in made:
      with contextlib.suppress(OSError):  # another program may have put files there
        parent.rmdir()


def spread(sizes: Sequence[int], limit: int) -> list[int]:
  """Indices of items, spread evenly over their bytes, that take at most `limit` together; all if they do."""
  total = sum(sizes)
  if total <= limit:
    return list(range(len(sizes)))
  chosen, taken, seen = [], 0, 0
  for i, nbytes in enumerate(sizes):
    seen += nbytes
    if taken + nbytes <= min(limit, seen * limit / total + nbytes / 2):
      chosen.append(i)
      taken += nbytes
  return chosen


def bounded(state: PyTree, limit: int) -> PyTree:
  """Whole arrays of `state`, spread evenly over its bytes, that take at most `limit` together; all if they do.

  If no array is that small, the smallest is cut along its first axis, unless it is on several devices.
  """
  leaves = [(path, x) for path, x in jax.tree_util.tree_leaves_with_path(state) if hasattr(x, "nbytes")]
  chosen = spread([x.nbytes for _, x in leaves], limit)
  if len(chosen) == len(leaves):
    return state
  kept = dict(leaves[i] for i in chosen)
  if not kept:
    path, x = min(leaves, key=lambda item: item[1].nbytes)
    rows = max(1, math.floor(x.shape[0] * limit / x.nbytes))
    kept[path] = x if len(getattr(x, "devices", tuple)()) > 1 else x[:rows]
  return {path_name(path): x for path, x in kept.items()}  # a leaf's codec follows from its path


def _abstract(x: Any) -> Any:
  if isinstance(x, jax.Array):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
  return x
