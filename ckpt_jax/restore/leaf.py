"""One leaf of a restore: what is stored, what is wanted, and how Orbax is asked for it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from ckpt_jax.errors import CheckpointError, CorruptCheckpointError, StructureMismatchError
from ckpt_jax.layout.encoding import decode_leaf, is_prng_key

Note = dict[str, Any]


class _AsSaved:
  """In place of a leaf of `like`: the value as it was saved, in host memory."""

  def __repr__(self) -> str:
    return "AS_SAVED"


AS_SAVED = _AsSaved()


@dataclasses.dataclass(frozen=True)
class LeafPlan:
  """How one leaf is read.

  Attributes:
    name: its path.
    shape, dtype: as stored: a PRNG key's words, an uint4 array's uint8. `dtype` is None for text.
    chunk_shape: the pieces that storage reads whole; None if unknown, and for what is no array.
    scalar: the Python type of a stored number or text.
    note: what `encoding.encode` noted.
    like: the leaf wanted, or AS_SAVED.
    cast: the dtype that the value becomes after reading; None for the saved one.
    sharding: where the stored form shall lie; None for host memory and for the default device.
  """

  name: str
  shape: tuple[int, ...]
  dtype: Any
  chunk_shape: tuple[int, ...] | None
  scalar: type | None
  note: Note | None
  like: Any
  cast: Any = None
  sharding: Sharding | None = None

  @property
  def nbytes(self) -> int:
    """Bytes of the stored form."""
    return math.prod(self.shape) * self.dtype.itemsize if self.dtype is not None else 0

  def request(self, sharding: Sharding | None) -> tuple[Any, ocp.RestoreArgs]:
    """Orbax's item and restore args: the stored form with a sharding, or as numpy without one."""
    args = self.restore_args(sharding)
    if self.scalar is not None:
      return self.scalar(), args
    if sharding is None:
      return np.zeros((), np.uint8), args
    return jax.ShapeDtypeStruct(self.shape, self.dtype, sharding=sharding), args

  def restore_args(self, sharding: Sharding | None) -> ocp.RestoreArgs:
    """The second part of `request`."""
    if self.scalar is not None:
      return ocp.RestoreArgs(restore_type=self.scalar)
    if sharding is None:
      return ocp.RestoreArgs(restore_type=np.ndarray)
    return ocp.ArrayRestoreArgs(
      restore_type=jax.Array, sharding=sharding, global_shape=self.shape, dtype=np.dtype(self.dtype)
    )

  def finish(self, value: Any) -> Any:
    """What was read, with the type of `like`."""
    value = decode_leaf(value, self.note)
    if self.cast is not None:
      value = _cast(self.name, value, self.cast)
    return value if self.like is AS_SAVED else _as_like(self.name, value, self.like)


def make_plan(name: str, meta: Any, note: Note | None, like: Any, cast: Any = None) -> LeafPlan:
  """The plan for a leaf.

  Args:
    name: its path.
    meta: Orbax's ArrayMetadata, ScalarMetadata or StringMetadata.
    note: what `encoding.encode` noted.
    like: the leaf wanted, or AS_SAVED.
    cast: the dtype to change to.

  Raises:
    StructureMismatchError: if several processes restore it and `like` does not say where.
  """
  kind = type(meta).__name__
  if kind == "StringMetadata":
    return LeafPlan(name, (), None, None, str, None, like)
  shape, dtype = tuple(meta.shape), np.dtype(meta.dtype)
  if kind == "ScalarMetadata":
    scalar = {"b": bool, "i": int, "u": int, "f": float}.get(dtype.kind)
    return LeafPlan(name, shape, dtype, None, scalar, None, like, cast)
  storage = getattr(meta, "storage", None)
  chunk = getattr(storage, "chunk_shape", None)
  return LeafPlan(
    name,
    shape,
    dtype,
    tuple(chunk) if chunk else None,
    None,
    note,
    like,
    cast,
    _stored_sharding(name, shape, note, like),
  )


def _stored_sharding(name: str, shape: tuple[int, ...], note: Note | None, like: Any) -> Sharding | None:
  if not isinstance(like, (jax.Array, jax.ShapeDtypeStruct)) or (note and note["kind"] == "empty"):
    return None
  sharding = _target_sharding(name, like)
  if sharding is not None and is_prng_key(like) and isinstance(sharding, NamedSharding):
    spec = (*sharding.spec, *[None] * (len(shape) - len(sharding.spec)))
    return NamedSharding(sharding.mesh, PartitionSpec(*spec), memory_kind=sharding.memory_kind)
  return sharding


