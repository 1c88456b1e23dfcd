"""The process of one variant: holds its state, and saves and restores when the runner asks.

It stays alive over all rounds, so that imports, compilation and the first save are paid once, before anything counts.
Several processes of one job get the same command.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib.metadata
import os
import pathlib
import platform
import sys
import time
from typing import Any

from ckpt_jax.bench.common import quiet, serve
from ckpt_jax.bench.suites import SUITES
from ckpt_jax.bench.variants import VARIANTS, Target, make_target

_PACKAGES = ("ckpt-jax", "jax", "orbax-checkpoint", "tensorstore", "numpy", "torch", "safetensors")


def peak_rss() -> int | None:
  """The peak of resident bytes since `reset_peak`; None where the kernel does not report it."""
  return _status("VmHWM")


def resident() -> int | None:
  """Resident bytes; None where the kernel does not report them."""
  return _status("VmRSS")


def reset_peak() -> None:
  """Sets the peak of resident bytes to the current value (proc(5), clear_refs)."""
  try:
    pathlib.Path("/proc/self/clear_refs").write_text("5")
  except OSError:
    return


def _status(key: str) -> int | None:
  try:
    text = pathlib.Path("/proc/self/status").read_text()
  except OSError:
    return None
  found = [line for line in text.splitlines() if line.startswith(key + ":")]
  return int(found[0].split()[1]) * 1024 if found else None


def give_memory_back() -> None:
  """Collects garbage, and returns free memory to the system."""
  gc.collect()
  with contextlib.suppress(OSError, AttributeError):  # not glibc
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def drop_cache(directory: str) -> bool:
  """Drops the files below a directory from the page cache. Returns False where the system has no call for it."""
  if not hasattr(os, "posix_fadvise"):
    return False
  for root, _, names in os.walk(directory):
    for name in names:
      fd = os.open(os.path.join(root, name), os.O_RDONLY)
      try:
        os.fsync(fd)  # dirty pages are not dropped
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
      finally:
        os.close(fd)
  return True


class Worker:
  """Answers commands about one target.

  Attributes:
    idle_rss: resident bytes with the state in memory and nothing saved yet; peaks are reported relative to it.
  """

  def __init__(self, target: Target, sync: bool):
    self.target = target
    self.sync = sync
    self.rest()
    self.idle_rss = resident()

  def prepare(self) -> None:
    """Prepares the target for its first save."""
    self.target.prepare()

  def about(self) -> dict[str, Any]:
    """The settings that the target chose and the costs that it predicted."""
    return self.target.about()

  def save(self, step: int) -> dict[str, Any]:
    """Seconds of `save`, to the commit as the API reports it, and until the kernel has written everything out."""
    reset_peak()
    started = time.perf_counter()
    self.target.save(step)
    blocked = time.perf_counter()
    self.target.wait()
    committed = time.perf_counter()
    if self.sync:
      os.sync()
    synced = time.perf_counter()
    return {
      "blocking_s": blocked - started,
      "commit_s": committed - started,
      "synced_s": synced - started if self.sync else None,
      "save_rss": self._extra(),
    }

  def restore(self, step: int, check: bool) -> dict[str, Any]:
    """Seconds until the state is on its devices; `check` compares every bit afterwards."""
    gc.collect()
    reset_peak()
    started = time.perf_counter()
    restored = self.target.restore(step)
    seconds = time.perf_counter() - started
    found = {"seconds": seconds, "restore_rss": self._extra()}
    if check:
      found["bitwise"] = self.target.same(restored)
    return found

  def rest(self) -> None:
    """Returns freed memory to the system, outside of the timings: other variants need it."""
    give_memory_back()

  def end(self) -> None:
    """Releases what the target holds."""
    self.target.close()

  def _extra(self) -> int | None:
    peak = peak_rss()
    return None if peak is None or self.idle_rss is None else max(0, peak - self.idle_rss)


def _versions() -> dict[str, str]:
  found = {"python": platform.python_version()}
  for name in _PACKAGES:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  return found


def start(suite_name: str, variant_name: str, directory: str) -> tuple[Worker, dict[str, Any]]:
  """The worker with its state in memory, and its description for the runner."""
  suite = SUITES[suite_name]
  target = make_target(VARIANTS[variant_name], suite, directory)
  about = {
    "nbytes": sum(target.sizes),
    "leaves": len(target.sizes),
    "versions": _versions(),
  }
  return Worker(target, suite.storage == "disk"), about


def main() -> None:
  """Serves the runner."""
  suite, variant, directory = sys.argv[1:]
  if SUITES[suite].processes > 1:
    from ckpt_jax import multihost

    multihost.initialize()
  quiet()
  serve(lambda: start(suite, variant, directory))


if __name__ == "__main__":
  main()
