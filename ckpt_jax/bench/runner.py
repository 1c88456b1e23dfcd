"""Measures suites: every variant in its turn, rounds interleaved, the order rotated from round to round.

A turn is one save, a cold and a warm restore, and the check of every bit. Everything else (making the state, the first
save of a process, removing earlier steps) happens outside of the timings.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import os
import pathlib
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import psutil

import ckpt_jax
from ckpt_jax.bench.buckets import gcs_server, s3_server
from ckpt_jax.bench.common import RemoteWorker, rotated
from ckpt_jax.bench.suites import Suite
from ckpt_jax.bench.variants import VARIANTS, Variant, left_out, python_of
from ckpt_jax.bench.worker import drop_cache
from ckpt_jax.errors import CheckpointError, ConfigError
from ckpt_jax.storage.space import count_files

_START_TIMEOUT = 300.0


class WorkerJob(RemoteWorker):
  """The process of one variant, or several in a multi-process suite; they answer with what `worker.Worker` returns."""

  def __init__(self, suite: Suite, variant: Variant, directory: str, env: Mapping[str, str]):
    package = str(pathlib.Path(ckpt_jax.__file__).parent.parent)
    path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    super().__init__(
      f"{suite.name}, {variant.title}",
      ["ckpt_jax.bench.worker", suite.name, variant.name, directory],
      suite.processes,
      devices=suite.devices,
      env={**env, "PYTHONPATH": path, "TF_CPP_MIN_LOG_LEVEL": "2"},
      python=python_of(variant),
    )


def run_suite(
  suite: Suite,
  variants: Sequence[str] | None,
  rounds: int,
  directory: str | os.PathLike[str],
  progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
  """Measures one suite.

  Args:
    suite: what to save.
    variants: names of those to measure; None: all of the suite.
    rounds: turns of each variant that count; one more comes before them.
    directory: where to write; everything written is removed afterwards.
    progress: called with a line about each turn.

  Returns:
    JSON-able: `variants` with a list a metric (one value a round), `left_out` with reasons, and the machine.

  Raises:
    ConfigError: for a variant that the suite does not have.
    CheckpointError: if a variant fails, or restores other bits than it saved.
  """
  names, excluded = _runnable(suite, variants, progress)
  os.makedirs(directory, exist_ok=True)
  with contextlib.ExitStack() as stack:
    work = stack.enter_context(tempfile.TemporaryDirectory(prefix="ckpt-bench-", dir=directory))
    url, env = stack.enter_context(_storage(suite, work))
    about = machine(work)
    jobs: dict[str, WorkerJob] = {}
    for name in names:
      if suite.storage == "disk":
        os.makedirs(f"{url}/{name}")
      # A cache of its own: no variant uses the storage measurements of another.
      cache = {"XDG_CACHE_HOME": f"{work}/cache/{name}"}
      jobs[name] = WorkerJob(suite, VARIANTS[name], f"{url}/{name}", env | cache)
      stack.callback(jobs[name].stop)
    started = [job.receive("make its state", _START_TIMEOUT)[0] for job in jobs.values()]
    if suite.storage == "disk":
      _check_space(work, 3 * max((s["nbytes"] for s in started), default=0))
    large = any(s["nbytes"] >= _WORTH_FILLING_NBYTES for s in started)
    found = _rounds(suite, jobs, rounds, url, progress, large=large)
  versions = {name: version for s in started for name, version in s["versions"].items()}
  return {
    "what": suite.what,
    "nbytes": started[0]["nbytes"] if started else 0,
    "leaves": started[0]["leaves"] if started else 0,
    "rounds": rounds,
    "machine": about | {"versions": dict(sorted(versions.items()))},
    "variants": found,
    "left_out": excluded,
  }


def _runnable(
  suite: Suite, variants: Sequence[str] | None, progress: Callable[[str], None]
) -> tuple[list[str], dict[str, str]]:
  """The variants that can be measured here, and why others cannot."""
  names = list(variants or suite.variants)
  for name in names:
    if name not in suite.variants:
      raise ConfigError(f"suite {suite.name} has no variant {name!r}; there are {', '.join(suite.variants)}")
  excluded = {name: why for name in names if (why := left_out(VARIANTS[name], suite)) is not None}
  for name, why in excluded.items():
    progress(f"{suite.name}: {VARIANTS[name].title} is left out: {why}")
  return [name for name in names if name not in excluded], excluded


def _rounds(
  suite: Suite, jobs: Mapping[str, WorkerJob], rounds: int, url: str, progress: Callable[[str], None], *, large: bool
) -> dict[str, Any]:
  """Measures all rounds. Returns lists by metric, and the settings chosen, for each variant."""
  for job in jobs.values():
    job.ask("prepare")
  turns: dict[str, list[dict[str, Any]]] = {name: [] for name in jobs}
  for turn in range(rounds + 1):
    for name in rotated(jobs, turn):
      title = VARIANTS[name].title
      place = f"{url}/{name}" if suite.storage == "disk" else None
      found = _turn(jobs[name], turn, place, fill_free_memory if large else lambda: None)
      progress(f"{suite.name} {turn}/{rounds} {title}: {_brief(found)}")
      if not found.pop("bitwise"):
        raise CheckpointError(f"bench: {suite.name}, {title}: restored other bits than were saved")
      if turn:  # the first save and restore of a process pay for imports and compilation
        turns[name].append(found)
  results = {name: _by_metric(turns[name]) | job.ask("about")[0] for name, job in jobs.items()}
  for job in jobs.values():
    job.ask("end")
  return results


def _turn(job: WorkerJob, step: int, place: str | None, settle: Callable[[], None]) -> dict[str, Any]:
  os.sync()
  settle()
  saves = job.ask("save", step=step)
  found = {key: _most(saves, key) for key in ("blocking_s", "commit_s", "synced_s", "save_rss")}
  found["files"], found["stored_nbytes"] = count_files(f"{place}/{step}") if place else (None, None)
  found["cold_s"] = None
  # An emulated bucket has caches of its own that cannot be dropped.
  if place and drop_cache(f"{place}/{step}"):
    settle()
    found["cold_s"] = _most(job.ask("restore", step=step, check=False), "seconds")
  settle()
  restores = job.ask("restore", step=step, check=True)
  found["warm_s"] = _most(restores, "seconds")
  found["restore_rss"] = _most(restores, "restore_rss")
  found["bitwise"] = all(r["bitwise"] for r in restores)
  job.ask("rest")
  if place:
    shutil.rmtree(f"{place}/{step}")
    os.sync()
  return found


def _most(answers: list[dict[str, Any]], key: str) -> Any:
  """The largest value of all processes: a job is as slow as its slowest process."""
  values = [a[key] for a in answers]
  return None if None in values else max(values)


def _by_metric(rounds: list[dict[str, Any]]) -> dict[str, Any]:
  """Lists by metric; seconds rounded to 0.1 ms."""
  found: dict[str, Any] = {}
  for key in rounds[0] if rounds else ():
    values = [r[key] for r in rounds]
    if any(v is None for v in values):
      found[key] = None
    else:
      found[key] = [round(v, 4) for v in values] if key.endswith("_s") else values
  return found


def _brief(found: dict[str, Any]) -> str:
  keys = {"blocking_s": "blocking", "synced_s": "commit + sync", "cold_s": "cold", "warm_s": "warm"}
  return ", ".join(f"{label} {found[key]:.2f} s" for key, label in keys.items() if found[key] is not None)


_MIB = 2**20
_WORTH_FILLING_NBYTES = 100 * _MIB
_FREE_MIB = 400  # stays free, so that allocations do not wait
_filler_at = 0


@functools.cache
def _filler() -> int:
  """A sparse file, as large as memory, that takes no disk space and vanishes with the process."""
  descriptor, path = tempfile.mkstemp(prefix="ckpt-bench-")
  os.unlink(path)
  os.truncate(descriptor, psutil.virtual_memory().total)
  return descriptor


def fill_free_memory() -> None:
  """Fills free memory with page cache, which the kernel can hand out at once.

  The host of a virtual machine takes free memory back (free page reporting), and the next use of it, for an array or
  for the page cache, waits for the host: 2 to 8 s per GB were measured, in arbitrary turns. Reading a sparse file moves
  that wait out of the timings. Does nothing where the kernel does not report free memory.
  """
  global _filler_at
  buffer = bytearray(4 * _MIB)
  size = psutil.virtual_memory().total
  for _ in range(2 * size // len(buffer)):
    if psutil.virtual_memory().free < _FREE_MIB * _MIB or not hasattr(os, "preadv"):
      return
    os.preadv(_filler(), [buffer], _filler_at)
    _filler_at = (_filler_at + len(buffer)) % (size - size % len(buffer))


@contextlib.contextmanager
def _storage(suite: Suite, work: str) -> Iterator[tuple[str, dict[str, str]]]:
  """Where a suite is written, and the environment to reach it."""
  if suite.storage == "disk":
    yield work, {}
    return
  with gcs_server(f"{work}/objects") if suite.storage == "gs" else s3_server() as bucket:
    yield bucket.url, bucket.env


def _check_space(work: str, nbytes: int) -> None:
  free = shutil.disk_usage(work).free
  if free < nbytes:
    raise CheckpointError(f"{work}: {free / 1e9:.1f} GB are free and {nbytes / 1e9:.1f} GB are needed; choose --dir")


def machine(work: str) -> dict[str, Any]:
  """The machine, as far as figures depend on it."""
  model = platform.processor()
  with contextlib.suppress(OSError):
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
  return {
    "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    "cores": len(os.sched_getaffinity(0)),
    "cpu": model,
    "memory_nbytes": psutil.virtual_memory().total,
    "kernel": platform.release(),
    "disk": _mount(work),
    "page_cache_dropped": hasattr(os, "posix_fadvise"),
    "load_before": round(os.getloadavg()[0], 2),
  }


def _mount(path: str) -> str:
  command = ["findmnt", "-n", "-o", "SOURCE,FSTYPE", "-T", path]
  try:
    done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
  except (OSError, subprocess.TimeoutExpired):
    return "unknown"
  return " ".join(done.stdout.split()) or "unknown"
