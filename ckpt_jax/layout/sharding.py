"""Which bytes of a state this process holds, and shapes and shardings of a state that is not built yet."""

from __future__ import annotations

import collections
import contextlib
import functools
import logging
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core as jex_core
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from ckpt_jax.errors import StructureMismatchError
from ckpt_jax.layout.forms import why_not_flat
from ckpt_jax.layout.shared import reunited, shared_nodes
from ckpt_jax.layout.structure import Flat, flatten

_log = logging.getLogger(__name__)
PyTree = Any


def local_nbytes(state: PyTree | Flat) -> int:
  """Bytes of this process's distinct shards, which a copy to host memory needs; replicas on its devices count once."""
  return _sizes_of(state)[1]


def global_nbytes(state: PyTree | Flat) -> int:
  """Bytes of all array leaves, each counted once however it is sharded."""
  return _sizes_of(state)[0]


def _sizes_of(state: PyTree | Flat) -> tuple[int, int]:
  structure = flatten(state).structure
  return structure.once(_sizes, structure.abstract)


def _sizes(leaves: Sequence[Any]) -> tuple[int, int]:
  """Bytes of all arrays, and of the distinct pieces that this process holds."""
  kinds: collections.Counter[Any] = collections.Counter()
  whole = local = 0
  for leaf in leaves:
    if leaf is not None:
      whole += math.prod(leaf.shape) * leaf.dtype.itemsize
    if isinstance(leaf, np.ndarray):
      local += leaf.nbytes
    elif leaf is not None and leaf.sharding is not None:
      kinds[leaf.shape, leaf.dtype, leaf.sharding] += 1  # thousands of leaves are of few kinds
  for (shape, dtype, sharding), count in kinds.items():
    boxes = {box_of(index, shape) for index in sharding.addressable_devices_indices_map(shape).values()}
    local += count * sum(math.prod(shape_of(box)) * dtype.itemsize for box in boxes)
  return whole, local


def context_mesh() -> Mesh | None:
  """The mesh set by `jax.set_mesh`, if any."""
  get_mesh = getattr(jax.sharding, "get_mesh", None)  # jax 0.8.0 has none
  mesh = None
  if get_mesh is not None:
    with contextlib.suppress(ValueError):  # inside jit, where there are no devices
      mesh = get_mesh()
  return None if mesh is None or mesh.empty else mesh


class UnknownDevicesError(Exception):
  """A sharding over an abstract mesh whose devices are not known."""


def on_devices(sharding: Sharding | None, mesh: Mesh | None) -> Sharding | None:
  """A sharding over real devices, given the current mesh.

  `jax.eval_shape` under `jax.set_mesh` returns shardings over abstract meshes: axes with sizes, without devices.

  Raises:
    UnknownDevicesError: if `mesh` has other axes than the sharding's mesh.
  """
  if not isinstance(sharding, NamedSharding) or not isinstance(sharding.mesh, AbstractMesh):
    return sharding
  abstract = sharding.mesh
  if abstract.empty:
    return None
  if mesh is None or dict(mesh.shape) != dict(abstract.shape):
    raise UnknownDevicesError(f"{sharding.spec} over an abstract mesh {dict(abstract.shape)}")
  if mesh.axis_names != abstract.axis_names:  # as jax compares meshes
    raise UnknownDevicesError(f"{sharding.spec} over an abstract mesh with axes {abstract.axis_names}")
  types = abstract.axis_types
  if types != mesh.axis_types and AxisType.Manual not in types:
    mesh = Mesh(mesh.devices, mesh.axis_names, axis_types=types)
  return NamedSharding(mesh, sharding.spec, memory_kind=sharding.memory_kind)


def abstract_state(init_fn: Callable[[], PyTree]) -> PyTree:
  """The result of `init_fn()` as `jax.ShapeDtypeStruct`s with shardings, without computing or allocating it.

  Leaves that are not traced (Python scalars, numpy arrays, arrays that the function closes over) come back as they
  are. The sharding of a traced leaf is read off the program: jit's `out_shardings`, `with_sharding_constraint`,
  `shard_map` or `device_put`, and the types of arrays on an explicit mesh. If the compiler chooses it and there are
  several devices, or if `init_fn` cannot be traced, the state is built once and only its description is kept.
  """
  try:
    return _traced_state(init_fn)
  except _NotDetermined as e:
    _log.info("init_fn is run to learn its shardings (%s); jit it with out_shardings= to avoid that", e)
  state = init_fn()
  if problem := why_not_flat(state):
    raise StructureMismatchError(f"init_fn makes no tree for jax:\n  {problem}")
  return reunited(jax.tree.map(_describe, state), shared_nodes(state))