def _target_sharding(name: str, leaf: Any) -> Sharding | None:
  if isinstance(leaf, jax.Array):
    return leaf.sharding if getattr(leaf, "committed", True) else None
  if leaf.sharding is None and jax.process_count() > 1:
    raise StructureMismatchError(
      f"{name}: like has no sharding, and {jax.process_count()} processes must know which part each reads; pass "
      "jax.ShapeDtypeStruct(..., sharding=...)"
    )
  return leaf.sharding


def to_default_device(plans: Sequence[LeafPlan], values: dict[str, Any]) -> None:
  """Makes arrays of the leaves of `like` that are committed to no device, free for jit to move them.

  They were read into host memory, which jax on CPU takes over as it is.
  """
  loose = [
    p.name
    for p in plans
    if isinstance(p.like, (jax.Array, jax.ShapeDtypeStruct)) and isinstance(values[p.name], (np.ndarray, np.generic))
  ]
  arrays = jax.device_put([values[name] for name in loose], may_alias=True)
  values.update(zip(loose, arrays, strict=True))


def _as_like(name: str, value: Any, like: Any) -> Any:
  if isinstance(like, (bool, int, float, complex, str)):
    return value if type(value) is type(like) else type(like)(np.asarray(value)[()])
  if isinstance(like, np.generic):
    return like.dtype.type(np.asarray(value)[()])
  if isinstance(like, np.ndarray):
    return _exact(name, value, like.dtype)
  sharding = _target_sharding(name, like)
  if is_prng_key(like):
    if not is_prng_key(value):  # plain Orbax notes what keys are, unless its array metadata is off
      value = jax.random.wrap_key_data(
        value, impl=str(jax.random.key_impl(like)) if isinstance(like, jax.Array) else None
      )
    if value.dtype != like.dtype:
      raise StructureMismatchError(f"{name}: saved as {value.dtype}, asked for {like.dtype}")
  if isinstance(value, jax.Array):
    if sharding is None:
      return value
    # Decoding widened values and keys keeps the sharding, but may say it in other words (a spec with trailing None).
    return value if value.sharding == sharding else jax.device_put(value, sharding)
  value = _exact(name, value, like.dtype)
  # Without a sharding it goes to the default device, which `to_default_device` does for all leaves at once.
  return value if sharding is None else _put(value, sharding)


def _put(value: np.ndarray, sharding: Sharding) -> jax.Array:
  return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def _exact(name: str, value: Any, dtype: Any) -> np.ndarray:
  if isinstance(value, jax.Array):
    value = np.array(value)
  if isinstance(value, np.ndarray) and value.dtype == dtype:
    return value
  array = np.asarray(value).astype(dtype)
  # Only Python scalars get here, one number each: a cast that changes it is refused.
  if array[()] != value and value == value:
    raise StructureMismatchError(f"{name}: the saved number {value} does not fit into {dtype}")
  return array


def _cast(name: str, value: Any, dtype: Any) -> Any:
  """`value` in another dtype of its kind, to nearest even; whatever the new dtype cannot hold is an error."""
  dtype = jnp.dtype(dtype)
  if value.dtype == dtype:
    return value
  numpy = jnp if isinstance(value, jax.Array) else np
  if jnp.issubdtype(dtype, jnp.integer):
    new, old = jnp.iinfo(dtype), jnp.iinfo(value.dtype)
    least, most = max(new.min, old.min), min(new.max, old.max)
    narrower = (least, most) != (old.min, old.max)
    lost = narrower and bool(value.size and numpy.any((value > most) | (value < least)))
    out = value.astype(dtype)
  else:
    with np.errstate(over="ignore"):
      out = value.astype(dtype)
    lost = bool(numpy.any(numpy.isfinite(value) & ~numpy.isfinite(out))) if value.size else False
  if lost:
    raise CheckpointError(
      f"{name}: holds values that {dtype.name} cannot; cast it to a wider dtype, or restore it as saved"
    )
  return out


def check_stored(plan: LeafPlan, value: Any) -> None:
  """Fails if storage gave something else than what its metadata promised.

  Raises:
    CorruptCheckpointError: naming the leaf.
  """
  if plan.scalar is not None or is_prng_key(value):
    return
  if tuple(value.shape) != plan.shape or np.dtype(value.dtype) != np.dtype(plan.dtype):
    raise CorruptCheckpointError(
      f"{plan.name}: storage gave {value.dtype}{list(value.shape)}, its metadata says {plan.dtype}{list(plan.shape)}"
    )
