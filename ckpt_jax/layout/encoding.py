"""Encodes leaves that Orbax cannot store as leaves that it can, and decodes them; refuses those that cannot be stored.

Orbax 0.12 refuses empty arrays, numpy scalars, complex numbers, and the dtypes that TensorStore lacks. Each becomes a
leaf at the same place of the tree, so that the step stays an ordinary Orbax checkpoint, and a note in the step's JSON
says how to decode it. No bit of the value is lost.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts

from ckpt_jax.layout.forms import form_of, refusal, shown, why_not_flat
from ckpt_jax.layout.structure import Flat, flatten, path_name
from ckpt_jax.storage.paths import is_utf8

PyTree = Any
# Orbax's zarr driver knows int2 and int4 but not their unsigned twins; uint8 holds every value of them.
_WIDENED: dict[Any, Any] = {jnp.dtype("uint2"): np.uint8, jnp.dtype("uint4"): np.uint8}
_SCALARS = (bool, int, float, complex, str)


def is_prng_key(leaf: Any) -> bool:
  """True for typed PRNG keys (`jax.random.key`), concrete or abstract."""
  dtype = getattr(leaf, "dtype", None)
  return dtype is not None and is_prng_dtype(dtype)


def as_words(leaf: Any) -> Any:
  """A leaf; of a typed PRNG key, concrete or abstract, the numbers in it."""
  if not is_prng_key(leaf):
    return leaf
  if isinstance(leaf, jax.Array):
    return jax.random.key_data(leaf)
  return jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))


def is_traced(leaf: Any) -> bool:
  """True for the tracers that jax puts in place of arrays."""
  return isinstance(leaf, jax.core.Tracer)


@functools.cache
def is_prng_dtype(dtype: Any) -> bool:
  """True for the dtypes of typed PRNG keys."""
  return bool(jnp.issubdtype(dtype, jax.dtypes.prng_key))


@functools.cache  # numpy composes a name anew each time, which adds up over thousands of leaves
def dtype_name(dtype: Any) -> str:
  """numpy's name of a dtype; `key<impl>` for PRNG keys."""
  return str(dtype) if is_prng_dtype(dtype) else np.dtype(dtype).name


def encode(state: PyTree | Flat) -> tuple[PyTree, dict[str, dict[str, Any]]]:
  """The tree for Orbax, and a note by path for each encoded leaf.

  Raises:
    CheckpointError: naming the leaves that cannot be stored; nothing was written.
  """
  flat = flatten(state)
  structure, leaves = flat.structure, flat.leaves
  form = structure.once(form_of, structure, flat.tree)
  unchanged = structure.once(_unchanged, leaves)
  if form is None and False not in unchanged:
    return flat.tree, {}
  out, notes, refused = list(leaves), {}, []
  for i, name in enumerate(structure.names):
    if unchanged[i]:
      continue
    try:
      out[i], note = _encode_leaf(leaves[i])
    except TypeError as e:
      refused.append(f"{shown(name)}: {e}")
      continue
    if note:
      notes[name] = note
  if refused:
    raise refusal(refused)
  return jax.tree.unflatten(structure.treedef, out) if form is None else form.of(out), notes


def refuse_unusable(state: PyTree) -> None:
  """Finds the leaf or node because of which jax failed to flatten a state.

  Raises:
    CheckpointError: naming it, if there is one.
  """
  if problem := why_not_flat(state):
    raise refusal([problem])
  leaves = jax.tree_util.tree_flatten_with_path(state)[0]
  found = [f"{shown(path_name(path))}: {problem}" for path, leaf in leaves if (problem := _gone(leaf))]
  if found:
    raise refusal(found)


def _gone(leaf: Any) -> str | None:
  """Why a leaf has no value."""
  if is_traced(leaf):
    return (
      "a value that jax is tracing: save was called inside jit, grad, vmap or scan. Call it outside, with what the "
      "function returns"
    )
  if isinstance(leaf, jax.Array) and leaf.is_deleted():
    return "was donated or deleted. Save what the step function returned, not what it was given (donate_argnums)"
  return None


