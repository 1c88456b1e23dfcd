"""Moves arrays between devices, and bytes between hosts, bit for bit: always as unsigned integers.

A sum of floats turns -0.0 into +0.0 and flushes denormals, and a compiler may widen bfloat16 on its way. Where
something is summed here, all terms but one are zero and all are unsigned.

Programs are compiled once for each (shape, dtype, shardings) and kept for later restores of the process.
"""

from __future__ import annotations

import functools
import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ckpt_jax.restore.routes import axes_by_dim, concrete, primary_mesh, replica_axes

_UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint64}
_lock = threading.Lock()
_programs: dict[Any, Any] = {}
_compile_s: list[float] = []


@functools.lru_cache(maxsize=256)
def plain_mesh(mesh: Mesh) -> Mesh:
  """The same devices with axes that the compiler may use as it likes, whatever the user's mesh forbids."""
  return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def relabelled(array: jax.Array, sharding: jax.sharding.Sharding) -> jax.Array:
  """The same buffers under another description of where they lie."""
  if array.sharding == sharding:
    return array
  # By device: two shardings may list their devices in another order.
  by_device = {s.device: s.data for s in array.addressable_shards}
  pieces = [by_device[d] for d in sharding.addressable_devices_indices_map(array.shape)]
  return jax.make_array_from_single_device_arrays(array.shape, sharding, pieces, dtype=array.dtype)


def compile_seconds() -> float:
  """What one program took to compile so far, on average; a guess before the first."""
  return sum(_compile_s) / len(_compile_s) if _compile_s else 0.15


def is_compiled(shape: tuple[int, ...], dtype: Any, target: NamedSharding, spec: PartitionSpec | None) -> bool:
  """Whether the program for this exchange is there already; `spec` as in `spread` and `replicate`."""
  return _key("spread" if spec is not None else "replica", shape, dtype, target, spec) in _programs


def spread_program(shape: tuple[int, ...], dtype: Any, target: NamedSharding, spec: PartitionSpec) -> Any:
  """The program that brings an array divided by `spec` to `target`. Compiles it if need be."""

  def build() -> Any:
    mesh = plain_mesh(concrete(target))
    given = jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
    wanted = NamedSharding(mesh, target.spec)

    def exchange(x: Any) -> Any:
      # The barriers keep the compiler from moving the conversions across the exchange, which it else does.
      words = jax.lax.optimization_barrier(_as_words(x))
      words = jax.lax.with_sharding_constraint(words, wanted)
      return _from_words(jax.lax.optimization_barrier(words), dtype)

    return jax.jit(exchange, out_shardings=wanted).lower(given).compile()

  return _compiled(_key("spread", shape, dtype, target, spec), build)


def spread(array: jax.Array, target: NamedSharding, spec: PartitionSpec) -> jax.Array:
  """An array that was read divided by `spec`, where `target` wants it. All processes of the mesh must call it."""
  program = spread_program(array.shape, array.dtype, target, spec)
  given = relabelled(array, NamedSharding(plain_mesh(concrete(target)), spec))
  return relabelled(program(given), target)


def replica_program(shape: tuple[int, ...], dtype: Any, target: NamedSharding) -> Any:
  """The program that fills all replicas of an array from the first, the others being zero. Compiles it if need be."""

  def build() -> Any:
    mesh = plain_mesh(concrete(target))
    sharding = NamedSharding(mesh, target.spec)
    axes = replica_axes(target.spec, mesh)

    def exchange(x: Any) -> Any:
      return _from_words(jax.lax.psum(_as_words(x), axes), dtype)

    mapped = jax.shard_map(exchange, mesh=mesh, in_specs=target.spec, out_specs=target.spec, check_vma=False)
    return (
      jax.jit(mapped, out_shardings=sharding).lower(jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)).compile()
    )

  return _compiled(_key("replica", shape, dtype, target, None), build)


def replicate(shape: tuple[int, ...], dtype: Any, target: NamedSharding, primary: jax.Array | None) -> jax.Array:
  """An array with all its replicas, from what the processes of the first replica have read.

  Args:
    shape, dtype: of the array.
    target: where it shall be.
    primary: the array on `primary_mesh(target)`; None on processes that have no device there.
  """
  program = replica_program(shape, dtype, target)
  sharding = NamedSharding(plain_mesh(concrete(target)), target.spec)
  held = {} if primary is None else {s.device: s.data for s in primary.addressable_shards}
  local = sharding.shard_shape(shape)
  # Not replicas of each other yet: the program looks at each device's own.
  pieces = [
    held[d] if d in held else jax.device_put(np.zeros(local, np.dtype(dtype)), d)
    for d in sharding.addressable_devices_indices_map(shape)
  ]
  return relabelled(program(jax.make_array_from_single_device_arrays(shape, sharding, pieces, dtype=dtype)), target)


