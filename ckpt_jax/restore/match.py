"""Compares `like` with a checkpoint before a byte is read.

Orbax casts, pads and truncates silently, and its errors do not name the leaf (float32 into int8 wraps;
google/orbax#2972, AI-Hypercomputer/maxtext#4341). Here every difference is found first and reported at once, with what
may have happened.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from ckpt_jax.config.units import count
from ckpt_jax.errors import ConfigError, StructureMismatchError
from ckpt_jax.layout.contents import LeafInfo
from ckpt_jax.layout.encoding import as_words, dtype_name, is_prng_key, is_traced
from ckpt_jax.layout.forms import shown
from ckpt_jax.restore.hints import ShapeDtype, explain, nearest
from ckpt_jax.restore.like import why_impossible
from ckpt_jax.restore.patterns import matches, selected

_MAX_SHOWN = 40
_ADVICE = "\nPass a like= that matches, or none at all to get the checkpoint as it is."
_ADVICE_INIT = (
  "\nHere like= is what init_fn makes: let it make what was saved, or call restore(like=init_fn(), ...) with only=, "
  "init_missing= or cast=. To begin afresh, use another directory."
)
_PYTHON = {"bool": jnp.bool_, "int": jnp.integer, "float": jnp.floating, "complex": jnp.complexfloating}
Cast = bool | Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Match:
  """What `like` and a checkpoint have in common.

  Attributes:
    both: leaves of `like` that are read, by path.
    kept: leaves of `like` that the checkpoint lacks and that `init_missing` names.
    casts: for each leaf whose dtype changes: (saved, wanted).
  """

  both: dict[str, Any] = dataclasses.field(default_factory=dict)
  kept: dict[str, Any] = dataclasses.field(default_factory=dict)
  casts: dict[str, tuple[str, str]] = dataclasses.field(default_factory=dict)


def match(
  like: Mapping[str, Any],
  saved: Mapping[str, LeafInfo],
  where: str,
  *,
  init_missing: tuple[str, ...] = (),
  cast: Cast = False,
  initial: bool = False,
) -> Match:
  """Pairs the leaves of `like` with those of a checkpoint.

  Args:
    like, saved: leaves by path: arrays, `jax.ShapeDtypeStruct`s or scalars, and those of the checkpoint.
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
  if isinstance(cast, Mapping) and cast:
    selected(tuple(cast), saved, "cast", where)
  found = Match()
  missing: dict[str, Any] = {}
  differing: dict[str, str] = {}
  for name, leaf in like.items():
    problem = _unusable(leaf)
    if name not in saved:
      if any(matches(p, name) for p in init_missing):
        found.kept[name] = leaf
      elif callable(leaf) and problem:
        differing[name] = problem
      else:
        missing[name] = leaf
      continue
    problem = problem or _difference(leaf, saved[name])
    if problem and _cast_allowed(name, leaf, saved[name], cast):
      found.casts[name] = (saved[name].dtype, _kind(leaf))
      problem = None
    problem = problem or why_impossible(leaf, own=initial)
    if problem:
      differing[name] = problem
    else:
      found.both[name] = leaf
  if missing or differing or saved.keys() - like.keys():
    raise StructureMismatchError(_report(like, saved, where, missing, differing, found.both, bool(cast), initial))
  return found


def _report(
  like: Mapping[str, Any],
  saved: Mapping[str, LeafInfo],
  where: str,
  missing: Mapping[str, Any],
  differing: Mapping[str, str],
  both: Mapping[str, Any],
  casts_allowed: bool,
  initial: bool,
) -> str:
  there = {name: ShapeDtype(info.shape, info.dtype) for name, info in saved.items()}
  extra = {name: leaf for name, leaf in there.items() if name not in like}
  lines = [(name, problem, "") for name, problem in differing.items()]
  for name, leaf in missing.items():
    near = nearest(name, _shape_dtype(leaf), extra)
    lines.append((name, "not in the checkpoint", f"; the checkpoint has {near}" if near else ""))
  lines += [(name, "in the checkpoint, not in like", "") for name in extra]
  problems = _brief(lines)
  if len(problems) > _MAX_SHOWN:
    problems[_MAX_SHOWN:] = [f"... and {len(problems) - _MAX_SHOWN} more"]
  # What fits is no difference to be explained: a Python int is restored into an int32.
  here = {name: there[name] if name in both else _shape_dtype(leaf) for name, leaf in like.items()}
  advice = "".join(f"\n  - {hint}" for hint in explain(here, there, casts_allowed))
  return (
    f"{where} does not fit {'the state that init_fn makes' if initial else 'like='} "
    f"({count(len(lines), 'difference')}; nothing was read):\n  "
    + "\n  ".join(problems)
    + (f"\nWhat may have happened:{advice}" if advice else "")
    + (_ADVICE_INIT if initial else _ADVICE)
  )


