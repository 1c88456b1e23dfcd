"""Moves arrays between devices, and bytes between hosts, bit for bit: always as unsigned integers.

A sum of floats turns -0.0 into +0.0 and flushes denormals, and a compiler may widen bfloat16 on the way. Sums here are
of unsigned integers of which all but one are zero.
"""

from __future__ import annotations

import functools
import itertools
import math
import threading
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ckpt_jax.restore.meshes import concrete, plain_mesh, primary_mesh, replica_axes

_UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint64}
_NARROW = ("int4", "int2", "uint4", "uint2")
_compile_s: list[float] = []


def compile_seconds() -> float:
  """Mean time that a program took to compile so far; a guess before the first."""
  return sum(_compile_s) / len(_compile_s) if _compile_s else 0.15


class Program:
  """A computation between devices, compiled when it is first needed. All processes of its mesh must call it.

  Attributes:
    given: shape, dtype and sharding of its argument.
  """

  def __init__(self, jitted: Any, given: jax.ShapeDtypeStruct):
    self.given = given
    self._jitted = jitted
    self._compiled: Any = None
    self._lock = threading.Lock()

  @property
  def is_compiled(self) -> bool:
    """Whether a call would not have to compile."""
    return self._compiled is not None

  def compile(self) -> Any:
    """The executable."""
    with self._lock:
      if self._compiled is None:
        started = time.perf_counter()
        self._compiled = self._jitted.lower(self.given).compile()
        _compile_s.append(time.perf_counter() - started)
      return self._compiled

  def __call__(self, array: jax.Array) -> jax.Array:
    return self.compile()(array)


def relabelled(array: jax.Array, sharding: jax.sharding.Sharding) -> jax.Array:
  """The same buffers under an equivalent sharding."""
  if array.sharding == sharding:
    return array
  # By device: two shardings may list their devices in another order.
  by_device = {s.device: s.data for s in array.addressable_shards}
  pieces = [by_device[d] for d in sharding.addressable_devices_indices_map(array.shape)]
  return jax.make_array_from_single_device_arrays(array.shape, sharding, pieces, dtype=array.dtype)


@functools.cache
def spread_program(shape: tuple[int, ...], dtype: Any, target: NamedSharding, spec: PartitionSpec) -> Program:
  """The program that redistributes an array divided by `spec` to `target`."""
  mesh = plain_mesh(concrete(target))
  wanted = NamedSharding(mesh, target.spec)

  def exchange(x: Any) -> Any:
    # Without the barriers the compiler moves the conversions across the exchange.
    words = jax.lax.optimization_barrier(_as_words(x))
    words = jax.lax.with_sharding_constraint(words, wanted)
    return _from_words(jax.lax.optimization_barrier(words), dtype)

  given = jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
  return Program(jax.jit(exchange, out_shardings=wanted), given)


@functools.cache
def replica_program(shape: tuple[int, ...], dtype: Any, target: NamedSharding) -> Program:
  """The program that fills all replicas of an array from the first, where the others are zero."""
  mesh = plain_mesh(concrete(target))
  sharding = NamedSharding(mesh, target.spec)
  axes = replica_axes(target.spec, mesh)

  def exchange(x: Any) -> Any:
    return _from_words(jax.lax.psum(_as_words(x), axes), dtype)

  mapped = jax.shard_map(exchange, mesh=mesh, in_specs=target.spec, out_specs=target.spec, check_vma=False)
  return Program(jax.jit(mapped, out_shardings=sharding), jax.ShapeDtypeStruct(shape, dtype, sharding=sharding))


def spread(program: Program, array: jax.Array, target: NamedSharding) -> jax.Array:
  """Runs a `spread_program` on an array that was read divided."""
  return relabelled(program(relabelled(array, program.given.sharding)), target)


def replicate(program: Program, primary: jax.Array | None, target: NamedSharding) -> jax.Array:
  """Runs a `replica_program` on the array on `on_primary(target)`: None on processes that have no device there."""
  shape, dtype, sharding = program.given.shape, program.given.dtype, program.given.sharding
  held = {} if primary is None else {s.device: s.data for s in primary.addressable_shards}
  local = sharding.shard_shape(shape)
  # Not replicas of each other yet: the program looks at each device's own.
  devices = [*sharding.addressable_devices_indices_map(shape)]
  others = [d for d in devices if d not in held]
  held |= zip(others, jax.device_put([np.zeros(local, dtype)] * len(others), others), strict=True)
  pieces = [held[d] for d in devices]
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
  """Gives every process the bytes of all: for each process its pieces, as uint8 views of one buffer.

  All processes call it alike, with pieces of their own, contiguous uint8, and the sizes of the pieces of each process.
  """
  processes, me = jax.process_count(), jax.process_index()
  loads = [sum(s) for s in sizes]
  # A gather sends as much for each process as for the one that has most; a sum sends everything twice.
  summed = sum(loads) * 2 < processes * max(loads)
  starts = [0, *itertools.accumulate(loads)] if summed else [0] * processes
  nbytes = _rounded(sum(loads) if summed else max(loads))
  buffer = np.zeros(nbytes, np.uint8)
  at = starts[me]
  for piece in mine:
    buffer[at : at + piece.nbytes] = piece
    at += piece.nbytes
  program = _bytes_program(summed, nbytes // 4)
  device = next(iter(program.given.sharding.addressable_devices))
  row = jax.device_put(buffer.view(np.uint32).reshape(1, -1), device)
  given = jax.make_array_from_single_device_arrays(program.given.shape, program.given.sharding, [row])
  rows = np.asarray(program(given).addressable_shards[0].data).view(np.uint8)
  out = []
  for process, pieces in enumerate(sizes):
    row_of = rows[0 if summed else process, starts[process] :]
    out.append([row_of[end - size : end] for size, end in zip(pieces, itertools.accumulate(pieces), strict=True)])
  return out


@functools.cache
def _bytes_program(summed: bool, words: int) -> Program:
  def exchange(x: Any) -> Any:
    return jax.lax.psum(x, "process") if summed else jax.lax.all_gather(x, "process", tiled=True)

  mesh = _one_device_each()
  mapped = jax.shard_map(
    exchange, mesh=mesh, in_specs=PartitionSpec("process"), out_specs=PartitionSpec(), check_vma=False
  )
  sharding = NamedSharding(mesh, PartitionSpec("process"))
  return Program(jax.jit(mapped), jax.ShapeDtypeStruct((jax.process_count(), words), jnp.uint32, sharding=sharding))


def _rounded(nbytes: int) -> int:
  """Up to one of few sizes, at most an eighth more, so that programs are used again."""
  if nbytes <= 4096:
    return 4096
  step = 1 << max(12, math.floor(math.log2(nbytes)) - 3)
  return -(-nbytes // step) * step


# -- words


def _as_words(x: Any) -> Any:
  if x.dtype == jnp.bool_ or np.dtype(x.dtype).name in _NARROW:
    return x.astype(jnp.uint8)  # negative values wrap, and back
  return jax.lax.bitcast_convert_type(x, _UNSIGNED[x.dtype.itemsize])


def _from_words(words: Any, dtype: Any) -> Any:
  if np.dtype(dtype).name in ("bool", *_NARROW):
    return words.astype(dtype)
  return jax.lax.bitcast_convert_type(words, dtype)
