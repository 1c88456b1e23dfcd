"""Which strategy a restore takes: a prediction from the rates of storage and network, which process 0 makes for all."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from ckpt_jax.config import Config
from ckpt_jax.job.threads import Worker
from ckpt_jax.job.waits import Together
from ckpt_jax.restore import exchange
from ckpt_jax.restore.leaf import LeafPlan
from ckpt_jax.restore.meshes import SLACK
from ckpt_jax.restore.strategies import STRATEGIES, Route, Totals, plan_routes, totals
from ckpt_jax.storage.cache import recall, remember
from ckpt_jax.storage.kinds import StorageKind, storage_identity
from ckpt_jax.storage.probe import StorageProfile
from ckpt_jax.tuning.assumed import is_assumed
from ckpt_jax.tuning.plan import known_profile

# Storage of one server, or one disk: more readers do not make it faster. The others grow with them.
FIXED = frozenset({StorageKind.LOCAL, StorageKind.NETWORK_DISK, StorageKind.TMPFS, StorageKind.NFS, StorageKind.SMB})
# Rate of a copy out of the page cache, where all processes share a host.
_MEMORY_BYTES_PER_S = 2e9
# Predictions are rough: another strategy must beat direct by this share and by so many seconds.
_MARGIN = 0.85
_WORTH_S = 0.2
_MEASURED_NBYTES = 4 * 2**20
# N readers that together get more than this share of N times one reader's rate: storage grows with them.
_SCALES = 0.6
# A shorter restore measures caches and latencies rather than storage.
_TELLING_NBYTES, _TELLING_S = 32 * 2**20, 0.5


@dataclasses.dataclass(frozen=True)
class Speeds:
  """The rates that a restore may expect, in bytes per second.

  Attributes:
    storage: of one reader.
    scales: whether N readers get N times as much together; else they share it.
    one_host: whether all processes share a host, so that what one has read the others find in memory.
    network: what a process receives from the others; None if it was not measured.
    source: where the figures come from.
  """

  storage: float
  scales: bool
  one_host: bool
  network: float | None
  source: str


@dataclasses.dataclass(frozen=True)
class StrategyChoice:
  """A strategy, the reason for it, and the seconds that each was expected to take."""

  strategy: str
  why: str
  predicted: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Readers:
  """An observation of an earlier restore: the number of readers and their rate in all, in bytes per second."""

  count: int
  bytes_per_s: float


def agree_on_strategy(
  plans: list[LeafPlan], strategy: str, step_dir: str, config: Config, together: Together
) -> tuple[StrategyChoice, list[Route]]:
  """The strategy of a restore, which process 0 decides for all, and the routes that follow. All processes call it.

  `strategy` is a key of STRATEGIES, or `auto`. Afterwards the waits of `together` last as long as the prediction asks.
  """
  processes = jax.process_count()
  if strategy == "direct" or processes == 1:
    why = "one process reads everything once" if strategy == "auto" else "asked for"
    return StrategyChoice("direct" if strategy == "auto" else strategy, why), plan_routes(plans, "direct")
  routes = {name: plan_routes(plans, name, processes) for name in STRATEGIES}
  costs = {name: totals(r) for name, r in routes.items()}
  nbytes = float(sum(p.nbytes for p in plans))

  def speed() -> Speeds:
    kind = None if config.storage.kind == "auto" else StorageKind(config.storage.kind)
    return speeds(known_profile(step_dir, kind), next(iter(_network), None), seen_readers(step_dir))

  def is_measurement_needed() -> bool:
    return not _network and worth_exchanging(costs, nbytes, speed())

  def choice() -> dict[str, Any]:
    found = choose(costs, nbytes, speed(), {name: _compile_seconds(r) for name, r in routes.items()})
    return dataclasses.asdict(found if strategy == "auto" else StrategyChoice(strategy, "asked for", found.predicted))

  if together.decided("process 0 to see whether to measure the network", is_measurement_needed):
    worker = Worker("ckpt_jax-network")
    try:
      _network.append(together.wait("a measurement of the network", worker.submit(_measure_network)))
    finally:
      worker.close()
  chosen = StrategyChoice(**together.decided("process 0 to choose a strategy", choice))
  together.expected_s = chosen.predicted[chosen.strategy]
  return chosen, routes[chosen.strategy]


def speeds(profile: StorageProfile, network: float | None, seen: Readers | None = None) -> Speeds:
  """The speeds of a storage, from the profile of one reader and from what several readers have `seen` before.

  The two together show whether storage grows with its readers.
  """
  one = max(profile.read_bytes_per_s, 1.0)
  scales = profile.kind not in FIXED
  source = f"usual for {profile.kind}" if is_assumed(profile) else f"measured on {profile.measured_at[:10]}"
  if seen is not None and profile.kind.traits.shared:  # else they read from the page cache
    scales = seen.bytes_per_s > _SCALES * seen.count * one
    one = seen.bytes_per_s / seen.count if scales else seen.bytes_per_s
    source = f"seen by {seen.count} readers before"
  return Speeds(storage=one, scales=scales, one_host=not profile.kind.traits.shared, network=network, source=source)


def _read_seconds(total: Totals, nbytes: float, speed: Speeds) -> float:
  """Seconds until all processes have read their parts."""
  if speed.one_host:
    once = min(total.read_nbytes, nbytes)
    return once / speed.storage + (total.read_nbytes - once) / _MEMORY_BYTES_PER_S
  return (total.most_nbytes if speed.scales else total.read_nbytes) / speed.storage


def predict(
  costs: Mapping[str, Totals], nbytes: float, speed: Speeds, compile_s: Mapping[str, float]
) -> dict[str, float]:
  """Seconds that each strategy takes: reading overlaps with exchanging and with compiling."""
  found = {}
  for strategy, total in costs.items():
    reading = _read_seconds(total, nbytes, speed)
    exchanging = total.received_nbytes / speed.network if speed.network and strategy != "direct" else 0.0
    longer, shorter = max(reading, exchanging), min(reading, exchanging)
    found[strategy] = longer + 0.15 * shorter + max(0.0, compile_s[strategy] - reading)
  return found


def worth_exchanging(costs: Mapping[str, Totals], nbytes: float, speed: Speeds) -> bool:
  """Whether reading each byte once could save anything, were the network free."""
  return _wins(predict(costs, nbytes, dataclasses.replace(speed, network=None), dict.fromkeys(costs, 0.0)))


def _wins(predicted: Mapping[str, float]) -> bool:
  direct = predicted["direct"]
  return min(predicted.values()) < min(_MARGIN * direct, direct - _WORTH_S)


def choose(costs: Mapping[str, Totals], nbytes: float, speed: Speeds, compile_s: Mapping[str, float]) -> StrategyChoice:
  """The strategy that is expected to be fastest; `direct` unless another is clearly faster.

  `costs` and `compile_s` are what the routes of each strategy cost, and the seconds that they still have to compile.
  """
  predicted = predict(costs, nbytes, speed, compile_s)
  copies = costs["direct"].read_nbytes / max(nbytes, 1.0)
  facts = f"direct reads {copies:.2f} copies; storage gives {speed.storage / 1e6:.0f} MB/s "
  facts += f"{'to each reader' if speed.scales else 'in all'} ({speed.source})"
  strategy, why = "direct", "nothing is clearly faster"
  if copies <= SLACK:
    why = "each byte is read once anyway"
  elif not worth_exchanging(costs, nbytes, speed):
    why = "reading less would save little"
  else:
    facts += f", the network {(speed.network or 0) / 1e6:.0f} MB/s"
    if _wins(predicted):
      strategy, why = min(predicted, key=lambda s: predicted[s]), "fastest by prediction"
  return StrategyChoice(strategy, f"{why}: {facts}", predicted)


def _compile_seconds(routes: Sequence[Route]) -> float:
  """Seconds of compiling that the routes still need."""
  left = {p for r in routes if (p := r.program()) is not None and not p.is_compiled}
  return len(left) * exchange.compile_seconds()


_network: list[float] = []  # what this process has measured, in bytes per second


def _measure_network() -> float:
  """Bytes per second that a process receives when all gather; all processes must call it together."""
  processes = jax.process_count()
  best = float("inf")
  for i in range(3):
    started = time.perf_counter()
    exchange.exchange_bytes([np.zeros(_MEASURED_NBYTES, np.uint8)], [[_MEASURED_NBYTES]] * processes)
    if i:  # the first compiles and connects
      best = min(best, time.perf_counter() - started)
  return _MEASURED_NBYTES * (processes - 1) / best


def seen_readers(path: str) -> Readers | None:
  """What the last long restore from the storage of `path` observed, in this process or an earlier one on this host."""
  try:
    return Readers(**recall("readers", storage_identity(path)) or {})
  except TypeError:
    return None


def see_readers(path: str, count: int, nbytes: float, seconds: float) -> None:
  """Keeps what a restore observed, if it was long enough to measure storage."""
  if count >= 2 and nbytes >= _TELLING_NBYTES and seconds >= _TELLING_S:
    remember("readers", storage_identity(path), dataclasses.asdict(Readers(count, nbytes / seconds)))
