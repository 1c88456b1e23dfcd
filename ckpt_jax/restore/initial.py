"""Leaves that a checkpoint lacks: which ones `init_missing=` names, and what they become."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from ckpt_jax.errors import ConfigError, StructureMismatchError
from ckpt_jax.restore.patterns import as_patterns, matches, selected
from ckpt_jax.restore.placement import why_impossible

Initialise = Callable[[str, Any], Any]


def initialisers(argument: Any) -> tuple[dict[str, Initialise | None], tuple[str, ...]]:
  """What makes the leaves that a pattern names, None for like's own values, and the patterns.

  Raises:
    ConfigError: if the argument of `init_missing` is wrong.
  """
  if argument is None:
    return {}, ()
  if isinstance(argument, Mapping):
    for pattern, initialise in argument.items():
      if not callable(initialise):
        raise ConfigError(f"init_missing[{pattern!r}]: expected a function of path and leaf, got {initialise!r:.60}")
    return dict(argument), as_patterns(argument.keys(), "init_missing")
  patterns = as_patterns(argument, "init_missing")
  return dict.fromkeys(patterns), patterns


def patterns_inside(
  patterns: tuple[str, ...], chosen: Mapping[str, Any], like: Mapping[str, Any]
) -> tuple[tuple[str, ...], dict[str, Any]]:
  """The patterns about leaves that are restored, and the leaves of `like` outside of those that come back beside them.

  A pattern that names some of the leaves that `only` names is about those alone: `**/lora_*` brings nothing of an
  optimizer state back that nobody asked for. One that names none of them, and begins with the name of a node, is about
  the rest of `like`.

  Args:
    patterns: of `init_missing`.
    chosen: the leaves of `like` that `only` names.
    like: all of its leaves.

  Raises:
    StructureMismatchError: if a pattern names nothing.
  """
  inside = tuple(p for p in patterns if any(matches(p, name) for name in chosen))
  others = [p for p in patterns if p not in inside]
  beyond = [p for p in others if not set("*?[") & set(p.strip("/").split("/")[0])]
  if vague := [p for p in others if p not in beyond]:
    selected(vague, chosen, "init_missing", "like" if len(chosen) == len(like) else "like that only= names")
  named = selected(beyond, like, "init_missing", "like") if beyond else set()
  return inside, {name: leaf for name, leaf in like.items() if name in named}


def initial_value(name: str, leaf: Any, initialise: Mapping[str, Initialise | None]) -> Any:
  """The value of a leaf that the checkpoint lacks.

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
  if hasattr(leaf, "dtype"):
    shape, dtype = np.shape(value), getattr(value, "dtype", None)
    if shape != tuple(leaf.shape) or dtype != leaf.dtype:
      raise StructureMismatchError(
        f"{name}: its init_missing function returned {dtype}{list(shape)}, like has {leaf.dtype}{list(leaf.shape)}"
      )
    sharding = getattr(leaf, "sharding", None)
    if isinstance(leaf, jax.Array) and not getattr(leaf, "committed", True):
      sharding = None
    if isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct)):
      if sharding is None:
        return value if isinstance(value, jax.Array) else jax.numpy.asarray(value)
      if isinstance(value, jax.Array):
        return jax.device_put(value, sharding)
      return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])
  return value
