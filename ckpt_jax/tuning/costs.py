"""Predicts what a save and a restore cost: a pure function of profiles, with its constants in one place, `OURS`.

A cost is (fixed) + (leaves and shards, in interpreter time) + (bytes, at the rates of host and storage). Rates come
from profiles. The constants are what this package's code and Orbax's spend; `ckpt-jax bench predictions` checks them,
and they are to be fitted again when that code changes.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import numpy as np

from ckpt_jax.config.units import is_uncompressed
from ckpt_jax.layout.codec import OFF, ZSTD, Compression, codec_of_kind
from ckpt_jax.planning.estimate import copy_seconds, host_nbytes
from ckpt_jax.storage.probe import StorageProfile, Throughput
from ckpt_jax.tuning.profile import HostProfile, StateProfile
from ckpt_jax.tuning.sampling import Kind

MIB = 1 << 20
# Files of a step besides OCDBT's data files: of the step, and of each process.
_STEP_FILES, _PROCESS_FILES = 11, 4
# A quick probe sees a disk's burst: w1's saves sustained 0.35 to 1.2 GB/s where it measured 2.5 GB/s, its restores 1.1
# GB/s where it measured 1.5.
_BURST = 0.7
# A chunk that is not contiguous is gathered, into memory that TensorStore has used before in part: 151 MB in 576 chunks
# took 0.04 to 0.06 s of CPU more than in 60. `ckpt-jax bench reshard` measures it.
_ACROSS_COPIES, _CHUNK_S = 0.5, 20e-6
_QUICK_S = 2.0


@dataclasses.dataclass(frozen=True)
class Phase:
  """What one part of a save or restore spends besides the time of the storage.

  Python is counted in asyncio tasks, so that a faster host is faster.

  Attributes:
    fixed_s: seconds for a tiny state.
    leaf: tasks for a leaf.
    shard: tasks for each piece that this process holds.
    packed: tasks, all in all, for a leaf in a slab.
    copies: what a byte costs besides its codec, in copies of it into fresh memory; a commit pays for the stored bytes.
    codec_share: share of the threads that are busy with codecs, at most one a piece.
    overlap: share of the shorter of CPU and storage time that is hidden behind the longer, 0 to 1. A commit's Python
      is not hidden, a restore's is part of its CPU time.
  """

  fixed_s: float
  leaf: float
  shard: float
  packed: float = 0.0
  copies: float = 0.0
  codec_share: float = 1.0
  overlap: float = 0.0


@dataclasses.dataclass(frozen=True)
class CostModel:
  """What code spends: while `save` blocks, from then to the commit, and in a restore.

  Attributes:
    block, commit, restore: the parts.
    waits_for_snapshot: whether `save` returns only after accelerators have sent their arrays.
  """

  block: Phase
  commit: Phase
  restore: Phase
  waits_for_snapshot: bool = False


# Orbax 0.12.8 with its defaults, on a host with 4.3 us a task and 1.7 GB/s a copy: w2 (5,000 arrays) blocks 0.64 s,
# commits in 6.6 s and restores in 5.0 s; w3 (4,832 pieces) restores in 4.0 s where w1 (604) takes 1.9 s; zstd makes the
# commit of w1 2.3 s where it is 1.1 s without.
ORBAX = CostModel(
  block=Phase(0.007, leaf=30, shard=4),
  commit=Phase(0.03, leaf=240, shard=30, copies=1.0, codec_share=0.35, overlap=0.7),
  restore=Phase(0.03, leaf=120, shard=115, copies=1.5, codec_share=0.5, overlap=0.3),
  waits_for_snapshot=True,
)
# This package on the same host: reads and writes are queued with little Python an array, and each region of a process
# is read once, into memory that jax takes over. Costs of an array, a piece and a byte are solved from w1 (604 arrays,
# 1.02 GB), w2 (5,000 arrays, 0.2 GB) and w3 (w1 in 4,832 pieces). docs/predictions.json compares it with measurements.
OURS = CostModel(
  block=Phase(0.005, leaf=9, shard=6, packed=8),
  commit=Phase(0.03, leaf=21, shard=2, packed=5, copies=0.75, codec_share=0.75, overlap=0.7),
  restore=Phase(0.02, leaf=34, shard=12, packed=16, copies=0.75, codec_share=1.0, overlap=1.0),
)


@dataclasses.dataclass(frozen=True)
class Layout:
  """The settings that costs depend on, under their names in a configuration; None where Orbax's own applies."""

  compression: Compression = ZSTD
  pack: bool = False
  target_file_size: int | None = None
  chunk_size: int | None = None
  save_concurrency: int | None = None
  restore_concurrency: int | None = None
  data_copy_concurrency: int | None = None
  gather: bool = False
  reshard: bool = False


