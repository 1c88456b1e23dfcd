"""What is known before a plan is made: of the state (sizes, shards, how well it compresses) and of the host."""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import dataclasses
import math
import mmap
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any

import psutil

from ckpt_jax.storage.cache import recall, remember
from ckpt_jax.tuning.sampling import Compressibility, measure_compression

PyTree = Any
_CGROUP = pathlib.Path("/sys/fs/cgroup")
_VERSION = 3  # of what is remembered
# Below this a leaf costs more by being one than by its bytes: 1 MiB at 1 GB/s takes as long as Orbax's Python for it.
SMALL_LEAF_NBYTES = 1 << 20
_COPIED_NBYTES = 32 << 20
_TASKS = 1000


@dataclasses.dataclass(frozen=True)
class StateProfile:
  """What a save has to move.

  Attributes:
    leaves: array leaves.
    nbytes: bytes of the whole state, each leaf once however it is sharded.
    dtypes: (dtype, bytes of it), most bytes first.
    shards: distinct pieces that the leaves are cut into, over all processes.
    local_shards, local_nbytes: those that this process holds, a piece on several of its devices once.
    local_leaves: leaves of which this process holds a piece.
    read_nbytes: bytes that all processes together read if each reads what its devices need.
    copies: on how many devices an average byte lies.
    largest_leaf_nbytes, largest_shard_nbytes: of one array, and of one piece.
    largest_local_nbytes: of all that this process holds of one array.
    small_leaves, small_nbytes: leaves below 1 MiB, and their bytes.
    compressibility: measured on a sample of the values; None for a state without values.
  """

  leaves: int
  nbytes: int
  dtypes: tuple[tuple[str, int], ...] = ()
  shards: int = 0
  local_shards: int = 0
  local_nbytes: int = 0
  local_leaves: int = 0
  read_nbytes: int = 0
  copies: float = 1.0
  largest_leaf_nbytes: int = 0
  largest_shard_nbytes: int = 0
  largest_local_nbytes: int = 0
  small_leaves: int = 0
  small_nbytes: int = 0
  compressibility: Compressibility | None = None


@dataclasses.dataclass(frozen=True)
class HostProfile:
  """What this process can use. The rates are those of one thread.

  Attributes:
    cores: CPUs that this process may use, by affinity and cgroup quota.
    memory_nbytes: RAM of the host, or of the cgroup if that is less.
    copy_bytes_per_s: copying into memory that was not touched before.
    task_s: one asyncio task, made and awaited: the unit of what a leaf costs in Orbax's Python.
    zstd: compression of random float32 numbers, which is what a state without values is taken for.
    devices_per_process, processes: of the jax job.
    host: its name.
  """

  cores: int
  memory_nbytes: int
  copy_bytes_per_s: float
  task_s: float
  zstd: Compressibility
  devices_per_process: int = 1
  processes: int = 1
  host: str = ""


# -- the state


