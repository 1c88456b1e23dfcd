"""Random single-bit flips over all files of a step: what ckpt_jax and plain Orbax restore then.

For each way of saving, a run of two steps is saved once by real processes. Then, again and again, one bit of one file
of the newer step is flipped, the run is restored, and every bit that comes back is compared with what was saved. A file
is drawn first, each with the same chance, so that metadata are hit as often as data; then one of its bits.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import logging
import os
import pathlib
import random
import shutil
import tempfile
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np

from ckpt_jax.bench import flips_worker
from ckpt_jax.bench.common import job_events
from ckpt_jax.bench.variants import same_bits
from ckpt_jax.config.units import count
from ckpt_jax.errors import CheckpointError

# How a restore after a flip ends. `harmless`: with the flipped step, bit for bit right, metrics and extras too; `fell
# back`: with the step before, bit for bit right, and a report of it; `detected`: with an error; `silently wrong`: else.
OUTCOMES = ("harmless", "fell back", "detected", "silently wrong")


@dataclasses.dataclass(frozen=True)
class Case:
  """A way of saving."""

  storage: str
  processes: int
  compression: str
  pack: str = "off"

  @property
  def name(self) -> str:
    """Its name in the table."""
    kind = "zstd" if self.compression == "on" else "raw"
    packed = ", packed" if self.pack == "on" else ""
    return f"{self.storage}, {count(self.processes, 'process')}, {kind}{packed}"

  @property
  def config(self) -> dict[str, Any]:
    """The settings to save with."""
    return {"layout": {"compression": self.compression, "pack": self.pack}}


def cases() -> list[Case]:
  """All combinations of storage, processes, compression and packing."""
  return [
    Case(storage, processes, compression, pack)
    for storage in ("local", "s3")
    for processes in (1, 4)
    for compression in ("off", "on")
    for pack in ("off", "on")
  ]


def run(flips: int, seed: int, say: Callable[[str], None], *, plain: bool = True) -> dict[str, Any]:
  """Runs the campaign: `flips` in all, spread evenly over the cases.

  Args:
    flips: of ckpt_jax's steps; plain Orbax, which can write to local disks only, gets as many there.
    seed: seed of the random flips.
    say: called with a line about each case.
    plain: whether plain Orbax takes part.
  """
  from ckpt_jax.bench.buckets import s3_server

  every = cases()
  table = []
  logging.disable(logging.CRITICAL)  # each fallback is an error in the log
  try:
    for i, case in enumerate(every):
      count = flips // len(every) + (i < flips % len(every))
      say(f"{case.name}: {count} flips")
      with tempfile.TemporaryDirectory() as work, contextlib.ExitStack() as stack:
        place = pathlib.Path(work)
        if case.storage == "s3":
          bucket = stack.enter_context(s3_server())
          stack.enter_context(mock.patch.dict(os.environ, bucket.env))
          ours = _bucket_campaign(case, f"{bucket.url}/run", count, random.Random(f"{seed} {i}"))
          theirs = None
        else:
          ours = _local_campaign(case, "ckpt_jax", place / "ours", count, random.Random(f"{seed} {i}"))
          theirs = None
          if plain and case.pack == "off":
            theirs = _local_campaign(case, "orbax", place / "orbax", count, random.Random(f"{seed} {i}"))
      table.append({"case": case.name, **dataclasses.asdict(case), "ckpt_jax": ours, "orbax": theirs})
  finally:
    logging.disable(logging.NOTSET)
  return {"seed": seed, "flips": flips, "cases": table, "totals": _totals(table)}


def _totals(table: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
  totals = {}
  for side in ("ckpt_jax", "orbax"):
    counts: collections.Counter[str] = collections.Counter()
    for row in table:
      counts.update(row[side]["outcomes"] if row[side] else {})
    totals[side] = {outcome: counts[outcome] for outcome in OUTCOMES}
  return totals


def _campaign(outcomes: list[dict[str, str]]) -> dict[str, Any]:
  counts = collections.Counter(o["outcome"] for o in outcomes)
  return {"outcomes": {outcome: counts[outcome] for outcome in OUTCOMES}, "flips": outcomes}


def _save(case: Case, side: str, url: str) -> None:
  command = [flips_worker.__name__, side, url, json.dumps(case.config)]
  job_events(f"{case.name}: {side} could not save", command, processes=case.processes, timeout=240)


def _local_campaign(case: Case, side: str, place: pathlib.Path, count: int, rng: random.Random) -> dict[str, Any]:
  original, copy = place / "original", place / "copy"
  _save(case, side, str(original))
  files = sorted(p.relative_to(original) for p in (original / "1").rglob("*") if p.is_file() and p.stat().st_size)
  outcomes = []
  for _ in range(count):
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(original, copy)
    file = rng.choice(files)
    data, bit = _flipped((copy / file).read_bytes(), rng)
    (copy / file).write_bytes(data)
    outcome = _restored_ours(str(copy)) if side == "ckpt_jax" else _restored_orbax(copy)
    outcomes.append({"file": _generic(str(file)), "bit": str(bit), "outcome": outcome})
  return _campaign(outcomes)


def _bucket_campaign(case: Case, url: str, count: int, rng: random.Random) -> dict[str, Any]:
  from ckpt_jax.run.steps import ASIDE, NOTES, run_directory
  from ckpt_jax.storage.objects import BACKEND

  _save(case, "ckpt_jax", url)
  directory = run_directory(url)
  files = sorted(key for key in BACKEND.tree(directory / "1") if (directory / "1" / key).read_bytes())
  outcomes = []
  for _ in range(count):
    file = directory / "1" / rng.choice(files)
    original = file.read_bytes()
    data, bit = _flipped(original, rng)
    file.write_bytes(data)
    outcome = _restored_ours(url)
    outcomes.append({"file": _generic(str(file).removeprefix(url + "/")), "bit": str(bit), "outcome": outcome})
    file.write_bytes(original)
    (directory / NOTES / ASIDE / "1").unlink(missing_ok=True)
  return _campaign(outcomes)


def _flipped(data: bytes, rng: random.Random) -> tuple[bytes, int]:
  bit = rng.randrange(8 * len(data))
  out = bytearray(data)
  out[bit // 8] ^= 1 << bit % 8
  return bytes(out), bit


def _generic(file: str) -> str:
  """The file without the random name of a data file."""
  parts = file.split("/")
  return "/".join([*parts[:-1], "*"]) if parts[-2:-1] == ["d"] else file


def _is(state: Any, step: int) -> bool:
  want = flips_worker.values(step)
  return set(state) == set(want) and all(same_bits(np.asarray(state[k]), np.asarray(v)) for k, v in want.items())


def _restored_ours(url: str) -> str:
  import ckpt_jax as ckpt

  try:
    with ckpt.Checkpointer(url, {"preemption": {"enabled": False}}) as c:
      got = c.restore()
  except CheckpointError:
    return "detected"
  assert got.step is not None and got.report is not None
  beside = {"batch": 1000 * got.step} == got.extras and {"loss": got.step / 4} == got.metrics
  if not (beside and _is(got.state, got.step)):
    return "silently wrong"
  if got.step == 1:
    return "harmless"
  return "fell back" if list(got.report.quarantined) == [1] else "silently wrong"


def _restored_orbax(directory: pathlib.Path) -> str:
  import jax
  import orbax.checkpoint as ocp

  like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype), flips_worker.values(1))
  try:
    with ocp.CheckpointManager(directory, item_handlers=ocp.PyTreeCheckpointHandler()) as manager:
      step = manager.latest_step()
      args = ocp.checkpoint_utils.construct_restore_args(like)
      state = manager.restore(step, args=ocp.args.PyTreeRestore(like, restore_args=args))
  except Exception:
    return "detected"
  if step == 1 and _is(state, 1):
    return "harmless"
  return "silently wrong"
