"""Where the leaves of `like` are wanted: on which devices, and whether a jax array can be that at all.

jax itself says of a sharding that does not fit neither the leaf nor the mesh, once everything is read; what it cannot
hold without `jax_enable_x64` it cuts to 32 bits without a word.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from ckpt_jax.errors import StructureMismatchError
from ckpt_jax.layout.encoding import dtype_name, is_prng_dtype
from ckpt_jax.layout.sharding import UnknownDevicesError, context_mesh, on_devices
from ckpt_jax.layout.structure import path_name

PyTree = Any


def on_real_devices(like: PyTree) -> PyTree:
  """`like` with shardings over real devices.

  Those over abstract meshes, which `jax.eval_shape` gives under `jax.set_mesh`, are taken for the mesh in force. Under
  one, a `jax.ShapeDtypeStruct` without a sharding is wanted on all its devices, where jax puts new arrays.

  Raises:
    StructureMismatchError: naming the leaf, if no mesh is in force that has the abstract one's axes.
  """
  mesh = context_mesh()
  everywhere = None if mesh is None else NamedSharding(mesh, PartitionSpec())
  found: Any = jax.tree_util.tree_flatten_with_path(like)
  leaves, treedef = [leaf for _, leaf in found[0]], found[1]
  changed = False
  for i, leaf in enumerate(leaves):
    if type(leaf) is not jax.ShapeDtypeStruct:
      continue
    try:
      sharding = on_devices(leaf.sharding, mesh) or everywhere
    except UnknownDevicesError as e:
      there = "no mesh is in force" if mesh is None else f"the mesh in force is {dict(mesh.shape)}"
      raise StructureMismatchError(
        f"{path_name(found[0][i][0])}: like has a sharding {e}, and {there}; nothing was read. Restore within `with "
        "jax.set_mesh(mesh):`, or put shardings of real devices into like: jax.ShapeDtypeStruct(..., "
        "sharding=NamedSharding(mesh, spec))"
      ) from None
    if sharding is not leaf.sharding:
      leaves[i] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding, weak_type=leaf.weak_type)
      changed = True
  return treedef.unflatten(leaves) if changed else like


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
def _why_misplaced(shape: tuple[int, ...], sharding: Sharding) -> str | None:
  what, mesh = str(sharding), ""
  if isinstance(sharding, NamedSharding):
    what, mesh = str(sharding.spec).replace("PartitionSpec", "P"), f" over the mesh {dict(sharding.mesh.shape)}"
    if len(sharding.spec) > len(shape):
      return (
        f"like's sharding {what}{mesh} names {len(sharding.spec)} axes, and the shape {list(shape)} has {len(shape)}"
      )
    for axis, (size, names) in enumerate(zip(shape, sharding.spec, strict=False)):
      parts = math.prod(sharding.mesh.shape[n] for n in ((names,) if isinstance(names, str) else names or ()))
      if size % parts:
        return (
          f"like's sharding {what}{mesh} cuts axis {axis} of {list(shape)} into {parts}, which do not divide {size}"
        )
  try:
    sharding.shard_shape(shape)
  except Exception as e:  # jax's own kinds of error differ from version to version
    return f"like's sharding {what}{mesh} does not fit the shape {list(shape)}: {e}"
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
