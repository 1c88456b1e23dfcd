"""One leaf of a restore: what is stored, what is wanted, and how the one becomes the other."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from ckpt_jax.errors import CheckpointError, CorruptCheckpointError, StructureMismatchError
from ckpt_jax.layout.encoding import decode_leaf, is_prng_key
from ckpt_jax.layout.link import PINNED
from ckpt_jax.layout.placing import Unplaced, place
from ckpt_jax.layout.sharding import is_weak
from ckpt_jax.orbax import private
from ckpt_jax.orbax.format import is_number, is_text
from ckpt_jax.restore.like import is_held_by_jax, target_sharding
from ckpt_jax.restore.meshes import default_memory_kind

Note = dict[str, Any]


AS_SAVED: Any = object()  # in place of a leaf of `like`: the value as it was saved, in host memory


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
    sharding: of the stored form; None for host memory and for the default device.
    weak: whether a jax array is to be weakly typed, as a Python number is.
    loose: whether a jax array is to be uncommitted, so that jit may move it; `sharding` is then only where it is read.
  """

  name: str
  shape: tuple[int, ...]
  dtype: Any
  chunk_shape: tuple[int, ...] | None = None
  scalar: type | None = None
  note: Note | None = None
  like: Any = AS_SAVED
  cast: Any = None
  sharding: Sharding | None = None
  weak: bool = False
  loose: bool = False

  @property
  def nbytes(self) -> int:
    """Bytes of the stored form."""
    return math.prod(self.shape) * self.dtype.itemsize if self.dtype is not None else 0

  def decode(self, value: Any) -> Any:
    """What was saved, given the stored form."""
    return decode_leaf(value, self.note)

  def convert(self, saved: Any) -> Any:
    """What was saved, with the type of `like`.

    Raises:
      StructureMismatchError, CheckpointError: naming the leaf, if that cannot hold its value.
    """
    if self.cast is not None:
      saved = _cast(self.name, saved, self.cast)
    return saved if self.like is AS_SAVED else _as_like(self.name, saved, self.like)

  def finish(self, value: Any) -> Any:
    """Decoded and converted."""
    return self.convert(self.decode(value))


def plan_leaf(
  name: str, meta: Any, note: Note | None, like: Any, cast: Any = None, weak: bool | None = None
) -> LeafPlan:
  """The plan for a leaf; see `LeafPlan`.

  Args:
    meta: Orbax's ArrayMetadata, ScalarMetadata or StringMetadata.
    note: what `encoding.encode` noted.
    weak: whether it was weakly typed when it was saved; None if that was not recorded, and `like` decides.
  """
  if is_text(meta):
    return LeafPlan(name, (), None, scalar=str, like=like)
  shape, dtype = tuple(meta.shape), np.dtype(meta.dtype)
  if is_number(meta):
    scalar = {"b": bool, "i": int, "u": int, "f": float}.get(dtype.kind)
    # As in jax, where a bool takes the type of nothing else.
    weak = is_weak(like) if weak is None else scalar is not bool
    return LeafPlan(name, shape, dtype, scalar=scalar, like=like, cast=cast, weak=weak)
  chunk = getattr(getattr(meta, "storage", None), "chunk_shape", None)
  sharding = _stored_sharding(shape, dtype, note, like)
  is_changed = note is not None or cast is not None
  if is_changed and sharding is not None and sharding.memory_kind == PINNED:
    sharding = sharding.with_memory_kind(default_memory_kind())  # accelerators do not compute in pinned memory
  loose = sharding is None and not is_changed and _is_array(like) and not is_prng_key(like)
  return LeafPlan(
    name,
    shape,
    dtype,
    chunk_shape=tuple(chunk) if chunk else None,
    note=note,
    like=like,
    cast=cast,
    sharding=_default_place() if loose else sharding,
    weak=is_weak(like) if weak is None else weak or bool(note and note["kind"] == "complex"),
    loose=loose,
  )


def _is_array(like: Any) -> bool:
  return isinstance(like, (jax.Array, jax.ShapeDtypeStruct))


def _stored_sharding(shape: tuple[int, ...], dtype: Any, note: Note | None, like: Any) -> Sharding | None:
  if not _is_array(like) or (note and note["kind"] == "empty"):
    return None
  if not is_held_by_jax(dtype):
    return None  # it is cast, in host memory: jax would cut it to 32 bits
  sharding = target_sharding(like)
  if sharding is not None and is_prng_key(like) and isinstance(sharding, NamedSharding):
    spec = (*sharding.spec, *[None] * (len(shape) - len(sharding.spec)))
    return NamedSharding(sharding.mesh, PartitionSpec(*spec), memory_kind=sharding.memory_kind)
  return sharding


