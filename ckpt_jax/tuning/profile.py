"""What a plan is made from: profiles of the state (sizes, shards, how well it compresses) and of the host."""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import contextlib
import dataclasses
import math
import mmap
import os
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import psutil

from ckpt_jax.layout.link import Link, measured_link
from ckpt_jax.layout.staging import belongs_to_accelerators, has_accelerators, pinned_limit
from ckpt_jax.layout.structure import flatten
from ckpt_jax.planning.estimate import arrays_of
from ckpt_jax.storage.cache import boot_id, recall, remember
from ckpt_jax.tuning.sampling import Compressibility, Kind, measure_codecs, sample_kinds

PyTree = Any
_CGROUP = pathlib.Path("/sys/fs/cgroup")
# Files with a cgroup's memory limit, its use and its statistics: of version 2, and of version 1.
_CGROUP_FILES = (
  ("memory.max", "memory.current", "memory.stat"),
  ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
)
_VERSION = 4  # of the host's measurements on disk
# Below this a leaf costs more Python than time for its bytes: 1 MiB at 1 GB/s takes as long as Orbax's Python for it.
SMALL_LEAF_NBYTES = 1 << 20
_COPIED_NBYTES = 32 << 20
_TASKS = 1000


@dataclasses.dataclass(frozen=True)
class StateProfile:
  """What a save has to move.

  Attributes:
    leaves: array leaves.
    nbytes: bytes of the whole state; each leaf counts once however it is sharded.
    dtypes: (dtype, its bytes), most bytes first.
    shards: distinct pieces that the leaves are cut into, over all processes.
    local_shards, local_nbytes: those that this process holds; a piece on several of its devices counts once.
    local_leaves: leaves of which this process holds a piece.
    read_nbytes: bytes that all processes together read if each reads what its devices need.
    written_nbytes: bytes that the process which writes most writes, see `layout.shares`.
    across_nbytes, across_chunks: bytes of the arrays whose chunks `layout.reshard` cuts across the rows of a process,
      and how many more chunks that makes.
    resharding, resharding_whole: bytes that a restore onto an orthogonal mesh reads over what it needs, with such cuts
      and without.
    copies: number of devices that hold an average byte.
    largest_leaf_nbytes, largest_shard_nbytes: of one array, and of one piece.
    largest_local_nbytes: of all that this process holds of one array.
    small_leaves, small_nbytes: leaves below 1 MiB, and their bytes.
    accelerator_nbytes, accelerator_shards: what of the local ones belongs to accelerators.
    kinds: of leaves, and how well they compress by a sample; empty for a state without values.
  """

  leaves: int
  nbytes: int
  dtypes: tuple[tuple[str, int], ...] = ()
  shards: int = 0
  local_shards: int = 0
  local_nbytes: int = 0
  local_leaves: int = 0
  read_nbytes: int = 0
  written_nbytes: int = 0
  across_nbytes: int = 0
  across_chunks: int = 0
  resharding: float = 1.0
  resharding_whole: float = 1.0
  copies: float = 1.0
  largest_leaf_nbytes: int = 0
  largest_shard_nbytes: int = 0
  largest_local_nbytes: int = 0
  small_leaves: int = 0
  small_nbytes: int = 0
  accelerator_nbytes: int = 0
  accelerator_shards: int = 0
  kinds: tuple[Kind, ...] = ()


@dataclasses.dataclass(frozen=True)
class HostProfile:
  """What this process can use. The rates are those of one thread.

  Attributes:
    cores: CPUs that this process may use, by affinity and cgroup quota.
    memory_nbytes: RAM of the host, or of the cgroup if that is less.
    copy_bytes_per_s: copying into memory that was not touched before.
    task_s: seconds of one asyncio task, made and awaited: the unit of what a leaf costs in Orbax's Python.
    codecs: of random float32 numbers, which stand for a state without values.
    devices_per_process, processes: of the jax job.
    host: its name.
    link: to its accelerators; None without any, or if it could not be measured.
    pinned_limit: bytes of pinned memory that XLA gives a process; None if it sets no limit.
  """

  cores: int
  memory_nbytes: int
  copy_bytes_per_s: float
  task_s: float
  codecs: Mapping[str, Compressibility]
  devices_per_process: int = 1
  processes: int = 1
  host: str = ""
  link: Link | None = None
  pinned_limit: int | None = None


# -- the state


