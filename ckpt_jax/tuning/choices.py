"""The decisions of a plan, one function each, in the order of `CHOICES`: facts and the layout so far -> a choice.

Each compares predictions (costs.py) or follows from what a kind of storage is (storage/kinds.py). A setting that the
user made is reported as such, and the others are chosen around it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

from ckpt_jax.config import TIMEOUT_FLOOR_S, Config
from ckpt_jax.config.units import count, decimal_text, duration_text, is_uncompressed
from ckpt_jax.layout.codec import OFF, SHUFFLED, ZSTD, codec_of_kind
from ckpt_jax.layout.shares import SLICE_NBYTES
from ckpt_jax.storage.kinds import StorageKind
from ckpt_jax.storage.probe import StorageProfile
from ckpt_jax.tuning.costs import MIB, Layout, Prediction, coding, knee_of, predict, streams_of
from ckpt_jax.tuning.profile import HostProfile, StateProfile
from ckpt_jax.tuning.sampling import Codecs, Kind

# A change of the layout must reduce commit and restore together to this share ...
_WORTH = 0.9
# ... or, where it stores this share of the bytes, cost no time.
_SMALL_ENOUGH = 0.6
_ALIKE = 0.01  # of the bytes
_NO_VALUES = "random numbers, since this state has no values to try"
_PACK_LEAVES = 200
# Steps from this size on are worth keeping out of the page cache, unless that is slower.
_WORTH_DROPPING_NBYTES, _AS_FAST = 256 * MIB, 0.9
# w1 with 1 GB in flight committed in 1.18 s, unlimited in 1.56 s.
_IN_FLIGHT = 10**9
_MEMORY_SHARE = 8
# 16 of them are in flight.
_CODED_CHUNK_NBYTES = 64 * MIB
_ORBAX_FILE_IO = 128
# Orbax's own targets (tensorstore_utils.py of 0.12.8).
_ORBAX_FILE_NBYTES = {True: 400 * MIB, False: 2048 * MIB}
# The most that chunks which other meshes can use may add to a commit.
_RESHARD_COST = 0.05
_TIMEOUT_FACTOR = 20


@dataclasses.dataclass(frozen=True)
class Choice:
  """One line of a plan.

  Attributes:
    key: key path of the setting; a name without a dot is no setting, but explains what happens anyway.
    value: as in a configuration file.
    reason: with the figures behind it.
    default: what Orbax does by default, and what that would cost.
    by_user: whether the user made the choice.
  """

  key: str
  value: Any
  reason: str
  default: str
  by_user: bool = False

  @property
  def is_setting(self) -> bool:
    """Whether it can be written in a configuration."""
    return "." in self.key

  @property
  def text(self) -> str:
    """The value as written in a file."""
    return value_text(self.key, self.value)

  def line(self) -> str:
    """`key: value - reason. Orbax: default`."""
    yours = "set by you; " if self.by_user else ""
    return f"{self.key}: {self.text} - {yours}{self.reason}. Orbax: {self.default}"


@dataclasses.dataclass(frozen=True)
class Facts:
  """What a plan is made from, with the layout that the choices made so far give."""

  state: StateProfile
  storage: StorageProfile
  host: HostProfile
  config: Config
  layout: Layout = dataclasses.field(default_factory=Layout)

  def predict(self, **changes: Any) -> Prediction:
    """The costs of the layout so far, with `changes`."""
    return predict(self.state, self.storage, self.host, dataclasses.replace(self.layout, **changes))

  def set_by_user(self, path: str) -> Any:
    """What the user set, or None."""
    value = operator.attrgetter(path)(self.config)
    return None if value == "auto" else value

  def choice(self, path: str, value: Any, reason: str, default: str) -> Choice:
    """A choice of `value`, unless the user set another."""
    section, key = path.split(".")
    mine = self.set_by_user(path)
    by_user = mine is not None and key in getattr(self.config, section).model_fields_set
    return Choice(path, value if mine is None else mine, reason, default, by_user)

  def after(self, choice: Choice) -> Facts:
    """The facts for the next decision."""
    name = choice.key.rpartition(".")[2]
    if not any(field.name == name for field in dataclasses.fields(Layout)):
      return self
    value: Any = choice.value
    if name != "compression":
      value = {"on": True, "off": False, "auto": None}.get(value, value)
    return dataclasses.replace(self, layout=dataclasses.replace(self.layout, **{name: value}))

  @property
  def write_streams(self) -> int:
    """Parallel writes from which the throughput stops growing."""
    return streams_of(self.storage, self.storage.write)

  @property
  def read_streams(self) -> int:
    """Parallel reads from which the throughput stops growing."""
    return streams_of(self.storage, self.storage.read)


def _data_copy(f: Facts) -> Choice:
  reason = f"this process may use {count(f.host.cores, 'core')}"
  return f.choice("limits.data_copy_concurrency", f.host.cores, reason, "every CPU of the host, whatever the quota")


def _file_io(f: Facts) -> Choice:
  streams = max(f.read_streams, f.write_streams)
  reason = f"throughput stops growing at {count(streams, 'stream')}; 4 times as many leave room for small ones"
  value = min(_ORBAX_FILE_IO, max(8, 4 * streams))
  return f.choice("limits.file_io_concurrency", value, reason, f"{_ORBAX_FILE_IO} threads")


def _page_cache(f: Facts) -> Choice:
  kind, cache, expected = f.storage.kind, f.storage.page_cache, f.predict()
  read_s = duration_text(expected.nbytes / max(f.storage.read_bytes_per_s, 1.0))
  speeds = "not measured, see ckpt-jax probe"
  if cache is not None:
    speeds = f"one stream writes {rate_text(cache.write_behind)} past it, {rate_text(cache.write)} through it"
  value = "buffered"
  if kind is StorageKind.TMPFS:
    reason = "the files are memory, whichever way they are written"
  elif kind.traits.shared:
    reason = "what this host reads again it need not read from the servers"
    if not kind.traits.overwrite_in_place:
      reason = "a bucket is not in the page cache"
  elif kind is not StorageKind.LOCAL:
    reason = f"a restart on this host reads from memory what would take {read_s} from the disk"
  elif expected.nbytes < _WORTH_DROPPING_NBYTES:
    reason = f"{decimal_text(expected.nbytes)} take little memory, and a restart on this host reads them from there"
  elif cache is not None and cache.write_behind < _AS_FAST * cache.write:
    reason = f"past the page cache is slower here: {speeds}"
  else:
    value = "direct"
    reason = f"leaves {decimal_text(expected.nbytes)} of page cache to the data of training ({speeds}); a "
    reason += f"restart on this host reads it from the disk in {read_s}"
  return f.choice("limits.file_io", value, reason, "every step stays in the page cache until the room is needed")


def _compression(f: Facts) -> Choice:
  """Compresses the kinds of leaves that save most bytes for a second of a thread, as many as make it fastest."""
  kinds = f.state.kinds or (Kind(_NO_VALUES, f.state.nbytes, f.host.codecs),)
  best = {kind.name: _best_codec(kind.codecs) for kind in kinds}
  codecs = {kind.name: kind.codecs[best[kind.name]] for kind in kinds}
  order = sorted(best, key=lambda kind: (codecs[kind].ratio - 1) * codecs[kind].compress_bytes_per_s)
  settings: list[Any] = [{kind: best[kind] for kind in order[: n + 1]} for n in range(len(order))]
  if all(best[kind.name] == (SHUFFLED if SHUFFLED in kind.codecs else ZSTD) for kind in kinds):
    settings[-1] = SHUFFLED  # those leaves too that were not sampled
  off, tried = f.predict(compression=OFF), [(f.predict(compression=setting), setting) for setting in settings]
  on, setting = min(tried, key=lambda one: _time(one[0]))
  smaller = coding(f.state, f.host, setting).ratio <= _SMALL_ENOUGH and _time(on) <= _time(off)
  value = setting if f.state.kinds and (smaller or _time(on) <= _WORTH * _time(off)) else OFF
  used = f.set_by_user("layout.compression") or value
  said = [
    f"{best[kind.name]} {'would leave' if codec_of_kind(used, kind.name) == OFF else 'leaves'} "
    f"{codecs[kind.name].ratio:.0%} of {kind.name} ({decimal_text(kind.nbytes)}) at "
    f"{rate_text(codecs[kind.name].compress_bytes_per_s)} a thread"
    for kind in kinds
  ]
  reason = (
    f"{', '.join(said)}: commit {duration_text(on.commit_s)} and restore {duration_text(on.restore_s)} at best, "
    f"{duration_text(off.commit_s)} and {duration_text(off.restore_s)} without"
  )
  orbax = f.predict(compression=ZSTD)
  return f.choice("layout.compression", value, reason, f"zstd for all: commit {duration_text(orbax.commit_s)}")


def _best_codec(codecs: Codecs) -> str:
  """Shuffled, unless zstd alone stores less, as it may where rows are repeated: moments are zeros only at first."""
  return min(codecs, key=lambda name: codecs[name].ratio - (_ALIKE if name == SHUFFLED else 0))


def _time(p: Prediction) -> float:
  return p.commit_s + p.restore_s


def _pack(f: Facts) -> Choice:
  off, on = f.predict(pack=False), f.predict(pack=True)
  small = f.state.small_leaves
  pays = small >= _PACK_LEAVES and _time(on) <= _WORTH * _time(off)
  gain = f"commit {duration_text(off.commit_s)} -> {duration_text(on.commit_s)}, restore "
  gain += f"{duration_text(off.restore_s)} -> {duration_text(on.restore_s)}"
  if small < _PACK_LEAVES:
    reason = f"{count(small, 'array')} below 1 MiB {'is' if small == 1 else 'are'} too few to pack"
  elif pays and f.set_by_user("layout.pack") == "off":  # the default, so that plain Orbax reads the steps
    reason = f"`on` is recommended for {small:,} arrays below 1 MiB: {gain}; but plain Orbax can read a packed step "
    reason += "only after ckpt-jax repack"
  else:
    reason = f"{small:,} arrays below 1 MiB: {gain} if packed"
  return f.choice("layout.pack", "on" if pays else "off", reason, "no packing: some Python and an entry for each array")


def _target_file_size(f: Facts) -> Choice:
  orbax = _ORBAX_FILE_NBYTES[f.storage.kind in (StorageKind.GCS, StorageKind.S3)]
  stored = f.predict().nbytes / max(1, f.host.processes)
  streams, knee = f.write_streams, knee_of(f.storage)
  size = _rounded(max(stored / streams, 2 * knee, 16 * MIB))
  mine = f.set_by_user("layout.target_file_size")
  value: Any = "auto"
  if mine:
    reason = f"{_times(stored, mine)} a process"
  elif f.storage.kind.traits.overwrite_in_place:
    reason = "a disk takes one file as well as many"
  elif size >= orbax or stored <= 2 * size:
    reason = f"{decimal_text(stored)} a process need no other objects than Orbax's"
  else:
    value = size
    reason = f"{decimal_text(stored)} a process in {_times(stored, size)} objects: up to {streams} are written at a "
    reason += f"time, and a request is efficient from {decimal_text(knee)}"
  return f.choice("layout.target_file_size", value, reason, f"{decimal_text(orbax)}: {_times(stored, orbax)} a process")


def _chunk_size(f: Facts) -> Choice:
  streams, knee = f.read_streams, knee_of(f.storage)
  shard = f.state.largest_shard_nbytes or f.state.largest_leaf_nbytes
  least = max(8 * knee, 16 * MIB)
  enough = (f.state.local_shards or f.state.leaves) >= 2 * streams
  mine = f.set_by_user("layout.chunk_size")
  value: Any = "auto"
  if mine:
    reason = f"the largest piece, {decimal_text(shard)}, in {_times(shard, mine)}"
  elif not is_uncompressed(f.layout.compression) and shard > 2 * _CODED_CHUNK_NBYTES:
    value = _CODED_CHUNK_NBYTES
    reason = f"a thread compresses a chunk: the largest piece, {decimal_text(shard)}, in {_times(shard, value)}"
  elif shard <= 2 * least:
    reason = f"the largest piece, {decimal_text(shard)}, is read in one request"
  elif enough and shard <= 256 * MIB:
    reason = f"{f.state.local_shards:,} pieces of a process keep {count(streams, 'stream')} busy without cutting them"
  else:
    value = _rounded(min(max(shard / streams, least), 256 * MIB))
    reason = f"the largest piece, {decimal_text(shard)}, is read by {_times(shard, value)} requests at a time, each "
    reason += f"well above the {decimal_text(knee)} from which a request is efficient"
  one_stream = min((t.bytes_per_s for t in f.storage.read), default=0.0)
  default = f"whole pieces: {decimal_text(shard)} by one request at {rate_text(one_stream)}"
  return f.choice("layout.chunk_size", value, reason, default)


def _replica_parallel(f: Facts) -> Choice:
  copies = f.state.read_nbytes / max(f.state.nbytes, 1)
  value = "on"
  if f.host.processes == 1:
    value, reason = "auto", "one process writes all; Orbax's way costs it nothing"
  elif copies > 1.01:
    share = decimal_text(f.state.nbytes / f.host.processes)
    most = f" ({decimal_text(f.state.written_nbytes)} at most)" if f.state.written_nbytes else ""
    reason = f"{f.host.processes} processes hold {copies:.1f} copies: each writes {share}{most} instead of one set of "
    reason += f"them all {decimal_text(f.state.nbytes)}"
  else:
    reason = "no byte is held by two processes: nothing to divide, nothing lost"
  return f.choice("layout.replica_parallel", value, reason, "on")


def _min_slice(f: Facts) -> Choice:
  value: Any = SLICE_NBYTES
  reason = "smaller arrays are dealt out whole, so that all processes write as much; below this the bookkeeping of a "
  reason += "part costs more than its bytes"
  if f.host.processes == 1:
    value, reason = "auto", "one process: nothing is divided"
  default = "every replicated array is divided, however small"
  return f.choice("layout.min_slice_for_replica_parallel", value, reason, default)


def _reshard(f: Facts) -> Choice:
  s, off = f.state, f.predict(reshard=False).commit_s
  cost = f.predict(reshard=True).commit_s / off - 1
  reads = f"a restore onto an orthogonal mesh (rows -> columns) reads {s.resharding:.2f} times what it needs"
  more = f"{count(s.across_chunks, 'chunk')} more"
  value: Any = "on"
  if not s.across_chunks:
    value, reason = "auto", "no array is large enough, on several processes, to be cut across the rows of each"
  elif cost <= _RESHARD_COST:
    reason = f"{reads} instead of {s.resharding_whole:.2f}: {more} add {cost:.1%} to the commit"
  else:
    value, reason = "off", f"{more} would add {cost:.1%} to the commit, and at most {_RESHARD_COST:.0%} are worth it"
  return f.choice("layout.reshard", value, reason, f"whole shards: {max(s.resharding_whole, 1):.2f} times")


def _concurrency(saving: bool, f: Facts) -> Choice:
  held = f.state.local_nbytes or f.state.nbytes
  # All that a process holds of an array must be in flight together.
  piece = f.state.largest_local_nbytes or f.state.largest_leaf_nbytes
  share = f.host.memory_nbytes // _MEMORY_SHARE
  wanted = min(max(_IN_FLIGHT, 2 * (f.write_streams if saving else f.read_streams) * 8 * MIB), share)
  reason = f"{decimal_text(wanted)} in flight keep {'writes' if saving else 'reads'} busy"
  if piece > wanted:
    reason = f"what a process holds of the largest array, {decimal_text(piece)}, must fit"
  elif wanted == share:
    reason = f"1/{_MEMORY_SHARE} of the memory is the limit"
  default = f"unlimited: up to {decimal_text(held)} besides the state"
  if saving:
    default = f"unlimited: one transaction holds up to {decimal_text(held)} until the commit"
  path = f"limits.{'save' if saving else 'restore'}_concurrency"
  return f.choice(path, max(wanted, piece), reason, default)


def _strategy(f: Facts) -> Choice:
  copies = f.state.read_nbytes / max(f.state.nbytes, 1)
  direct, gather = duration_text(f.predict().restore_s), duration_text(f.predict(gather=True).restore_s)
  if f.host.processes == 1:
    reason = "one process reads what its devices need, once"
  elif copies <= 1.01:
    reason = "no byte is needed by two processes: each reads its own"
  else:
    reason = f"{f.host.processes} processes need {copies:.1f} copies: {direct} if each reads its own, {gather} and an "
    reason += f"exchange if each reads 1/{f.host.processes}; auto compares them with the interconnect at each restore"
  default = f"direct: {decimal_text(f.state.read_nbytes or f.state.nbytes)} are read in all"
  return f.choice("restore.strategy", "auto", reason, default)


def _commit(f: Facts) -> Choice:
  if f.storage.kind.traits.atomic_rename:
    return Choice("commit", "rename", "renaming a directory is atomic here", "the same")
  default = "the same on gs://; none for s3://"
  if f.storage.kind is StorageKind.BUCKET_MOUNT:
    seconds = f.predict().files * f.storage.latency.get("create", 0.0)
    default = f"renames, which copy every object: {duration_text(seconds)} and twice the bytes"
  return Choice("commit", "marker", "no rename is atomic here: a marker is written last", default)


def _deletion(f: Facts) -> Choice:
  files = f.predict().files
  each = f.storage.latency.get("delete", 0.0)
  reason = f"a step is {files} files at {duration_text(each)} each: marked at once, removed in the background"
  return Choice("deletion", "background", reason, f"one after the other, {duration_text(files * each)} a step")


def _timeout(saving: bool, f: Facts) -> Choice:
  expected = f.predict().commit_s if saving else f.predict().restore_s
  value = max(TIMEOUT_FLOOR_S, float(math.ceil(_TIMEOUT_FACTOR * expected / 60) * 60))
  reason = (
    f"{_TIMEOUT_FACTOR} times the {duration_text(expected)} expected, and at least {duration_text(TIMEOUT_FLOOR_S)}"
  )
  default = "20 min, however large the state" if saving else "none for the whole restore"
  return f.choice(f"timeouts.{'save' if saving else 'restore'}", value, reason, default)


CHOICES: tuple[Callable[[Facts], Choice], ...] = (
  _data_copy,
  _file_io,
  _compression,
  _pack,
  _target_file_size,
  _chunk_size,
  _replica_parallel,
  _min_slice,
  _reshard,
  functools.partial(_concurrency, True),
  functools.partial(_concurrency, False),
  _page_cache,
  _strategy,
  _commit,
  _deletion,
  functools.partial(_timeout, True),
  functools.partial(_timeout, False),
)


def _rounded(nbytes: float) -> int:
  return math.ceil(nbytes / MIB) * MIB


def _times(whole: float, part: float) -> int:
  return max(1, math.ceil(whole / part))


# -- text


def value_text(key: str, value: Any) -> str:
  """A setting's value as written in a file."""
  if isinstance(value, Mapping):
    return f"{{{', '.join(f'{name}: {of}' for name, of in value.items())}}}"
  if value is None or isinstance(value, bool):
    return {None: "null", True: "true", False: "false"}[value]
  if isinstance(value, float) and key.startswith("timeouts."):
    return f"{value:.0f}s"
  return f"{value // MIB}MiB" if isinstance(value, int) and value and value % MIB == 0 else str(value)


def rate_text(bytes_per_s: float) -> str:
  """1.02 GB/s."""
  return f"{decimal_text(bytes_per_s)}/s"
