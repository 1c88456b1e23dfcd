"""Measures storage: throughput over streams, cost of a request over its size, latency of metadata operations.

Every figure comes from operations made in this call. It writes into a directory (or under a prefix) of its own, a
bounded number of bytes for a bounded time, and removes it again, also on Ctrl-C.
"""

from __future__ import annotations

import collections
import dataclasses
import datetime
import os
import pathlib
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import pydantic

from ckpt_jax.config import parse_bytes, parse_duration
from ckpt_jax.config.html import html_table
from ckpt_jax.config.units import decimal_text, size_text
from ckpt_jax.errors import ConfigError
from ckpt_jax.storage.cache import recall, remember
from ckpt_jax.storage.kinds import StorageKind, detect, storage_identity
from ckpt_jax.storage.parallel import in_threads
from ckpt_jax.storage.targets import BLOCK, FileTarget, Target, file_target, object_target, random_bytes
from ckpt_jax.storage.urls import is_object_store

_SMALLEST = 64 * BLOCK
_MAX_STREAMS = 64
_TURNS = 5
# One more doubling of the streams must bring this much, twice in a row, or the curve counts as flat.
_GROWTH = 1.1
_RANGES = tuple(4096 * 4**i for i in range(7))  # 4 KiB to 16 MiB
_VERSION = 2
_CACHE_NBYTES = 256 * BLOCK  # of the file that is written past the page cache and through it


@dataclasses.dataclass(frozen=True)
class Throughput:
  """Bytes per second with this many streams in flight; writes count until they are durable."""

  streams: int
  bytes_per_s: float


@dataclasses.dataclass(frozen=True)
class RangeRead:
  """Median seconds of one read of this many bytes, one at a time, at random places."""

  nbytes: int
  seconds: float


@dataclasses.dataclass(frozen=True)
class PageCache:
  """Bytes per second of one stream, through the page cache and past it; writes count until they are durable.

  Attributes:
    write, read: through it, cold reads.
    write_behind: with the pages dropped behind what is written.
    read_direct: with O_DIRECT; None if the file system refuses.
  """

  write: float
  write_behind: float
  read: float
  read_direct: float | None


@dataclasses.dataclass(frozen=True)
class StorageProfile:
  """What `probe` measured.

  Attributes:
    path, kind: the directory or URL, and the kind of its storage.
    measured_at, host: when (UTC, ISO 8601) and on which host.
    seconds, written_nbytes, read_nbytes: cost of the measurement.
    cold_by: how reads were made to come from the storage itself; None if they came from the page cache.
    write, read: throughput over streams, up to where it stops growing.
    ranges: cost of one read over its size.
    latency: median seconds of `create` (64 bytes, durable), `stat`, `list` (of some 10 entries), `rename`, `delete`,
      `fsync` (of one stream's file). Operations that the storage lacks are left out.
    page_cache: a file through the page cache and past it; None for buckets, and where nothing but a quick look was had.
  """

  path: str
  kind: StorageKind
  measured_at: str
  host: str
  seconds: float
  written_nbytes: int
  read_nbytes: int
  cold_by: str | None
  write: tuple[Throughput, ...]
  read: tuple[Throughput, ...]
  ranges: tuple[RangeRead, ...]
  latency: dict[str, float]
  page_cache: PageCache | None = None

  @property
  def write_bytes_per_s(self) -> float:
    """The best write throughput of this host."""
    return max((t.bytes_per_s for t in self.write), default=0.0)

  @property
  def read_bytes_per_s(self) -> float:
    """The best read throughput of this host."""
    return max((t.bytes_per_s for t in self.read), default=0.0)

  @property
  def knee_nbytes(self) -> int:
    """The smallest request that reaches half of the best throughput of one stream.

    Hockney's half-performance length n_1/2 (R. Hockney, C. Jesshope, "Parallel Computers", 1981), read off the curve.
    """
    best = max((r.nbytes / r.seconds for r in self.ranges), default=0.0)
    return next((r.nbytes for r in self.ranges if r.nbytes / r.seconds >= best / 2), _RANGES[-1])

  @property
  def age_s(self) -> float:
    """Seconds since it was measured."""
    then = datetime.datetime.fromisoformat(self.measured_at)
    return (datetime.datetime.now(datetime.timezone.utc) - then).total_seconds()

  def __repr__(self) -> str:
    when = f"measured {self.measured_at:.16} UTC in {self.seconds:.1f} s" if self.seconds else "assumed, not measured"
    return (
      f"StorageProfile({self.kind} at {self.path}: writes {decimal_text(self.write_bytes_per_s)}/s, reads "
      f"{decimal_text(self.read_bytes_per_s)}/s, a request is efficient from {decimal_text(self.knee_nbytes)}; {when})"
    )

  def _repr_html_(self) -> str:
    rates = [(f"write, {t.streams} at a time", f"{decimal_text(t.bytes_per_s)}/s") for t in self.write]
    rates += [(f"read, {t.streams} at a time", f"{decimal_text(t.bytes_per_s)}/s") for t in self.read]
    each = [(f"read of {size_text(r.nbytes)}", f"{1e3 * r.seconds:.3g} ms") for r in self.ranges]
    each += [(name, f"{1e3 * seconds:.3g} ms") for name, seconds in self.latency.items()]
    return html_table(("", "bytes a second"), rates, repr(self)) + html_table(("one request", "median"), each)

  def to_dict(self) -> dict[str, Any]:
    """JSON-able data, derived figures included."""
    return dataclasses.asdict(self) | {
      "version": _VERSION,
      "kind": str(self.kind),
      "write_bytes_per_s": self.write_bytes_per_s,
      "read_bytes_per_s": self.read_bytes_per_s,
      "knee_nbytes": self.knee_nbytes,
    }

  @classmethod
  def from_dict(cls, data: dict[str, Any]) -> StorageProfile:
    """The inverse of `to_dict`.

    Raises:
      ValueError: if a figure is missing or of the wrong type.
    """
    return pydantic.TypeAdapter(cls).validate_python(data)