def profile_state(state: PyTree, *, sample: bool = True) -> StateProfile:
  """Profile of a pytree of arrays or `jax.ShapeDtypeStruct`s; leaves that are no arrays do not count.

  Args:
    state: what would be saved.
    sample: whether to measure compression on some 8 MB of its values (some 50 ms).
  """
  arrays = arrays_of(state)
  # Thousands of leaves are of few kinds; names of dtypes and cuts of shardings are too slow to look up for each leaf.
  counts = collections.Counter((tuple(x.shape), x.dtype, getattr(x, "sharding", None)) for x in arrays)
  kinds = [(n, _cut(shape, dtype.itemsize, sharding)) for (shape, dtype, sharding), n in counts.items()]
  dtypes: collections.Counter[str] = collections.Counter()
  for (_, dtype, _), (n, cut) in zip(counts, kinds, strict=True):
    dtypes[str(dtype)] += n * cut.nbytes
  total = sum(n * cut.nbytes for n, cut in kinds)
  small = [(n, cut.nbytes) for n, cut in kinds if cut.nbytes < SMALL_LEAF_NBYTES]
  far = [kind for kind, (*_, sharding) in zip(kinds, counts, strict=True) if _is_far(sharding)]
  return StateProfile(
    leaves=len(arrays),
    nbytes=total,
    dtypes=tuple(dtypes.most_common()),
    shards=sum(n * cut.pieces for n, cut in kinds),
    local_shards=sum(n * cut.local for n, cut in kinds),
    local_nbytes=sum(n * cut.local * cut.piece_nbytes for n, cut in kinds),
    local_leaves=sum(n for n, cut in kinds if cut.local),
    read_nbytes=sum(n * cut.read * cut.piece_nbytes for n, cut in kinds),
    **_shares(arrays),
    copies=sum(n * cut.held * cut.piece_nbytes for n, cut in kinds) / total if total else 1.0,
    largest_leaf_nbytes=max((cut.nbytes for _, cut in kinds), default=0),
    largest_shard_nbytes=max((cut.piece_nbytes for _, cut in kinds if cut.local), default=0),
    largest_local_nbytes=max((cut.local * cut.piece_nbytes for _, cut in kinds), default=0),
    small_leaves=sum(n for n, _ in small),
    small_nbytes=sum(n * nbytes for n, nbytes in small),
    accelerator_nbytes=sum(n * cut.local * cut.piece_nbytes for n, cut in far),
    accelerator_shards=sum(n * cut.local for n, cut in far),
    kinds=sample_kinds(flatten(state)) if sample else (),
  )


def _is_far(sharding: Any) -> bool:
  return isinstance(sharding, jax.sharding.Sharding) and bool(sharding.device_set) and belongs_to_accelerators(sharding)


class _Cut(NamedTuple):
  """Bytes of a leaf and of one of its pieces; the distinct pieces, those of this process, and those that processes
  together read and that devices together hold."""

  nbytes: int
  piece_nbytes: int
  pieces: int
  local: int
  read: int
  held: int


