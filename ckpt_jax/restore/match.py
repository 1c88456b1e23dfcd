"""Compares `like` with a checkpoint before a byte is read, and turns each leaf of `like` into Orbax's terms.

Orbax casts, pads and truncates silently, and its errors do not name the leaf (FACTS: float32 into int8 wraps;
google/orbax#2972). Here every difference is found first and reported at once.
"""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from ckpt_jax.errors import StructureMismatchError
from ckpt_jax.layout.encoding import decode_leaf, is_prng_key, path_name
from ckpt_jax.run import LeafInfo

PyTree = Any
Note = dict[str, Any]
_MAX_SHOWN = 40


@dataclasses.dataclass(frozen=True)
class LeafPlan:
  """How one leaf of `like` is read: Orbax's item and restore args, and what turns the result into `like`'s type."""

  item: Any
  restore_args: ocp.RestoreArgs
  like: Any
  note: Note | None

  def finish(self, value: Any) -> Any:
    """The restored leaf with the type of `like`."""
    return _as_like(decode_leaf(value, self.note), self.like)


def plan_leaves(like: PyTree, saved: list[LeafInfo], notes: dict[str, Note], where: str) -> tuple[list[LeafPlan], Any]:
  """Plans for all leaves of `like`, in its flatten order, and its tree structure.

  Args:
    like: tree of arrays, `jax.ShapeDtypeStruct`s or scalars: the types, shapes, dtypes and shardings wanted.
    saved: the checkpoint's leaves.
    notes: what `encoding.encode` noted.
    where: the step, for the message.

  Raises:
    StructureMismatchError: listing every leaf that is missing, extra, or differs in shape, dtype or kind.
  """
  leaves, treedef = jax.tree_util.tree_flatten_with_path(like)
  have = {leaf.path: leaf for leaf in saved}
  want = {path_name(path): leaf for path, leaf in leaves}
  missing = [name for name in want if name not in have]
  extra = [name for name in have if name not in want]
  problems = [f"{name}: not in the checkpoint{_nearest(name, extra)}" for name in missing]
  problems += [f"{name}: in the checkpoint, not in like" for name in extra]
  plans = []
  for name, leaf in want.items():
    if name not in have:
      continue
    problem = _difference(leaf, have[name])
    if problem:
      problems.append(f"{name}: {problem}")
    else:
      plans.append(_plan(name, leaf, have[name], notes.get(name)))
  if problems:
    shown = problems[:_MAX_SHOWN]
    if len(problems) > len(shown):
      shown.append(f"... and {len(problems) - len(shown)} more")
    raise StructureMismatchError(
      f"{where} does not fit like= ({len(problems)} differences; nothing was read):\n  "
      + "\n  ".join(shown)
      + "\nPass a like= that matches, or none at all to get the checkpoint as it is."
    )
  return plans, treedef


def _nearest(name: str, candidates: list[str]) -> str:
  near = difflib.get_close_matches(name, candidates, n=1, cutoff=0.6)
  return f"; the checkpoint has {near[0]}" if near else ""


def _kind(leaf: Any) -> str:
  for kind in (bool, int, float, complex, str):
    if type(leaf) is kind:
      return kind.__name__
  return str(leaf.dtype) if is_prng_key(leaf) else np.dtype(leaf.dtype).name


_NUMBERS = {"bool": "b", "int": "i", "float": "f"}


def _scalar_class(kind: str) -> str:
  if kind in _NUMBERS:
    return _NUMBERS[kind]
  if kind.startswith("key<") or kind in ("str", "complex"):
    return kind
  dtype = jnp.dtype(kind)
  return "i" if jnp.issubdtype(dtype, jnp.integer) else "f" if jnp.issubdtype(dtype, jnp.floating) else "b"


