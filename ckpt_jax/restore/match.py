"""Compares `like` with a checkpoint before a byte is read.

Orbax casts, pads and truncates silently, and its errors do not name the leaf (float32 into int8 wraps;
google/orbax#2972, AI-Hypercomputer/maxtext#4341). Here every difference is found first and reported at once, with what
may have happened.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ckpt_jax.errors import ConfigError, StructureMismatchError
from ckpt_jax.layout.contents import LeafInfo
from ckpt_jax.layout.encoding import dtype_name, is_prng_key, is_traced
from ckpt_jax.layout.forms import shown
from ckpt_jax.restore.hints import Leaf, brief, explain, nearest
from ckpt_jax.restore.patterns import matches, selected
from ckpt_jax.restore.placement import why_impossible

Note = dict[str, Any]
_MAX_SHOWN = 40
_ADVICE = "\nPass a like= that matches, or none at all to get the checkpoint as it is."
_ADVICE_INIT = (
  "\nHere like= is what init_fn makes: let it make what was saved, or call restore(like=init_fn(), ...) with only=, "
  "init_missing= or cast=. To begin afresh, use another directory."
)


@dataclasses.dataclass(frozen=True)
class Match:
  """What `like` and a checkpoint have in common.

  Attributes:
    both: leaves of `like` that are read, by path.
    kept: leaves of `like` that the checkpoint lacks and that `init_missing` names.
    casts: for each leaf whose dtype changes: (saved, wanted).
  """

  both: dict[str, Any]
  kept: dict[str, Any]
  casts: dict[str, tuple[str, str]]


def match(
  like: Mapping[str, Any],
  saved: Mapping[str, LeafInfo],
  where: str,
  *,
  init_missing: tuple[str, ...] = (),
  cast: bool | Mapping[str, Any] = False,
  initial: bool = False,
) -> Match:
  """Pairs the leaves of `like` with those of a checkpoint.

  Args:
    like: arrays, `jax.ShapeDtypeStruct`s or scalars by path: the shapes and dtypes wanted.
    saved: the checkpoint's leaves by path.
    where: the step, for the message.
    init_missing: patterns of leaves that the checkpoint may lack.
    cast: True, or `{pattern: dtype}`: the leaves whose dtype may change.
    initial: whether `like` is what `init_fn` of `restore_or_init` makes, whose leaves without a sharding are each
      process's own.

  Raises:
    StructureMismatchError: listing every leaf that is missing, extra, or differs in shape, dtype or kind, with hints.
    ConfigError: if a pattern names no leaf, or `cast` names a dtype that `like` does not have.
  """
  if init_missing:
    selected(init_missing, like, "init_missing", "like")
  rules = dict(cast) if isinstance(cast, Mapping) else {}
  if rules:
    selected(tuple(rules), saved, "cast", where)
  both, kept, casts = {}, {}, {}
  missing, extra, differing = {}, {}, {}
  for name, leaf in like.items():
    if name not in saved:
      if any(matches(p, name) for p in init_missing):
        kept[name] = leaf
      elif callable(leaf) and (problem := _unusable(leaf)):
        differing[name] = problem
      else:
        missing[name] = leaf
      continue
    problem = _unusable(leaf) or _difference(leaf, saved[name])
    if problem and _cast_allowed(name, leaf, saved[name], cast, rules):
      casts[name] = (saved[name].dtype, _kind(leaf))
      problem = None
    problem = problem or why_impossible(leaf, own=initial)
    if problem:
      differing[name] = problem
    else:
      both[name] = leaf
  for name, info in saved.items():
    if name not in like:
      extra[name] = info
  problems = _lines(missing, extra, differing)
  if problems:
    shown = problems[:_MAX_SHOWN]
    if len(problems) > len(shown):
      shown.append(f"... and {len(problems) - len(shown)} more")
    there = {name: Leaf(info.shape, info.dtype) for name, info in saved.items()}
    # What fits is no difference to be explained: a Python int is restored into an int32.
    here = {name: there[name] if name in both else _as_leaf(leaf) for name, leaf in like.items()}
    advice = "".join(f"\n  - {hint}" for hint in explain(here, there, casts_allowed=bool(cast)))
    raise StructureMismatchError(
      f"{where} does not fit {'the state that init_fn makes' if initial else 'like='} "
      f"({_count(len(missing) + len(extra) + len(differing))}; nothing was read):\n  "
      + "\n  ".join(shown)
      + (f"\nWhat may have happened:{advice}" if advice else "")
      + (_ADVICE_INIT if initial else _ADVICE)
    )
  return Match(both, kept, casts)


def _count(n: int) -> str:
  return "1 difference" if n == 1 else f"{n} differences"


def _lines(missing: dict[str, Any], extra: dict[str, LeafInfo], differing: dict[str, str]) -> list[str]:
  lines = [f"{shown(name)}: {problem}" for name, problem in differing.items()]
  for name, leaf in missing.items():
    near = nearest(name, _as_leaf(leaf), {n: Leaf(i.shape, i.dtype) for n, i in extra.items()})
    lines.append(f"{shown(name)}: not in the checkpoint" + (f"; the checkpoint has {near}" if near else ""))
  lines += [f"{shown(name)}: in the checkpoint, not in like" for name in extra]
  return brief(lines)


def _as_leaf(leaf: Any) -> Leaf:
  return Leaf(tuple(getattr(leaf, "shape", ())), "?" if _unusable(leaf) else _kind(leaf))


def _unusable(leaf: Any) -> str | None:
  if is_traced(leaf):
    return "like has a value that jax is tracing: restore was called inside jit, grad, vmap or scan; call it outside"
  if (hasattr(leaf, "dtype") and hasattr(leaf, "shape")) or type(leaf) in (bool, int, float, complex, str):
    return None
  if callable(leaf):
    return (
      "like has a function; pass the arrays alone, e.g. eqx.filter(model, eqx.is_array), and put it back with "
      "eqx.combine; or name it in init_missing="
    )
  return f"like has a {type(leaf).__name__}; pass an array, a jax.ShapeDtypeStruct or a scalar"


def _kind(leaf: Any) -> str:
  for kind in (bool, int, float, complex, str):
    if type(leaf) is kind:
      return kind.__name__
  return dtype_name(leaf.dtype)


_NUMBERS = {"bool": "b", "int": "i", "float": "f", "complex": "c"}


def _scalar_class(kind: str) -> str:
  if kind in _NUMBERS:
    return _NUMBERS[kind]
  if kind.startswith("key<") or kind == "str":
    return kind
  dtype = jnp.dtype(kind)
  classes = {"i": jnp.integer, "f": jnp.floating, "c": jnp.complexfloating, "b": jnp.bool_}
  return next((name for name, numbers in classes.items() if jnp.issubdtype(dtype, numbers)), kind)


def _difference(leaf: Any, saved: LeafInfo) -> str | None:
  want, shape = _kind(leaf), tuple(getattr(leaf, "shape", ()))
  # Flax's TrainState.step starts as a Python int and becomes an int32 array after a step: both hold the same number.
  plain = {want, saved.dtype} & set(_NUMBERS)
  same_kind = want == saved.dtype or (plain and _scalar_class(want) == _scalar_class(saved.dtype))
  if same_kind and shape == saved.shape:
    return None
  if is_prng_key(leaf) and saved.dtype == "uint32" and saved.shape[: len(shape)] == shape:
    words = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)).shape
    if words == saved.shape:
      return None  # plain Orbax notes the kind of a key elsewhere; `finish` checks it
  text = f"saved as {saved.dtype}{list(saved.shape)}, asked for {want}{list(shape)}"
  if same_kind and len(shape) > 1 and shape == saved.shape[::-1]:
    text += " (transposed?)"
  elif same_kind and len(shape) == len(saved.shape) + 1 and shape[1:] == saved.shape:
    text += " (layers stacked here, separate there?)"
  elif same_kind and len(shape) + 1 == len(saved.shape) and shape == saved.shape[1:]:
    text += " (layers separate here, stacked there?)"
  return text


def _cast_allowed(
  name: str, leaf: Any, saved: LeafInfo, cast: bool | Mapping[str, Any], rules: Mapping[str, Any]
) -> bool:
  """Whether the caller named this change of dtype. Shapes are never changed, nor numbers into other kinds."""
  if not cast or saved.scalar or not hasattr(leaf, "dtype") or tuple(leaf.shape) != saved.shape:
    return False
  want = _kind(leaf)
  if not castable(saved.dtype, want):
    return False
  if not rules:
    return True
  for pattern, dtype in rules.items():
    if matches(pattern, name):
      named = jnp.dtype(dtype).name
      if named != want:
        raise ConfigError(f"cast={{{pattern!r}: {named!r}}}: like has {want} at {name}; make them agree")
      return True
  return False


def castable(saved: str, wanted: str) -> bool:
  """Whether a value of one dtype may become another: floats among themselves, and integers among themselves."""
  for kind in (jnp.floating, jnp.integer):
    try:
      if jnp.issubdtype(jnp.dtype(saved), kind) and jnp.issubdtype(jnp.dtype(wanted), kind):
        return True
    except TypeError:  # int, str, key<...>: no dtype of an array
      return False
  return False
