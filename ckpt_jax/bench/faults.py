"""Faults in real processes, over ckpt_jax and plain Orbax: what is kept, what is reported, what works afterwards.

Each row of the table is a fault, each entry in the JSON one try of it. A try is good if every step that was committed
before the fault restores bit for bit, training got one error for a lost step (none if no step was lost), the next
save works, a new process can resume, and it finds no leftovers.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import random
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from ckpt_jax.bench.common import Worker, facts_of
from ckpt_jax.bench.fault_worker import SIDES
from ckpt_jax.bench.files import filled, markdown
from ckpt_jax.errors import CheckpointError
from ckpt_jax.multihost import Job

_MODULE = "ckpt_jax.bench.fault_worker"
KILLS = {"kill_1": 1, "kill_4": 4}
FAULTS: dict[str, str] = {
  "kill_1": "kill -9 at a random moment of a save, one process",
  "kill_4": "kill -9 of one of four processes at a random moment of a save",
  "full_disk": "somebody else fills the disk during a save",
  "too_large": "a step that does not fit, tried three times",
  "read_only": "file system turns read-only during a run, and back",
  "directory_deleted": "directory of a step deleted while it is written",
  "hang": "storage stops answering in the middle of a save, longer than the timeout (5 s)",
  "sigterm": "SIGTERM during a save",
  "odd_directories": "an empty directory 4 and a foreign directory 5 in the run",
  "clock_back": "the clock of the next job is a year behind",
  "two_jobs": "a second job writes into the same run",
  "copied": "a finished run copied with rsync -r, the original gone",
}


def _worker(side: str, name: str, run: pathlib.Path, **options: Any) -> Worker:
  return Worker(_MODULE, side, name, str(run), json.dumps({"megabytes": 8} | options))


@contextlib.contextmanager
def _disk(work: pathlib.Path, name: str) -> Iterator[pathlib.Path]:
  """A file system of its own for faults that need one: a tmpfs, or ext4 in a file if it must freeze."""
  if name not in ("full_disk", "too_large", "read_only", "hang"):
    yield work
    return
  if os.geteuid() != 0:
    raise CheckpointError(f"{name}: mounting a file system needs root")
  disk = work / "disk"
  disk.mkdir()
  if name == "hang":
    image = work / "image"
    with open(image, "wb") as file:
      file.truncate(256 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True, capture_output=True)
    command = ["mount", "-o", "loop", str(image), str(disk)]
  else:
    command = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk)]
  mounted = subprocess.run(command, capture_output=True, text=True)
  if mounted.returncode:
    raise CheckpointError(f"{name}: cannot mount here: {mounted.stderr.strip()}")
  try:
    yield disk
  finally:
    if name == "hang":
      subprocess.run(["fsfreeze", "-u", disk], capture_output=True)
    subprocess.run(["umount", "-l", disk], check=True)


def kills(
  side: str, processes: int, seeds: list[int], megabytes: int = 16, log: Callable[[str], None] = print
) -> list[dict[str, Any]]:
  """Runs one job after another in the same run, each killed at a moment that its seed decides; see `live`."""
  work = pathlib.Path(tempfile.mkdtemp(prefix="ckpt-jax-faults-"))
  found: list[dict[str, Any]] = []
  try:
    for number, seed in enumerate([*seeds, None]):
      report, victim, begun = _life(side, work / "run", processes, megabytes, seed)
      if number:
        last = found[-1]
        committed = report.get("found", [])
        last |= {
          # Three steps are kept; only the one that was being written may be lost.
          "kept": not report.get("wrong", [-1]) and (committed or [-1])[-1] >= last["begun"] - 2,
          "leftovers": report.get("leftovers", -1),
          "next": report.get("next", False),
          "told": report.get("told", []),
        }
        last["good"] = last["kept"] and last["next"] and last["leftovers"] == 0
        log(f"{side}, {processes} processes, seed {last['seed']}: {'good' if last['good'] else last}")
      if seed is not None:
        found.append({"seed": seed, "victim": victim, "begun": begun})
  finally:
    shutil.rmtree(work, ignore_errors=True)
  return found


def _life(
  side: str, run: pathlib.Path, processes: int, megabytes: int, seed: int | None
) -> tuple[dict[str, Any], int, int]:
  """Starts a job and kills it. Returns its facts, the process killed, and the step that was being written."""
  rng = random.Random(seed)
  wanted, delay, victim = rng.randint(2, 4), rng.uniform(0, 0.25 * processes**0.5), rng.randrange(processes)
  facts: dict[str, Any] = {"next": False}
  begun: list[int] = []
  enough = threading.Event()

  def listen(_: int, line: str) -> None:
    message = facts_of(line)
    if "begin" in message:
      begun.append(message.pop("begin"))
      if len(begun) > 1:
        message["next"] = True  # the previous save was accepted, and the one before it is committed
      if len(begun) == wanted:
        enough.set()
    facts.update(message)

  options = json.dumps({"megabytes": megabytes, "saves": 10**6 if seed is not None else 2})
  job = Job(["-m", _MODULE, side, "live", str(run), options], processes=processes, on_line=listen)
  try:
    if seed is None:
      ended = job.wait(240)
      facts["next"] = bool(facts.get("good")) and all(r.returncode == 0 for r in ended)
    elif not enough.wait(180):
      raise CheckpointError(f"{side}: no save was begun in 180 s:\n{job.log(0)}")
    else:
      time.sleep(delay)
      job.kill(victim)
      time.sleep(0.2 if processes > 1 else 0)
  finally:
    job.stop(grace=0)
  return facts, victim, begun[-1] if begun else -1


def one_fault(side: str, name: str, seed: int) -> dict[str, Any]:
  """Tries a fault that is not a kill once."""
  work = pathlib.Path(tempfile.mkdtemp(prefix="ckpt-jax-faults-"))
  try:
    with _disk(work, name) as disk:
      return {"seed": seed} | _special.get(name, _fault)(side, name, seed, disk)
  finally:
    shutil.rmtree(work, ignore_errors=True)


def _fault(side: str, name: str, seed: int, disk: pathlib.Path) -> dict[str, Any]:
  run = disk / "run"
  clock = {"clock": 365 * 86400.0} if name == "clock_back" else {}
  timeout = 5.0 if name == "hang" else 60.0
  worker = _worker(side, name, run, disk=str(disk), seed=seed, timeout=timeout, **clock)
  code = worker.end(150)
  facts = worker.facts
  if name == "odd_directories":
    facts["foreign kept"] = any(p.read_text() == "mine" for p in run.glob("5*/thesis.tex"))
  new = _worker(side, "after", run)
  new.end(120)
  return _judged(name, facts, new.facts, code)


def _judged(name: str, facts: dict[str, Any], new: dict[str, Any], code: int | None) -> dict[str, Any]:
  errors = facts.get("errors", [])
  wants = {"too_large": 3, "sigterm": 0, "odd_directories": 0, "clock_back": 0}.get(name, 1)
  found = new.get("found", [])
  result: dict[str, Any] = {
    "kept": bool(set(facts.get("must stay", [1])) <= set(found) and not new.get("wrong", [1])),
    "told": errors,
    # The step may have been faster than the fault.
    "told right": len(errors) == wants or (wants == 1 and not errors and 2 in found),
    "next": facts.get("next", name == "sigterm") and new.get("next", False),
    "leftovers": new.get("leftovers", -1),
    "ended": code is not None,
    "notes": [*facts.get("told", []), *new.get("told", [])],
  }
  if name == "sigterm":
    result["kept"] = result["kept"] and 3 in found
    result["ended"] = code in (0, 143)
  if "waited_s" in facts:
    result["waited_s"] = round(facts["waited_s"], 1)
  if "foreign kept" in facts:
    result["kept"] = result["kept"] and facts["foreign kept"]
  result["good"] = bool(
    result["kept"] and result["told right"] and result["next"] and result["leftovers"] == 0 and result["ended"]
  )
  return result


def _two_jobs(side: str, name: str, seed: int, disk: pathlib.Path) -> dict[str, Any]:
  run = disk / "run"
  first = _worker(side, "hold", run)
  first.until("saved", 120)
  second = _worker(side, "after", run, step=5)
  second.end(120)
  first.end(120)
  refused = not second.facts.get("next", True) and any("another job" in t for t in second.facts.get("told", []))
  new = _worker(side, "after", run)
  new.end(120)
  judged = _judged(name, first.facts | {"errors": second.facts.get("told", []), "must stay": [0, 5]}, new.facts, 0)
  judged["told right"] = refused
  judged["good"] = judged["good"] and refused
  return judged


def _copied(side: str, name: str, seed: int, disk: pathlib.Path) -> dict[str, Any]:
  first = _worker(side, "clock_back", disk / "run", disk=str(disk), seed=seed)
  first.end(120)
  subprocess.run(["rsync", "-r", f"{disk}/run/", f"{disk}/copy"], check=True)
  shutil.rmtree(disk / "run")
  new = _worker(side, "after", disk / "copy")
  code = new.end(120)
  return _judged("clock_back", first.facts | {"must stay": [0, 1]}, new.facts, code)


_special: dict[str, Callable[..., dict[str, Any]]] = {"two_jobs": _two_jobs, "copied": _copied}


def campaign(
  names: list[str], seeds: int, kill_seeds: int, minutes: float, results: dict[str, Any], log: Callable[[str], None]
) -> dict[str, Any]:
  """Runs the tries that `results` lacks, until the time is over. Returns `results`."""
  deadline = time.monotonic() + minutes * 60
  rows = results.setdefault("faults", {})
  for name in names:
    for side in SIDES:
      tries = rows.setdefault(name, {}).setdefault(side, [])
      done = {t["seed"] for t in tries}
      missing = [s for s in range(kill_seeds if name in KILLS else seeds) if s not in done]
      while missing and time.monotonic() < deadline:
        if name in KILLS:
          some, missing = missing[:5], missing[5:]
          tries += kills(side, KILLS[name], some, log=log)
        else:
          seed, missing = missing[0], missing[1:]
          tries.append(one_fault(side, name, seed))
          log(f"{side}, {name}, seed {seed}: {'good' if tries[-1]['good'] else tries[-1]}")
  results["cpus"] = os.cpu_count()
  return results


def fsync_cost(rounds: int = 15, megabytes: float = 8.0) -> dict[str, Any]:
  """Seconds from `save` to the commit with `storage.fsync` on and off, interleaved, and of syncing alone."""
  import jax.numpy as jnp
  import numpy as np

  import ckpt_jax as ckpt
  from ckpt_jax.storage.durable import Sealing, seal
  from ckpt_jax.storage.space import count_files

  state = {"w": jnp.asarray(np.random.default_rng(0).standard_normal(int(megabytes * 1e6) // 4, dtype=np.float32))}
  seconds: dict[str, list[float]] = {"on": [], "off": []}
  with tempfile.TemporaryDirectory(prefix="ckpt-jax-faults-") as work, contextlib.ExitStack() as stack:
    common = {"retention": {"last": 3}, "layout": {"unchanged": "off"}}  # each save is to write the state
    runs = {
      how: stack.enter_context(ckpt.Checkpointer(pathlib.Path(work, how), {"storage": {"fsync": how}, **common}))
      for how in seconds
    }
    for step in range(rounds + 1):
      for how, c in runs.items():
        started = time.perf_counter()
        c.save(step, state)
        c.wait()
        if step:  # the first save of a process costs more
          seconds[how].append(time.perf_counter() - started)
    newest = pathlib.Path(work, "on", str(rounds))
    started = time.perf_counter()
    seal(str(newest), Sealing())
    again = time.perf_counter() - started
    files, _ = count_files(str(newest))
  medians = {f"{how}_s": statistics.median(values) for how, values in seconds.items()}
  return medians | {"rounds": rounds, "megabytes": megabytes, "files": files, "synced_again_s": again}


def table(results: dict[str, Any]) -> str:
  """The results as a Markdown table: the number of good tries, and what went wrong in the others."""
  rows = []
  for name, sides in results["faults"].items():
    tries = [sides.get(side, []) for side in SIDES]
    good = [f"{sum(t['good'] for t in of)} of {len(of)}" if of else "-" for of in tries]
    rows.append((FAULTS[name], *good, _complaints(sides.get("orbax", []))))
  return markdown(("fault", "ckpt_jax", "plain Orbax", "what went wrong with Orbax"), rows)


def _complaints(tries: list[dict[str, Any]]) -> str:
  found: dict[str, int] = {}
  for t in tries:
    if t["good"]:
      continue
    for key, text in (
      ("kept", "a step was lost, or is listed and cannot be restored"),
      ("told right", "training got no error, or more than one"),
      ("next", "the next save failed"),
      ("ended", "the process did not end as it should"),
    ):
      if not t.get(key, True):
        found[text] = found.get(text, 0) + 1
    if t["leftovers"]:
      found["leftovers stayed"] = found.get("leftovers stayed", 0) + 1
  return "; ".join(f"{text} ({count})" for text, count in found.items())


def render(results: dict[str, Any], page: str) -> str:
  """A page with the table in its place."""
  text = table(results)
  if cost := results.get("fsync"):
    text += (
      f"\n\nSyncing: {cost['megabytes']:.0f} MB, {cost['files']} files commit in {cost['on_s'] * 1e3:.0f} ms with it, "
      f"in {cost['off_s'] * 1e3:.0f} ms without (medians of {cost['rounds']}, interleaved)."
    )
  return filled(page, "faults", text)