def probe(path: str | os.PathLike[str], budget: float | str = 30.0, max_bytes: int | str = 4 * 2**30) -> StorageProfile:
  """Measures the storage under `path`, and keeps the result for this host and this storage.

  Args:
    path: a directory (it need not exist yet), or a gs:// or s3:// URL.
    budget: seconds, or text such as `30s`, that it may take; one operation that hangs may exceed it.
    max_bytes: bytes, or text such as `1GiB`, that it may have stored at a time; at most half of what is free is used.

  Raises:
    ConfigError: if budget or max_bytes make no sense.
    StorageError: if less than 64 MiB are free, or if the path cannot be reached or written.
  """
  try:
    seconds, limit = parse_duration(budget), parse_bytes(max_bytes)
  except ValueError as e:
    raise ConfigError(f"probe: {e}") from None
  if limit < _SMALLEST:
    raise ConfigError(f"probe: max_bytes must be at least {_SMALLEST} (64 MiB)")
  return _probe(path, seconds, limit, least=3)


def quick_probe(path: str | os.PathLike[str]) -> StorageProfile:
  """`probe` with single measurements instead of medians: less than a second on anything but very slow storage.

  The result is kept like that of `probe`, which replaces it.

  Raises:
    StorageError: as `probe`.
  """
  return _probe(path, 0.4, _SMALLEST, least=1)


