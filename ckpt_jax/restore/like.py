"""The leaves that `like` asks for: their devices, whether jax can hold them, and values for those that a step lacks.

jax's own error for a sharding that does not fit names neither the leaf nor the mesh, and comes after everything was
read; a dtype that it cannot hold without `jax_enable_x64` it cuts to 32 bits silently.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from ckpt_jax.errors import ConfigError, StructureMismatchError
from ckpt_jax.layout.encoding import dtype_name, is_prng_dtype
from ckpt_jax.layout.sharding import UnknownDevicesError, context_mesh, is_weak, on_devices
from ckpt_jax.layout.shared import reunited, shared_nodes
from ckpt_jax.layout.structure import path_name
from ckpt_jax.restore.patterns import as_patterns, matches, selected

PyTree = Any
Initialise = Callable[[str, Any], Any]
_VALUES = (jax.Array, np.ndarray, np.generic, bool, int, float, complex, str)


def on_real_devices(like: PyTree) -> PyTree:
  """`like` with shardings over real devices.

  Shardings over abstract meshes, which `jax.eval_shape` gives under `jax.set_mesh`, are taken for the mesh in force.
  Under one, a `jax.ShapeDtypeStruct` without a sharding is wanted on all its devices, where jax puts new arrays. Any
  other object with a shape and a dtype, such as Orbax's metadata, becomes a `jax.ShapeDtypeStruct`.

  Raises:
    StructureMismatchError: naming the leaf, if no mesh is in force that has the abstract one's axes, or a sharding is
      for more axes than there are.
  """
  mesh = context_mesh()
  everywhere = None if mesh is None else NamedSharding(mesh, PartitionSpec())

  def placed(path: tuple[Any, ...], leaf: Any) -> Any:
    if isinstance(leaf, _VALUES) or not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
      return leaf
    given: Any = getattr(leaf, "sharding", None)
    if hasattr(given, "to_jax_sharding"):  # Orbax's description of one
      given = given.to_jax_sharding()
    try:
      sharding = on_devices(given if isinstance(given, Sharding) else None, mesh) or everywhere
    except UnknownDevicesError as e:
      there = "no mesh is in force" if mesh is None else f"the mesh in force is {dict(mesh.shape)}"
      raise StructureMismatchError(
        f"{path_name(path)}: like has a sharding {e}, and {there}; nothing was read. Restore within `with "
        "jax.set_mesh(mesh):`, or put shardings of real devices into like: jax.ShapeDtypeStruct(..., "
        "sharding=NamedSharding(mesh, spec))",
        topic="shardings-of-like",
      ) from None
    if sharding is not None and (problem := _why_misplaced(tuple(leaf.shape), sharding, rank_alone=True)):
      raise StructureMismatchError(f"{path_name(path)}: {problem}; nothing was read")
    if type(leaf) is jax.ShapeDtypeStruct and sharding is leaf.sharding:
      return leaf
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding, weak_type=is_weak(leaf))

  return reunited(jax.tree_util.tree_map_with_path(placed, like), shared_nodes(like))


def target_sharding(leaf: Any) -> Sharding | None:
  """Where an array of `like` is wanted; None if it is committed to no device."""
  return leaf.sharding if getattr(leaf, "committed", True) else None


def is_held_by_jax(dtype: Any) -> bool:
  """Whether a jax array can have this dtype, as jax is configured now."""
  return is_prng_dtype(dtype) or bool(jax.dtypes.canonicalize_dtype(dtype) == dtype)


def why_impossible(leaf: Any, *, own: bool = False) -> str | None:
  """Why no jax array can be what a leaf of `like` asks for; None if one can, or if none is asked for.

  `own`: whether a leaf without a sharding may become an array of each process's own.
  """
  if not isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct)):
    return None
  shape, dtype = tuple(leaf.shape), leaf.dtype
  if leaf.sharding is None and shape and not own and jax.process_count() > 1:
    return (
      f"like has no sharding, and {jax.process_count()} processes must know which part each reads; pass "
      "jax.ShapeDtypeStruct(..., sharding=...)"
    )
  if not is_held_by_jax(dtype):
    smaller = jax.dtypes.canonicalize_dtype(dtype).name
    return (
      f"like has {dtype_name(dtype)}{list(shape)}, which jax holds only with jax_enable_x64; set that, put a numpy "
      f"array into like, or have it cast: {smaller} in like, and cast="
    )
  return None if leaf.sharding is None else _why_misplaced(shape, leaf.sharding)


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


# -- leaves that a step lacks


def initialisers(argument: Any) -> dict[str, Initialise | None]:
  """For each pattern of `init_missing` what makes the leaves that it names; None for like's own values.

  Raises:
    ConfigError: if the argument is wrong.
  """
  if argument is None:
    return {}
  if not isinstance(argument, Mapping):
    return dict.fromkeys(as_patterns(argument, "init_missing"))
  for pattern, initialise in argument.items():
    if not callable(initialise):
      raise ConfigError(f"init_missing[{pattern!r}]: expected a function of path and leaf, got {initialise!r:.60}")
  as_patterns(argument, "init_missing")
  return dict(argument)


def patterns_inside(
  patterns: Mapping[str, Any], chosen: Mapping[str, Any], like: Mapping[str, Any]
) -> tuple[tuple[str, ...], dict[str, Any]]:
  """The patterns about leaves that are restored, and the leaves of `like` outside of those that come back beside them.

  A pattern that names some of the leaves that `only` names is about those alone: `**/lora_*` adds nothing of an
  optimizer state that nobody asked for. One that names none of them, and begins with the name of a node, is about the
  rest of `like`. `chosen` are the leaves of `like` that `only` names.

  Raises:
    StructureMismatchError: if a pattern names nothing.
  """
  inside = tuple(p for p in patterns if any(matches(p, name) for name in chosen))
  others = [p for p in patterns if p not in inside]
  beyond = [p for p in others if not set("*?[") & set(p.strip("/").split("/")[0])]
  if vague := [p for p in others if p not in beyond]:
    selected(vague, chosen, "init_missing", "like" if len(chosen) == len(like) else "like that only= names")
  named = selected(beyond, like, "init_missing", "like")
  return inside, {name: leaf for name, leaf in like.items() if name in named}


def initial_value(name: str, leaf: Any, initialise: Mapping[str, Initialise | None]) -> Any:
  """The value of a leaf that the step lacks.

  Raises:
    StructureMismatchError: naming it, if there is none, or it is not what `like` asks for.
  """
  function = next(f for pattern, f in initialise.items() if matches(pattern, name))
  if function is None:
    if isinstance(leaf, jax.ShapeDtypeStruct):
      raise StructureMismatchError(
        f"{name}: init_missing keeps like's value, and like has only a shape there; put an array into like=, or a "
        "function: init_missing={'" + name + "': lambda path, leaf: ...}"
      )
    return leaf
  if problem := why_impossible(leaf):
    raise StructureMismatchError(f"{name}: {problem}")
  value = function(name, leaf)
  if not hasattr(leaf, "dtype"):
    return value
  shape, dtype = np.shape(value), getattr(value, "dtype", None)
  if shape != tuple(leaf.shape) or dtype != leaf.dtype:
    raise StructureMismatchError(
      f"{name}: its init_missing function returned {dtype}{list(shape)}, like has {leaf.dtype}{list(leaf.shape)}"
    )
  if not isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct)):
    return value
  sharding = target_sharding(leaf)
  if sharding is None:
    return value if isinstance(value, jax.Array) else jax.numpy.asarray(value)
  if isinstance(value, jax.Array):
    return jax.device_put(value, sharding)
  return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])
