"""Random single-bit flips over all files of a step: what ckpt_jax and plain Orbax restore then.

For each way of saving, a run is saved once by real processes. Then, again and again, one bit of one file of the newest
step is flipped, the step is verified and the run restored, and every bit that comes back is compared with what was
saved. A file is drawn first, each with the same chance, so that metadata are hit as often as data; then one of its
bits. Length and time of the file stay, as where a disk forgets.

Where steps share files, the job goes on too, since what is linked or copied next is taken from a damaged step: it
restores and then saves and restores a step, or, every other time, saves one first, without having looked.
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
import subprocess
import tempfile
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np

from ckpt_jax.bench import flips_worker
from ckpt_jax.bench.common import job_events
from ckpt_jax.bench.files import filled, markdown
from ckpt_jax.bench.variants import same_bits
from ckpt_jax.config.units import count
from ckpt_jax.errors import CheckpointError
from ckpt_jax.layout.keys import UNCHANGED

# How a restore after a flip ends. `harmless`: with the flipped step, bit for bit right, metrics and extras too; `fell
# back`: with the step before, bit for bit right, and a report of it; `detected`: with an error; `silently wrong`: else.
OUTCOMES = ("harmless", "fell back", "detected", "silently wrong")


@dataclasses.dataclass(frozen=True)
class Case:
  """A way of saving.

  Attributes:
    storage: `local` or `s3`.
    processes: of the job that saves.
    compression: see `layout.compression`.
    pack: see `layout.pack`.
    shared: whether steps take over what has not changed from the one before.
  """

  storage: str
  processes: int
  compression: str
  pack: str = "off"
  shared: bool = False

  @property
  def name(self) -> str:
    """Its name in the table."""
    kind = {"off": "raw"}.get(self.compression, self.compression)
    packed = ", packed" if self.pack == "on" else ""
    shared = ("" if not self.shared else ", copied") if self.storage == "s3" else ", linked" if self.shared else ""
    return f"{self.storage}, {count(self.processes, 'process')}, {kind}{packed}{shared}"

  @property
  def config(self) -> dict[str, Any]:
    """The settings to save with."""
    config: dict[str, Any] = {"layout": {"compression": self.compression, "pack": self.pack}}
    return config | ({"limits": {"file_io": "direct"}} if self.shared else {})

  @property
  def newest(self) -> int:
    """The step that is damaged. Of those that share step 2 is the first to write what it shares apart."""
    return 4 if self.shared else 1

  @property
  def state(self) -> dict[str, Any]:
    """Arguments of `flips_worker.values`. Copies in a bucket begin at 16 MiB."""
    return {"frozen": self.shared, "rows": 3072 if self.shared and self.storage == "s3" else 64}


def cases() -> list[Case]:
  """All combinations of storage, processes and codec, packed, shared, or neither; no four processes share in a bucket.

  There each of them would need 16 MiB, and what a process copies does not depend on the others.
  """
  return [
    Case(storage, processes, compression, pack, shared)
    for storage in ("local", "s3")
    for processes in (1, 4)
    for compression in ("off", "zstd", "shuffled")
    for pack, shared in (("off", False), ("on", False), ("off", True))
    if not (shared and storage == "s3" and processes > 1)
  ]


def run(flips: int, seed: int, say: Callable[[str], None], *, plain: bool = True) -> dict[str, Any]:
  """Runs the campaign: `flips` in all, spread evenly over the cases.

  Args:
    flips: of ckpt_jax's steps; plain Orbax, which can write to local disks only, gets as many there.
    seed: seed of the random flips.
    say: called with a line about each case.
    plain: whether plain Orbax takes part. It neither packs nor shuffles nor shares.
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
          if plain and case.pack == "off" and case.compression != "shuffled" and not case.shared:
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
  totals["ckpt_jax"]["missed by verify"] = sum(row["ckpt_jax"]["missed by verify"] for row in table)
  return totals


def _campaign(flips: list[dict[str, Any]]) -> dict[str, Any]:
  counts = collections.Counter(flip["outcome"] for flip in flips)
  missed = sum(flip["outcome"] != "harmless" and not flip.get("verify", True) for flip in flips)
  outcomes = {outcome: counts[outcome] for outcome in OUTCOMES}
  return {"outcomes": outcomes, "missed by verify": missed, "flips": flips}


def save(case: Case, side: str, url: str) -> None:
  what = json.dumps({"config": case.config, "newest": case.newest, "state": case.state})
  command = [flips_worker.__name__, side, url, what]
  job_events(f"{case.name}: {side} could not save", command, processes=case.processes, timeout=240)


def _checked(case: Case, files: list[str]) -> list[str]:
  """The files to flip bits of. Raises CheckpointError if the step shares none with others although it is to."""
  if case.shared and not any(f"/{UNCHANGED}" in file for file in files):
    raise CheckpointError(f"{case.name}: the newest step shares nothing with the one before")
  return files


def _local_campaign(case: Case, side: str, place: pathlib.Path, count: int, rng: random.Random) -> dict[str, Any]:
  original, copy = place / "original", place / "copy"
  save(case, side, str(original))
  found = sorted(p for p in (original / str(case.newest)).rglob("*") if p.is_file() and p.stat().st_size)
  if case.shared and not any(p.stat().st_nlink > 1 for p in found):
    raise CheckpointError(f"{case.name}: nothing is linked")
  files = _checked(case, [str(p.relative_to(original)) for p in found])
  outcomes = []
  for number in range(count):
    replicate(original, copy)
    file = copy / rng.choice(files)
    data, bit = _flipped(file.read_bytes(), rng)
    rot(file, data)
    flip = {"file": _generic(str(file.relative_to(copy))), "bit": str(bit)}
    outcomes.append(flip | (tried(str(copy), case, number) if side == "ckpt_jax" else {"outcome": _orbax(copy)}))
  return _campaign(outcomes)