def _probe(path: str | os.PathLike[str], seconds: float, limit: int, least: int) -> StorageProfile:
  started = time.monotonic()
  kind = detect(path)
  if is_object_store(path):
    with object_target(os.fspath(path)) as objects:
      measured = _Measurement(objects, started + seconds, limit, least).run()
  else:
    where = pathlib.Path(os.path.abspath(os.path.expanduser(os.fspath(path))))
    with file_target(where, 2 * _SMALLEST) as files:
      measured = _Measurement(files, started + seconds, min(limit, files.free_nbytes() // 2), least).run()
  profile = StorageProfile(
    path=os.fspath(path),
    kind=kind,
    measured_at=datetime.datetime.now(datetime.timezone.utc).isoformat(),
    host=os.uname().nodename,
    seconds=time.monotonic() - started,
    **measured,
  )
  remember("storage", storage_identity(path), profile.to_dict())
  return profile


class _Measurement:
  """One run of all measurements; each gets a share of the time that is left, so that all of them happen."""

  def __init__(self, target: Target, deadline: float, limit: int, least: int):
    self._target = target
    self._deadline = deadline
    self._limit = limit
    self._least = least
    self._quick = least == 1
    self._written = self._read = 0
    self._data = random_bytes(8 * BLOCK if self._quick else min(limit // 2, 256 * BLOCK))
    self._stored: dict[str, int] = {}

  def run(self) -> dict[str, Any]:
    latency = self._latencies(self._time_left() * 0.12)
    write = self._writes(self._time_left() * 0.45)
    read = self._reads(self._time_left() * 0.6)
    ranges = self._ranges(self._time_left() * 0.5)
    if isinstance(self._target, FileTarget) and self._target.fsync_s:
      latency["fsync"] = statistics.median(self._target.fsync_s)
    cache = None
    if isinstance(self._target, FileTarget) and not self._quick:
      self._drop()
      cache = self._page_cache(self._target, self._time_left())
    return {
      "page_cache": cache,
      "written_nbytes": self._written,
      "read_nbytes": self._read,
      "cold_by": self._target.cold_by,
      "write": write,
      "read": read,
      "ranges": ranges,
      "latency": latency,
    }

  def _time_left(self) -> float:
    return max(0.0, self._deadline - time.monotonic())

  def _latencies(self, budget: float) -> dict[str, float]:
    until = time.monotonic() + budget
    target = self._target
    seconds: dict[str, list[float]] = {}
    in_threads(target.create, [f"small-{i}" for i in range(10)], threads=8)
    for i in range(20):
      name, renamed = f"new-{i}", f"renamed-{i}"
      operations: list[tuple[Callable[..., Any], *tuple[str, ...]]] = [
        (target.create, name),
        (target.stat, name),
        (target.list,),
        *([(target.rename, name, renamed), (target.delete, renamed)] if target.can_rename else [(target.delete, name)]),
      ]
      for operation, *arguments in operations:
        started = time.perf_counter()
        operation(*arguments)
        seconds.setdefault(operation.__name__, []).append(time.perf_counter() - started)
      if time.monotonic() > until:
        break
    if isinstance(target, FileTarget):
      target.fsync_s.clear()  # those of 64 bytes; saves are like the large ones that follow
    return {name: statistics.median(values) for name, values in seconds.items()}

  def _writes(self, budget: float) -> tuple[Throughput, ...]:
    # The first write opens connections and says how much to write in a slice of the time.
    first = 2 * BLOCK if self._quick else min(8 * BLOCK, len(self._data))
    started = time.perf_counter()
    self._store("pilot", first)
    speed = first / (time.perf_counter() - started)
    self._drop()

    def measure(streams: int, slice_s: float) -> float:
      nonlocal speed
      # At least 4 MiB a stream: less measures requests, not throughput. One stream writes one file.
      each = int(speed * slice_s / streams) // BLOCK * BLOCK
      each = max(4 * BLOCK, min(each, len(self._data), self._limit // streams // BLOCK * BLOCK))
      self._drop()  # the files of the last measurement stay for the reads
      started = time.perf_counter()
      names = [f"data-{streams}-{i}" for i in range(streams)]
      in_threads(lambda name: self._store(name, each), names, threads=streams)
      speed = each * streams / (time.perf_counter() - started)
      return speed

    return self._levels(measure, budget, min(_MAX_STREAMS, self._limit // (4 * BLOCK)))

  def _reads(self, budget: float) -> tuple[Throughput, ...]:
    speed = 0.0

    def measure(streams: int, slice_s: float) -> float:
      nonlocal speed
      parts = self._parts(streams, int(speed * slice_s) if speed else (2 if self._quick else 16) * BLOCK)
      self._target.make_cold(list(self._stored))
      started = time.perf_counter()
      got = sum(in_threads(lambda part: sum(self._target.read(*piece) for piece in part), parts, threads=streams))
      measured = got / (time.perf_counter() - started)
      self._read += got
      speed = max(speed, measured)
      return measured

    measure(1, 0.0)  # says how much to read
    return self._levels(measure, budget, _MAX_STREAMS)

  def _levels(self, measure: Callable[[int, float], float], budget: float, most: int) -> tuple[Throughput, ...]:
    """Throughput at 1, 2, 4 ... streams until it stops growing, then all levels again while time is left: medians.

    Args:
      measure: gives bytes per second for a number of streams and the seconds that it should take.
      budget: seconds for all of it.
      most: the largest number of streams.
    """
    until = time.monotonic() + budget
    slice_s = budget / 3 if self._quick else max(0.25, budget / 20)
    speeds: dict[int, list[float]] = {}
    streams, flat = 1, 0
    while streams <= most and flat < 2 and (time.monotonic() < until or not speeds):
      best = max((s[0] for s in speeds.values()), default=0.0)
      speeds[streams] = [measure(streams, slice_s)]
      flat = flat + 1 if speeds[streams][0] < _GROWTH * best else 0
      streams *= 2
    for streams in [*speeds] * 2:
      if time.monotonic() < until:
        speeds[streams].append(measure(streams, slice_s))
    return tuple(Throughput(streams, statistics.median(values)) for streams, values in speeds.items())

  def _parts(self, streams: int, wanted: int) -> list[list[tuple[str, int, int]]]:
    """The distinct pieces that each stream reads, `wanted` bytes in all, or everything that there is."""
    piece = max(BLOCK, min(16 * BLOCK, -(-wanted // (4 * streams)) // BLOCK * BLOCK))
    chosen: list[tuple[str, int, int]] = []
    total = 0
    for name, size in self._stored.items():
      step = min(size, piece) if isinstance(self._target, FileTarget) else size
      for start in range(0, size, step):
        if total < max(wanted, BLOCK) or len(chosen) < streams:
          chosen.append((name, start, min(start + step, size)))
          total += chosen[-1][2] - start
    # Neighbours go to one stream, as a sequential reader would have them.
    per = -(-len(chosen) // streams)
    return [chosen[i : i + per] for i in range(0, len(chosen), per)]

  def _ranges(self, budget: float) -> tuple[RangeRead, ...]:
    found: list[RangeRead] = []
    rng = random.Random(0)
    for nbytes in _RANGES:
      fitting = [name for name, size in self._stored.items() if size >= nbytes]
      if not fitting:
        break
      self._target.make_cold(fitting)
      until = min(self._deadline, time.monotonic() + budget / len(_RANGES))
      seconds: list[float] = []
      while len(seconds) < self._least or (len(seconds) < 50 and time.monotonic() < until):
        name = rng.choice(fitting)
        start = rng.randrange(0, self._stored[name] - nbytes + 1)
        start += (start == 0) & (self._stored[name] > nbytes)  # a range, not the whole object
        started = time.perf_counter()
        self._read += self._target.read(name, start, start + nbytes)
        seconds.append(time.perf_counter() - started)
      found.append(RangeRead(nbytes, statistics.median(seconds)))
      if self._quick and time.monotonic() > self._deadline:
        break
    return tuple(found)

  def _page_cache(self, target: FileTarget, budget: float) -> PageCache:
    """Both ways in turn, so that what else the machine does meets both: medians."""
    until = time.monotonic() + budget
    data = self._data[: min(len(self._data), _CACHE_NBYTES)]
    speeds: dict[str, list[float]] = collections.defaultdict(list)

    def timed(what: str, work: Callable[..., object], *arguments: Any, **options: Any) -> None:
      started = time.perf_counter()
      if work("cache", *arguments, **options) is not False:
        speeds[what].append(len(data) / (time.perf_counter() - started))

    for turn in range(_TURNS):
      for behind in (turn % 2 == 0, turn % 2 == 1):
        timed("write_behind" if behind else "write", target.write, data, behind=behind)
        self._written += len(data)
        if not behind:
          target.make_cold(["cache"])
          timed("read", target.read, 0, len(data))
          timed("read_direct", target.read_direct, len(data))
          self._read += 2 * len(data)
        target.delete("cache")
      if time.monotonic() > until:
        break
    found = {what: statistics.median(some) for what, some in speeds.items()}
    return PageCache(found["write"], found["write_behind"], found["read"], found.get("read_direct"))

  def _store(self, name: str, nbytes: int) -> None:
    self._target.write(name, self._data[:nbytes])
    self._stored[name] = nbytes
    self._written += nbytes

  def _drop(self) -> None:
    in_threads(self._target.delete, [*self._stored], threads=8)
    self._stored.clear()


def cached_profile(path: str | os.PathLike[str]) -> StorageProfile | None:
  """What `probe` last measured on this host for the storage (mount or bucket) of `path`, or None."""
  data = recall("storage", storage_identity(path))
  try:
    return StorageProfile.from_dict(data) if data and data.get("version") == _VERSION else None
  except ValueError:
    return None
