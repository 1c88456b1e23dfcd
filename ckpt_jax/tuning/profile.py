"""What the host has: memory that a save may use."""

from __future__ import annotations

import pathlib

import psutil

_CGROUP = pathlib.Path("/sys/fs/cgroup")


def available_memory(cgroup: pathlib.Path = _CGROUP) -> int:
  """Bytes of RAM that this process can still take: what the host has free, or the cgroup's limit if that is nearer.

  Page cache counts as free, inside the cgroup too (`inactive_file`), since the kernel drops it before it kills.
  """
  free = psutil.virtual_memory().available
  for limit_file, used_file, stat_file in (
    ("memory.max", "memory.current", "memory.stat"),  # cgroup v2
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),  # v1
  ):
    try:
      limit = (cgroup / limit_file).read_text().strip()
      used = int((cgroup / used_file).read_text())
      stat = dict(line.split() for line in (cgroup / stat_file).read_text().splitlines())
    except (OSError, ValueError):
      continue
    if limit != "max":
      cache = int(stat.get("inactive_file", stat.get("total_inactive_file", 0)))
      free = min(free, max(0, int(limit) - used + cache))
  return free
