"""What one save writes of a state: the tree as Orbax takes it, the step's JSON, and how much fits into host memory."""

from __future__ import annotations

import functools
import importlib.metadata
import logging
import math
import platform
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from ckpt_jax.config import Config
from ckpt_jax.errors import CheckpointError
from ckpt_jax.layout.encoding import encode, refuse_unusable
from ckpt_jax.layout.sharding import is_weak
from ckpt_jax.layout.shared import stored_once
from ckpt_jax.layout.structure import Flat, Structure, flatten

_log = logging.getLogger(__name__)
PyTree = Any


class Encoded(NamedTuple):
  """A state and what is to be stored of it.

  Attributes:
    flat: the state.
    tree: what Orbax takes.
    notes: on leaves that differ in the two.
    metrics: as Python numbers.
    computing_s: seconds until state and metrics were computed, which are not the save's cost.
  """

  flat: Flat
  tree: PyTree
  notes: dict[str, dict[str, Any]]
  metrics: dict[str, float | int]
  computing_s: float


def encoded(state: PyTree, metrics: Mapping[str, Any] | None) -> Encoded:
  """What is to be stored of a state.

  Raises:
    CheckpointError: naming the leaf or metric that cannot be saved.
  """
  try:
    computing = time.perf_counter()
    jax.block_until_ready((state, metrics))
    seconds = time.perf_counter() - computing
    numbers = plain_metrics(metrics)
    flat = stored_once(flatten(state))
    return Encoded(flat, *encode(flat), numbers, seconds)
  except CheckpointError:
    raise
  except Exception:
    refuse_unusable(state)
    plain_metrics(metrics)
    raise


FORMAT = 1


@functools.cache
def _versions() -> dict[str, str]:
  found = {"python": platform.python_version()}
  for name in ("ckpt-jax", "jax", "flax", "optax", "orbax-checkpoint", "tensorstore", "numpy"):
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  return found


def run_metadata(config: Config, state: PyTree | Flat, nbytes: int) -> dict[str, Any]:
  """Where a step comes from: package versions, processes, devices, meshes, configuration and sizes."""
  flat = flatten(state)
  structure = flat.structure
  return {
    "format": FORMAT,
    "versions": _versions(),
    "processes": jax.process_count(),
    "devices": jax.device_count(),
    "platform": jax.default_backend(),
    "meshes": structure.once(_meshes, structure.abstract),
    "config": config.to_dict(),
    "leaves": len(structure.kinds),
    "nbytes": nbytes,
    # Also if there is none, which sets the step apart from those of older versions.
    "weak": structure.once(_weakly_typed, structure),
  }


def _weakly_typed(structure: Structure) -> list[str]:
  """Names of the weakly typed arrays."""
  return [name for name, leaf in zip(structure.names, structure.abstract, strict=True) if is_weak(leaf)]


def _meshes(leaves: Sequence[Any]) -> list[dict[str, int]]:
  shardings = (getattr(x, "sharding", None) for x in leaves)
  return [dict(mesh.shape) for mesh in {s.mesh for s in shardings if isinstance(s, jax.sharding.NamedSharding)}]


def plain_metrics(metrics: Mapping[str, Any] | None) -> dict[str, float | int]:
  """Metrics as Python numbers; 0-d arrays are read.

  Raises:
    CheckpointError: naming the metric that is not a number.
  """
  if not (metrics is None or isinstance(metrics, Mapping)):
    raise CheckpointError(f"metrics: expected {{name: number}}, got {metrics!r:.80}", topic="metrics-and-extras")
  plain: dict[str, float | int] = {}
  for name, value in (metrics or {}).items():
    if isinstance(value, (jax.Array, np.ndarray, np.generic)) and np.size(value) == 1:
      try:
        value = np.asarray(value).reshape(())[()].item()
      except Exception as e:  # donated, traced by jit, or a PRNG key
        raise CheckpointError(
          f"metrics[{name!r}] has no value that can be read: {' '.join(str(e).split())[:300]}",
          topic="metrics-and-extras",
        ) from e
    if isinstance(value, bool) or not isinstance(value, (int, float)):
      raise CheckpointError(f"metrics[{name!r}] is {value!r:.80}; a metric is one number", topic="metrics-and-extras")
    if isinstance(value, int) and value.bit_length() > 1023:
      raise CheckpointError(f"metrics[{name!r}] is larger than a float can hold", topic="metrics-and-extras")
    if not isinstance(name, str):
      raise CheckpointError(
        f"metrics: the name {name!r:.80} would come back as text; use str names", topic="metrics-and-extras"
      )
    plain[str(name)] = value
  return plain


def checked_json(value: Any, where: str) -> Any:
  """`value` with tuples as lists.

  Raises:
    CheckpointError: naming the entry that JSON cannot hold or would change (keys that are not text).
  """
  if value is None or isinstance(value, (bool, int, str)):
    return value
  if isinstance(value, float) and not isinstance(value, np.generic):
    if not math.isfinite(value):
      raise CheckpointError(
        f"{where} is {value}: JSON has no such number; store it as text", topic="metrics-and-extras"
      )
    return value
  if isinstance(value, (list, tuple)):
    return [checked_json(v, f"{where}[{i}]") for i, v in enumerate(value)]
  if isinstance(value, Mapping):
    for key in value:
      if not isinstance(key, str):
        raise CheckpointError(
          f"{where}: the key {key!r} would come back as text; use str keys", topic="metrics-and-extras"
        )
    return {k: checked_json(v, f"{where}[{k!r}]") for k, v in value.items()}
  hint = "; convert it with .item() or .tolist()" if isinstance(value, (np.generic, np.ndarray, jax.Array)) else ""
  raise CheckpointError(f"{where}: JSON cannot hold a {type(value).__name__}{hint}", topic="metrics-and-extras")
