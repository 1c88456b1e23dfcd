"""How a mesh divides an array, and how much storage reads for a division. Pure functions of shapes, chunks and meshes.

Storage reads whole chunks, so a part that cuts through chunks costs more than it holds.
"""

from __future__ import annotations

import functools
import itertools
import math

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

# Bytes that a division may read beyond one copy, because it cuts through chunks.
SLACK = 1.02


def concrete(sharding: NamedSharding) -> Mesh:
  """The mesh of a sharding over real devices."""
  assert isinstance(sharding.mesh, Mesh)
  return sharding.mesh


@functools.lru_cache(maxsize=256)
def plain_mesh(mesh: Mesh) -> Mesh:
  """The same devices with axes that the compiler may use freely, whatever the user's mesh forbids."""
  return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


@functools.lru_cache(maxsize=256)
def process_grid(mesh: Mesh) -> np.ndarray:
  """The process of each device, in the shape of the mesh."""
  return np.vectorize(lambda d: d.process_index, otypes=[np.int64])(mesh.devices)


def processes_of(mesh: Mesh) -> list[int]:
  """The processes that have devices in the mesh, in order."""
  return sorted({int(p) for p in process_grid(mesh).flat})


@functools.cache
def default_memory_kind() -> str:
  """The kind of memory that jax puts arrays in by default."""
  return jax.local_devices()[0].default_memory().kind


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
  mesh = concrete(sharding)
  unused = replica_axes(sharding.spec, mesh)
  index = tuple(slice(0, 1) if name in unused else slice(None) for name in mesh.axis_names)
  return Mesh(mesh.devices[index], mesh.axis_names, axis_types=mesh.axis_types)


def amplification(
  shape: tuple[int, ...], chunk: tuple[int, ...] | None, mesh: Mesh, axes: tuple[tuple[str, ...], ...]
) -> float:
  """Bytes that storage reads, over the array's own, when each process reads its parts once.

  At least 1: a chunk that two parts share is read twice, and a part that several processes hold once for each. Any
  division respects chunks of unknown shape (None). `axes` are those of `axes_by_dim`.
  """
  ratio = 1.0
  for size, piece, names in zip(shape, chunk or (1,) * len(shape), axes, strict=True):
    ratio *= _touched(size, piece, math.prod(mesh.shape[n] for n in names))
  used = {n for names in axes for n in names}
  return ratio * _processes_per_part(mesh, tuple(n for n in mesh.axis_names if n not in used))


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
  copies = math.prod(grid.shape[i] for i in last)
  parts = np.moveaxis(grid, last, range(-len(last), 0)).reshape(-1, copies)
  return sum(len(set(holders)) for holders in parts.tolist()) / len(parts)


@functools.lru_cache(maxsize=8192)
def spread_spec(
  shape: tuple[int, ...], chunk: tuple[int, ...] | None, mesh: Mesh, target: PartitionSpec
) -> PartitionSpec | None:
  """A division of the array over all processes of the mesh by whole chunks; None if there is none.

  Divisions that refine the target's own are preferred, since devices then only gather what their replicas have read;
  next, those that cut early dimensions, whose parts are contiguous in memory.
  """
  names = [n for n in mesh.axis_names if mesh.shape[n] > 1]
  wanted = axes_by_dim(target, len(shape))
  best: tuple[tuple[float, ...], PartitionSpec] | None = None
  for dims in itertools.product(range(len(shape) + 1), repeat=len(names)):
    placed = [[name for name, dim in zip(names, dims, strict=True) if dim == d] for d in range(len(shape))]
    refines = True
    for dim, axes in enumerate(wanted):
      inside = [n for n in axes if n in names]
      if all(n in placed[dim] for n in inside):
        # The target's axes come first, in its order: then a device's part is inside what the device will hold.
        placed[dim] = [*inside, *[n for n in placed[dim] if n not in inside]]
      else:
        refines = False
    axes_of = tuple(tuple(p) for p in placed)
    if any(size % math.prod(mesh.shape[n] for n in p) for size, p in zip(shape, axes_of, strict=True)):
      continue
    if amplification(shape, chunk, mesh, axes_of) > SLACK:
      continue
    unplaced = sum(dim == len(shape) for dim in dims)
    late = sum(d * math.log2(mesh.shape[n]) for n, d in zip(names, dims, strict=True) if d < len(shape))
    rank = (0.0 if refines else 1.0, float(unplaced), late)
    if best is None or rank < best[0]:
      best = rank, PartitionSpec(*[p if len(p) > 1 else (p[0] if p else None) for p in axes_of])
  return None if best is None else best[1]