class _NotDetermined(Exception):
  pass


def _describe(leaf: Any) -> Any:
  if isinstance(leaf, jax.Array):
    sharding = leaf.sharding if getattr(leaf, "committed", True) else None
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding, weak_type=is_weak(leaf))
  return leaf


def is_weak(leaf: Any) -> bool:
  """Whether a leaf is a weakly typed jax array, which takes on the types of others as Python numbers do."""
  return bool(getattr(leaf, "weak_type", False))


def _traced_state(init_fn: Callable[[], PyTree]) -> PyTree:
  concrete: list[Any] = []
  treedef, shared = None, []

  def traced_leaves():
    nonlocal concrete, treedef, shared
    state = init_fn()
    shared = shared_nodes(state)
    leaves, treedef = jax.tree.flatten(state)
    concrete = [None if isinstance(x, jax.core.Tracer) else x for x in leaves]
    return [x for x in leaves if isinstance(x, jax.core.Tracer)]

  try:
    closed = jax.make_jaxpr(traced_leaves)()
  except Exception as e:  # whatever an eager init_fn does that tracing forbids
    raise _NotDetermined(f"it cannot be traced: {type(e).__name__}") from e
  mesh = context_mesh()
  sharding: Callable[[Any], Sharding | None]
  if _places_arrays(closed.jaxpr) or any(getattr(x, "committed", False) for x in closed.consts):
    sharding = functools.partial(_known_sharding, jaxpr=closed.jaxpr, mesh=mesh)
  elif mesh is not None:  # where jax puts what is made under `jax.set_mesh`
    sharding = functools.partial(_sharding_by_type, mesh=mesh)
  else:
    sharding = lambda var: None  # noqa: E731
  shapes = iter(
    jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype, sharding=sharding(v), weak_type=is_weak(v.aval))
    for v in closed.jaxpr.outvars
  )
  leaves = [next(shapes) if x is None else _describe(x) for x in concrete]
  return reunited(jax.tree.unflatten(treedef, leaves), shared)


def _places_arrays(jaxpr: Any) -> bool:
  """Whether the program names a device or sharding anywhere; if not, its results are on the default device."""
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == "shard_map":
      return True
    for value in jax.tree.leaves(eqn.params, is_leaf=lambda x: isinstance(x, (Sharding, jax.Device))):
      if isinstance(value, (Sharding, jax.Device)):
        return True
      inner = getattr(value, "jaxpr", value)
      if isinstance(inner, jex_core.Jaxpr) and _places_arrays(inner):
        return True
  return False


def _known_sharding(var: Any, jaxpr: Any, mesh: Mesh | None) -> Sharding | None:
  """The sharding of a result of a program; None for the default device."""
  typed = mesh is not None and set(mesh.axis_types) == {AxisType.Explicit}
  try:
    return on_devices(_sharding_of(var, jaxpr, typed), mesh)
  except UnknownDevicesError as e:
    raise _NotDetermined(str(e)) from e
  except _NotDetermined:
    # With one device there is no other place, and building the state would cost its memory.
    if not typed and jax.device_count() > 1:
      raise
    return None if mesh is None else _sharding_by_type(var, mesh)


def _sharding_by_type(var: Any, mesh: Mesh) -> Sharding:
  """The sharding in the type of an array, which is complete if every axis is explicit."""
  spec = getattr(getattr(var.aval, "sharding", None), "spec", PartitionSpec())
  return NamedSharding(mesh, spec if set(mesh.axis_types) == {AxisType.Explicit} else PartitionSpec())


def _sharding_of(var: Any, jaxpr: Any, typed: bool) -> Sharding:
  """The sharding that the program gives `var`; `typed`: results of jit are sharded as their types say."""
  for eqn in jaxpr.eqns:
    if var not in eqn.outvars:
      continue
    i = eqn.outvars.index(var)
    if eqn.primitive.name in ("pjit", "jit"):
      given = eqn.params["out_shardings"][i]
      if isinstance(given, Sharding):
        return given
      if typed:
        break
      return _sharding_of(eqn.params["jaxpr"].jaxpr.outvars[i], eqn.params["jaxpr"].jaxpr, typed)
    if eqn.primitive.name == "sharding_constraint" and isinstance(eqn.params["sharding"], Sharding):
      return eqn.params["sharding"]
    if eqn.primitive.name == "shard_map" and "out_specs" in eqn.params:
      return NamedSharding(eqn.params["mesh"], eqn.params["out_specs"][i])
    if eqn.primitive.name == "device_put":
      target = eqn.params["devices"][i]
      if isinstance(target, Sharding):
        return target
      if isinstance(target, jax.Device):
        return jax.sharding.SingleDeviceSharding(target)
    break
  if isinstance(var, jex_core.Literal):
    raise _NotDetermined("a constant has no sharding")
  raise _NotDetermined(f"the compiler chooses the sharding of a {var.aval.str_short()}")