def _unchanged(leaves: Sequence[Any]) -> list[bool]:
  """Which leaves are stored unchanged, whatever their values."""

  def unchanged(leaf: Any) -> bool:
    try:
      stored, note = _encode_leaf(leaf)
    except TypeError:
      return False
    return stored is leaf and note is None and isinstance(leaf, (jax.Array, np.ndarray))

  return [unchanged(leaf) for leaf in leaves]


def _encode_leaf(leaf: Any) -> tuple[Any, dict[str, Any] | None]:
  if isinstance(leaf, np.generic):
    stored, note = _encode_leaf(np.asarray(leaf))
    return stored, {**(note or {}), "kind": "numpy_scalar"}
  if isinstance(leaf, (jax.Array, np.ndarray)):
    return _encode_array(leaf)
  if problem := _no_value(leaf):
    raise TypeError(problem)
  if isinstance(leaf, complex):
    return np.asarray(leaf, np.complex128), {"kind": "complex"}
  return leaf, None


def _no_value(leaf: Any) -> str | None:
  """Why a leaf that is no array cannot be saved; None if it can."""
  kind = type(leaf)
  name = f"{kind.__module__}.{kind.__qualname__}"
  if kind not in _SCALARS:
    base = next((k for k in _SCALARS if isinstance(leaf, k)), None)
    if base is not None:
      return f"a {name}, which would come back as {base.__name__}; save {base.__name__}(...) of it"
    if isinstance(leaf, jax.ShapeDtypeStruct):
      return "a jax.ShapeDtypeStruct, which has no value; save the arrays themselves"
    if callable(leaf):
      return (
        f"a function ({name}); save the arrays alone, e.g. eqx.filter(model, eqx.is_array), and put it back with "
        "eqx.combine; or make it a static field"
      )
    return f"a {name} is no array or scalar; put it into extras= as text or numbers, or leave it out"
  if kind is int and not -(2**63) <= leaf < 2**63:
    return f"the integer {hex(leaf):.40} needs more than 64 bits; store it as text in extras="
  if kind is str and not is_utf8(leaf):
    return f"the text {leaf!r:.60} is no Unicode; store bytes as np.frombuffer(..., np.uint8)"
  return None


def _encode_array(leaf: jax.Array | np.ndarray) -> tuple[Any, dict[str, Any] | None]:
  if problem := _gone(leaf) or _held_by_one(leaf):
    raise TypeError(problem)
  if is_prng_key(leaf):
    if leaf.size == 0:
      raise TypeError("an empty array of PRNG keys; leave it out")
    return leaf, {"kind": "prng_key", "dtype": str(leaf.dtype), "impl": str(jax.random.key_impl(leaf))}
  if not isinstance(leaf, jax.Array) and type(leaf) not in (np.ndarray, np.memmap):
    raise TypeError(f"a {type(leaf).__name__}, which would come back as a plain array; {_way_out(leaf)}")
  stored_as = _stored_as(leaf.dtype)
  if leaf.size == 0:
    return np.zeros((1,), np.uint8), {"kind": "empty", "shape": list(leaf.shape), "dtype": leaf.dtype.name}
  if stored_as is None:
    return leaf, None
  if isinstance(leaf, jax.Array) and leaf.dtype.name in ("int1", "uint1"):  # jax itself cannot convert them
    raise TypeError(f"dtype {leaf.dtype} of a jax array is none that checkpoints can hold; save it as int8 or uint8")
  if leaf.dtype in _WIDENED:
    return leaf.astype(stored_as), {"kind": "widened", "dtype": leaf.dtype.name}
  return _viewed(leaf, stored_as), {"kind": "viewed", "dtype": leaf.dtype.name, "viewed": True}