def on_primary(target: NamedSharding) -> NamedSharding:
  """`target` on the devices of the first replica only."""
  return NamedSharding(plain_mesh(primary_mesh(target)), target.spec)


# -- bytes between hosts


@functools.cache
def _one_device_each() -> Mesh:
  first: dict[int, Any] = {}
  for device in sorted(jax.devices(), key=lambda d: d.id):
    first.setdefault(device.process_index, device)
  return Mesh(np.array([first[p] for p in sorted(first)]), ("process",), axis_types=(AxisType.Auto,))


def exchange_bytes(mine: Sequence[np.ndarray], sizes: Sequence[Sequence[int]]) -> list[list[np.ndarray]]:
  """What every process has to give, on all of them. All must call it alike.

  Args:
    mine: this process's pieces: uint8, contiguous.
    sizes: for each process the bytes of its pieces.

  Returns:
    For each process its pieces, as uint8 views of one buffer.
  """
  processes = jax.process_count()
  loads = [sum(s) for s in sizes]
  # Gathering sends as much for each as for the one that has most; summing sends everything twice.
  together = sum(loads) * 2 < processes * max(loads)
  offsets = np.concatenate([[0], np.cumsum(loads)]) if together else None
  nbytes = _rounded(sum(loads) if together else max(loads))
  buffer = np.zeros(nbytes, np.uint8)
  at = int(offsets[jax.process_index()]) if offsets is not None else 0
  for piece in mine:
    buffer[at : at + piece.nbytes] = piece
    at += piece.nbytes
  mesh = _one_device_each()
  device = next(d for d in mesh.devices.flat if d.process_index == jax.process_index())
  sharding = NamedSharding(mesh, PartitionSpec("process"))
  shape = (processes, nbytes // 4)
  given = jax.make_array_from_single_device_arrays(
    shape, sharding, [jax.device_put(buffer.view(np.uint32).reshape(1, -1), device)]
  )
  program = _compiled(("bytes", together, nbytes, processes), lambda: _bytes_program(mesh, together, shape, sharding))
  everything = np.asarray(program(given).addressable_shards[0].data).reshape(-1 if together else (processes, -1))
  out = []
  for p, pieces in enumerate(sizes):
    flat = everything.view(np.uint8) if together else everything[p].view(np.uint8)
    at = int(offsets[p]) if offsets is not None else 0
    mine_of_p = []
    for size in pieces:
      mine_of_p.append(flat[at : at + size])
      at += size
    out.append(mine_of_p)
  return out


def _bytes_program(mesh: Mesh, together: bool, shape: tuple[int, int], sharding: NamedSharding) -> Any:
  def exchange(x: Any) -> Any:
    return jax.lax.psum(x, "process") if together else jax.lax.all_gather(x, "process", tiled=True)

  mapped = jax.shard_map(
    exchange, mesh=mesh, in_specs=PartitionSpec("process"), out_specs=PartitionSpec(), check_vma=False
  )
  return jax.jit(mapped).lower(jax.ShapeDtypeStruct(shape, jnp.uint32, sharding=sharding)).compile()


def _rounded(nbytes: int) -> int:
  """Up to one of few sizes, at most an eighth more, so that programs are used again."""
  if nbytes <= 4096:
    return 4096
  step = 1 << max(12, math.floor(math.log2(nbytes)) - 3)
  return -(-nbytes // step) * step


# -- words


def _as_words(x: Any) -> Any:
  if x.dtype == jnp.bool_:
    return x.astype(jnp.uint8)
  if np.dtype(x.dtype).name in ("int4", "int2", "uint4", "uint2"):
    return x.astype(jnp.uint8)  # wraps negative values, and back
  return jax.lax.bitcast_convert_type(x, _UNSIGNED[x.dtype.itemsize])


def _from_words(words: Any, dtype: Any) -> Any:
  if np.dtype(dtype).name in ("bool", "int4", "int2", "uint4", "uint2"):
    return words.astype(dtype)
  return jax.lax.bitcast_convert_type(words, dtype)


def _key(way: str, shape: tuple[int, ...], dtype: Any, target: NamedSharding, spec: PartitionSpec | None) -> Any:
  given = None if spec is None else axes_by_dim(spec, len(shape))
  return way, shape, np.dtype(dtype).name, target.mesh, axes_by_dim(target.spec, len(shape)), given


def _compiled(key: Any, build: Callable[[], Any]) -> Any:
  with _lock:
    if key not in _programs:
      started = time.perf_counter()
      _programs[key] = build()
      _compile_s.append(time.perf_counter() - started)
    return _programs[key]
