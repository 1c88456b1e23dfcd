"""Faults in real processes, over ckpt_jax and plain Orbax: what is kept, what is reported, what works afterwards.

Each row of the table is a fault, each entry in the JSON one try of it. A try is good if every step that was committed
before the fault restores bit for bit, training got one error for a lost step (none if no step was lost), the next
save works, a new process can resume, and it finds no leftovers.
"""

from __future__ import annotations

import contextlib
import dataclasses
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
from collections.abc import Callable, Mapping
from typing import Any

from ckpt_jax.bench.common import Worker, facts_of
from ckpt_jax.bench.fault_places import Place, at, unfinished_homes
from ckpt_jax.bench.fault_worker import SIDES
from ckpt_jax.bench.files import filled, markdown
from ckpt_jax.errors import CheckpointError
from ckpt_jax.multihost import Job

_MODULE = "ckpt_jax.bench.fault_worker"
# All that has a write path of its own, together: leaves that do not change, the shuffled codec, files past the cache.
_LINKED = {"frozen": 6, "config": {"layout": {"compression": "shuffled"}, "limits": {"file_io": "direct"}}}
_CROWDED = _LINKED | {"keep": 5}  # no save makes room by deleting a step
_COPIED = _LINKED | {"frozen": 7, "megabytes": 24}  # copies in a bucket begin at 16 MiB


@dataclasses.dataclass(frozen=True)
class Fault:
  """A row of the table.

  Attributes:
    text: what happens.
    scenario: of the worker; None if it is not one of its alone.
    place: what the run is in; see `fault_places.at`.
    processes: of the job, if it is killed; else 0.
    options: of the worker.
  """

  text: str
  scenario: str | None = None
  place: str | None = None
  processes: int = 0
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def shares(self) -> bool:
    """Whether steps are to take over files of those before them."""
    return "frozen" in self.options


_KILLED = "kill -9 at a random moment of a save"
_UNCHANGED = "most leaves unchanged"
FAULTS: dict[str, Fault] = {
  "kill_1": Fault(f"{_KILLED}, one process", processes=1),
  "kill_4": Fault("kill -9 of one of four processes at a random moment of a save", processes=4),
  "kill_linked": Fault(
    f"{_KILLED}, one process, {_UNCHANGED} and linked, shuffled, past the page cache", processes=1, options=_LINKED
  ),
  "kill_linked_4": Fault("the same, one of four processes", processes=4, options=_LINKED),
  "kill_gs": Fault(f"{_KILLED} into gs://, one process, {_UNCHANGED} and copied by the bucket", None, "gs", 1, _COPIED),
  "kill_s3": Fault("the same into s3://", None, "s3", 1, _COPIED),
  "full_disk": Fault("somebody else fills the disk during a save", "full_disk", "tmpfs"),
  "full_disk_linked": Fault(
    f"the same, ext4, {_UNCHANGED} and linked, shuffled, past the page cache", "full_disk", "ext4", options=_CROWDED
  ),
  "too_large": Fault("a step that does not fit, tried three times", "too_large", "tmpfs"),
  "too_large_linked": Fault(
    "the same, ext4, what has changed does not fit, the rest is linked", "too_large", "ext4", options=_CROWDED
  ),
  "read_only": Fault("file system turns read-only during a run, and back", "read_only", "tmpfs"),
  "directory_deleted": Fault("directory of a step deleted while it is written", "directory_deleted"),
  "hang": Fault("storage stops answering in the middle of a save, longer than the timeout (5 s)", "hang", "ext4"),
  "hang_gs": Fault("the same of the server of gs://", "server_stops", "gs", options=_COPIED),
  "hang_s3": Fault("the same of the server of s3://", "server_stops", "s3", options=_COPIED),
  "sigterm": Fault("SIGTERM during a save", "sigterm"),
  "odd_directories": Fault("an empty directory 4 and a foreign directory 5 in the run", "odd_directories"),
  "clock_back": Fault("the clock of the next job is a year behind", "clock_back"),
  "two_jobs": Fault("a second job writes into the same run"),
  "copied": Fault("a finished run copied with rsync -r, the original gone"),
}