def _default_place() -> Sharding:
  """Where jax puts arrays that are wanted nowhere in particular."""
  device: Any = jax.config.jax_default_device or jax.local_devices()[0]  # type: ignore[attr-defined]
  return SingleDeviceSharding(device if isinstance(device, jax.Device) else jax.local_devices(backend=device)[0])


def finish_arrays(plans: Sequence[LeafPlan], values: dict[str, Any]) -> None:
  """Moves leaves that are still in host memory to their devices, in one transfer, and makes arrays as they are planned.

  That is: weakly typed, or uncommitted, so that jit may move them.
  """
  wanted = [p for p in plans if _is_array(p.like)]
  held = [p for p in wanted if isinstance(values[p.name], (np.ndarray, np.generic))]
  places = [target_sharding(p.like) for p in held]
  arrays = place(
    [
      Unplaced.whole(np.asarray(values[p.name]), where or _default_place())
      for p, where in zip(held, places, strict=True)
    ]
  )
  values.update(zip((p.name for p in held), arrays, strict=True))
  nowhere = {p.name for p, where in zip(held, places, strict=True) if where is None}
  for plan in wanted:
    value = values[plan.name]
    weak = plan.weak and not is_prng_key(value)
    loose = (plan.loose or plan.name in nowhere) and value.committed
    if weak or loose:
      values[plan.name] = private.array_as(value, weak=weak, committed=value.committed and not loose)


def _as_like(name: str, value: Any, like: Any) -> Any:
  if isinstance(like, str):
    return value
  if isinstance(like, np.generic):
    return _exact(name, value, like.dtype)[()]
  if isinstance(like, (bool, int, float, complex)):
    return value if type(value) is type(like) else type(like)(np.asarray(value)[()])
  if isinstance(like, np.ndarray):
    return _exact(name, value, like.dtype)
  sharding = target_sharding(like)
  if is_prng_key(like):
    if not is_prng_key(value):  # a raw key; or plain Orbax noted what keys are, and its array metadata is off
      value = jax.random.wrap_key_data(value, impl=_impl(like.dtype))
    if value.dtype != like.dtype:
      raise StructureMismatchError(f"{name}: saved as {value.dtype}, asked for {like.dtype}")
  elif is_prng_key(value):  # plain Orbax wrote it as a key
    value = jax.random.key_data(value)
  if isinstance(value, jax.Array):
    if sharding is None:
      return value
    # Decoding widened values and keys keeps the sharding, but may say it in other words (a spec with trailing None).
    return value if value.sharding == sharding else jax.device_put(value, sharding)
  return _exact(name, value, like.dtype)  # `finish_arrays` sends it to its devices


@functools.cache
def _impl(dtype: Any) -> str:
  """The name by which jax knows the implementation of a dtype of PRNG keys."""
  for name in ("threefry2x32", "rbg", "unsafe_rbg"):
    if jax.eval_shape(functools.partial(jax.random.key, 0, impl=name)).dtype == dtype:
      return name
  return str(dtype).removeprefix("key<").removesuffix(">")


def _exact(name: str, value: Any, dtype: Any) -> np.ndarray:
  """`value` as a numpy array of a dtype: a Python number, of the same class, is rounded as jax rounds it."""
  if isinstance(value, jax.Array):
    value = np.array(value)
  if isinstance(value, np.ndarray) and value.dtype == dtype:
    return value
  # One Python number, or a numpy scalar that was saved as one. What cannot be held at all is refused.
  try:
    with np.errstate(over="ignore"):
      array = np.asarray(value).astype(dtype)
    if np.asarray(value).dtype.kind in "iub":
      lost = int(array[()]) != int(value)
    else:
      lost = bool(np.isfinite(value)) and not bool(np.isfinite(array))
  except OverflowError:  # an int beyond 64 bits
    lost = True
  if lost:
    raise StructureMismatchError(
      f"the step does not fit like=: {name}: saved as the number {value}, which {np.dtype(dtype).name} cannot hold; "
      "put a Python number or a wider dtype into like="
    )
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
    if min(new.bits, old.bits) < 8 and isinstance(value, np.ndarray):
      value = value.astype(np.int64)  # numpy knows no way from uint4 to int4
    out = value.astype(dtype)
  else:
    with np.errstate(over="ignore"):
      out = value.astype(dtype)
    lost = bool(numpy.any(numpy.isfinite(value) & ~numpy.isfinite(out))) if value.size else False
  if lost:
    raise CheckpointError(
      f"{name}: holds values that {dtype.name} cannot; cast it to a wider dtype, or restore it as saved",
      topic="structure-mismatch",
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