def replicate(original: pathlib.Path, copy: pathlib.Path) -> None:
  """Copies a run, in place of an earlier copy, with its links and times."""
  shutil.rmtree(copy, ignore_errors=True)
  subprocess.run(["cp", "-a", original, copy], check=True)


def rot(file: pathlib.Path, data: bytes) -> None:
  """Gives a file, under all of its names, other bytes of the same length, and leaves its time as it is."""
  times = file.stat()
  file.write_bytes(data)
  os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def _bucket_campaign(case: Case, url: str, count: int, rng: random.Random) -> dict[str, Any]:
  from ckpt_jax.run.steps import ASIDE, NOTES, run_directory
  from ckpt_jax.storage.objects import BACKEND

  save(case, "ckpt_jax", url)
  directory = run_directory(url)
  step = directory / str(case.newest)
  files = _checked(case, sorted(key for key in BACKEND.tree(step) if (step / key).read_bytes()))
  outcomes = []
  for number in range(count):
    file = step / rng.choice(files)
    original = file.read_bytes()
    data, bit = _flipped(original, rng)
    file.write_bytes(data)
    outcomes.append({"file": _generic(str(file).removeprefix(url + "/")), "bit": str(bit)} | tried(url, case, number))
    file.write_bytes(original)
    for other in range(case.newest + 2):
      (directory / NOTES / ASIDE / str(other)).unlink(missing_ok=True)
    if (further := directory / str(case.newest + 1)).exists():
      further.rmtree()
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


def _is(state: Any, step: int, case: Case) -> bool:
  want = flips_worker.values(step, **case.state)
  return set(state) == set(want) and all(same_bits(np.asarray(state[k]), np.asarray(v)) for k, v in want.items())


def tried(url: str, case: Case, number: int) -> dict[str, Any]:
  """Whether `verify` finds the damage of a run, and how its restore ends; see the top of this file."""
  import jax

  import ckpt_jax as ckpt

  try:
    found = bool(ckpt.verify(url, case.newest))
  except CheckpointError:
    found = True
  newest, goes_on = case.newest, case.shared
  try:
    with ckpt.Checkpointer(url, ckpt.Config(**case.config, preemption={"enabled": False})) as c:

      def saved() -> int:
        step = case.newest + 1
        state = jax.tree.map(jax.numpy.asarray, flips_worker.values(step, **case.state))
        c.save(step, state, **flips_worker.beside(step))
        c.wait()
        return step

      if goes_on and number % 2:
        newest, goes_on = saved(), False
      outcome = _outcome(c.restore(), newest, case)
      if goes_on and _outcome(c.restore(saved()), newest + 1, case) != "harmless":
        outcome = "silently wrong"
  except CheckpointError:
    outcome = "detected"
  return {"verify": found, "outcome": outcome}


def _outcome(got: Any, newest: int, case: Case) -> str:
  beside = flips_worker.beside(got.step)
  if (got.metrics, got.extras) != (beside["metrics"], beside["extras"]) or not _is(got.state, got.step, case):
    return "silently wrong"
  if got.step == newest:
    return "harmless"
  return "fell back" if sorted(got.report.quarantined) == [*range(got.step + 1, newest + 1)] else "silently wrong"


def _orbax(directory: pathlib.Path) -> str:
  import jax
  import orbax.checkpoint as ocp

  case = Case("local", 1, "off")
  like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype), flips_worker.values(1))
  try:
    with ocp.CheckpointManager(directory, item_handlers=ocp.PyTreeCheckpointHandler()) as manager:
      step = manager.latest_step()
      args = ocp.checkpoint_utils.construct_restore_args(like)
      state = manager.restore(step, args=ocp.args.PyTreeRestore(like, restore_args=args))
  except Exception:
    return "detected"
  return "harmless" if step == 1 and _is(state, 1, case) else "silently wrong"


def table(results: dict[str, Any]) -> str:
  """The results as a Markdown table and a sentence."""
  rows = []
  for row in results["cases"]:
    theirs = "does not write so" if row["orbax"] is None else _counts(row["orbax"]["outcomes"])
    rows.append((row["case"], _counts(row["ckpt_jax"]["outcomes"]), theirs))
  ours, theirs = results["totals"]["ckpt_jax"], results["totals"]["orbax"]
  flips = {side: sum(totals[outcome] for outcome in OUTCOMES) for side, totals in results["totals"].items()}
  return markdown(("saved", "ckpt_jax", "plain Orbax"), rows) + (
    f"\n\nIn all: {ours['silently wrong']} of {flips['ckpt_jax']} silently wrong with ckpt_jax, "
    f"{theirs['silently wrong']} of {flips['orbax']} with plain Orbax, which never goes back by itself. "
    f"`verify` missed {ours['missed by verify']} of those that were not harmless."
  )


def _counts(outcomes: dict[str, int]) -> str:
  return "; ".join(f"{n} {outcome}" for outcome, n in outcomes.items() if n)


def render(results: dict[str, Any], page: str) -> str:
  """A page with the table in its place."""
  return filled(page, "flips", table(results))
