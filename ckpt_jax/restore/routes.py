"""Who reads what: the route of each leaf under a strategy, and how many bytes storage hands out for it.

Pure functions on shapes, chunks and meshes; `exchange` runs what is decided here.

`direct` reads on each process what its devices need: R replicas read R copies. `gather` has each byte read once,
spread over all processes, and moves it on between the devices. `broadcast` has one replica read.
Storage hands out whole chunks, so a part that cuts chunks costs more than it holds: parts are made of whole chunks
where that is possible, and an array that cannot be divided so is read whole by one process.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ckpt_jax.restore.leaf import LeafPlan

DIRECT, SPREAD, WHOLE, REPLICA = "direct", "spread", "whole", "replica"
# Bytes read beyond one copy: what tiny leaves, read by all, may add; and what a cut through chunks may.
_TINY_NBYTES = 256 * 1024
_TINY_SHARE = 0.02
_SLACK = 1.02
# Below this the bytes of several leaves travel together, put together and taken apart in host memory.
_SMALL_NBYTES = 2**20


@dataclasses.dataclass(frozen=True)
class Route:
  """How one leaf gets to where it shall be.

  Attributes:
    plan: the leaf.
    way: `direct`: each process reads what it needs; `spread`: all read a part, then exchange within the devices;
      `whole`: one process reads, and sends bytes to the hosts; `replica`: one replica reads, and its devices send.
    spec: for `spread`: how the mesh divides the leaf while it is read.
    owner: for `whole`: the process that reads.
    read_nbytes: bytes that storage hands out for it, over all processes.
    most_nbytes: the same for the process that reads most.
    received_nbytes: bytes that a process gets from others.
  """

  plan: LeafPlan
  way: str
  spec: PartitionSpec | None = None
  owner: int | None = None
  read_nbytes: float = 0.0
  most_nbytes: float = 0.0
  received_nbytes: float = 0.0


@dataclasses.dataclass(frozen=True)
class Totals:
  """What a set of routes costs: bytes read in all, by the process that reads most, and received by each."""

  read_nbytes: float
  most_nbytes: float
  received_nbytes: float


def totals(routes: Sequence[Route]) -> Totals:
  """The sums over all routes. Leaves read whole are spread over the processes evenly."""
  most = sum(r.most_nbytes for r in routes if r.way != WHOLE)
  loads: dict[int, float] = {}
  for r in routes:
    if r.way == WHOLE and r.owner is not None:
      loads[r.owner] = loads.get(r.owner, 0.0) + r.read_nbytes
  return Totals(
    sum(r.read_nbytes for r in routes), most + max(loads.values(), default=0.0), sum(r.received_nbytes for r in routes)
  )


def plan_routes(plans: Sequence[LeafPlan], strategy: str, processes: int | None = None) -> list[Route]:
  """The route of each leaf under a strategy; the same on all processes.

  Args:
    plans: all leaves to read.
    strategy: `direct`, `gather` or `broadcast`.
    processes: of the job; default: jax's.
  """
  processes = jax.process_count() if processes is None else processes
  routes = [_direct(p, processes) for p in plans]
  if strategy == DIRECT or processes == 1:
    return routes
  # Leaves that each process reads in part only, or once in all, have nothing to exchange.
  costly = [
    i for i, r in enumerate(routes) if r.read_nbytes > _SLACK * r.plan.nbytes and _exchangeable(r.plan, processes)
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
    plan = plans[i]
    assert isinstance(plan.sharding, NamedSharding)
    processes_of = sorted({int(p) for p in process_grid(concrete(plan.sharding)).flat})
    if strategy == "broadcast":
      routes[i] = _broadcast(plan, plan.sharding, loads, processes_of)
    else:
      routes[i] = _gather(plan, plan.sharding, loads, processes_of)
  return routes


def _exchangeable(plan: LeafPlan, processes: int) -> bool:
  sharding = plan.sharding
  return (
    isinstance(sharding, NamedSharding)
    and sharding.memory_kind in (None, default_memory_kind())
    and len(set(process_grid(concrete(sharding)).flat)) == processes
    and plan.nbytes > 0
  )


@functools.cache
def default_memory_kind() -> str:
  """The kind of memory that arrays lie in unless told otherwise."""
  return jax.local_devices()[0].default_memory().kind


def _direct(plan: LeafPlan, processes: int) -> Route:
  sharding = plan.sharding
  if isinstance(sharding, NamedSharding):
    read = plan.nbytes * _amplification(
      plan.shape, plan.chunk_shape, concrete(sharding), _axes_by_dim(sharding.spec, plan)
    )
    readers = len(set(process_grid(concrete(sharding)).flat))
    return Route(plan, DIRECT, read_nbytes=read, most_nbytes=read / readers)
  if sharding is not None and not sharding.is_fully_addressable:
    return Route(plan, DIRECT, read_nbytes=plan.nbytes * processes, most_nbytes=plan.nbytes)
  return Route(plan, DIRECT, read_nbytes=float(plan.nbytes) * processes, most_nbytes=plan.nbytes)


def _gather(plan: LeafPlan, sharding: NamedSharding, loads: dict[int, float], processes: list[int]) -> Route:
  spec = spread_spec(plan.shape, plan.chunk_shape, concrete(sharding), sharding.spec) if movable(plan.dtype) else None
  received = _held(plan, sharding) * (1 - 1 / len(processes))
  if spec is None:
    return _whole(plan, loads, processes, received)
  read = plan.nbytes * _amplification(plan.shape, plan.chunk_shape, concrete(sharding), _axes_by_dim(spec, plan))
  return Route(plan, SPREAD, spec, None, read, read / len(processes), received)


def _broadcast(plan: LeafPlan, sharding: NamedSharding, loads: dict[int, float], processes: list[int]) -> Route:
  primary = primary_mesh(sharding)
  readers = sorted({int(p) for p in process_grid(primary).flat})
  read = plan.nbytes * _amplification(plan.shape, plan.chunk_shape, primary, _axes_by_dim(sharding.spec, plan))
  received = _held(plan, sharding)
  if plan.nbytes < _SMALL_NBYTES or not movable(plan.dtype) or read > _SLACK * plan.nbytes:
    return _whole(plan, loads, readers, received)
  return Route(plan, REPLICA, None, None, read, read / len(readers), 2 * received)


def _whole(plan: LeafPlan, loads: dict[int, float], processes: list[int], received: float) -> Route:
  owner = min(processes, key=lambda p: (loads[p], p))
  loads[owner] += plan.nbytes
  return Route(plan, WHOLE, None, owner, plan.nbytes, plan.nbytes, max(received, plan.nbytes))


def _held(plan: LeafPlan, sharding: NamedSharding) -> float:
  """Bytes of a leaf that a process holds in the end."""
  grid = process_grid(concrete(sharding))
  per_process = len(sharding.device_set) / len(set(grid.flat))
  return min(plan.nbytes, math.prod(sharding.shard_shape(plan.shape)) * np.dtype(plan.dtype).itemsize * per_process)


def movable(dtype: Any) -> bool:
  """Whether devices can exchange it as unsigned integers."""
  dtype = np.dtype(dtype)
  return dtype.kind != "c" and not (dtype.name.startswith("float4"))


# -- how a mesh divides an array


def concrete(sharding: NamedSharding) -> Mesh:
  """The mesh of a sharding of real devices."""
  assert isinstance(sharding.mesh, Mesh)
  return sharding.mesh


@functools.lru_cache(maxsize=256)
def process_grid(mesh: Mesh) -> np.ndarray:
  """The process of each device, in the shape of the mesh."""
  return np.vectorize(lambda d: d.process_index, otypes=[np.int64])(mesh.devices)


def _axes_by_dim(spec: PartitionSpec, plan: LeafPlan) -> tuple[tuple[str, ...], ...]:
  return axes_by_dim(spec, len(plan.shape))


def axes_by_dim(spec: PartitionSpec, ndim: int) -> tuple[tuple[str, ...], ...]:
  """The mesh axes that divide each dimension."""
  entries = [*spec, *[None] * (ndim - len(spec))]
  return tuple((e,) if isinstance(e, str) else tuple(e) if isinstance(e, tuple) else () for e in entries)


def replica_axes(spec: PartitionSpec, mesh: Mesh) -> tuple[str, ...]:
  """The mesh axes along which an array is repeated."""
  used = {name for axes in axes_by_dim(spec, len(spec)) for name in axes}
  return tuple(name for name in mesh.axis_names if name not in used and mesh.shape[name] > 1)


def primary_mesh(sharding: NamedSharding) -> Mesh:
  """The devices of the first replica, as a mesh with the same axes."""
  unused = replica_axes(sharding.spec, concrete(sharding))
  index = tuple(slice(0, 1) if name in unused else slice(None) for name in concrete(sharding).axis_names)
  return Mesh(
    concrete(sharding).devices[index], concrete(sharding).axis_names, axis_types=concrete(sharding).axis_types
  )


def _amplification(
  shape: tuple[int, ...], chunk: tuple[int, ...] | None, mesh: Mesh, axes: tuple[tuple[str, ...], ...]
) -> float:
  """Bytes that storage hands out over the array's own, when each process reads its parts once.

  >= 1; chunks that two parts share are handed out twice, and parts that several processes hold, once to each.
  """
  ratio = 1.0
  for size, piece, names in zip(shape, chunk or shape_of_ones(shape), axes, strict=True):
    ratio *= _touched(size, piece, math.prod(mesh.shape[n] for n in names))
  used = {n for names in axes for n in names}
  return ratio * _processes_per_part(mesh, tuple(n for n in mesh.axis_names if n not in used))


def shape_of_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
  """Chunks that any division respects, for arrays whose chunks nobody knows."""
  return (1,) * len(shape)


@functools.lru_cache(maxsize=65536)
def _touched(size: int, chunk: int, parts: int) -> float:
  """Length of all chunks that the parts of a dimension touch, over its length."""
  if size == 0 or parts == 1:
    return 1.0
  step = -(-size // parts)
  if step % chunk == 0:
    return 1.0
  touched = 0
  for start in range(0, size, step):
    end = min(start + step, size)
    touched += min(-(-end // chunk) * chunk, size) - start // chunk * chunk
  return touched / size


@functools.lru_cache(maxsize=1024)
def _processes_per_part(mesh: Mesh, repeated: tuple[str, ...]) -> float:
  grid = process_grid(mesh)
  last = [mesh.axis_names.index(n) for n in repeated]
  rows = np.transpose(grid, [i for i in range(grid.ndim) if i not in last] + last).reshape(
    -1, math.prod(grid.shape[i] for i in last)
  )
  holders: dict[int, set[int]] = {}
  # Parts that one process holds are read together; each of its replicas once.
  for i, row in enumerate(rows):
    holders[i] = set(row.tolist())
  return sum(len(h) for h in holders.values()) / len(rows)


@functools.lru_cache(maxsize=8192)
def spread_spec(
  shape: tuple[int, ...], chunk: tuple[int, ...] | None, mesh: Mesh, target: PartitionSpec
) -> PartitionSpec | None:
  """A division of the array over all processes of the mesh by whole chunks; None if there is none.

  Preferred are divisions that refine the target's own, so that devices only gather what their replicas have read, then
  those that cut early dimensions, since these are whole runs of memory.
  """
  names = [n for n in mesh.axis_names if mesh.shape[n] > 1]
  wanted = axes_by_dim(target, len(shape))
  best: tuple[tuple[float, ...], PartitionSpec] | None = None
  for dims in itertools.product(range(len(shape) + 1), repeat=len(names)):
    placed: list[list[str]] = [[] for _ in shape]
    for name, dim in zip(names, dims, strict=True):
      if dim < len(shape):
        placed[dim].append(name)
    refines = True
    for dim, axes in enumerate(wanted):
      inside = [n for n in axes if n in names]
      if all(n in placed[dim] for n in inside):
        # The target's axes are the major ones, in its order: a device's part lies inside what it shall hold.
        placed[dim] = [*inside, *[n for n in placed[dim] if n not in inside]]
      else:
        refines = False
    axes_of = tuple(tuple(p) for p in placed)
    if any(size % math.prod(mesh.shape[n] for n in p) for size, p in zip(shape, axes_of, strict=True)):
      continue
    cost = _amplification(shape, chunk, mesh, axes_of)
    if cost > _SLACK:
      continue
    unplaced = sum(dim == len(shape) for dim in dims)
    late = sum(d * math.log2(mesh.shape[n]) for n, d in zip(names, dims, strict=True) if d < len(shape))
    rank = (0.0 if refines else 1.0, float(unplaced), late)
    if best is None or rank < best[0]:
      spec = PartitionSpec(*[tuple(p) if len(p) > 1 else (p[0] if p else None) for p in axes_of])
      best = rank, spec
  return None if best is None else best[1]
