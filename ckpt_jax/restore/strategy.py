"""Which strategy a restore takes, from what storage and network give: a pure decision, and the measurement it needs."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping

import jax
import numpy as np

from ckpt_jax.restore import exchange
from ckpt_jax.restore.routes import DIRECT, Totals
from ckpt_jax.storage.cache import recall, remember
from ckpt_jax.storage.kinds import StorageKind, storage_identity
from ckpt_jax.storage.probe import StorageProfile
from ckpt_jax.tuning.assumed import is_assumed

STRATEGIES = ("direct", "gather", "broadcast")
# Storage of one server, or one disk: more readers do not make it faster. The others grow with them.
FIXED = frozenset({StorageKind.LOCAL, StorageKind.NETWORK_DISK, StorageKind.TMPFS, StorageKind.NFS, StorageKind.SMB})
# What a copy out of the page cache gives where all processes share a host.
_MEMORY_BYTES_PER_S = 2e9
# Another strategy must be better than direct by this share and by so many seconds: predictions are not that good.
_MARGIN = 0.85
_WORTH_S = 0.2
_MEASURED_NBYTES = 4 * 2**20
# N readers that together get more than this share of N times one reader's rate: storage grows with them.
_SCALES = 0.6
# What a restore must have read, and how long, to say anything about storage rather than about caches and latencies.
_TELLING_NBYTES, _TELLING_S = 32 * 2**20, 0.5


@dataclasses.dataclass(frozen=True)
class Speeds:
  """What a restore may count on, in bytes per second.

  Attributes:
    storage: of one reader.
    scales: whether N readers get N times as much together; else they share it.
    one_host: whether all processes share a host, so that what one has read others find in memory.
    network: what a process receives from the others; None if it was not measured.
    source: where the figures come from.
  """

  storage: float
  scales: bool
  one_host: bool
  network: float | None
  source: str


@dataclasses.dataclass(frozen=True)
class Choice:
  """A strategy, the reason for it, and the seconds that each was expected to take."""

  strategy: str
  why: str
  predicted: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Readers:
  """What an earlier restore saw: so many processes read so many bytes per second, all together."""

  count: int
  bytes_per_s: float


def speeds(profile: StorageProfile, network: float | None, seen: Readers | None = None) -> Speeds:
  """The speeds of a storage as `probe` measured it, or as its kind usually is.

  Args:
    profile: of one reader.
    network: bytes per second from the other processes, if measured.
    seen: what several readers got before. One reader's figure and this one tell whether storage grows with its readers.
  """
  one = max(profile.read_bytes_per_s, 1.0)
  scales = profile.kind not in FIXED
  source = f"usual for {profile.kind}" if is_assumed(profile) else f"measured on {profile.measured_at[:10]}"
  if seen is not None and profile.kind.traits.shared:  # else it was the page cache that they saw
    scales = seen.bytes_per_s > _SCALES * seen.count * one
    one = seen.bytes_per_s / seen.count if scales else seen.bytes_per_s
    source = f"seen by {seen.count} readers before"
  return Speeds(storage=one, scales=scales, one_host=not profile.kind.traits.shared, network=network, source=source)


def read_seconds(total: Totals, nbytes: float, speed: Speeds) -> float:
  """Seconds until all processes have read what they shall."""
  if speed.one_host:
    once = min(total.read_nbytes, nbytes)
    return once / speed.storage + (total.read_nbytes - once) / _MEMORY_BYTES_PER_S
  if speed.scales:
    return total.most_nbytes / speed.storage
  return total.read_nbytes / speed.storage


def predict(
  costs: Mapping[str, Totals], nbytes: float, speed: Speeds, compile_s: Mapping[str, float]
) -> dict[str, float]:
  """Seconds that each strategy takes: reading and exchanging overlap, compiling does with reading."""
  found = {}
  for strategy, total in costs.items():
    reading = read_seconds(total, nbytes, speed)
    exchanging = total.received_nbytes / speed.network if speed.network and strategy != DIRECT else 0.0
    longer, shorter = max(reading, exchanging), min(reading, exchanging)
    found[strategy] = longer + 0.15 * shorter + max(0.0, compile_s[strategy] - reading)
  return found


def worth_exchanging(costs: Mapping[str, Totals], nbytes: float, speed: Speeds) -> bool:
  """Whether reading each byte once could save anything, were the network free."""
  free = predict(costs, nbytes, dataclasses.replace(speed, network=None), dict.fromkeys(costs, 0.0))
  return min(free.values()) < min(_MARGIN * free[DIRECT], free[DIRECT] - _WORTH_S)


def choose(
  costs: Mapping[str, Totals], nbytes: float, speed: Speeds, compile_s: Mapping[str, float], processes: int
) -> Choice:
  """The strategy that is expected to be fastest; `direct` unless another is clearly faster.

  Args:
    costs: for each strategy what its routes cost.
    nbytes: of the leaves.
    speed: of storage and network.
    compile_s: for each strategy seconds of compiling that are still to be done.
    processes: of the job.
  """
  predicted = predict(costs, nbytes, speed, compile_s)
  copies = costs[DIRECT].read_nbytes / max(nbytes, 1.0)
  facts = f"direct reads {copies:.2f} copies; storage gives {speed.storage / 1e6:.0f} MB/s "
  facts += f"{'to each reader' if speed.scales else 'in all'} ({speed.source})"
  if processes == 1:
    return Choice(DIRECT, "one process reads everything once", predicted)
  if copies <= 1.02:
    return Choice(DIRECT, f"each byte is read once anyhow: {facts}", predicted)
  if not worth_exchanging(costs, nbytes, speed):
    return Choice(DIRECT, f"reading less would save little: {facts}", predicted)
  best = min(predicted, key=lambda s: predicted[s])
  facts += f", the network {(speed.network or 0) / 1e6:.0f} MB/s"
  if predicted[best] < min(_MARGIN * predicted[DIRECT], predicted[DIRECT] - _WORTH_S):
    return Choice(best, f"fastest by prediction: {facts}", predicted)
  return Choice(DIRECT, f"nothing is clearly faster: {facts}", predicted)


def measure_network() -> float:
  """Bytes per second that a process receives when all gather; all processes must call it together."""
  processes = jax.process_count()
  mine = [np.zeros(_MEASURED_NBYTES, np.uint8)]
  sizes = [[_MEASURED_NBYTES]] * processes
  best = float("inf")
  for i in range(3):
    started = time.perf_counter()
    exchange.exchange_bytes(mine, sizes)
    if i:  # the first compiles and connects
      best = min(best, time.perf_counter() - started)
  return _MEASURED_NBYTES * (processes - 1) / best


def seen_readers(path: str) -> Readers | None:
  """What the last telling restore from the storage of `path` saw, in this process or an earlier one on this host."""
  try:
    return Readers(**recall("readers", storage_identity(path)) or {})
  except TypeError:
    return None


def see_readers(path: str, count: int, nbytes: float, seconds: float) -> None:
  """Keeps what a restore saw, if it tells anything."""
  if count < 2 or nbytes < _TELLING_NBYTES or seconds < _TELLING_S:
    return
  remember("readers", storage_identity(path), dataclasses.asdict(Readers(count, nbytes / seconds)))


_networks: dict[str, float] = {}


def _network_key() -> str:
  return f"{jax.default_backend()} {jax.process_count()} {jax.device_count()}"


def known_network() -> float | None:
  """What this process has measured before."""
  return _networks.get(_network_key())


def remember_network(bytes_per_s: float) -> None:
  """Keeps a measurement for later restores of this process."""
  _networks[_network_key()] = bytes_per_s
