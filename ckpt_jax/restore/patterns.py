"""Patterns of `only=`, `init_missing=` and `cast=`: path prefixes, or globs over segments; trees that lack leaves."""

from __future__ import annotations

import difflib
import fnmatch
import functools
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from ckpt_jax.errors import ConfigError, UnknownLeafError

PyTree = Any


def matches(pattern: str, path: str) -> bool:
  """Whether `pattern` names the leaf at `path` or a node above it.

  `*`, `?` and `[...]` match within one segment of the path, `**` matches any number of segments: `params` and
  `params/*` name all leaves below `params`, `params/*/kernel` each kernel one node down, `**/lora_*` every leaf that
  has such a node on its path.
  """
  return _match(tuple(_segments(pattern)), tuple(path.split("/")))


def _segments(pattern: str) -> list[str]:
  return [s for s in pattern.strip("/").split("/") if s]


@functools.lru_cache(maxsize=65536)
def _match(pattern: tuple[str, ...], path: tuple[str, ...]) -> bool:
  if not pattern:
    return True  # leaves below a match belong to it
  if pattern[0] == "**":
    return any(_match(pattern[1:], path[i:]) for i in range(len(path)))
  if not path or not fnmatch.fnmatchcase(path[0], pattern[0]):
    return False
  return _match(pattern[1:], path[1:])


def as_patterns(value: str | Iterable[str], argument: str) -> tuple[str, ...]:
  """The patterns of an argument that takes one or several.

  Raises:
    ConfigError: if one is empty or no text.
  """
  patterns = (value,) if isinstance(value, str) else tuple(value)
  for pattern in patterns:
    if not isinstance(pattern, str) or not _segments(pattern):
      raise ConfigError(f"{argument}: {pattern!r} is no leaf path; write e.g. 'params' or 'params/decoder/*'")
  if not patterns:
    raise ConfigError(f"{argument}: names nothing; leave it out, or name a path such as 'params'")
  return patterns


def selected(patterns: Sequence[str], paths: Collection[str], argument: str, where: str) -> set[str]:
  """The paths that any pattern names.

  Raises:
    UnknownLeafError: naming the patterns that name none of `paths`, each with the nearest there is.
  """
  found: set[str] = set()
  useless = []
  for pattern in patterns:
    hits = {path for path in paths if matches(pattern, path)}
    found |= hits
    if not hits:
      useless.append(f"{argument}={pattern!r}: names no leaf of {where}{_nearest_node(pattern, paths)}")
  if useless:
    raise UnknownLeafError("\n".join(useless))
  return found


def _nearest_node(pattern: str, paths: Collection[str]) -> str:
  nodes = {"/".join(p.split("/")[:n]) for p in paths for n in range(1, p.count("/") + 2)}
  near = difflib.get_close_matches(pattern.strip("/"), nodes, n=1)
  if near:
    return f"; did you mean {near[0]!r}?"
  roots = sorted({p.split("/")[0] for p in paths})
  if roots == [""]:
    return ", which is one leaf: leave it out"
  return f"; at the top there are {', '.join(roots[:10])}{', ...' if len(roots) > 10 else ''}"


def rebuild(tree: PyTree, values: dict[str, Any]) -> PyTree:
  """`tree` with the leaves of `values` (by path) in their places, and without the leaves that `values` lacks.

  A node all of whose leaves are there keeps its type. One that lacks some comes back as a dict of those that it has,
  by name or position; a node without any is left out.
  """
  found = _rebuilt(tree, "", values)
  return {} if found is _NOTHING else found


_NOTHING: Any = object()


def _rebuilt(node: PyTree, prefix: str, values: dict[str, Any]) -> PyTree:
  import jax  # a command that only matches patterns starts without it

  from ckpt_jax.layout.structure import path_name

  leaves, structure = jax.tree_util.tree_flatten_with_path(node)
  names = [prefix + path_name(path) if path else prefix.removesuffix("/") for path, _ in leaves]
  there = [name in values for name in names]
  if all(there) and (names or not prefix):
    treedef: Any = structure  # jax's stubs do not know its methods
    return treedef.unflatten([values[name] for name in names])
  if not any(there):
    return _NOTHING
  out: dict[str, Any] = {}
  for path, child in jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)[0]:
    name = path_name(path)
    if (rebuilt := _rebuilt(child, f"{prefix}{name}/", values)) is not _NOTHING:
      out[name] = rebuilt
  return out