@dataclasses.dataclass(frozen=True)
class Prediction:
  """What a save and a restore of one state should cost.

  Attributes:
    blocking_s: seconds for which `save` blocks training.
    commit_s: seconds from the call of `save` to the commit.
    restore_s: seconds of a restore from cold storage.
    nbytes: bytes of the stored arrays.
    files: files or objects of a step.
    requests: data requests of a restore, over all processes.
    peak_host_bytes: host memory of a process besides the state itself, the greater of save and restore.
    snapshot_s: seconds until accelerators have sent what a process writes; a step that donates the state waits for it.
    pinned_bytes: pinned host memory of a process that a snapshot takes.
  """

  blocking_s: float
  commit_s: float
  restore_s: float
  nbytes: int
  files: int
  requests: int
  peak_host_bytes: int
  snapshot_s: float
  pinned_bytes: int


def predict(
  state: StateProfile, storage: StorageProfile, host: HostProfile, layout: Layout, model: CostModel = OURS
) -> Prediction:
  """The costs of `state` under `layout`."""
  found = _in_host_memory(state, storage, host, layout, model)
  return _on_accelerators(found, state, host, model) if state.accelerator_nbytes else found


def _on_accelerators(found: Prediction, state: StateProfile, host: HostProfile, model: CostModel) -> Prediction:
  """What a prediction becomes by the way between host and accelerators."""
  share = min(1.0, _written(state) / max(state.local_nbytes or state.nbytes, 1))
  sent, link = int(state.accelerator_nbytes * share), host.link
  pinned = link is not None and link.prefers_pinned and not model.waits_for_snapshot  # Orbax uses ordinary memory
  if link is None:
    seconds, restore, dispatch = copy_seconds(sent), copy_seconds(state.accelerator_nbytes), 0.0
  else:
    seconds = sent / ((link.to_pinned if pinned else None) or link.to_pageable)
    restore = state.accelerator_nbytes / link.from_pageable
    dispatch = state.accelerator_shards * share * link.put_s
  waits = seconds if model.waits_for_snapshot else dispatch
  return dataclasses.replace(
    found,
    blocking_s=found.blocking_s + waits,
    commit_s=found.commit_s + max(waits, seconds),
    restore_s=max(found.restore_s, restore),  # batches are sent while others are read
    snapshot_s=seconds,
    pinned_bytes=sent if pinned else 0,
  )


