"""Measures what fingerprints and health checks cost: on one core, in `save`, in a commit, in a restore."""

from __future__ import annotations

import contextlib
import functools
import os
import pathlib
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax

import ckpt_jax as ckpt
from ckpt_jax.bench.common import rotated, timed
from ckpt_jax.bench.runner import fill_free_memory
from ckpt_jax.bench.suites import SUITES, state_of
from ckpt_jax.bench.variants import on_devices
from ckpt_jax.bench.worker import drop_cache, give_memory_back
from ckpt_jax.integrity import fingerprint, health, record
from ckpt_jax.integrity.meant import Meant
from ckpt_jax.layout.sharding import global_nbytes
from ckpt_jax.layout.staging import HostCopies
from ckpt_jax.layout.structure import flatten
from ckpt_jax.save import saver

_SIDES = ("without", "with")
_SETTLE_S = 10.0  # a file system needs a while to discard the blocks of deleted files


def run(rounds: int, directory: str | None, say: Callable[[str], None]) -> dict[str, Any]:
  """Medians over `rounds` on w1, with fingerprints and without in turn; restores from cold and from warm storage.

  Args:
    rounds: rounds that count.
    directory: where to write; default: the temporary directory.
    say: called with a line about each round.
  """
  w1 = SUITES["w1"]
  state = on_devices(state_of(w1), w1)
  nbytes, leaves = global_nbytes(state), len(jax.tree.leaves(state))
  say(f"{nbytes / 1e9:.2f} GB in {leaves} leaves")
  views = _median(rounds, lambda: fingerprint.take(flatten(state)))
  checked = _median(rounds, lambda: health.from_tallies(fingerprint.take(flatten(state)).tallies(2, fingerprint=False)))
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
  found: dict[str, Any] = {name: {side: [] for side in _SIDES} for name in ("save_blocking_s", "commit_s")}
  for turn in range(rounds + 1):
    say(f"saves, round {turn} of {rounds}")
    for side in rotated(_SIDES, turn):
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
    for kind, side in ((kind, side) for kind in ("cold_restore_s", "warm_restore_s") for side in rotated(_SIDES, turn)):
      with ckpt.Checkpointer(work / "with", {"restore": {"verify": side == "with"}}) as c:
        give_memory_back()
        if kind == "cold_restore_s" and not drop_cache(str(work / "with")):
          continue
        fill_free_memory()
        started = time.perf_counter()
        got = c.restore(like=like)
        if turn:
          found.setdefault(kind, {side: [] for side in _SIDES})[side].append(time.perf_counter() - started)
        assert got.report is not None
        assert got.report.verified == (len(jax.tree.leaves(state)) if side == "with" else 0)
        del got
  return found


def _median(rounds: int, action: Callable[[], Any]) -> float:
  return statistics.median([timed(action) for _ in range(rounds + 1)][1:])


@contextlib.contextmanager
def _recording(on: bool) -> Iterator[None]:
  """Saves without a record if `on` is False, for comparison."""

  def nothing(
    _state: Any, _nbytes: int, _nonfinite: str, where: str, meant: Meant, copies: HostCopies, *_: Any
  ) -> record.Recording:
    return record.Recording(fingerprint.Taken(copies=copies), None, meant, False, where, {})

  with contextlib.nullcontext() if on else mock.patch.object(saver, "record_of", nothing):
    yield
