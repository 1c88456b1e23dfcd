"""Measures what fingerprints and health checks cost: on one core, in `save`, in a commit, in a restore."""

from __future__ import annotations

import functools
import os
import pathlib
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np

import ckpt_jax as ckpt
from ckpt_jax.bench.runner import fill_free_memory
from ckpt_jax.bench.worker import drop_cache, give_memory_back
from ckpt_jax.integrity import fingerprint, health, record
from ckpt_jax.integrity.meant import Meant
from ckpt_jax.layout.sharding import global_nbytes
from ckpt_jax.layout.staging import HostCopies
from ckpt_jax.layout.structure import flatten
from ckpt_jax.layout.unchanged import Round
from ckpt_jax.save import saver

_SETTLE_S = 10.0  # a file system needs a while to discard the blocks of deleted files


def adam_state() -> Any:
  """1.0 GB of float32 in 604 leaves: parameters and Adam's moments of a small transformer (W1)."""
  rng = np.random.default_rng(0)

  def matrices() -> dict[str, Any]:
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys("qkvo", (768, 768))
    shapes |= {"up": (768, 1024), "b1": (768,), "b2": (1024,), "ln": (768,)}
    layers = {f"l{i}": {k: rng.standard_normal(s, dtype=np.float32) for k, s in shapes.items()} for i in range(25)}
    return layers | {"emb": rng.standard_normal((8192, 768), dtype=np.float32)}

  state = {"params": matrices(), "mu": matrices(), "nu": matrices(), "step": np.int32(0)}
  return jax.block_until_ready(jax.tree.map(jax.numpy.asarray, state))


def run(rounds: int, directory: str | None, say: Callable[[str], None]) -> dict[str, Any]:
  """Medians over `rounds`, with fingerprints and without in turn; restores from cold and from warm storage.

  Args:
    rounds: rounds that count.
    directory: where to write; default: the temporary directory.
    say: called with a line about each round.
  """
  state = adam_state()
  nbytes, leaves = global_nbytes(state), len(jax.tree.leaves(state))
  say(f"{nbytes / 1e9:.2f} GB in {leaves} leaves")
  views = _median(rounds, lambda: fingerprint.take(flatten(state)))
  checked = _median(rounds, lambda: health.before_save(fingerprint.take(flatten(state))))
  found: dict[str, Any] = {
    "nbytes": nbytes,
    "leaves": leaves,
    "cpus": os.cpu_count(),
    "rounds": rounds,
    "gigabytes_per_second": _speeds(rounds, state, nbytes),
    "blocking_s": {"views": views, "views and health": checked, "per 100 leaves": views / leaves * 100},
  }
  with tempfile.TemporaryDirectory(dir=directory) as work:
    saves = _saves(rounds, state, pathlib.Path(work), say)
    # Apart from the saves: a restore behind one is slower, whichever side it is on.
    os.sync()
    time.sleep(_SETTLE_S)
    restores = _restores(rounds, state, pathlib.Path(work), say)
  for name, sides in {**saves, **restores}.items():
    medians = {side: statistics.median(values) for side, values in sides.items()}
    found[name] = medians | {"share": medians["with"] / medians["without"] - 1, "all": sides}
  return found


def _speeds(rounds: int, state: Any, nbytes: int) -> dict[str, float]:
  taken = fingerprint.take(flatten(state))
  passes: dict[str, dict[str, Any]] = {
    "sum": dict(health=False, hashed=()),
    "hash": dict(health=False, hashed=taken.leaves),
    "sum, hash and health": {},
    "health": dict(fingerprint=False),
  }
  return {
    f"{name}, {threads} threads": nbytes / _median(rounds, functools.partial(taken.tallies, threads, **options)) / 1e9
    for name, options in passes.items()
    for threads in (1, 2)
  }


def _saves(rounds: int, state: Any, work: pathlib.Path, say: Callable[[str], None]) -> dict[str, Any]:
  """Seconds of saves, with a record of the state and without. The last steps stay in `work`."""
  found: dict[str, Any] = {name: {"with": [], "without": []} for name in ("save_blocking_s", "commit_s")}
  for turn in range(rounds + 1):
    say(f"saves, round {turn} of {rounds}")
    for side in _order(turn):
      shutil.rmtree(work / side, ignore_errors=True)
      os.sync()
      fill_free_memory()
      with _recording(side == "with"), ckpt.Checkpointer(work / side) as c:
        c.save(0, state)
        c.wait()
      if turn:
        found["save_blocking_s"][side].append(c.saves[0].blocking_s)
        found["commit_s"][side].append(c.saves[0].blocking_s + (c.saves[0].background_s or 0.0))
  return found


def _restores(rounds: int, state: Any, work: pathlib.Path, say: Callable[[str], None]) -> dict[str, Any]:
  """Seconds of restores, verified and not; cold ones only where the page cache can be dropped."""
  found: dict[str, Any] = {}
  like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
  for turn in range(rounds + 1):
    say(f"restores, round {turn} of {rounds}")
    for kind, side in ((kind, side) for kind in ("cold_restore_s", "warm_restore_s") for side in _order(turn)):
      with ckpt.Checkpointer(work / "with", {"restore": {"verify": side == "with"}}) as c:
        give_memory_back()
        if kind == "cold_restore_s" and not drop_cache(str(work / "with")):
          continue
        fill_free_memory()
        started = time.perf_counter()
        got = c.restore(like=like)
        if turn:
          found.setdefault(kind, {"with": [], "without": []})[side].append(time.perf_counter() - started)
        assert got.report is not None
        assert got.report.verified == (len(jax.tree.leaves(state)) if side == "with" else 0)
        del got
  return found


def _order(turn: int) -> tuple[str, str]:
  return ("with", "without") if turn % 2 else ("without", "with")


def _median(rounds: int, action: Callable[[], Any]) -> float:
  seconds = []
  for _ in range(rounds + 1):
    started = time.perf_counter()
    action()
    seconds.append(time.perf_counter() - started)
  return statistics.median(seconds[1:])


@contextmanager
def _recording(on: bool) -> Iterator[None]:
  """Saves without a record if `on` is False, for comparison."""
  original = saver.record_of

  def nothing(
    state: Any,
    nbytes: int,
    nonfinite: str,
    where: str,
    meant: Meant,
    copies: HostCopies,
    unchanged: Round | None = None,
  ) -> record.Recording:
    return record.Recording(fingerprint.Taken(copies=copies), None, meant, False, where, {})

  if not on:
    saver.record_of = nothing
  try:
    yield
  finally:
    saver.record_of = original