def profile_state(state: PyTree, *, sample: bool = True) -> StateProfile:
  """Profile of a pytree of arrays or `jax.ShapeDtypeStruct`s; leaves that are no arrays do not count.

  Args:
    state: what would be saved.
    sample: whether to measure compression on at most 8 MB of its values (some 50 ms).
  """

  arrays = _arrays(state)
  total = local = read = held = shards = local_shards = small = small_bytes = 0
  largest = largest_shard = largest_local = local_leaves = 0
  dtypes: dict[str, int] = {}
  # Thousands of leaves are of few kinds; names of dtypes and cuts of shardings are too slow to ask for one by one.
  kinds = collections.Counter((tuple(x.shape), x.dtype, getattr(x, "sharding", None)) for x in arrays)
  for (shape, dtype, sharding), count in kinds.items():
    nbytes = math.prod(shape) * dtype.itemsize
    cut = _cut(shape, sharding)
    piece = -(-nbytes // cut.pieces) if cut.pieces else nbytes
    total += count * nbytes
    dtypes[str(dtype)] = dtypes.get(str(dtype), 0) + count * nbytes
    shards += count * cut.pieces
    local_shards += count * cut.local
    local_leaves += count * bool(cut.local)
    local += count * cut.local * piece
    read += count * cut.read * piece
    held += count * cut.held * piece
    largest = max(largest, nbytes)
    largest_shard = max(largest_shard, piece if cut.local else 0)
    largest_local = max(largest_local, cut.local * piece)
    if nbytes < SMALL_LEAF_NBYTES:
      small, small_bytes = small + count, small_bytes + count * nbytes
  return StateProfile(
    leaves=len(arrays),
    nbytes=total,
    dtypes=tuple(sorted(dtypes.items(), key=lambda item: -item[1])),
    shards=shards,
    local_shards=local_shards,
    local_nbytes=local,
    local_leaves=local_leaves,
    read_nbytes=read,
    copies=held / total if total else 1.0,
    largest_leaf_nbytes=largest,
    largest_shard_nbytes=largest_shard,
    largest_local_nbytes=largest_local,
    small_leaves=small,
    small_nbytes=small_bytes,
    compressibility=sample_state(state) if sample else None,
  )


def sample_state(state: PyTree) -> Compressibility | None:
  """How the values of a state compress, on at most 8 MB of them; None without values, or with too few."""
  values = [x for x in _arrays(state) if hasattr(x, "addressable_shards") or hasattr(x, "__array_interface__")]
  return measure_compression(values)


@dataclasses.dataclass(frozen=True)
class _Cut:
  """Pieces of a leaf: distinct ones, those of this process, and the sums over processes and over devices."""

  pieces: int
  local: int
  read: int
  held: int


def _cut(shape: tuple[int, ...], sharding: Any) -> _Cut:
  import jax

  if sharding is None:
    # Not placed yet, or numpy: every process has it, or will read it, whole.
    return _Cut(1, 1, jax.process_count(), jax.process_count())
  me = jax.process_index()
  by_process: dict[int, set[Any]] = {}
  try:
    devices = sharding.devices_indices_map(shape)
  except Exception:  # an abstract mesh, or a shape that it does not divide: who saves or restores it will say so
    return _Cut(1, 1, jax.process_count(), jax.process_count())
  for device, index in devices.items():
    by_process.setdefault(device.process_index, set()).add(tuple((s.start, s.stop) for s in index))
  distinct = set().union(*by_process.values())
  return _Cut(len(distinct), len(by_process.get(me, ())), sum(map(len, by_process.values())), len(devices))


def _arrays(state: PyTree) -> list[Any]:
  import jax

  return [_as_array(x) for x in jax.tree.leaves(state) if hasattr(x, "shape") and hasattr(x, "dtype")]


def _as_array(x: Any) -> Any:
  import jax

  if isinstance(x, jax.Array) and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
    return jax.random.key_data(x)
  return x


# -- the host


def profile_host() -> HostProfile:
  """Measures this host in some 0.2 s, or takes what was measured since it was started; devices are the job's.

  The first call of a process starts jax's back end.
  """
  import jax

  measured = remembered("host", f"{_boot_id()} {usable_cores()}", _measure_host)
  return HostProfile(
    cores=usable_cores(),
    memory_nbytes=total_memory(),
    copy_bytes_per_s=measured["copy_bytes_per_s"],
    task_s=measured["task_s"],
    zstd=Compressibility(**measured["zstd"]),
    devices_per_process=jax.local_device_count(),
    processes=jax.process_count(),
    host=os.uname().nodename,
  )


def _measure_host() -> dict[str, Any]:
  import numpy as np

  source = np.ones(_COPIED_NBYTES, np.uint8)
  copies = []
  for _ in range(3):
    # Fresh pages each time, which malloc would not promise: a save copies into memory that it has just been given.
    target = np.frombuffer(mmap.mmap(-1, _COPIED_NBYTES), np.uint8)
    started = time.thread_time()
    np.copyto(target, source)
    copies.append(time.thread_time() - started)

  async def task() -> None:
    await asyncio.sleep(0)

  async def tasks() -> float:
    started = time.thread_time()
    await asyncio.gather(*(asyncio.ensure_future(task()) for _ in range(_TASKS)))
    return (time.thread_time() - started) / _TASKS

  # In a thread of its own: a notebook's main thread has a loop that runs.
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    per_task = min(pool.submit(asyncio.run, tasks()).result() for _ in range(10))
  numbers = np.random.default_rng(0).standard_normal(1 << 20, dtype=np.float32)
  zstd = measure_compression([numbers])
  assert zstd is not None
  # CPU time, and the best of several: what others do on this host now is not its speed.
  return {
    "copy_bytes_per_s": _COPIED_NBYTES / min(copies),
    "task_s": per_task,
    "zstd": dataclasses.asdict(zstd),
  }


def _boot_id() -> str:
  try:
    return pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
  except OSError:
    return os.uname().nodename


def usable_cores(cgroup: pathlib.Path = _CGROUP) -> int:
  """CPUs that this process may use: its affinity, or the cgroup's quota if that is less."""
  cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
  try:
    quota, period = (cgroup / "cpu.max").read_text().split()
    if quota != "max":
      cores = min(cores, max(1, int(quota) // int(period)))
  except (OSError, ValueError):
    pass
  return cores


def total_memory(cgroup: pathlib.Path = _CGROUP) -> int:
  """Bytes of RAM of the host, or the cgroup's limit if that is less."""
  total = psutil.virtual_memory().total
  for name in ("memory.max", "memory/memory.limit_in_bytes"):
    try:
      total = min(total, int((cgroup / name).read_text()))
    except (OSError, ValueError):
      continue
  return total


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


# -- remembered measurements


def remembered(what: str, key: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
  """What was measured before on this host under `key`, else what `measure()` gives now, kept for later processes."""
  key = f"{_VERSION} {key}"
  found = recall(what, key)
  if found is None:
    found = measure()
    remember(what, key, found)
  return found
