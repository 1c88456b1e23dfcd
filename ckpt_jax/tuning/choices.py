"""The decisions of a plan, one function each: (facts, layout so far) -> (choice, layout with it).

Each compares predictions (costs.py) or follows from what a kind of storage is (storage/kinds.py). A setting that the
user made is reported as such, and the others are chosen around it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from ckpt_jax.config import TIMEOUT_FLOOR_S, Config
from ckpt_jax.storage.kinds import StorageKind
from ckpt_jax.storage.probe import StorageProfile
from ckpt_jax.tuning.costs import MIB, Layout, Prediction, knee_of, predict, streams_of
from ckpt_jax.tuning.profile import HostProfile, StateProfile

# A change of the layout must bring this much of commit and restore together ...
_WORTH = 0.9
# ... or, where it saves this much space, cost no more than that in time.
_SMALL_ENOUGH, _NO_SLOWER = 0.6, 1.1
_PACK_LEAVES = 200
_GB = 10**9
# FACTS: W1 with 1 GB in flight committed in 1.18 s, unlimited in 1.56 s.
_IN_FLIGHT = _GB
_MEMORY_SHARE = 8
_ORBAX_FILE_IO = 128
# Orbax's own targets (tensorstore_utils.py of 0.12.8).
_ORBAX_FILE_NBYTES = {True: 400 * MIB, False: 2048 * MIB}
_TIMEOUT_FACTOR = 20


@dataclasses.dataclass(frozen=True)
class Choice:
  """One line of a plan.

  Attributes:
    key: the setting's key path; names without a dot tell what happens anyway.
    value: as in a configuration file.
    reason: with the figures that it rests on.
    default: what Orbax does unasked, and what that would cost.
    by_user: whether the user made the choice.
  """

  key: str
  value: Any
  reason: str
  default: str
  by_user: bool = False

  @property
  def is_setting(self) -> bool:
    return "." in self.key

  @property
  def text(self) -> str:
    """The value as it would stand in a file."""
    return _value_text(self.key, self.value)

  def line(self) -> str:
    """`key: value - reason. Orbax: default`."""
    yours = "set by you; " if self.by_user else ""
    return f"{self.key}: {self.text} - {yours}{self.reason}. Orbax: {self.default}"


@dataclasses.dataclass(frozen=True)
class Facts:
  """What a plan is made from."""

  state: StateProfile
  storage: StorageProfile
  host: HostProfile
  config: Config

  def predict(self, layout: Layout) -> Prediction:
    return predict(self.state, self.storage, self.host, layout)

  def set_by_user(self, path: str, default: Any = "auto") -> Any:
    """What the user set, or None."""
    section, key = path.split(".")
    value = getattr(getattr(self.config, section), key)
    return None if value == default else value

  @property
  def write_streams(self) -> int:
    return streams_of(self.storage, self.storage.write)

  @property
  def read_streams(self) -> int:
    return streams_of(self.storage, self.storage.read)

  @property
  def knee(self) -> int:
    return knee_of(self.storage)

  @property
  def piece(self) -> int:
    """Bytes of one array that must be in flight together: all that a process holds of it."""
    return self.state.largest_local_nbytes or self.state.largest_leaf_nbytes


Decision = tuple[Choice, Layout]


def _compression(f: Facts, layout: Layout) -> Decision:
  off, on = (f.predict(dataclasses.replace(layout, compression=c)) for c in (False, True))
  zstd = f.state.compressibility or f.host.zstd
  where = (
    f"of {nbytes_text(zstd.sampled_nbytes)} of its values"
    if f.state.compressibility
    else "of random numbers, since this state has no values to try,"
  )
  pays = _time(on) <= _WORTH * _time(off)
  smaller = zstd.ratio <= _SMALL_ENOUGH and _time(on) <= _NO_SLOWER * _time(off)
  mine = f.set_by_user("layout.compression")
  value = mine or ("on" if pays or smaller else "off")
  reason = (
    f"zstd leaves {zstd.ratio:.0%} {where} at {rate_text(zstd.compress_bytes_per_s)} a thread: commit "
    f"{seconds_text(on.commit_s)} and restore {seconds_text(on.restore_s)} with it, {seconds_text(off.commit_s)} and "
    f"{seconds_text(off.restore_s)} without"
  )
  default = f"on: commit {seconds_text(on.commit_s)}"
  return Choice("layout.compression", value, reason, default, bool(mine)), dataclasses.replace(
    layout, compression=value == "on"
  )


def _time(p: Prediction) -> float:
  return p.commit_s + p.restore_s


def _pack(f: Facts, layout: Layout) -> Decision:
  off, on = (f.predict(dataclasses.replace(layout, pack=p)) for p in (False, True))
  pays = f.state.small_leaves >= _PACK_LEAVES and _time(on) <= _WORTH * _time(off)
  mine = f.set_by_user("layout.pack")  # `off` unless the configuration says otherwise: plain Orbax should read it
  value = mine or ("on" if pays else "off")
  gain = f"commit {seconds_text(off.commit_s)} -> {seconds_text(on.commit_s)}, restore "
  gain += f"{seconds_text(off.restore_s)} -> {seconds_text(on.restore_s)}"
  if f.state.small_leaves < _PACK_LEAVES:
    reason = f"{f.state.small_leaves} arrays below 1 MiB are too few to gather"
  elif mine == "off" and pays:
    reason = f"`on` is recommended for {f.state.small_leaves:,} arrays below 1 MiB: {gain}; but plain Orbax reads a "
    reason += "packed step only after ckpt-jax repack"
  else:
    reason = f"{f.state.small_leaves:,} arrays below 1 MiB: {gain} if gathered"
  by_user = "pack" in f.config.layout.model_fields_set and mine is not None
  return Choice("layout.pack", value, reason, "no packing: some Python and an entry for each array", by_user), (
    dataclasses.replace(layout, pack=value == "on")
  )


def _target_file_size(f: Facts, layout: Layout) -> Decision:
  bucket = not f.storage.kind.traits.overwrite_in_place
  orbax = _ORBAX_FILE_NBYTES[f.storage.kind in (StorageKind.GCS, StorageKind.S3)]
  stored = f.predict(layout).nbytes / max(1, f.host.processes)
  streams = f.write_streams
  size = _rounded(max(stored / streams, 2 * f.knee, 16 * MIB))
  mine = f.set_by_user("layout.target_file_size")
  if mine:
    value, reason = mine, f"{_times(stored, mine)} a process"
  elif not bucket:
    value, reason = "auto", "a disk takes one file as well as many"
  elif layout.compression:
    # zarr3, which alone keeps to the target, would compress at level 3 in place of 1.
    value, reason = "auto", "compressed steps keep to Orbax's size"
  elif size >= orbax or stored <= 2 * size:
    value, reason = "auto", f"{nbytes_text(stored)} a process need no other objects than Orbax's"
  else:
    value = size
    reason = f"{nbytes_text(stored)} a process in {_times(stored, size)} objects: up to {streams} are on their way at "
    reason += f"a time, and a request is worth while from {nbytes_text(f.knee)}"
  default = f"{nbytes_text(orbax)}: {_times(stored, orbax)} a process"
  return Choice("layout.target_file_size", value, reason, default, bool(mine)), dataclasses.replace(
    layout, target_file_size=None if value == "auto" else value
  )


def _chunk_size(f: Facts, layout: Layout) -> Decision:
  streams = f.read_streams
  shard = f.state.largest_shard_nbytes or f.state.largest_leaf_nbytes
  least = max(8 * f.knee, 16 * MIB)
  enough = (f.state.local_shards or f.state.leaves) >= 2 * streams
  mine = f.set_by_user("layout.chunk_size")
  value: Any = "auto"
  if mine:
    value, reason = mine, f"the largest piece, {nbytes_text(shard)}, in {_times(shard, mine)}"
  elif shard <= 2 * least:
    reason = f"the largest piece, {nbytes_text(shard)}, is read in one request"
  elif enough and shard <= 256 * MIB:
    reason = f"{f.state.local_shards:,} pieces of a process keep {streams} streams busy without cutting them"
  else:
    value = _rounded(min(max(shard / streams, least), 256 * MIB))
    reason = (
      f"the largest piece, {nbytes_text(shard)}, is read by {_times(shard, value)} requests at a time, each well "
    )
    reason += f"above the {nbytes_text(f.knee)} from which a request is worth while"
  default = f"whole pieces: {nbytes_text(shard)} by one request at {rate_text(_one_stream(f.storage))}"
  return Choice("layout.chunk_size", value, reason, default, bool(mine)), dataclasses.replace(
    layout, chunk_size=None if value == "auto" else value
  )


def _replica_parallel(f: Facts, layout: Layout) -> Decision:
  mine = f.set_by_user("layout.replica_parallel")
  copies = f.state.read_nbytes / max(f.state.nbytes, 1)
  if f.host.processes == 1:
    value: Any = "auto"
    reason = "one process writes all; Orbax's way costs it nothing"
  elif copies > 1.01:
    value = "on"
    reason = f"{f.host.processes} processes hold {copies:.1f} copies: each writes "
    reason += nbytes_text(f.state.nbytes / f.host.processes)
    reason += f" instead of one set of them all {nbytes_text(f.state.nbytes)}"
  else:
    value, reason = "on", "no byte lies on two processes: nothing to divide, nothing lost"
  return Choice("layout.replica_parallel", mine or value, reason, "on", bool(mine)), layout


# 0.1 ms for the entry of a part in metadata and tree, against 160 MB/s to a shared store.
_MIN_SLICE = 16 * 1024


def _min_slice(f: Facts, layout: Layout) -> Decision:
  mine = f.set_by_user("layout.min_slice_for_replica_parallel")
  value = mine or ("auto" if f.host.processes == 1 else _MIN_SLICE)
  reason = (
    "one process: nothing is divided"
    if f.host.processes == 1
    else "a process gathers its parts in few large files; below this a part's bookkeeping costs more than its bytes"
  )
  default = "every replicated array is divided, however small"
  return Choice("layout.min_slice_for_replica_parallel", value, reason, default, bool(mine)), layout


def _concurrency(f: Facts, layout: Layout, path: str) -> Decision:
  saving = path.endswith("save_concurrency")
  held = f.state.local_nbytes or f.state.nbytes
  share = f.host.memory_nbytes // _MEMORY_SHARE
  wanted = min(max(_IN_FLIGHT, 2 * (f.write_streams if saving else f.read_streams) * 8 * MIB), share)
  value = max(wanted, f.piece)
  reason = f"{nbytes_text(wanted)} in flight keep {'writes' if saving else 'reads'} busy"
  if wanted == share:
    reason = f"1/{_MEMORY_SHARE} of the memory is the bound"
  if value > wanted:
    reason = f"what a process holds of the largest array, {nbytes_text(f.piece)}, must fit"
  mine = f.set_by_user(path)
  if saving:
    default = f"unlimited: one transaction holds up to {nbytes_text(held)} until the commit"
  else:
    default = f"unlimited: up to {nbytes_text(held)} beside the state"
  limit: dict[str, Any] = {path.split(".")[1]: mine or value}
  return Choice(path, mine or value, reason, default, bool(mine)), dataclasses.replace(layout, **limit)


def _save_concurrency(f: Facts, layout: Layout) -> Decision:
  return _concurrency(f, layout, "limits.save_concurrency")


def _restore_concurrency(f: Facts, layout: Layout) -> Decision:
  return _concurrency(f, layout, "limits.restore_concurrency")


def _file_io(f: Facts, layout: Layout) -> Decision:
  streams = max(f.read_streams, f.write_streams)
  mine = f.set_by_user("limits.file_io_concurrency")
  value = mine or min(_ORBAX_FILE_IO, max(8, 4 * streams))
  reason = f"throughput stops growing at {streams} streams; 4 times that leaves room for small ones"
  return Choice("limits.file_io_concurrency", value, reason, f"{_ORBAX_FILE_IO} threads", bool(mine)), layout


def _data_copy(f: Facts, layout: Layout) -> Decision:
  mine = f.set_by_user("limits.data_copy_concurrency")
  value = mine or f.host.cores
  reason = f"this process may use {f.host.cores} cores"
  return Choice(
    "limits.data_copy_concurrency", value, reason, "every CPU of the host, whatever the quota", bool(mine)
  ), (dataclasses.replace(layout, copy_threads=value))


def _strategy(f: Facts, layout: Layout) -> Decision:
  mine = f.set_by_user("restore.strategy")
  copies = f.state.read_nbytes / max(f.state.nbytes, 1)
  direct = f.predict(layout)
  gather = f.predict(dataclasses.replace(layout, gather=True))
  if f.host.processes == 1:
    reason = "one process reads what its devices need, once"
  elif copies <= 1.01:
    reason = "no byte is needed by two processes: each reads its own"
  else:
    reason = (
      f"{f.host.processes} processes need {copies:.1f} copies: {seconds_text(direct.restore_s)} if each reads its "
    )
    reason += (
      f"own, {seconds_text(gather.restore_s)} and an exchange if each reads 1/{f.host.processes}; auto compares "
    )
    reason += "them with the interconnect at each restore"
  default = f"direct: {nbytes_text(f.state.read_nbytes or f.state.nbytes)} are read in all"
  return Choice("restore.strategy", mine or "auto", reason, default, bool(mine)), layout


def _commit(f: Facts, layout: Layout) -> Decision:
  traits = f.storage.kind.traits
  if traits.atomic_rename:
    return Choice("commit", "rename", "a directory's rename is one step here", "the same"), layout
  seconds = f.predict(layout).files * f.storage.latency.get("create", 0.0)
  reason = "nothing can be renamed in one step here: a marker is written last"
  default = "the same on gs://; none for s3://"
  if f.storage.kind is StorageKind.BUCKET_MOUNT:
    default = f"renames, which copy every object: {seconds_text(seconds)} and twice the bytes"
  return Choice("commit", "marker", reason, default), layout


def _deletion(f: Facts, layout: Layout) -> Decision:
  files = f.predict(layout).files
  each = f.storage.latency.get("delete", 0.0)
  reason = f"a step is {files} files at {seconds_text(each)} each: marked at once, removed behind training"
  return Choice("deletion", "background", reason, f"one after the other, {seconds_text(files * each)} a step"), layout


def _timeout(f: Facts, layout: Layout, path: str) -> Decision:
  found = f.predict(layout)
  expected = found.commit_s if path.endswith("save") else found.restore_s
  mine = f.set_by_user(path)
  value = mine or max(TIMEOUT_FLOOR_S, float(math.ceil(_TIMEOUT_FACTOR * expected / 60) * 60))
  reason = f"{_TIMEOUT_FACTOR} times the {seconds_text(expected)} expected, and no less than "
  reason += seconds_text(TIMEOUT_FLOOR_S)
  default = "1200 s, however large the state" if path.endswith("save") else "none of the whole restore"
  return Choice(path, value, reason, default, bool(mine)), layout


def _save_timeout(f: Facts, layout: Layout) -> Decision:
  return _timeout(f, layout, "timeouts.save")


def _restore_timeout(f: Facts, layout: Layout) -> Decision:
  return _timeout(f, layout, "timeouts.restore")


CHOICES: tuple[Callable[[Facts, Layout], Decision], ...] = (
  _data_copy,
  _file_io,
  _compression,
  _pack,
  _target_file_size,
  _chunk_size,
  _replica_parallel,
  _min_slice,
  _save_concurrency,
  _restore_concurrency,
  _strategy,
  _commit,
  _deletion,
  _save_timeout,
  _restore_timeout,
)


def _one_stream(storage: StorageProfile) -> float:
  return min((t.bytes_per_s for t in storage.read), default=0.0)


def _rounded(nbytes: float) -> int:
  return math.ceil(nbytes / MIB) * MIB


def _times(whole: float, part: float) -> int:
  return max(1, math.ceil(whole / part))


# -- text


def _value_text(key: str, value: Any) -> str:
  if isinstance(value, bool) or not isinstance(value, (int, float)):
    return str(value)
  if key.startswith("timeouts."):
    return f"{value:.0f}s"
  if key.endswith(("file_io_concurrency", "data_copy_concurrency")):
    return str(value)
  return f"{value // MIB}MiB" if value % MIB == 0 else f"{value}"


def nbytes_text(nbytes: float) -> str:
  """1.02 GB: powers of 1000, as storage and links are sold."""
  for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
    if nbytes >= size:
      return f"{nbytes / size:.3g} {unit}"
  return f"{nbytes:.0f} B"


def rate_text(bytes_per_s: float) -> str:
  return f"{nbytes_text(bytes_per_s)}/s"


def seconds_text(seconds: float) -> str:
  if seconds < 1:
    return f"{seconds * 1e3:.3g} ms"
  return f"{seconds:.3g} s" if seconds < 1000 else f"{seconds:.0f} s"
