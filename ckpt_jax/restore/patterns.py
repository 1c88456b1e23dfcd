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