# (start, stop) in each dimension; () for a scalar.
Box = tuple[tuple[int, int], ...]


def box_of(index: tuple[slice, ...], shape: tuple[int, ...]) -> Box:
  """The box that a shard's index selects."""
  return tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))


@functools.lru_cache(maxsize=4096)
def local_regions(sharding: Sharding, shape: tuple[int, ...]) -> tuple[Box, ...]:
  """Few disjoint boxes that cover exactly the shards of an array on this process's devices.

  Shards that tile a box become one region, so that an array sharded over the devices of one process is one region;
  replicas count once. Each shard is within one region.
  """
  return merge_boxes(
    {box_of(i, shape) for i in sharding.addressable_devices_indices_map(shape).values() if i is not None}
  )


@functools.lru_cache(maxsize=4096)
def one_device(sharding: Sharding) -> str | None:
  """`here` or `elsewhere` for an array on one device, of this process or another; None for any other."""
  if len(sharding.device_set) > 1:
    return None
  return "here" if sharding.is_fully_addressable else "elsewhere"


@functools.lru_cache(maxsize=4096)
def replicas(sharding: Sharding, shape: tuple[int, ...]) -> int:
  """How many devices hold each shard of an array."""
  indices = sharding.devices_indices_map(shape).values()
  return len(indices) // len({box_of(i, shape) for i in indices if i is not None})


def merge_boxes(boxes: Collection[Box]) -> tuple[Box, ...]:
  """Sorted boxes, where two disjoint ones that make up a box are joined."""
  merged = sorted(set(boxes))
  axes = range(len(merged[0])) if merged else range(0)
  changed = True
  while changed:
    changed = False
    for axis in axes:
      # Boxes can be joined along an axis if they agree in all others.
      rows: dict[Box, list[tuple[int, int]]] = {}
      for box in merged:
        rows.setdefault(box[:axis] + box[axis + 1 :], []).append(box[axis])
      joined = []
      for rest, spans in rows.items():
        start, stop = (spans := sorted(spans))[0]
        for a, b in spans[1:]:
          if a == stop:
            stop, changed = b, True
          else:
            joined.append((*rest[:axis], (start, stop), *rest[axis:]))
            start, stop = a, b
        joined.append((*rest[:axis], (start, stop), *rest[axis:]))
      merged = joined
  return tuple(sorted(merged))


def split_box(box: Box, chunk_shape: tuple[int, ...], itemsize: int, nbytes: int) -> list[Box]:
  """Parts of `box` whose chunks take at most `nbytes` each, cut between chunks, since a chunk is read whole."""
  spans = [(a // c, -(-b // c)) for (a, b), c in zip(box, chunk_shape, strict=True)]
  chunks = [last - first for first, last in spans]
  if chunk_nbytes(box, chunk_shape, itemsize) <= nbytes or max(chunks, default=1) <= 1:
    return [box]
  axis = chunks.index(max(chunks))
  first, last = spans[axis]
  cut = (first + last) // 2 * chunk_shape[axis]
  halves = [(*box[:axis], part, *box[axis + 1 :]) for part in ((box[axis][0], cut), (cut, box[axis][1]))]
  return [small for half in halves for small in split_box(half, chunk_shape, itemsize, nbytes)]


def chunk_nbytes(box: Box, chunk_shape: tuple[int, ...], itemsize: int) -> int:
  """Bytes of the chunks that `box` touches."""
  return itemsize * math.prod((-(-b // c) - a // c) * c for (a, b), c in zip(box, chunk_shape, strict=True))


def whole_box(shape: Sequence[int]) -> Box:
  """The box of a whole array."""
  return tuple((0, n) for n in shape)


def shape_of(box: Box) -> tuple[int, ...]:
  """The shape of a box."""
  return tuple(b - a for a, b in box)


def intersection(one: Box, other: Box) -> Box | None:
  """The intersection of two boxes; None if it is empty."""
  shared = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(one, other, strict=True))
  return None if any(a >= b for a, b in shared) else shared


def within(inner: Box, outer: Box) -> tuple[slice, ...]:
  """The index that selects `inner` in an array that holds `outer`."""
  return tuple(slice(a - o, b - o) for (a, b), (o, _) in zip(inner, outer, strict=True))
