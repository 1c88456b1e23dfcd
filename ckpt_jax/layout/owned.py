"""Arrays on a CPU device in memory that jax allocated, filled from outside.

On a CPU jax takes over aligned memory without a copy, but never writes into memory that it did not allocate: a first
training step with a donated state (`donate_argnums`) would copy all of it, and need it twice. So arrays are read
straight into memory that jax allocated, at the cost of a program that allocates it. Small arrays are not worth that:
jax copies those that are not aligned (see `memory.unaligned_empty`).
"""

from __future__ import annotations

import collections
import ctypes
import functools
import logging
import math
import mmap
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np

from ckpt_jax.layout.sharding import Box, shape_of

_log = logging.getLogger(__name__)
_LARGE_NBYTES = 2**18
_WORTH_NBYTES = 2**26  # a program takes 10 ms and 0.1 ms an array to compile, a copy into fresh memory 0.8 s/GB
# The costs of compiling a program, and of running it, in units of compiling one array.
_A_PROGRAM, _A_RUN = 100, 0.7
_MOST_ROUNDS = 200
_HUGE_PAGE = 2 * 2**20
_ADVICE = getattr(mmap, "MADV_HUGEPAGE", None)
_Key = TypeVar("_Key")
Kind = tuple[tuple[int, ...], np.dtype]


@functools.lru_cache(maxsize=4096)
def _cpu_of(sharding: jax.sharding.Sharding) -> jax.Device | None:
  """The device of an array that is on one device of this process, if that is a CPU; else None."""
  here = sharding.addressable_devices
  if len(here) != 1:
    return None
  device: Any = next(iter(here))
  ordinary = sharding.memory_kind in (None, device.default_memory().kind)
  return device if device.platform == "cpu" and ordinary else None


def make_for(
  wanted: Mapping[_Key, tuple[Sequence[Box], np.dtype, jax.sharding.Sharding]],
) -> dict[_Key, tuple[jax.Array, np.ndarray]]:
  """Arrays to read into, and their memory, for large arrays of which a CPU device of this process holds one part.

  Args:
    wanted: of each array the parts that this process holds, the dtype and the sharding.
  """
  devices: dict[jax.Device, dict[_Key, Kind]] = collections.defaultdict(dict)
  for key, (boxes, dtype, sharding) in wanted.items():
    if len(boxes) == 1 and (device := _cpu_of(sharding)) is not None:
      kind = shape_of(boxes[0]), dtype
      if _is_large(kind):
        devices[device][key] = kind
  found: dict[_Key, tuple[jax.Array, np.ndarray]] = {}
  for device, kinds in devices.items():
    enough = sum(math.prod(shape) * dtype.itemsize for shape, dtype in kinds.values()) >= _WORTH_NBYTES
    if enough and (made := make(list(kinds.values()), device)) is not None:
      found |= dict(zip(kinds, made, strict=True))
  return found


def _is_large(kind: Kind) -> bool:
  shape, dtype = kind
  # jax packs numbers of less than a byte, numpy does not.
  whole_bytes = not dtype.name.endswith(("int2", "int4", "float4_e2m1fn"))
  return whole_bytes and math.prod(shape) * dtype.itemsize >= _LARGE_NBYTES


def make(kinds: Sequence[Kind], device: jax.Device) -> list[tuple[jax.Array, np.ndarray]] | None:
  """Uninitialized arrays on a CPU device, and their memory; None if jax cannot do that.

  The memory has to be filled before anything else uses the array.
  """
  try:
    made: dict[Kind, list[jax.Array]] = collections.defaultdict(list)
    for times, some in in_rounds(collections.Counter(kinds)):
      program = _program(some, device)
      for _ in range(times):
        for kind, array in zip(some, program(), strict=True):
          made[kind].append(array)
    arrays = jax.block_until_ready([made[kind].pop() for kind in kinds])
    found = [(array, _memory(array)) for array in arrays]
  except Exception as e:  # an experimental part of jax; without it arrays are copied
    _log.debug("no memory of jax's own to read into: %s: %s", type(e).__name__, e)
    return None
  _advise([memory for _, memory in found])
  return found


def in_rounds(counts: Mapping[Kind, int]) -> list[tuple[int, tuple[Kind, ...]]]:
  """How often to run which programs, so that few arrays are compiled: a model repeats its layers."""

  def divided(rounds: int) -> list[tuple[int, tuple[Kind, ...]]]:
    often = tuple(kind for kind, n in counts.items() for _ in range(n // rounds))
    once = tuple(kind for kind, n in counts.items() for _ in range(n % rounds))
    return [(times, some) for times, some in ((rounds, often), (1, once)) if some]

  def cost(programs: list[tuple[int, tuple[Kind, ...]]]) -> float:
    return sum(_A_PROGRAM + len(some) + _A_RUN * times for times, some in programs)

  return min((divided(rounds) for rounds in range(1, min(max(counts.values()), _MOST_ROUNDS) + 1)), key=cost)


@functools.lru_cache(maxsize=8)
def _program(kinds: tuple[Kind, ...], device: jax.Device) -> Any:
  from jax.experimental.buffer_callback import buffer_callback

  results = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in kinds]

  def ckpt_jax_memory() -> Any:
    return buffer_callback(lambda context, out: None, results)()

  place = jax.sharding.SingleDeviceSharding(device)
  return jax.jit(ckpt_jax_memory, out_shardings=place).lower().compile()


class _At:
  """The memory of an array for numpy, whose view keeps the array alive."""

  def __init__(self, array: jax.Array):
    self._array = array
    self.__array_interface__ = {
      "version": 3,
      "typestr": "|u1",
      "shape": (array.nbytes,),
      "data": (array.unsafe_buffer_pointer(), False),
    }


def _memory(array: jax.Array) -> np.ndarray:
  if array.on_device_size_in_bytes() != array.nbytes:
    raise ValueError(f"{array.nbytes} bytes of {array.dtype} take {array.on_device_size_in_bytes()}")
  return np.asarray(_At(array)).view(array.dtype).reshape(array.shape)


def _advise(memory: Sequence[np.ndarray]) -> None:
  """Asks for huge pages, as `memory.unaligned_empty` does, for whole runs of adjacent arrays."""
  if _ADVICE is None:
    return
  spans = sorted((a.__array_interface__["data"][0], a.__array_interface__["data"][0] + a.nbytes) for a in memory)
  runs = spans[:1]
  for start, stop in spans[1:]:
    if start - runs[-1][1] <= 2 * mmap.PAGESIZE:  # malloc's header of each
      runs[-1] = (runs[-1][0], stop)
    else:
      runs.append((start, stop))
  madvise = ctypes.CDLL(None).madvise
  for start, stop in runs:
    start, stop = -(-start // _HUGE_PAGE) * _HUGE_PAGE, stop // _HUGE_PAGE * _HUGE_PAGE
    if stop > start:
      madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), _ADVICE)  # an error on a kernel without them
