"""Measures storage: throughput over streams, cost of a request over its size, latency of metadata operations.

Nothing is assumed: every figure comes from operations made in this call. It writes into a directory (or under a prefix)
of its own, a bounded number of bytes for a bounded time, and removes it again, on Ctrl-C too.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import datetime
import os
import pathlib
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

from ckpt_jax.config import parse_bytes, parse_duration
from ckpt_jax.errors import ConfigError
from ckpt_jax.storage.cache import recall, remember
from ckpt_jax.storage.kinds import StorageKind, detect, storage_identity
from ckpt_jax.storage.targets import BLOCK, FileTarget, Target, file_target, object_target, random_bytes
from ckpt_jax.storage.urls import is_object_store

_SMALLEST = 64 * BLOCK
_MAX_STREAMS = 64
# One more doubling of the streams must bring this much, twice in a row, or the curve counts as flat.
_GROWTH = 1.1
_RANGES = tuple(4096 * 4**i for i in range(7))  # 4 KiB to 16 MiB
_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Throughput:
  """Bytes per second with so many streams in flight; writes count until they are durable."""

  streams: int
  bytes_per_s: float


@dataclasses.dataclass(frozen=True)
class RangeRead:
  """Median seconds of one read of so many bytes, one at a time, at random places."""

  nbytes: int
  seconds: float


@dataclasses.dataclass(frozen=True)
class StorageProfile:
  """What `probe` measured.

  Attributes:
    path: where.
    kind: what it lies on.
    measured_at: when, UTC, ISO 8601.
    host: on which host.
    seconds, written_nbytes, read_nbytes: what measuring took.
    cold_by: how reads were made to come from the storage itself; None if they came from the page cache.
    write, read: throughput over streams, up to where it stops growing.
    ranges: cost of one read over its size.
    latency: median seconds of `create` (64 bytes, durable), `stat`, `list` (of some 10 entries), `rename`, `delete`,
      `fsync` (of one stream's file). An operation that the storage lacks is not there.
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
    """The inverse of `to_dict`."""
    kept = {f.name: data[f.name] for f in dataclasses.fields(cls)}
    kept["kind"] = StorageKind(kept["kind"])
    kept["write"] = tuple(Throughput(**t) for t in kept["write"])
    kept["read"] = tuple(Throughput(**t) for t in kept["read"])
    kept["ranges"] = tuple(RangeRead(**r) for r in kept["ranges"])
    return cls(**kept)


def probe(path: str | os.PathLike[str], budget: float | str = 30.0, max_bytes: int | str = 4 * 2**30) -> StorageProfile:
  """Measures the storage under `path`, and remembers the result for this host and this storage.

  Args:
    path: a directory (it need not exist yet), or a gs:// or s3:// URL.
    budget: seconds, or text such as `30s`, that it may take; one operation that hangs may exceed it.
    max_bytes: bytes, or text such as `1GiB`, that it may have stored at a time; at most half of what is free is used.

  Raises:
    ConfigError: if budget or max_bytes make no sense.
    StorageError: if there is less free space than the least it needs, 64 MiB; if the path cannot be written; or if it
      cannot be reached.
  """
  try:
    seconds, limit = parse_duration(budget), parse_bytes(max_bytes)
  except ValueError as e:
    raise ConfigError(f"probe: {e}") from None
  if limit < _SMALLEST:
    raise ConfigError(f"probe: max_bytes must be at least {_SMALLEST} (64 MiB)")
  return _probe(path, seconds, limit, least=3)


def quick_probe(path: str | os.PathLike[str]) -> StorageProfile:
  """`probe` in less than a second on anything but very slow storage: one measurement where `probe` takes a median.

  Remembered like `probe`'s, which replaces it.

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
  """One run of all measurements; parts get shares of the time that is left, so that all of them happen."""

  def __init__(self, target: Target, deadline: float, limit: int, least: int):
    self._least = least
    self._target = target
    self._deadline = deadline
    self._limit = limit
    self._written = self._read = 0
    self._data = random_bytes(min(limit // 2, 256 * BLOCK) if least > 1 else 8 * BLOCK)
    self._stored: dict[str, int] = {}

  def run(self) -> dict[str, Any]:
    latency = self._latencies(share=0.12)
    write = self._writes(share=0.45)
    read = self._reads(share=0.6)
    ranges = self._ranges(share=0.8)
    if isinstance(self._target, FileTarget) and self._target.fsync_s:
      latency["fsync"] = statistics.median(self._target.fsync_s)
    return {
      "written_nbytes": self._written,
      "read_nbytes": self._read,
      "cold_by": self._target.cold_by,
      "write": write,
      "read": read,
      "ranges": ranges,
      "latency": latency,
    }

  def _time_left(self, share: float) -> float:
    return max(0.0, self._deadline - time.monotonic()) * share

  def _latencies(self, share: float) -> dict[str, float]:
    until = time.monotonic() + self._time_left(share)
    seconds: dict[str, list[float]] = {}

    def timed(name: str, operation: Callable[[], Any]) -> None:
      started = time.perf_counter()
      operation()
      seconds.setdefault(name, []).append(time.perf_counter() - started)

    target = self._target
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
      list(pool.map(target.create, [f"small-{i}" for i in range(10)]))
    for i in range(20):
      timed("create", lambda: target.create(f"new-{i}"))  # noqa: B023 - called at once
      timed("stat", lambda: target.stat(f"new-{i}"))  # noqa: B023
      timed("list", target.list)
      name = f"new-{i}"
      if target.can_rename:
        timed("rename", lambda: target.rename(f"new-{i}", f"renamed-{i}"))  # noqa: B023
        name = f"renamed-{i}"
      timed("delete", lambda: target.delete(name))  # noqa: B023
      if time.monotonic() > until:
        break
    if isinstance(target, FileTarget):
      target.fsync_s.clear()  # those of 64 bytes; throughput's are what saving sees
    return {name: statistics.median(values) for name, values in seconds.items()}

  def _writes(self, share: float) -> tuple[Throughput, ...]:
    budget = self._time_left(share)
    until = time.monotonic() + budget
    # The first write warms connections up and says how much to write in a slice of the time.
    first = min(8 * BLOCK, len(self._data)) if self._least > 1 else 2 * BLOCK
    started = time.perf_counter()
    self._store("pilot", first)
    speed = first / (time.perf_counter() - started)
    self._drop(["pilot"])
    slice_s = max(0.25, budget / 20) if self._least > 1 else budget / 3

    def one(streams: int) -> float:
      nonlocal speed
      # At least 4 MiB a stream: less measures requests, not throughput. One stream writes one file.
      each = int(speed * slice_s / streams) // BLOCK * BLOCK
      each = max(4 * BLOCK, min(each, len(self._data), self._limit // streams // BLOCK * BLOCK))
      self._drop(list(self._stored))  # the last level's files stay for the reads
      names = [f"data-{streams}-{i}" for i in range(streams)]
      started = time.perf_counter()
      with concurrent.futures.ThreadPoolExecutor(streams) as pool:
        list(pool.map(lambda name: self._store(name, each), names))
      speed = each * streams / (time.perf_counter() - started)
      return speed

    return self._levels(one, until, min(_MAX_STREAMS, self._limit // (4 * BLOCK)))

  def _levels(self, one: Callable[[int], float], until: float, most: int) -> tuple[Throughput, ...]:
    """`one(streams)` at 1, 2, 4 ... until it stops growing, then all levels again while time is left: medians."""
    speeds: dict[int, list[float]] = {}
    streams, flat = 1, 0
    while streams <= most and flat < 2 and (time.monotonic() < until or not speeds):
      best = max((s[0] for s in speeds.values()), default=0.0)
      speeds[streams] = [one(streams)]
      flat = flat + 1 if speeds[streams][0] < _GROWTH * best else 0
      streams *= 2
    for _ in range(2):
      for streams in speeds:
        if time.monotonic() < until:
          speeds[streams].append(one(streams))
    return tuple(Throughput(streams, statistics.median(values)) for streams, values in speeds.items())

  def _reads(self, share: float) -> tuple[Throughput, ...]:
    budget = self._time_left(share)
    until = time.monotonic() + budget
    slice_s = max(0.25, budget / 20) if self._least > 1 else budget / 3
    names = list(self._stored)
    speed = 0.0

    def one(streams: int) -> float:
      nonlocal speed
      parts = self._parts(names, streams, int(speed * slice_s) if speed else (16 if self._least > 1 else 2) * BLOCK)
      self._target.make_cold(names)
      started = time.perf_counter()
      with concurrent.futures.ThreadPoolExecutor(streams) as pool:
        got = sum(pool.map(lambda part: sum(self._target.read(*piece) for piece in part), parts))
      measured = got / (time.perf_counter() - started)
      self._read += got
      speed = max(speed, measured)
      return measured

    one(1)  # says how much to read
    return self._levels(one, until, _MAX_STREAMS)

  def _parts(self, names: list[str], streams: int, wanted: int) -> list[list[tuple[str, int, int]]]:
    """What each stream reads: distinct pieces, `wanted` bytes in all, or everything that there is."""
    piece = 16 * BLOCK
    whole = not isinstance(self._target, FileTarget)
    pieces: list[tuple[str, int, int]] = []
    for name in names:
      size = self._stored[name]
      step = size if whole else max(BLOCK, min(piece, size, -(-wanted // (4 * streams)) // BLOCK * BLOCK))
      pieces += [(name, start, min(start + step, size)) for start in range(0, size, step)]
    chosen: list[tuple[str, int, int]] = []
    total = 0
    for candidate in pieces:
      if total >= max(wanted, BLOCK) and len(chosen) >= streams:
        break
      chosen.append(candidate)
      total += candidate[2] - candidate[1]
    # Neighbours go to one stream, as a sequential reader would have them.
    per = -(-len(chosen) // streams)
    return [chosen[i : i + per] for i in range(0, len(chosen), per)]

  def _ranges(self, share: float) -> tuple[RangeRead, ...]:
    budget = self._time_left(share)
    if not self._stored:
      return ()
    names = list(self._stored)
    found: list[RangeRead] = []
    rng = random.Random(0)
    for nbytes in _RANGES:
      fitting = [n for n in names if self._stored[n] >= nbytes]
      if not fitting:
        break
      self._target.make_cold(fitting)
      until = time.monotonic() + budget / len(_RANGES)
      seconds: list[float] = []
      while len(seconds) < self._least or (len(seconds) < 50 and time.monotonic() < until):
        name = rng.choice(fitting)
        start = rng.randrange(0, self._stored[name] - nbytes + 1)
        start += (start == 0) & (self._stored[name] > nbytes)  # a range, not the whole object
        started = time.perf_counter()
        self._read += self._target.read(name, start, start + nbytes)
        seconds.append(time.perf_counter() - started)
        if len(seconds) >= self._least and time.monotonic() > self._deadline:
          break
      if self._least == 1 and found and time.monotonic() > self._deadline:
        break
      found.append(RangeRead(nbytes, statistics.median(seconds)))
    return tuple(found)

  def _store(self, name: str, nbytes: int) -> None:
    self._target.write(name, self._data[:nbytes])
    self._stored[name] = nbytes
    self._written += nbytes

  def _drop(self, names: list[str]) -> None:
    if not names:
      return
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
      list(pool.map(self._target.delete, names))
    for name in names:
      del self._stored[name]


def cached_profile(path: str | os.PathLike[str]) -> StorageProfile | None:
  """What `probe` last measured on this host for the storage (mount or bucket) of `path`, or None."""
  data = recall("storage", storage_identity(path))
  try:
    return StorageProfile.from_dict(data) if data and data.get("version") == _VERSION else None
  except (ValueError, KeyError, TypeError):
    return None
