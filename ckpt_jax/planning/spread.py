"""How a state is spread over the processes of a job, which need not exist: what each holds, and what it writes."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from ckpt_jax.errors import ConfigError
from ckpt_jax.layout import shares
from ckpt_jax.planning.estimate import arrays_of

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Bytes:
  """Bytes that processes have, or write: the least, the mean and the most of one."""

  least: int
  mean: float
  most: int

  @classmethod
  def of(cls, each: Sequence[int]) -> Bytes:
    """Of some processes."""
    return cls(min(each), sum(each) / len(each), max(each))


@dataclasses.dataclass(frozen=True)
class Spread:
  """How a job holds and writes a state.

  Attributes:
    devices, processes: of the job.
    device_nbytes: what each device holds.
    held: distinct bytes of a process, which it reads in a `direct` restore.
    written: bytes of a process in a save, by the plan that saves follow (`layout.shares`).
    copies: of the state over all processes.
  """

  devices: int
  processes: int
  device_nbytes: int
  held: Bytes
  written: Bytes
  copies: float


def spread(state: PyTree, mesh: Any, process_of: Sequence[int]) -> Spread:
  """How a job that need not exist holds and writes a state. Allocates nothing.

  Args:
    state: its arrays have `NamedSharding`s over `mesh`; one without is on all devices.
    mesh: a `jax.sharding.AbstractMesh` or `Mesh`.
    process_of: the process of each device, in the order of the mesh.

  Raises:
    ConfigError: if a sharding does not divide its array.
  """
  everywhere = NamedSharding(mesh, PartitionSpec())
  arrays = []
  for leaf in arrays_of(state):
    sharding = getattr(leaf, "sharding", None)
    of = sharding if isinstance(sharding, NamedSharding) else everywhere
    try:
      arrays.append(shares.held(tuple(leaf.shape), np.dtype(leaf.dtype).itemsize, of, tuple(process_of)))
    except ValueError as e:
      raise ConfigError(
        f"an array of shape {list(leaf.shape)} cannot be sharded as {of.spec} over {mesh}: {e}"
      ) from None
  held = dict.fromkeys(sorted(set(process_of)), 0)
  for array, n in collections.Counter(arrays).items():
    for _, holders in array.shards:
      for process in holders:
        held[process] += n * array.piece_nbytes
  written = shares.nbytes_by_process(arrays, shares.share_out(arrays)) or held
  total = sum(array.nbytes for array in arrays)
  return Spread(
    len(process_of),
    len(held),
    sum(array.piece_nbytes for array in arrays),
    Bytes.of([*held.values()]),
    Bytes.of([*written.values()]),
    sum(held.values()) / total if total else 1.0,
  )
