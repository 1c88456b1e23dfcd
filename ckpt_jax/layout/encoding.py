"""Leaves that Orbax cannot store, written as ones that it can, and back.

Orbax 0.12 refuses empty arrays, numpy scalars, complex numbers and unsigned sub-byte integers. Each becomes a leaf of
the same tree position, so that the rest of the step stays an ordinary Orbax checkpoint, and an entry in the step's
JSON says what it was. The stored form is exact: no bit of the value is lost.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ckpt_jax import untrusted
from ckpt_jax.errors import CheckpointError
from ckpt_jax.layout import keys
from ckpt_jax.layout import text as text_leaves
from ckpt_jax.layout.structure import Structure, look, segment

PyTree = Any
# Orbax's zarr driver knows int2 and int4 but not their unsigned twins; uint8 holds every value of them.
_WIDENED: dict[Any, Any] = {jnp.dtype("uint2"): np.uint8, jnp.dtype("uint4"): np.uint8}
_NATIVE = (jax.Array, np.ndarray, bool, int, float, str)


def is_prng_key(leaf: Any) -> bool:
  """True for typed PRNG keys (`jax.random.key`), concrete or abstract."""
  dtype = getattr(leaf, "dtype", None)
  return dtype is not None and is_prng_dtype(dtype)


@functools.cache
def is_prng_dtype(dtype: Any) -> bool:
  """True for the dtypes of typed PRNG keys."""
  return bool(jnp.issubdtype(dtype, jax.dtypes.prng_key))


@functools.cache  # numpy composes names anew each time: microseconds that add up over thousands of leaves
def dtype_name(dtype: Any) -> str:
  """numpy's name of a dtype; `key<impl>` for PRNG keys."""
  return str(dtype) if is_prng_dtype(dtype) else np.dtype(dtype).name


def encode(state: PyTree) -> tuple[PyTree, dict[str, dict[str, Any]]]:
  """Returns the tree to hand to Orbax, and `{leaf path: what it was}` for the leaves that were changed.

  Raises:
    CheckpointError: naming the leaves that no checkpoint can hold, before anything is written.
  """
  structure, leaves = look(state)
  unchanged = structure.once(_unchanged, structure, leaves)
  if False not in unchanged:
    return state, {}
  out, notes, refused = list(leaves), {}, []
  problems = structure.once(_name_problems, structure)
  for i, name in enumerate(structure.names):
    if unchanged[i]:
      continue
    try:
      _check_path(structure.paths[i])
      if i in problems:
        raise TypeError(problems[i])
      out[i], note = _encode_leaf(leaves[i])
    except TypeError as e:
      printable = name.encode(errors="backslashreplace").decode()
      refused.append(f"{printable or '(the state itself)'}: {e}")
      continue
    if note:
      notes[name] = note
  if refused:
    raise CheckpointError("cannot save this state; nothing was written:\n  " + "\n  ".join(refused))
  return jax.tree.unflatten(structure.treedef, out), notes


def _unchanged(structure: Structure, leaves: Sequence[Any]) -> list[bool]:
  """Which leaves are stored as they are whatever their values."""

  def unchanged(path: tuple[Any, ...], leaf: Any) -> bool:
    try:
      _check_path(path)
      stored, note = _encode_leaf(leaf)
    except TypeError:
      return False
    return stored is leaf and note is None and isinstance(leaf, (jax.Array, np.ndarray))

  problems = structure.once(_name_problems, structure)
  return [
    i not in problems and unchanged(path, leaf)
    for i, (path, leaf) in enumerate(zip(structure.paths, leaves, strict=True))
  ]


def _name_problems(structure: Structure) -> dict[int, str]:
  """Leaves whose names cannot be stored, or not beside those of others, and why."""
  names = [keys.database_name(path) for path in structure.paths]
  is_text = [issubclass(kind[0], str) if isinstance(kind[0], type) else False for kind in structure.kinds]
  arrays = keys.collisions(name for name, text in zip(names, is_text, strict=True) if not text)
  texts = text_leaves.collisions(name for name, text in zip(names, is_text, strict=True) if text)
  found = {}
  for i, (name, text) in enumerate(zip(names, is_text, strict=True)):
    other = (texts if text else arrays).get(name)
    why = keys.problem(name) or (f"would be stored in the place of {other!r}; rename one of them" if other else None)
    if why:
      found[i] = why
  return found


def _check_path(path: tuple[Any, ...]) -> None:
  # What `untrusted` refuses to read must not be written either.
  if len(path) > untrusted.MAX_DEPTH:
    raise TypeError(f"nested {len(path)} deep; {untrusted.MAX_DEPTH} is the limit")
  for key in path:
    if problem := _check_segment(segment(key)):
      raise TypeError(problem)


_check_segment = functools.lru_cache(maxsize=4096)(untrusted.check_name)


def _encode_leaf(leaf: Any) -> tuple[Any, dict[str, Any] | None]:
  if isinstance(leaf, np.generic):
    stored, note = _encode_leaf(np.asarray(leaf))
    return stored, {**(note or {}), "kind": "numpy_scalar"}
  if isinstance(leaf, complex):
    return np.asarray(leaf, np.complex128), {"kind": "complex"}
  if isinstance(leaf, int) and not isinstance(leaf, bool) and not -(2**63) <= leaf < 2**63:
    raise TypeError(f"the integer {leaf} needs more than 64 bits; store it as text in extras=")
  if not isinstance(leaf, _NATIVE):
    raise TypeError(
      f"a {type(leaf).__module__}.{type(leaf).__qualname__} is no array or scalar; put it into extras= or leave it out"
    )
  if isinstance(leaf, (jax.Array, np.ndarray)):
    if is_prng_key(leaf):
      if leaf.size == 0:
        raise TypeError("an empty array of PRNG keys; leave it out")
      return leaf, {"kind": "prng_key", "dtype": str(leaf.dtype), "impl": str(jax.random.key_impl(leaf))}
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
      pass
    elif isinstance(leaf, jax.Array) and jax.process_count() > 1:
      raise TypeError(
        "lives on this process only; in a job of several processes give it a sharding over the whole mesh, e.g. "
        "jax.jit(init, out_shardings=NamedSharding(mesh, P()))"
      )
    if leaf.dtype.kind in "OSUMm" or leaf.dtype.names:
      raise TypeError(f"dtype {leaf.dtype} is not numeric; put it into extras=")
    if leaf.size == 0:
      return np.zeros((1,), np.uint8), {
        "kind": "empty",
        "shape": list(leaf.shape),
        "dtype": leaf.dtype.name,
      }
    if leaf.dtype in _WIDENED:
      return leaf.astype(_WIDENED[leaf.dtype]), {"kind": "widened", "dtype": leaf.dtype.name}
  return leaf, None


def decode_leaf(stored: Any, note: dict[str, Any] | None) -> Any:
  """The leaf as it was, given what was stored and its note; arrays stay where they are."""
  if note is None:
    return stored
  if note["kind"] == "prng_key":
    # With replica_parallel off Orbax keeps no array metadata, and hands back the key's words.
    return stored if is_prng_key(stored) else jax.random.wrap_key_data(stored, impl=note["impl"])
  if note["kind"] == "empty":
    return np.zeros(tuple(note["shape"]), jnp.dtype(note["dtype"]))
  if note["kind"] == "complex":
    return complex(stored[()])
  if "dtype" in note:
    stored = stored.astype(jnp.dtype(note["dtype"]))
  return stored[()] if note["kind"] == "numpy_scalar" else stored