def _brief(lines: list[tuple[str, str, str]]) -> list[str]:
  """Lines of path, problem and addition, with those together that differ only in numbers of the path."""
  groups: dict[tuple[str, str, str], list[tuple[str, str, str]]] = collections.defaultdict(list)
  for name, problem, more in lines:
    groups[re.sub(r"\d+", "*", name), problem, re.sub(r"\d+", "#", more)].append((name, problem, more))
  out = []
  for (path, problem, _), members in groups.items():
    if len(members) < 3:
      out += [f"{shown(name)}: {problem}{more}" for name, problem, more in members]
    else:
      out.append(f"{shown(path)}: {problem} ({len(members)} leaves, such as {shown(members[0][0])})")
  return out


def _shape_dtype(leaf: Any) -> ShapeDtype:
  return ShapeDtype(tuple(getattr(leaf, "shape", ())), "?" if _unusable(leaf) else _kind(leaf))


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
  return type(leaf).__name__ if type(leaf) in (bool, int, float, complex, str) else dtype_name(leaf.dtype)


def _is_same_number(kind: str, other: str) -> bool:
  """Whether one of two kinds is a Python number, and the other holds numbers of that class."""
  for python, numbers in _PYTHON.items():
    if python in (kind, other):
      wanted = other if kind == python else kind
      is_dtype = wanted != "str" and wanted not in _PYTHON and not wanted.startswith("key<")
      return wanted == python or (is_dtype and jnp.issubdtype(jnp.dtype(wanted), numbers))
  return False


def _difference(leaf: Any, saved: LeafInfo) -> str | None:
  want, shape = _kind(leaf), tuple(getattr(leaf, "shape", ()))
  # Flax's TrainState.step starts as a Python int and becomes an int32 array after a step: both hold the same number.
  same_kind = want == saved.dtype or _is_same_number(want, saved.dtype)
  if same_kind and shape == saved.shape:
    return None
  if is_prng_key(leaf) and saved.dtype == "uint32" and as_words(leaf).shape == saved.shape:
    return None  # plain Orbax notes the kind of a key elsewhere; `finish` checks it
  text = f"saved as {saved.dtype}{list(saved.shape)}, asked for {want}{list(shape)}"
  if same_kind and len(shape) > 1 and shape == saved.shape[::-1]:
    text += " (transposed?)"
  elif same_kind and shape[1:] == saved.shape:
    text += " (layers stacked here, separate there?)"
  elif same_kind and shape == saved.shape[1:]:
    text += " (layers separate here, stacked there?)"
  return text


def _cast_allowed(name: str, leaf: Any, saved: LeafInfo, cast: Cast) -> bool:
  """Whether the caller named this change of dtype. Shapes are never changed, nor numbers into other kinds."""
  if not cast or saved.scalar or not hasattr(leaf, "dtype") or tuple(leaf.shape) != saved.shape:
    return False
  want = _kind(leaf)
  if not castable(saved.dtype, want):
    return False
  if not isinstance(cast, Mapping):
    return True
  for pattern, dtype in cast.items():
    if matches(pattern, name):
      named = jnp.dtype(dtype).name
      if named != want:
        raise ConfigError(f"cast={{{pattern!r}: {named!r}}}: like has {want} at {name}; make them agree")
      return True
  return False


def castable(saved: str, wanted: str) -> bool:
  """Whether a value of one dtype may become another: floats among themselves, and integers among themselves."""
  try:
    dtypes = jnp.dtype(saved), jnp.dtype(wanted)
  except TypeError:  # int, str, key<...>: no dtype of an array
    return False
  return any(all(jnp.issubdtype(d, kind) for d in dtypes) for kind in (jnp.floating, jnp.integer))