def sides_of(name: str) -> list[str]:
  """Who is tried: plain Orbax has no s3://."""
  return [side for side in SIDES if side == "ckpt_jax" or FAULTS[name].place != "s3"]


def _worker(side: str, name: str, run: str, **options: Any) -> Worker:
  return Worker(_MODULE, side, name, run, json.dumps({"megabytes": 8} | options))


def kills(
  side: str, fault: Fault, seeds: list[int], megabytes: int = 16, log: Callable[[str], None] = print
) -> list[dict[str, Any]]:
  """Runs one job after another in the same run, each killed at a moment that its seed decides; see `live`."""
  found: list[dict[str, Any]] = []
  with at(fault.place) as place:
    for number, seed in enumerate([*seeds, None]):
      report, killed = _life(side, place, fault, megabytes, seed)
      if number:
        _judge_kill(side, fault, found[-1], report)
        log(f"{side}, {fault.text}, seed {found[-1]['seed']}: {'good' if found[-1]['good'] else found[-1]}")
      if seed is not None:
        found.append({"seed": seed, **killed})
  return found


def _judge_kill(side: str, fault: Fault, last: dict[str, Any], report: dict[str, Any]) -> None:
  """Completes a try by what the next job has found."""
  committed = report.get("found", [])
  last |= {
    # Three steps are kept; only the one that was being written may be lost.
    "kept": not report.get("wrong", [-1]) and (committed or [-1])[-1] >= last["begun"] - 2,
    "leftovers": report.get("leftovers", -1),
    "next": report.get("next", False),
    "told": report.get("told", []),
  }
  last["good"] = last["kept"] and last["next"] and last["leftovers"] == 0
  if fault.shares and side == "ckpt_jax" and not last["shared"]:
    last["good"] = False  # something else was tried