def _held_by_one(leaf: jax.Array | np.ndarray) -> str | None:
  """Why an array that one process of several holds cannot be saved; keys that each process has for itself can."""
  if not isinstance(leaf, jax.Array) or jax.process_count() == 1:
    return None
  holders = {device.process_index for device in leaf.sharding.device_set}  # type: ignore[attr-defined]
  if len(holders) > 1 or (is_prng_key(leaf) and leaf.is_fully_addressable):
    return None
  where = "this process" if leaf.is_fully_addressable else f"process {holders.pop()}"
  return (
    f"lives on {where} only; in a job of several processes give it a sharding over the whole mesh, e.g. "
    "jax.jit(init, out_shardings=NamedSharding(mesh, P()))"
  )


def _way_out(array: np.ndarray) -> str:
  if isinstance(array, np.ma.MaskedArray):
    return "save its .data and its .mask as two leaves"
  return "save np.asarray(...) of it"


@functools.cache
def _stored_as(dtype: np.dtype) -> Any:
  """The dtype in which arrays of a dtype are stored; None for the same.

  Raises:
    TypeError: if they cannot be stored.
  """
  if dtype in _WIDENED:
    return _WIDENED[dtype]
  if dtype.kind in "OSUMmT" or dtype.names or (dtype.kind == "V" and not _is_extended(dtype)):
    raise TypeError(f"dtype {dtype} is not numeric; {_as_numbers(dtype)}")
  if not dtype.isnative:
    raise TypeError(f"dtype {dtype.str} has the other byte order; save x.astype(x.dtype.newbyteorder('='))")
  with contextlib.suppress(ValueError, TypeError):
    ts.dtype(dtype)
    return None
  if dtype.itemsize == 1 and _is_extended(dtype):
    return np.dtype(np.uint8)  # its bits
  other = {"f": "np.float64", "c": "np.complex128"}.get(dtype.kind, "another dtype")
  raise TypeError(f"dtype {dtype} is none that checkpoints can hold; save it as {other}")


def _as_numbers(dtype: np.dtype) -> str:
  """How to save an array x whose dtype is not numeric."""
  if dtype == jax.dtypes.float0:
    return "it has no values, being the gradient of integers; leave it out"
  if dtype.names:
    return "save its fields as leaves, {name: x[name] for name in x.dtype.names}"
  if dtype.kind in "Mm":
    return f"save x.view(np.int64), and take .view({dtype.str!r}) of what comes back"
  if dtype.kind in "SV":
    return f"save np.frombuffer(x.tobytes(), np.uint8), and take .view({dtype.str!r}) of what comes back"
  return "put it into extras= as x.tolist(), if JSON can hold its elements"


def _is_extended(dtype: np.dtype) -> bool:
  """Whether ml_dtypes adds the dtype to numpy."""
  return dtype.type.__module__.startswith("ml_dtypes")


def _viewed(array: Any, dtype: Any) -> Any:
  """The bits of an array as another dtype."""
  if isinstance(array, jax.Array):
    return jax.lax.bitcast_convert_type(array, dtype)
  return array.view(dtype)


def decode_leaf(stored: Any, note: dict[str, Any] | None) -> Any:
  """The decoded leaf, given its stored form and its note; arrays stay on their devices."""
  if note is None:
    return stored
  if note["kind"] == "prng_key":
    # With replica_parallel off Orbax keeps no array metadata, and hands back the key's words.
    return stored if is_prng_key(stored) else jax.random.wrap_key_data(stored, impl=note["impl"])
  if note["kind"] == "empty":
    return np.zeros(tuple(note["shape"]), jnp.dtype(note["dtype"]))
  if note["kind"] == "complex":
    return complex(stored[()])
  if note.get("viewed"):
    stored = _viewed(stored, jnp.dtype(note["dtype"]))
  elif "dtype" in note:
    stored = stored.astype(jnp.dtype(note["dtype"]))
  return stored[()] if note["kind"] == "numpy_scalar" else stored
