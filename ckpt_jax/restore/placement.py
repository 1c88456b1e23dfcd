"""Where the leaves of `like` are wanted: on which devices, and whether a jax array can be that at all.

jax itself says of a sharding that does not fit neither the leaf nor the mesh, once everything is read; what it cannot
hold without `jax_enable_x64` it cuts to 32 bits without a word.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from ckpt_jax.errors import StructureMismatchError
from ckpt_jax.layout.encoding import dtype_name, is_prng_dtype
from ckpt_jax.layout.sharding import UnknownDevicesError, context_mesh, is_weak, on_devices
from ckpt_jax.layout.structure import path_name

PyTree = Any


def on_real_devices(like: PyTree) -> PyTree:
  """`like` with shardings over real devices.

  Those over abstract meshes, which `jax.eval_shape` gives under `jax.set_mesh`, are taken for the mesh in force. Under
  one, a `jax.ShapeDtypeStruct` without a sharding is wanted on all its devices, where jax puts new arrays. Whatever
  else says a shape and a dtype, as Orbax's metadata do, becomes a `jax.ShapeDtypeStruct`.

  Raises:
    StructureMismatchError: naming the leaf, if no mesh is in force that has the abstract one's axes, or a sharding is
      for more axes than there are.
  """
  mesh = context_mesh()
  everywhere = None if mesh is None else NamedSharding(mesh, PartitionSpec())
  found: Any = jax.tree_util.tree_flatten_with_path(like)
  leaves, treedef = [leaf for _, leaf in found[0]], found[1]
  changed = False
  for i, leaf in enumerate(leaves):
    if isinstance(leaf, _THEMSELVES) or not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
      continue
    try:
      sharding = on_devices(_given(leaf), mesh) or everywhere
      if problem := None if sharding is None else _why_misplaced(tuple(leaf.shape), sharding, rank_alone=True):
        raise StructureMismatchError(f"{path_name(found[0][i][0])}: {problem}; nothing was read")
    except UnknownDevicesError as e:
      there = "no mesh is in force" if mesh is None else f"the mesh in force is {dict(mesh.shape)}"
      raise StructureMismatchError(
        f"{path_name(found[0][i][0])}: like has a sharding {e}, and {there}; nothing was read. Restore within `with "
        "jax.set_mesh(mesh):`, or put shardings of real devices into like: jax.ShapeDtypeStruct(..., "
        "sharding=NamedSharding(mesh, spec))"
      ) from None
    if type(leaf) is not jax.ShapeDtypeStruct or sharding is not leaf.sharding:
      leaves[i] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding, weak_type=is_weak(leaf))
      changed = True
  return treedef.unflatten(leaves) if changed else like


_THEMSELVES = (jax.Array, np.ndarray, np.generic, bool, int, float, complex, str)


def _given(leaf: Any) -> Sharding | None:
  sharding: Any = getattr(leaf, "sharding", None)
  if hasattr(sharding, "to_jax_sharding"):  # Orbax's description of one
    sharding = sharding.to_jax_sharding()
  return sharding if isinstance(sharding, Sharding) else None


def why_impossible(leaf: Any, *, own: bool = False) -> str | None:
  """Why no jax array can be what a leaf of `like` asks for; None if one can, or if none is asked for.

  Args:
    leaf: of `like`.
    own: whether a leaf without a sharding may become an array of each process's own.
  """
  if not isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct)):
    return None
  if leaf.sharding is None and leaf.shape and not own and jax.process_count() > 1:
    return (
      f"like has no sharding, and {jax.process_count()} processes must know which part each reads; pass "
      "jax.ShapeDtypeStruct(..., sharding=...)"
    )
  return _why_impossible(tuple(leaf.shape), leaf.dtype, leaf.sharding)


@functools.lru_cache(maxsize=4096)
def _why_misplaced(shape: tuple[int, ...], sharding: Sharding, rank_alone: bool = False) -> str | None:
  what = str(sharding)
  if isinstance(sharding, NamedSharding):
    spec, sizes = sharding.spec, sharding.mesh.shape
    what = f"like's sharding P{tuple(spec)} over the mesh {dict(sizes)}"
    if len(spec) > len(shape):
      return f"{what} is for {len(spec)} axes, and the shape {list(shape)} has {len(shape)}"
    for axis, (size, names) in enumerate(zip(shape, spec, strict=False)):
      parts = math.prod(sizes[n] for n in ((names,) if isinstance(names, str) else names or ()) if n in sizes)
      if size % parts and not rank_alone:
        return f"{what} cuts axis {axis} of {list(shape)} into {parts} parts, and {size} cannot be divided so"
  if rank_alone:
    return None
  try:
    sharding.shard_shape(shape)
  except Exception as e:  # jax's own kinds of error differ from version to version
    return f"like's sharding {what} does not fit the shape {list(shape)}: {e}"
  return None


def _why_impossible(shape: tuple[int, ...], dtype: Any, sharding: Sharding | None) -> str | None:
  if not is_held_by_jax(dtype):
    smaller = jax.dtypes.canonicalize_dtype(dtype).name
    return (
      f"like has {dtype_name(dtype)}{list(shape)}, which jax holds only with jax_enable_x64; set that, put a numpy "
      f"array into like, or have it cast: {smaller} in like, and cast="
    )
  return None if sharding is None else _why_misplaced(shape, sharding)


def is_held_by_jax(dtype: Any) -> bool:
  """Whether a jax array can have this dtype, as jax is configured now."""
  return is_prng_dtype(dtype) or bool(jax.dtypes.canonicalize_dtype(dtype) == dtype)