def _in_host_memory(
  state: StateProfile, storage: StorageProfile, host: HostProfile, layout: Layout, model: CostModel
) -> Prediction:
  """The costs of a state in the memory of the host.

  Storage that several hosts share is assumed to give each of them what it gave the one that measured; a disk's rate is
  divided among the job's processes.
  """
  leaves, shards, packed = state.local_leaves or state.leaves, state.local_shards or state.leaves, 0
  if layout.pack:
    # Small leaves are in slabs, which are few, but each is still an entry of the tree and of its fingerprints.
    packed = state.small_leaves * leaves // max(state.leaves, 1)
    leaves -= packed
    shards = max(leaves, shards - packed * shards // max(state.local_shards, 1)) + len(state.dtypes)
  coded = coding(state, host, layout.compression)
  ratio = coded.ratio
  held, written = state.local_nbytes or state.nbytes, _written(state)
  read = held * _once(state) if layout.gather else float(held)
  sharing = 1 if storage.kind.traits.shared else max(1, host.processes)

  def python_s(phase: Phase) -> float:
    return (leaves * phase.leaf + shards * phase.shard + packed * phase.packed) * host.task_s

  def bytes_s(phase: Phase, copied: float, codec_s: float) -> float:
    threads = min(layout.data_copy_concurrency or host.cores, host.cores, max(1, shards))
    return copied * phase.copies / host.copy_bytes_per_s + codec_s / (phase.codec_share * threads)

  blocking = model.block.fixed_s + python_s(model.block)
  files = _data_files(written * ratio, layout, host)
  cpu = bytes_s(model.commit, written * ratio, written * coded.encode_s)
  if layout.reshard:
    cpu += state.across_nbytes / host.processes * _ACROSS_COPIES / host.copy_bytes_per_s
    cpu += state.across_chunks / host.processes * _CHUNK_S
  io = written * ratio / _rate(storage, storage.write_bytes_per_s, sharing)
  io += files * storage.latency.get("create", 0.0)
  commit = model.commit.fixed_s + python_s(model.commit) + _overlapped(cpu, io, model.commit.overlap)
  pieces = max(1, shards, math.ceil(held / (layout.chunk_size or math.inf)))  # one request a chunk
  # Python queues reads while others are under way.
  cpu = python_s(model.restore) + bytes_s(model.restore, read, read * coded.decode_s)
  io = _read_s(storage, read * ratio, pieces, sharing)
  in_flight = layout.save_concurrency or (None if is_uncompressed(layout.compression) else written)
  return Prediction(
    blocking_s=blocking,
    commit_s=blocking + commit,
    restore_s=model.restore.fixed_s + _overlapped(cpu, io, model.restore.overlap),
    nbytes=int(state.nbytes * ratio),
    files=_STEP_FILES + host.processes * (_PROCESS_FILES + files),
    requests=pieces * host.processes,
    peak_host_bytes=int(max(host_nbytes(written, in_flight), min(read, layout.restore_concurrency or read))),
    snapshot_s=0.0,
    pinned_bytes=0,
  )


class Coded(NamedTuple):
  """What codecs make of a byte of a state: bytes stored, and seconds of one thread."""

  ratio: float
  encode_s: float
  decode_s: float


def coding(state: StateProfile, host: HostProfile, compression: Compression) -> Coded:
  """What `layout.compression` makes of a state; values that were not sampled count as random numbers."""
  rest = state.nbytes - sum(kind.nbytes for kind in state.kinds)
  kinds = [*state.kinds, Kind("", rest, host.codecs)]
  total = max(state.nbytes, 1)
  ratio, encode_s, decode_s = 1.0, 0.0, 0.0
  for kind in kinds:
    name, share = codec_of_kind(compression, kind.name), kind.nbytes / total
    if name != OFF and (found := kind.codecs.get(name) or kind.codecs.get(ZSTD)):  # of single bytes only zstd is known
      ratio -= share * (1 - found.ratio)
      encode_s += share / found.compress_bytes_per_s
      decode_s += share / found.decompress_bytes_per_s
  return Coded(ratio, encode_s, decode_s)


def _written(state: StateProfile) -> float:
  """Bytes of the process that writes most: training waits for its snapshot, and the commit for its writes."""
  return state.written_nbytes or (state.local_nbytes or state.nbytes) * _once(state)


def _once(state: StateProfile) -> float:
  """The share of what a process holds, if all together write or read each byte once."""
  return state.nbytes / max(state.read_nbytes, state.nbytes, 1)


def _rate(storage: StorageProfile, bytes_per_s: float, sharing: int) -> float:
  """What a measured rate gives one process over gigabytes."""
  burst = 0 < storage.seconds < _QUICK_S and not storage.kind.traits.durable_on_close
  return max(bytes_per_s * (_BURST if burst else 1.0) / sharing, 1.0)


def _overlapped(a: float, b: float, overlap: float) -> float:
  return max(a, b) + (1 - overlap) * min(a, b)


def _data_files(stored: float, layout: Layout, host: HostProfile) -> int:
  """OCDBT closes a data file at its target size, and fills as many at a time as it has threads."""
  if layout.target_file_size is None:
    return max(1, min(math.ceil(stored / (64 * MIB)), 2 * host.cores + 1))
  return max(1, math.ceil(stored / layout.target_file_size))


def _read_s(storage: StorageProfile, nbytes: float, pieces: int, sharing: int) -> float:
  """Storage time of reading `nbytes` in `pieces`: bound by the throughput, or by the requests if they are small."""
  bound = nbytes / _rate(storage, storage.read_bytes_per_s, sharing)
  if not storage.ranges:
    return bound
  parallel = streams_of(storage, storage.read)
  if storage.kind.traits.overwrite_in_place:
    # One large read fills a disk, which still serves small ones side by side. For a bucket this predicted 4.4 s of 7.1.
    parallel = max(parallel, storage.kind.traits.parallelism)
  return max(bound, pieces * request_s(storage, nbytes / pieces) / parallel * sharing)


def streams_of(storage: StorageProfile, curve: tuple[Throughput, ...]) -> int:
  """The fewest streams that reach 9/10 of the best throughput; what is usual where only one level was measured."""
  if len(curve) < 2:
    return storage.kind.traits.parallelism
  best = max(t.bytes_per_s for t in curve)
  return next(t.streams for t in curve if t.bytes_per_s >= 0.9 * best)


def knee_of(storage: StorageProfile) -> int:
  """The size from which a request is efficient; at least what is usual where only small ones were measured."""
  usual = storage.kind.traits.request_nbytes
  if not storage.ranges:
    return usual
  return storage.knee_nbytes if storage.ranges[-1].nbytes >= usual else max(usual, storage.knee_nbytes)


def request_s(storage: StorageProfile, nbytes: float) -> float:
  """Seconds of one read of `nbytes`: interpolated between the sizes measured, beyond them at the full rate."""
  sizes, seconds = zip(*((r.nbytes, r.seconds) for r in storage.ranges), strict=True)
  full_rate = max(storage.read_bytes_per_s, sizes[-1] / seconds[-1])
  return float(np.interp(nbytes, sizes, seconds)) + max(nbytes - sizes[-1], 0) / full_rate
