"""The readable JSON of a step: where it came from, and what the trainer put beside its state."""

from __future__ import annotations

import functools
import importlib.metadata
import math
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from ckpt_jax.config import Config
from ckpt_jax.errors import CheckpointError
from ckpt_jax.layout.sharding import is_weak
from ckpt_jax.layout.structure import Structure, look

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


def run_metadata(config: Config, state: Any, nbytes: int) -> dict[str, Any]:
  """What made a step: package versions, processes, devices, mesh, configuration and sizes."""
  structure, leaves = look(state)
  return {
    "format": FORMAT,
    "versions": _versions(),
    "processes": jax.process_count(),
    "devices": jax.device_count(),
    "platform": jax.default_backend(),
    "meshes": structure.once(_meshes, leaves),
    "config": config.to_dict(),
    "leaves": len(leaves),
    "nbytes": nbytes,
    # Also if there is none: that a step says so sets it apart from those of older versions.
    "weak": structure.once(_weakly_typed, structure, leaves),
  }


def _weakly_typed(structure: Structure, leaves: Sequence[Any]) -> list[str]:
  """The arrays that give way to the types of others, as Python numbers do."""
  return [name for name, leaf in zip(structure.names, leaves, strict=True) if is_weak(leaf)]


def _meshes(leaves: Sequence[Any]) -> list[dict[str, int]]:
  shardings = (getattr(x, "sharding", None) for x in leaves)
  return [dict(mesh.shape) for mesh in {s.mesh for s in shardings if isinstance(s, jax.sharding.NamedSharding)}]


def plain_metrics(metrics: Mapping[str, Any] | None) -> dict[str, float | int]:
  """Metrics as Python numbers; 0-d arrays are read.

  Raises:
    CheckpointError: naming the metric that is no number.
  """
  if not (metrics is None or isinstance(metrics, Mapping)):
    raise CheckpointError(f"metrics: expected {{name: number}}, got {metrics!r:.80}")
  plain: dict[str, float | int] = {}
  for name, value in (metrics or {}).items():
    if isinstance(value, (jax.Array, np.ndarray, np.generic)) and np.size(value) == 1:
      try:
        value = np.asarray(value).reshape(())[()].item()
      except Exception as e:  # donated, traced by jit, or a PRNG key
        raise CheckpointError(
          f"metrics[{name!r}] has no value that can be read: {' '.join(str(e).split())[:300]}"
        ) from e
    if isinstance(value, bool) or not isinstance(value, (int, float)):
      raise CheckpointError(f"metrics[{name!r}] is {value!r:.80}; a metric is one number")
    plain[str(name)] = value
  return plain


def checked_json(value: Any, where: str) -> Any:
  """`value` with tuples as lists.

  Raises:
    CheckpointError: naming the entry that JSON cannot hold, or would change (keys that are no text).
  """
  if value is None or isinstance(value, (bool, int, str)):
    return value
  if isinstance(value, float) and not isinstance(value, np.generic):
    if not math.isfinite(value):
      raise CheckpointError(f"{where} is {value}: JSON has no such number; store it as text")
    return value
  if isinstance(value, (list, tuple)):
    return [checked_json(v, f"{where}[{i}]") for i, v in enumerate(value)]
  if isinstance(value, Mapping):
    for key in value:
      if not isinstance(key, str):
        raise CheckpointError(f"{where}: the key {key!r} would come back as text; use str keys")
    return {k: checked_json(v, f"{where}[{k!r}]") for k, v in value.items()}
  hint = "; convert it with .item() or .tolist()" if isinstance(value, (np.generic, np.ndarray, jax.Array)) else ""
  raise CheckpointError(f"{where}: JSON cannot hold a {type(value).__name__}{hint}")
