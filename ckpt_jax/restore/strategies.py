"""Strategies of a restore: which process reads what of each leaf, and how the rest reaches the other processes.

`direct` reads on each process what its devices need: R replicas read R copies. `gather` reads each byte once, spread
over all processes, and moves it on between the devices. `broadcast` lets one replica read and send to the others.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from ckpt_jax.restore import exchange
from ckpt_jax.restore.leaf import LeafPlan
from ckpt_jax.restore.meshes import (
  SLACK,
  amplification,
  axes_by_dim,
  concrete,
  default_memory_kind,
  plain_mesh,
  primary_mesh,
  processes_of,
  spread_spec,
)

# Leaves up to this size may be read by all processes, while that adds no more than this share to the bytes read.
_TINY_NBYTES = 256 * 1024
_TINY_SHARE = 0.02
# Below this the bytes of several leaves travel as one buffer in host memory.
_SMALL_NBYTES = 2**20
NOT_HERE: Any = object()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Route:
  """How one leaf gets from storage to its devices. This one: each process reads what its own devices need.

  Attributes:
    plan: the leaf.
    read_nbytes: bytes that storage reads for it, over all processes.
    most_nbytes: the same for the process that reads most.
    received_nbytes: bytes that a process gets from others.
    moves: whether anything goes between processes.
  """

  plan: LeafPlan
  read_nbytes: float
  most_nbytes: float
  received_nbytes: float = 0.0
  moves: ClassVar[bool] = False

  @property
  def target(self) -> NamedSharding:
    """Where a leaf that moves is wanted."""
    assert isinstance(self.plan.sharding, NamedSharding)
    return self.plan.sharding

  def reads_into(self) -> Sharding | None:
    """Where this process reads its part to; None: host memory, NOT_HERE: it reads nothing."""
    return self.plan.sharding

  def program(self) -> exchange.Program | None:
    """What has to be compiled to move it."""
    return None

  def move(self, value: Any) -> Any:
    """The leaf at `plan.sharding`, given what this process read. All processes call it."""
    return value


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spread(Route):
  """All processes read a part each, divided by `spec`, and the devices exchange them."""

  spec: PartitionSpec
  moves = True

  def reads_into(self) -> Sharding | None:
    return NamedSharding(plain_mesh(concrete(self.target)), self.spec)

  def program(self) -> exchange.Program:
    return exchange.spread_program(self.plan.shape, self.plan.dtype, self.target, self.spec)

  def move(self, value: Any) -> Any:
    return exchange.spread(self.program(), value, self.target)


class Replica(Route):
  """The processes of the first replica read it, and its devices send it to the other replicas."""

  moves = True

  def reads_into(self) -> Sharding | None:
    is_here = jax.process_index() in processes_of(primary_mesh(self.target))
    return exchange.on_primary(self.target) if is_here else NOT_HERE

  def program(self) -> exchange.Program:
    return exchange.replica_program(self.plan.shape, self.plan.dtype, self.target)

  def move(self, value: Any) -> Any:
    return exchange.replicate(self.program(), value, self.target)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Whole(Route):
  """The process `owner` reads all of it and sends the bytes to all hosts; `fetch` moves many of them at a time."""

  owner: int
  moves = True

  def reads_into(self) -> Sharding | None:
    return None if jax.process_index() == self.owner else NOT_HERE


class Strategy(abc.ABC):
  """How the processes of a job share the reading of a state: a pure decision, the same on all processes.

  `plan_routes` asks it about each leaf that direct reading would read more than once. It answers with a `Route`, whose
  byte counts are what `auto` predicts its time from; `fetch` then runs the routes, whatever strategy they come from.
  For example, a strategy that reads through one process a host would return `Whole` with the first process of each host
  for an owner.

  To add one: subclass this, return the routes above or one of your own, and put it into `STRATEGIES` and
  `config.sections.RestoreConfig.strategy`. tests/programs/reshard.py restores random states bit for bit with each
  strategy that it is given, and tests/restore/test_strategies.py counts the bytes that each reads.
  """

  @abc.abstractmethod
  def route(self, plan: LeafPlan, sharding: NamedSharding, loads: dict[int, float]) -> Route:
    """The route of one leaf.

    Args:
      plan: the leaf.
      sharding: where it is wanted; it has devices of all processes.
      loads: for each process the bytes of the leaves that it reads whole so far; a `Whole` route adds its own.
    """


class Direct(Strategy):
  """Each process reads what its devices need."""

  def route(self, plan: LeafPlan, sharding: NamedSharding, loads: dict[int, float]) -> Route:
    return _direct(plan, len(loads))


class Gather(Strategy):
  """All processes read a part of each leaf, by whole chunks; a leaf that cannot be divided so is read by one."""

  def route(self, plan: LeafPlan, sharding: NamedSharding, loads: dict[int, float]) -> Route:
    mesh, processes = concrete(sharding), len(loads)
    spec = spread_spec(plan.shape, plan.chunk_shape, mesh, sharding.spec) if _is_movable(plan.dtype) else None
    received = _held(plan, sharding) * (1 - 1 / processes)
    if spec is None:
      return _whole(plan, loads, list(loads), received)
    read = plan.nbytes * amplification(plan.shape, plan.chunk_shape, mesh, axes_by_dim(spec, len(plan.shape)))
    return Spread(plan=plan, spec=spec, read_nbytes=read, most_nbytes=read / processes, received_nbytes=received)


class Broadcast(Strategy):
  """The first replica reads; small leaves, and those that its devices divide across chunks, by one of its processes."""

  def route(self, plan: LeafPlan, sharding: NamedSharding, loads: dict[int, float]) -> Route:
    primary = primary_mesh(sharding)
    readers = processes_of(primary)
    axes = axes_by_dim(sharding.spec, len(plan.shape))
    read = plan.nbytes * amplification(plan.shape, plan.chunk_shape, primary, axes)
    received = _held(plan, sharding)
    if plan.nbytes < _SMALL_NBYTES or not _is_movable(plan.dtype) or read > SLACK * plan.nbytes:
      return _whole(plan, loads, readers, received)
    return Replica(plan=plan, read_nbytes=read, most_nbytes=read / len(readers), received_nbytes=2 * received)


STRATEGIES: dict[str, Strategy] = {"direct": Direct(), "gather": Gather(), "broadcast": Broadcast()}


@dataclasses.dataclass(frozen=True)
class Totals:
  """What a set of routes costs: bytes read in all, by the process that reads most, and received by each."""

  read_nbytes: float
  most_nbytes: float
  received_nbytes: float


def totals(routes: Sequence[Route]) -> Totals:
  """The sums over all routes."""
  loads: dict[int, float] = {}
  most = 0.0
  for r in routes:
    if isinstance(r, Whole):
      loads[r.owner] = loads.get(r.owner, 0.0) + r.read_nbytes
    else:
      most += r.most_nbytes
  read, received = sum(r.read_nbytes for r in routes), sum(r.received_nbytes for r in routes)
  return Totals(read, most + max(loads.values(), default=0.0), received)


def plan_routes(plans: Sequence[LeafPlan], strategy: str, processes: int | None = None) -> list[Route]:
  """The route of each leaf under a strategy, a key of STRATEGIES; the same on all processes.

  `processes` of the job; default: jax's.
  """
  processes = jax.process_count() if processes is None else processes
  routes = [_direct(plan, processes) for plan in plans]
  if processes == 1:
    return routes
  # Leaves that are read once in all, when each process reads its own part, have nothing to exchange.
  costly = [
    i for i, r in enumerate(routes) if r.read_nbytes > SLACK * r.plan.nbytes and _is_exchangeable(r.plan, processes)
  ]
  allowance = _TINY_SHARE * sum(p.nbytes for p in plans)
  left = []
  for i in sorted(costly, key=lambda i: plans[i].nbytes):
    more = routes[i].read_nbytes - plans[i].nbytes
    if plans[i].nbytes <= _TINY_NBYTES and more <= allowance:
      allowance -= more
    else:
      left.append(i)
  loads = dict.fromkeys(range(processes), 0.0)
  for i in sorted(left, key=lambda i: -plans[i].nbytes):
    sharding = plans[i].sharding
    assert isinstance(sharding, NamedSharding)
    routes[i] = STRATEGIES[strategy].route(plans[i], sharding, loads)
  return routes


def _is_exchangeable(plan: LeafPlan, processes: int) -> bool:
  sharding = plan.sharding
  return (
    isinstance(sharding, NamedSharding)
    and sharding.memory_kind in (None, default_memory_kind())
    and len(processes_of(concrete(sharding))) == processes
    and plan.nbytes > 0
  )


def _direct(plan: LeafPlan, processes: int) -> Route:
  sharding = plan.sharding
  if not isinstance(sharding, NamedSharding):
    return Route(plan=plan, read_nbytes=float(plan.nbytes) * processes, most_nbytes=plan.nbytes)
  mesh, axes = concrete(sharding), axes_by_dim(sharding.spec, len(plan.shape))
  read = plan.nbytes * amplification(plan.shape, plan.chunk_shape, mesh, axes)
  return Route(plan=plan, read_nbytes=read, most_nbytes=read / len(processes_of(mesh)))


def _whole(plan: LeafPlan, loads: dict[int, float], processes: Sequence[int], received: float) -> Route:
  owner = min(processes, key=lambda p: (loads[p], p))
  loads[owner] += plan.nbytes
  return Whole(
    plan=plan,
    owner=owner,
    read_nbytes=plan.nbytes,
    most_nbytes=plan.nbytes,
    received_nbytes=max(received, plan.nbytes),
  )


def _held(plan: LeafPlan, sharding: NamedSharding) -> float:
  """Bytes of a leaf that a process holds in the end."""
  per_process = len(sharding.device_set) / len(processes_of(concrete(sharding)))
  return min(plan.nbytes, math.prod(sharding.shard_shape(plan.shape)) * np.dtype(plan.dtype).itemsize * per_process)


def _is_movable(dtype: Any) -> bool:
  """Whether devices can exchange it as unsigned integers."""
  dtype = np.dtype(dtype)
  return dtype.kind != "c" and not dtype.name.startswith("float4")