def _life(
  side: str, place: Place, fault: Fault, megabytes: int, seed: int | None
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Starts a job and kills it. Returns its facts, and those of its end: see `kills`."""
  rng, processes = random.Random(seed), fault.processes
  wanted, delay, victim = rng.randint(2, 4), rng.uniform(0, 0.25 * processes**0.5), rng.randrange(processes)
  if fault.shares:
    wanted += 4  # with new arrays in each save, the fourth of a job is the first to take files over
  if place.server:
    delay *= 4  # saves take longer
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

  run = f"{place.url}/run"
  options = {"megabytes": megabytes, **fault.options, "saves": 10**6 if seed is not None else 2}
  before = place.shared() if place.server else 0
  job = Job(["-m", _MODULE, side, "live", run, json.dumps(options)], processes=processes, on_line=listen)
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
  killed: dict[str, Any] = {"victim": victim, "begun": begun[-1] if begun else -1}
  if fault.shares:
    killed |= {"shared": place.shared() - before, "amid": unfinished_homes(run)}
  return facts, killed


def one_fault(side: str, name: str, seed: int) -> dict[str, Any]:
  """Tries a fault that is not a kill once."""
  with at(FAULTS[name].place) as place:
    return {"seed": seed} | _special.get(name, _fault)(side, name, seed, place)


def _fault(side: str, name: str, seed: int, place: Place) -> dict[str, Any]:
  fault, run = FAULTS[name], f"{place.url}/run"
  scenario = fault.scenario or name
  timeout = 5.0 if scenario in ("hang", "server_stops") else 60.0
  options = {"clock": 365 * 86400.0} if name == "clock_back" else dict(fault.options)
  worker = _worker(side, scenario, run, **options, disk=place.url, server=place.server, seed=seed, timeout=timeout)
  code = worker.end(150)
  facts = worker.facts
  if name == "odd_directories":
    facts["foreign kept"] = any(p.read_text() == "mine" for p in pathlib.Path(run).glob("5*/thesis.tex"))
  new = _worker(side, "after", run, **fault.options)
  new.end(120)
  if fault.shares:
    facts["shared"] = place.shared()
  result = _judged(scenario, facts, new.facts, code)
  if side == "ckpt_jax" and not result.get("shared", True):
    result["good"] = False  # something else was tried
  return result


def _judged(name: str, facts: dict[str, Any], new: dict[str, Any], code: int | None) -> dict[str, Any]:
  errors = facts.get("errors", [])
  wants = {"too_large": 3, "sigterm": 0, "odd_directories": 0, "clock_back": 0}.get(name, 1)
  found, hit = new.get("found", []), facts.get("hit", 2)
  result: dict[str, Any] = {
    "kept": bool(set(facts.get("must stay", [hit - 1])) <= set(found) and not new.get("wrong", [1])),
    "told": errors,
    # One error for each step that is lost, and for no other: the step may have been faster than the fault.
    "told right": len(errors) == wants - (wants == 1 and hit in found),
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
  if "shared" in facts:
    result["shared"] = facts["shared"]
  if "foreign kept" in facts:
    result["kept"] = result["kept"] and facts["foreign kept"]
  result["good"] = bool(
    result["kept"] and result["told right"] and result["next"] and result["leftovers"] == 0 and result["ended"]
  )
  return result


def _two_jobs(side: str, name: str, seed: int, place: Place) -> dict[str, Any]:
  run = f"{place.url}/run"
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


def _copied(side: str, name: str, seed: int, place: Place) -> dict[str, Any]:
  disk = place.url
  first = _worker(side, "clock_back", f"{disk}/run", disk=disk, seed=seed)
  first.end(120)
  subprocess.run(["rsync", "-r", f"{disk}/run/", f"{disk}/copy"], check=True)
  shutil.rmtree(f"{disk}/run")
  new = _worker(side, "after", f"{disk}/copy")
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
    for side in sides_of(name):
      tries = rows.setdefault(name, {}).setdefault(side, [])
      done = {t["seed"] for t in tries}
      missing = [s for s in range(kill_seeds if FAULTS[name].processes else seeds) if s not in done]
      while missing and time.monotonic() < deadline:
        if FAULTS[name].processes:
          some, missing = missing[:5], missing[5:]
          tries += kills(side, FAULTS[name], some, log=log)
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
  load = round(os.getloadavg()[0], 1)
  return medians | {"rounds": rounds, "megabytes": megabytes, "files": files, "synced_again_s": again, "load": load}


def table(results: dict[str, Any]) -> str:
  """The results as a Markdown table: the number of good tries, and what went wrong in the others."""
  rows = []
  for name in (name for name in FAULTS if name in results["faults"]):
    sides = results["faults"][name]
    tries = [sides.get(side, []) for side in SIDES]
    good = [f"{sum(t['good'] for t in of)} of {len(of)}" if of else "-" for of in tries]
    rows.append((FAULTS[name].text, *good, _complaints(sides.get("orbax", []))))
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
  rows = [results["faults"].get(name, {}) for name, fault in FAULTS.items() if fault.shares and fault.processes]
  if tries := [t for row in rows for t in row.get("ckpt_jax", [])]:
    text += (
      f"\n\nOf {len(tries)} kills of ckpt_jax where steps share files, {sum(t['amid'] for t in tries)} left an "
      "unfinished step that had some of them already."
    )
  if cost := results.get("fsync"):
    text += (
      f"\n\nSyncing: {cost['megabytes']:.0f} MB, {cost['files']} files commit in {cost['on_s'] * 1e3:.0f} ms with it, "
      f"in {cost['off_s'] * 1e3:.0f} ms without (medians of {cost['rounds']}, interleaved, "
      f"at a load of {cost['load']})."
    )
  return filled(page, "faults", text)
