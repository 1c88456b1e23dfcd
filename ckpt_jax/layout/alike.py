"""What of a tree must be alike on all processes: names, types, shapes, dtypes and shardings, but not its values.

Each process writes its part of a leaf as it sees it. If one sees another dtype or shape than the others, the parts fit
into no array, and nothing else would notice: the step would commit.
"""

from __future__ import annotations

import hashlib
from typing import Any

import jax

from ckpt_jax.job.agreement import digest
from ckpt_jax.layout.structure import Flat, Structure


def kinds(flat: Flat) -> dict[str, str]:
  """What each leaf is, by name, in words that are the same on all processes."""
  return flat.structure.once(_kinds, flat.structure)


def digest_of(flat: Flat) -> str:
  """The digest of `kinds`, which is computed once for states that are alike."""
  return flat.structure.once(_digest, flat.structure)


def _digest(structure: Structure) -> str:
  return digest(structure.once(_kinds, structure))


def _kinds(structure: Structure) -> dict[str, str]:
  meshes: dict[Any, str] = {}
  names = (" ".join(name.split()) for name in structure.names)
  return {name: _kind(kind, meshes) for name, kind in zip(names, structure.kinds, strict=True)}


def _kind(kind: tuple[Any, ...], meshes: dict[Any, str]) -> str:
  if len(kind) == 2:  # a jax array
    (aval, sharding), what = kind, ""
    shape, dtype = aval.shape, aval.dtype
  else:
    node, shape, dtype, sharding = kind
    what = "" if issubclass(node, jax.ShapeDtypeStruct) else f"{node.__name__} "
  if shape is None or dtype is None:
    return what.strip()
  return f"{what}{dtype}[{','.join(map(str, shape))}]{_place(sharding, meshes)}"


def _place(sharding: Any, meshes: dict[Any, str]) -> str:
  """A sharding in words that are the same on all processes."""
  if sharding is None:
    return ""
  if sharding.is_fully_addressable and jax.process_count() > 1:
    return " of this process alone"
  if not isinstance(sharding, jax.sharding.NamedSharding):
    return f" {sharding}"
  mesh = sharding.mesh
  if mesh not in meshes:
    devices = "" if mesh.empty or not hasattr(mesh, "devices") else str([d.id for d in mesh.devices.flat])
    number = hashlib.sha256(devices.encode()).hexdigest()[:6]
    meshes[mesh] = f"mesh {dict(mesh.shape)} (devices {number})"
  spec = list(sharding.spec)
  while spec and spec[-1] is None:
    spec.pop()
  return f" {jax.sharding.PartitionSpec(*spec)} on {meshes[mesh]}, {sharding.memory_kind} memory"
