"""Predicts what a save and a restore cost, from profiles: a pure function with its constants in one place, `OURS`.

A cost is (fixed) + (leaves and shards, in interpreter time) + (bytes, at the rates of host and storage). Rates come
from profiles. The constants are what this package's code and Orbax's spend, to be checked by `ckpt-jax bench
predictions` and refitted when that code changes.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

from ckpt_jax.storage.probe import StorageProfile, Throughput
from ckpt_jax.tuning.profile import HostProfile, StateProfile

MIB = 1 << 20


@dataclasses.dataclass(frozen=True)
class CostModel:
  """What code spends beside the bytes. Interpreter work is counted in asyncio tasks, so that a faster host is faster.

  Attributes:
    block_fixed_s, commit_fixed_s, restore_fixed_s: of a tiny state.
    block_leaf, commit_leaf, restore_leaf: asyncio tasks' worth of Python for a leaf.
    block_shard, commit_shard, restore_shard: the same for each piece that this process holds.
    block_packed, commit_packed, restore_packed: the same for a leaf that lies in a slab, all in all.
    block_copies, commit_copies, restore_copies: what a byte costs beside zstd, in copies of it into fresh memory; of a
      commit it is the stored bytes that count.
    zstd_threads: how many threads' worth of compression runs at a time, at most the cores.
    unzstd_threads: the same for decompression.
    overlap, restore_overlap: the share of the shorter of CPU and storage time that is hidden behind the longer, 0 to 1;
      of a restore the interpreter's time is CPU time too.
    fixed_files: files of a step beside OCDBT's data files.
    process_files: the same for each process.
  """

  block_fixed_s: float
  commit_fixed_s: float
  restore_fixed_s: float
  block_leaf: float
  commit_leaf: float
  restore_leaf: float
  block_shard: float
  commit_shard: float
  restore_shard: float
  block_packed: float
  commit_packed: float
  restore_packed: float
  block_copies: float
  commit_copies: float
  restore_copies: float
  zstd_threads: float
  unzstd_threads: float
  overlap: float
  restore_overlap: float
  fixed_files: int
  process_files: int


# Orbax 0.12.8 with its defaults, on the host of FACTS (4.3 us a task, 1.7 GB/s a copy): w2 (5,000 arrays) blocks
# 0.64 s, commits in 6.6 s and restores in 5.0 s; w3 (4,832 pieces) restores in 4.0 s where w1 (604) takes 1.9 s; zstd
# makes the commit of w1 2.3 s where it is 1.1 s without.
ORBAX = CostModel(
  block_fixed_s=0.007,
  commit_fixed_s=0.03,
  restore_fixed_s=0.03,
  block_leaf=30,
  commit_leaf=240,
  restore_leaf=120,
  block_shard=4,
  commit_shard=30,
  restore_shard=115,
  block_packed=0,  # it does not pack
  commit_packed=0,
  restore_packed=0,
  block_copies=0.0,
  commit_copies=1.0,
  restore_copies=1.5,
  zstd_threads=0.7,
  unzstd_threads=1.0,
  overlap=0.7,
  restore_overlap=0.3,
  fixed_files=11,
  process_files=4,
)
# This package on the same host: reads and writes are queued with little Python an array, and each region of a process
# is read once, into memory that jax takes over. From w1 (604 arrays, 1.02 GB), w2 (5,000 arrays, 0.2 GB) and w3 (w1 in
# 4,832 pieces): equations for what an array, a piece and a byte cost. docs/predictions.json has what came of them.
OURS = CostModel(
  block_fixed_s=0.005,
  commit_fixed_s=0.03,
  restore_fixed_s=0.02,
  block_leaf=9,
  commit_leaf=21,
  restore_leaf=34,
  block_shard=6,
  commit_shard=2,
  restore_shard=12,
  block_packed=8,
  commit_packed=5,
  restore_packed=16,
  block_copies=0.0,
  commit_copies=0.75,
  restore_copies=0.75,
  zstd_threads=1.5,
  unzstd_threads=2.0,
  overlap=0.7,
  restore_overlap=1.0,
  fixed_files=11,
  process_files=4,
)


@dataclasses.dataclass(frozen=True)
class Layout:
  """The settings that costs depend on; sizes in bytes, None where Orbax's own applies."""

  compression: bool = True
  pack: bool = False
  target_file_size: int | None = None
  chunk_size: int | None = None
  save_concurrency: int | None = None
  restore_concurrency: int | None = None
  copy_threads: int | None = None
  gather: bool = False


