"""Rules that name the leaves of a tree anew, and lead back from the new names.

A rule is a pattern of a path and a pattern of a name: `blocks/*/up/kernel` becomes `model.layers.*.mlp.up_proj.weight`.
`*` stands for one segment, `**` for any number of them; the name has the stars of the path, in the same order. `:T` at
its end transposes a matrix, as PyTorch's linear layers expect. The first rule that fits decides. A leaf that none fits
is called by its path with dots for slashes.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from ckpt_jax.config.arguments import check_type
from ckpt_jax.errors import ConfigError

_STARS = re.compile(r"\*\*|\*")
Rules = Mapping[str, str] | Sequence[str]


@dataclasses.dataclass(frozen=True)
class Named:
  """A leaf under another name; `transposed`: a matrix [in, out] is stored as [out, in]."""

  name: str
  transposed: bool = False


@dataclasses.dataclass(frozen=True)
class Rule:
  """One rule; see the module.

  Attributes:
    path: pattern of a path, with slashes.
    name: pattern of a name, with dots.
    transposed: whether the leaf is transposed.
  """

  path: str
  name: str
  transposed: bool = False

  def __post_init__(self):
    if not self.path or not self.name:
      raise ConfigError(f"rename: {self.path!r} to {self.name!r}: both a path and a name are needed")
    if _STARS.findall(self.path) != _STARS.findall(self.name):
      raise ConfigError(f"rename: {self.path!r} and {self.name!r} need the same stars in the same order")


def rules(given: Rules) -> list[Rule]:
  """Rules from `{"PATH": "NAME"}`, or from texts `PATH=NAME`.

  Raises:
    ConfigError: for one that is not of that form.
  """
  is_several = isinstance(given, Iterable) and not isinstance(given, str)
  texts = given.items() if isinstance(given, Mapping) else list(given) if is_several else [given]
  pairs = [tuple(text.split("=", 1)) if isinstance(text, str) else text for text in texts]
  fit = all(isinstance(pair, tuple) and len(pair) == 2 and all(isinstance(p, str) for p in pair) for pair in pairs)
  check_type("rename", given, is_several and fit, "{'PATH': 'NAME'}, or texts PATH=NAME")
  return [Rule(path.strip("/ "), name.removesuffix(":T").strip(), name.endswith(":T")) for path, name in pairs]


def named(path: str, given: Sequence[Rule]) -> Named:
  """The name of the leaf at `path`."""
  for rule in given:
    if (name := _translated(path, rule.path, rule.name, "/", ".")) is not None:
      return Named(name, rule.transposed)
  return Named(path.replace("/", "."))


def path_of(name: str, given: Sequence[Rule]) -> Named:
  """The way back: the path of the leaf that is called `name`."""
  for rule in given:
    if (path := _translated(name, rule.name, rule.path, ".", "/")) is not None:
      return Named(path, rule.transposed)
  return Named(name.replace(".", "/"))


def refuse_shared(names: Iterable[tuple[str, str]]) -> None:
  """Checks that no two leaves, each with path and name, get one name.

  Raises:
    ConfigError: naming two that do.
  """
  seen: dict[str, str] = {}
  for path, name in names:
    if (other := seen.setdefault(name, path)) != path:
      raise ConfigError(f"rename: {other} and {path} would both be called {name}; make the rules tell them apart")


def _translated(text: str, source: str, target: str, separator: str, other: str) -> str | None:
  """`text` in the form of `target` if it has that of `source`, with what the stars stand for carried over."""
  one = f"[^{re.escape(separator)}]+"
  # The stars are all that escaping leaves to be replaced: each becomes a group.
  pattern = _filled(source, iter(["(.*)" if s == "**" else f"({one})" for s in _STARS.findall(source)]), re.escape)
  match = re.fullmatch(pattern, text)
  if match is None:
    return None
  return _filled(target, iter([found.replace(separator, other) for found in match.groups()]), str)


def _filled(pattern: str, stars: Iterable[str], between: Callable[[str], str]) -> str:
  parts = _STARS.split(pattern)
  return between(parts[0]) + "".join(star + between(part) for star, part in zip(stars, parts[1:], strict=True))
