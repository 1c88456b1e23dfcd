"""What fingerprints and the look at a state's health cost: on one core, in `save`, in a commit, in a restore."""

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
from ckpt_jax.layout.sharding import global_nbytes
from ckpt_jax.layout.structure import flatten
from ckpt_jax.save import saver

_SETTLE_S = 10.0  # a file system that discards what was deleted is busy with it for a while


def adam_state() -> Any:
  """1.0 GB of float32 in 604 leaves: parameters and Adam's moments of a small transformer (W1)."""
  rng = np.random.default_rng(0)

  def matrices() -> dict[str, Any]:
    shapes: dict[str, tuple[int, ...]] = {
      "q": (768, 768),
      "k": (768, 768),
      "v": (768, 768),
      "o": (768, 768),
      "up": (768, 1024),
    }
    shapes |= {"up": (768, 1024), "b1": (768,), "b2": (1024,), "ln": (768,)}
    layers = {f"l{i}": {k: rng.standard_normal(s, dtype=np.float32) for k, s in shapes.items()} for i in range(25)}
    return layers | {"emb": rng.standard_normal((8192, 768), dtype=np.float32)}

  state = {"params": matrices(), "mu": matrices(), "nu": matrices(), "step": np.int32(0)}
  return jax.block_until_ready(jax.tree.map(jax.numpy.asarray, state))


def run(rounds: int, directory: str | None, say: Callable[[str], None]) -> dict[str, Any]:
  """Medians over `rounds`, with and without taking turns; restores cold, where the page cache can be dropped, and warm.

  Args:
    rounds: turns of each.
    directory: where to write; default: the temporary directory.
    say: told what is going on.
  """
  state = adam_state()
  nbytes, leaves = global_nbytes(state), len(jax.tree.leaves(state))
  say(f"{nbytes / 1e9:.2f} GB in {leaves} leaves")
  found: dict[str, Any] = {"nbytes": nbytes, "leaves": leaves, "cpus": os.cpu_count(), "rounds": rounds}
  taken = fingerprint.take(flatten(state))
  speeds: dict[str, dict[str, Any]] = {
    "sum": dict(health=False, hashed=()),
    "hash": dict(health=False, hashed=taken.leaves),
    "sum, hash and health": {},
    "health": dict(fingerprint=False),
  }
  for name, options in speeds.items():
    for threads in (1, 2):
      seconds = _median(rounds, functools.partial(taken.tallies, threads, **options))
      found.setdefault("gigabytes_per_second", {})[f"{name}, {threads} threads"] = nbytes / seconds / 1e9
  found["blocking_s"] = {
    "views": _median(rounds, lambda: fingerprint.take(flatten(state))),
    "views and health": _median(
      rounds, lambda: health.before_save(fingerprint.take(flatten(state)), nbytes, always=True)
    ),
  }
  found["blocking_s"]["per 100 leaves"] = found["blocking_s"]["views"] / leaves * 100
  commits: dict[str, list[float]] = {"with": [], "without": []}
  blocked: dict[str, list[float]] = {"with": [], "without": []}
  restores: dict[str, dict[str, list[float]]] = {}
  with tempfile.TemporaryDirectory(dir=directory) as work:
    place = pathlib.Path(work)
    for turn in range(rounds + 1):
      say(f"saves, round {turn} of {rounds}")
      for side in _order(turn):
        shutil.rmtree(place / side, ignore_errors=True)
        os.sync()
        fill_free_memory()
        with _recording(side == "with"), ckpt.Checkpointer(place / side) as c:
          c.save(0, state)
          c.wait()
        if turn:
          blocked[side].append(c.saves[0].blocking_s)
          commits[side].append(c.saves[0].blocking_s + (c.saves[0].background_s or 0.0))
    # Apart from the saves: a restore behind one is slower, whichever side it is on.
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    os.sync()
    time.sleep(_SETTLE_S)
    for turn in range(rounds + 1):
      say(f"restores, round {turn} of {rounds}")
      for kind, side in ((kind, side) for kind in ("cold_restore_s", "warm_restore_s") for side in _order(turn)):
        with ckpt.Checkpointer(place / "with", {"restore": {"verify": side == "with"}}) as c:
          give_memory_back()
          if kind == "cold_restore_s" and not drop_cache(str(place / "with")):
            continue
          fill_free_memory()
          started = time.perf_counter()
          got = c.restore(like=like)
          if turn:
            sides = restores.setdefault(kind, {"with": [], "without": []})
            sides[side].append(time.perf_counter() - started)
          assert got.report is not None and got.report.verified == (leaves if side == "with" else 0)
          del got
  for name, sides in {"save_blocking_s": blocked, "commit_s": commits, **restores}.items():
    medians = {side: statistics.median(values) for side, values in sides.items()}
    found[name] = medians | {"share": medians["with"] / medians["without"] - 1, "all": sides}
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
  """Saves without a record while `on` is False, to have something to compare with."""
  original = saver.record_of

  def nothing(
    step: int, state: Any, nbytes: int, nonfinite: str, where: str, judge: Callable[[Any], Any]
  ) -> record.Recording:
    return record.Recording(fingerprint.Taken(), None, judge, False, where, {})

  if not on:
    saver.record_of = nothing
  try:
    yield
  finally:
    saver.record_of = original