def _difference(leaf: Any, saved: LeafInfo) -> str | None:
  if not (hasattr(leaf, "dtype") and hasattr(leaf, "shape")) and not isinstance(leaf, (bool, int, float, complex, str)):
    return f"like has a {type(leaf).__name__}; pass an array, a jax.ShapeDtypeStruct or a scalar"
  want, shape = _kind(leaf), tuple(getattr(leaf, "shape", ()))
  # Flax's TrainState.step starts as a Python int and becomes an int32 array after a step: both hold the same number.
  plain = {want, saved.dtype} & set(_NUMBERS)
  same_kind = want == saved.dtype or (plain and _scalar_class(want) == _scalar_class(saved.dtype))
  if same_kind and shape == saved.shape:
    return None
  text = f"saved as {saved.dtype}{list(saved.shape)}, asked for {want}{list(shape)}"
  if same_kind and len(shape) > 1 and shape == saved.shape[::-1]:
    text += " (transposed?)"
  elif same_kind and len(shape) == len(saved.shape) + 1 and shape[1:] == saved.shape:
    text += " (layers stacked here, separate there?)"
  return text


def _plan(name: str, leaf: Any, saved: LeafInfo, note: Note | None) -> LeafPlan:
  scalar = {"bool": bool, "int": int, "float": float, "str": str}.get(saved.dtype)
  if scalar is not None and saved.scalar:
    return LeafPlan(scalar(), ocp.RestoreArgs(restore_type=scalar), leaf, None)
  as_numpy = ocp.RestoreArgs(restore_type=np.ndarray)
  kind = note["kind"] if note else None
  if kind == "empty":
    return LeafPlan(np.zeros((1,), np.uint8), as_numpy, leaf, note)
  wants_jax = isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct))
  if not wants_jax:
    return LeafPlan(np.zeros((), np.uint8), as_numpy, leaf, note)
  sharding = _target_sharding(name, leaf)
  if sharding is None:  # uncommitted: jit may still move it to where the other operands are
    if not is_prng_key(leaf):
      return LeafPlan(np.zeros((), np.uint8), as_numpy, leaf, note)
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  item = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
  if is_prng_key(leaf):
    return LeafPlan(item, ocp.checkpoint_utils.construct_restore_args(item), leaf, note)
  dtype = np.uint8 if kind == "widened" else leaf.dtype
  args = ocp.ArrayRestoreArgs(restore_type=jax.Array, sharding=sharding, global_shape=leaf.shape, dtype=dtype)
  return LeafPlan(item, args, leaf, note)


def _target_sharding(name: str, leaf: Any) -> jax.sharding.Sharding | None:
  if isinstance(leaf, jax.Array):
    return leaf.sharding if getattr(leaf, "committed", True) else None
  if leaf.sharding is None and jax.process_count() > 1:
    raise StructureMismatchError(
      f"{name}: like has no sharding, and {jax.process_count()} processes must know which part each reads; pass "
      "jax.ShapeDtypeStruct(..., sharding=...)"
    )
  return leaf.sharding


def _as_like(value: Any, like: Any) -> Any:
  if isinstance(like, (bool, int, float, complex, str)):
    return value if type(value) is type(like) else type(like)(np.asarray(value)[()])
  if isinstance(like, np.generic):
    return like.dtype.type(np.asarray(value)[()])
  if isinstance(like, np.ndarray):
    return _exact(value, like.dtype)
  if isinstance(value, jax.Array):
    return value
  sharding = _target_sharding("", like)
  value = _exact(value, like.dtype)
  return jnp.asarray(value) if sharding is None else _put(value, sharding)


def _put(value: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
  return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def _exact(value: Any, dtype: Any) -> np.ndarray:
  if isinstance(value, np.ndarray) and value.dtype == dtype:
    return value
  array = np.asarray(value).astype(dtype)
  # Only Python scalars get here, one number each: a cast that changes it is refused.
  if array[()] != value and value == value:
    raise StructureMismatchError(f"the saved number {value} does not fit into {dtype}")
  return array