@dataclasses.dataclass(frozen=True)
class Prediction:
  """What a save and a restore of one state will cost.

  Attributes:
    blocking_s: what `save` takes from training.
    commit_s: from the call of `save` to the commit.
    restore_s: a restore from cold storage.
    nbytes: bytes of the stored arrays.
    files: files or objects of a step.
    requests: data requests of a restore, over all processes.
    peak_host_bytes: host memory of a process beside the state itself, the greater of save and restore.
  """

  blocking_s: float
  commit_s: float
  restore_s: float
  nbytes: int
  files: int
  requests: int
  peak_host_bytes: int


def predict(
  state: StateProfile, storage: StorageProfile, host: HostProfile, layout: Layout, model: CostModel | None = None
) -> Prediction:
  """The costs of `state` under `layout`.

  Storage that several hosts share is taken to give each of them what it gave the one that measured; a disk's rate is
  divided among the job's processes.
  """
  model = model or OURS
  leaves, shards, packed = state.local_leaves or state.leaves, state.local_shards or state.leaves, 0
  if layout.pack:
    # Small leaves lie in slabs, which are few, but each is still an entry of the tree and of its fingerprints.
    packed = state.small_leaves * leaves // max(state.leaves, 1)
    leaves -= packed
    shards = max(leaves, shards - packed * shards // max(state.local_shards, 1)) + len(state.dtypes)
  task = host.task_s
  zstd = state.compressibility or host.zstd
  ratio = zstd.ratio if layout.compression else 1.0
  threads = layout.copy_threads or host.cores
  # Each process writes its part of what it holds: all replicas together write a byte once.
  held = state.local_nbytes or state.nbytes
  written = held * state.nbytes / max(state.read_nbytes, state.nbytes, 1)
  read = written if layout.gather else float(held)
  sharing = 1 if storage.kind.traits.shared else max(1, host.processes)

  blocking = (
    model.block_fixed_s
    + (leaves * model.block_leaf + shards * model.block_shard + packed * model.block_packed) * task
    + held * model.block_copies / host.copy_bytes_per_s
  )
  data_files = _data_files(written * ratio, layout, host)
  stored = written * ratio
  cpu = stored * model.commit_copies / host.copy_bytes_per_s
  if layout.compression:
    cpu += written / (zstd.compress_bytes_per_s * min(model.zstd_threads, threads))
  io = stored / _rate(storage, storage.write_bytes_per_s, sharing)
  io += data_files * storage.latency.get("create", 0.0)
  commit = (
    blocking
    + model.commit_fixed_s
    + (leaves * model.commit_leaf + shards * model.commit_shard + packed * model.commit_packed) * task
    + _overlapped(cpu, io, model.overlap)
  )

  pieces = _pieces(state, shards, layout)
  cpu = read * model.restore_copies / host.copy_bytes_per_s
  if layout.compression:
    cpu += read / (zstd.decompress_bytes_per_s * min(model.unzstd_threads, threads))
  io = _read_s(storage, read * ratio, pieces, sharing)
  # Python queues reads while others are under way.
  cpu += (leaves * model.restore_leaf + shards * model.restore_shard + packed * model.restore_packed) * task
  restore = model.restore_fixed_s + _overlapped(cpu, io, model.restore_overlap)
  in_flight = min(held, layout.save_concurrency or (held if layout.compression else held / 8))
  on_restore = min(read, layout.restore_concurrency or read)
  return Prediction(
    blocking_s=blocking,
    commit_s=commit,
    restore_s=restore,
    nbytes=int(state.nbytes * ratio),
    files=model.fixed_files + host.processes * (model.process_files + data_files),
    requests=pieces * host.processes,
    peak_host_bytes=int(max(held + in_flight, on_restore)),
  )


# A quick probe sees a disk's burst: W1's saves kept 0.35 to 1.2 GB/s where it said 2.5 GB/s, its restores 1.1 where it
# said 1.5.
_BURST = 0.7
_QUICK_S = 2.0


def _rate(storage: StorageProfile, bytes_per_s: float, sharing: int) -> float:
  """What a measured rate is worth to one process over gigabytes."""
  burst = 0 < storage.seconds < _QUICK_S and not storage.kind.traits.durable_on_close
  return max(bytes_per_s * (_BURST if burst else 1.0) / sharing, 1.0)


def _overlapped(a: float, b: float, overlap: float) -> float:
  return max(a, b) + (1 - overlap) * min(a, b)


def _data_files(stored: float, layout: Layout, host: HostProfile) -> int:
  """OCDBT closes a data file at its target size, and fills as many at a time as it has threads."""
  if layout.target_file_size is None:
    return max(1, min(math.ceil(stored / (64 * MIB)), 2 * host.cores + 1))
  return max(1, math.ceil(stored / layout.target_file_size))


def _pieces(state: StateProfile, shards: int, layout: Layout) -> int:
  """Requests for data that one process makes in a restore: one a chunk."""
  if layout.chunk_size is None:
    return max(1, shards)
  return max(1, shards, math.ceil((state.local_nbytes or state.nbytes) / layout.chunk_size))


def _read_s(storage: StorageProfile, nbytes: float, pieces: int, sharing: int) -> float:
  """Storage time of reading `nbytes` in `pieces`: bound by the throughput, or by the requests if they are small."""
  bound = nbytes / _rate(storage, storage.read_bytes_per_s, sharing)
  if not storage.ranges:
    return bound
  parallel = streams_of(storage, storage.read)
  if storage.kind.traits.overwrite_in_place:
    # One large read fills a disk, which still serves small ones side by side; of a bucket this said 4.4 s for 7.1.
    parallel = max(parallel, storage.kind.traits.parallelism)
  return max(bound, pieces * request_s(storage, nbytes / pieces) / parallel * sharing)


def streams_of(storage: StorageProfile, curve: tuple[Throughput, ...]) -> int:
  """The fewest streams that reach 9/10 of the best throughput.

  A quick probe may have had time for one level only; then what is usual on the kind of storage.
  """
  if len(curve) < 2:
    return storage.kind.traits.parallelism
  best = max(t.bytes_per_s for t in curve)
  return next(t.streams for t in curve if t.bytes_per_s >= 0.9 * best)


def knee_of(storage: StorageProfile) -> int:
  """The size from which a request is worth while; what is usual where only small ones were measured."""
  usual = storage.kind.traits.request_nbytes
  if not storage.ranges or storage.ranges[-1].nbytes < usual:
    return max(usual, storage.knee_nbytes if storage.ranges else 0)
  return storage.knee_nbytes


def request_s(storage: StorageProfile, nbytes: float) -> float:
  """Seconds of one read of `nbytes`: by straight lines between the sizes measured, beyond them at the full rate."""
  ranges = storage.ranges
  if nbytes <= ranges[0].nbytes:
    return ranges[0].seconds
  for a, b in itertools.pairwise(ranges):
    if nbytes <= b.nbytes:
      return a.seconds + (b.seconds - a.seconds) * (nbytes - a.nbytes) / (b.nbytes - a.nbytes)
  last = ranges[-1]
  return last.seconds + (nbytes - last.nbytes) / max(storage.read_bytes_per_s, last.nbytes / last.seconds)