def _cut(shape: tuple[int, ...], itemsize: int, sharding: Any) -> _Cut:
  nbytes = math.prod(shape) * itemsize
  by_process: dict[int, set[Any]] = {}
  try:
    devices = sharding.devices_indices_map(shape)
  except Exception:
    # Not placed yet, or numpy, or on an abstract mesh, or a shape that the sharding does not divide, which a save or
    # restore reports: every process has it, or will read it, whole.
    return _Cut(nbytes, nbytes, 1, 1, jax.process_count(), jax.process_count())
  for device, index in devices.items():
    by_process.setdefault(device.process_index, set()).add(tuple((s.start, s.stop) for s in index))
  pieces = len(set().union(*by_process.values()))
  local, read = len(by_process.get(jax.process_index(), ())), sum(map(len, by_process.values()))
  return _Cut(nbytes, -(-nbytes // pieces), pieces, local, read, len(devices))


def _shares(arrays: Sequence[Any]) -> dict[str, Any]:
  """What follows from the write plan; process 0 writes what is not placed."""
  from ckpt_jax.layout.shares import Limits, held, nbytes_by_process, resharding, share_out

  placed, first = [], 0
  for x in arrays:
    try:
      placed.append(held(tuple(x.shape), x.dtype.itemsize, x.sharding))
    except (AttributeError, ValueError):  # numpy, or on an abstract mesh, or what the sharding does not divide
      first += math.prod(x.shape) * x.dtype.itemsize
  cut, whole = (share_out(placed, Limits(across=across), {0: first}) for across in (True, False))
  written = nbytes_by_process(placed, cut)
  found = {"written_nbytes": max([*written.values(), written.get(0, 0) + first])}
  pairs = [*zip(placed, cut, whole, strict=True)]
  across = [(array, a.chunks, b.chunks) for array, a, b in pairs if a.chunks != b.chunks]
  total = max(1, sum(array.nbytes for array in placed))
  return found | {
    "across_nbytes": sum(array.nbytes for array, _, _ in across),
    "across_chunks": sum(_chunks(array.shape, a) - _chunks(array.shape, b) for array, a, b in across),
    "resharding": sum(array.nbytes * resharding(array, a.chunks) for array, a, _ in pairs) / total,
    "resharding_whole": sum(array.nbytes * resharding(array, b.chunks) for array, _, b in pairs) / total,
  }


def _chunks(shape: Sequence[int], chunk: Sequence[int]) -> int:
  return math.prod(-(-n // c) for n, c in zip(shape, chunk, strict=True))


# -- the host


def profile_host() -> HostProfile:
  """Measures this host in some 0.2 s, or takes what was measured since it booted; devices are the job's.

  The link to accelerators takes another 0.2 s, once for such devices. The first call of a process starts jax's back
  end.
  """
  key = f"{_VERSION} {boot_id()} {usable_cores()}"
  measured = recall("host", key)
  if measured is None:
    measured = _measure_host()
    remember("host", key, measured)
  return HostProfile(
    cores=usable_cores(),
    memory_nbytes=total_memory(),
    copy_bytes_per_s=measured["copy_bytes_per_s"],
    task_s=measured["task_s"],
    codecs={name: Compressibility(**found) for name, found in measured["codecs"].items()},
    devices_per_process=jax.local_device_count(),
    processes=jax.process_count(),
    host=os.uname().nodename,
    link=measured_link() if has_accelerators() else None,
    pinned_limit=pinned_limit(),
  )


def _measure_host() -> dict[str, Any]:
  import numpy as np

  source = np.ones(_COPIED_NBYTES, np.uint8)
  copies = []
  for _ in range(3):
    # Fresh pages each time, which malloc does not guarantee: a save copies into newly allocated memory.
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

  # In a thread of its own: a notebook's main thread already runs an event loop.
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    per_task = min(pool.submit(asyncio.run, tasks()).result() for _ in range(10))
  numbers = np.random.default_rng(0).standard_normal(1 << 20, dtype=np.float32)
  # CPU time, and the best of several runs, so that other programs on this host do not matter.
  return {
    "copy_bytes_per_s": _COPIED_NBYTES / min(copies),
    "task_s": per_task,
    "codecs": {name: dataclasses.asdict(found) for name, found in measure_codecs([numbers]).items()},
  }


def usable_cores(cgroup: pathlib.Path = _CGROUP) -> int:
  """CPUs that this process may use: its affinity, or the cgroup's quota if that is less."""
  cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
  with contextlib.suppress(OSError, ValueError):  # a quota of `max` is no number
    quota, period = (cgroup / "cpu.max").read_text().split()
    cores = min(cores, max(1, int(quota) // int(period)))
  return cores


def total_memory(cgroup: pathlib.Path = _CGROUP) -> int:
  """Bytes of RAM of the host, or the cgroup's limit if that is less."""
  total = psutil.virtual_memory().total
  for limit, _, _ in _CGROUP_FILES:
    with contextlib.suppress(OSError, ValueError):
      total = min(total, int((cgroup / limit).read_text()))
  return total


def available_memory(cgroup: pathlib.Path = _CGROUP) -> int:
  """Bytes of RAM that this process can still take: what the host has free, or the cgroup has, if that is less.

  Page cache counts as free, inside the cgroup too (`inactive_file`), since the kernel drops it before it kills.
  """
  free = psutil.virtual_memory().available
  for names in _CGROUP_FILES:
    with contextlib.suppress(OSError, ValueError):
      limit, used, stat = ((cgroup / name).read_text() for name in names)
      found = dict(line.split() for line in stat.splitlines())
      cache = int(found.get("inactive_file", found.get("total_inactive_file", 0)))
      free = min(free, max(0, int(limit) - int(used) + cache))  # a limit of `max` is no number
  return free
