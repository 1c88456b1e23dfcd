"""Reads a YAML file into a Config and names the line of everything that is wrong in it."""

from __future__ import annotations

import difflib
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import pydantic
import yaml

from ckpt_jax.config.explain import problems as problems_of
from ckpt_jax.config.sections import Config
from ckpt_jax.errors import ConfigError

_SHIPPED = pathlib.Path(__file__).parents[1] / "configs"  # the repository's configs/, which wheels carry in the package
_DEEPEST = 16  # an anchor that refers to itself has no end


def as_config(config: Config | Mapping[str, Any] | str | os.PathLike[str] | None) -> Config:
  """A Config from a Config, a dict of its sections, the path of a YAML file, the name of a shipped one, or nothing.

  Raises:
    ConfigError: if it is wrong, or something else.
  """
  if config is None:
    return Config()
  if isinstance(config, Config):
    return config
  if isinstance(config, Mapping):
    strange = [key for key in config if not isinstance(key, str)]
    if strange:
      raise ConfigError(f"config: expected names of sections such as schedule, got the key {strange[0]!r:.80}")
    return Config(**config)
  if isinstance(config, (str, os.PathLike)):
    return load_config(config)
  raise ConfigError(
    f"config: expected a Config, a dict of its sections, or the path of a YAML file, got {config!r:.80} "
    f"({type(config).__name__})"
  )


def load_config(path: str | os.PathLike[str]) -> Config:
  """Reads a YAML file into a Config. An empty file gives the defaults.

  Args:
    path: of the file, or the name of a configuration that ckpt_jax ships, such as `local_ssd` or `gcs`.

  Raises:
    ConfigError: if the file cannot be read, is not YAML, or holds unknown, doubled or wrong keys: one line a problem,
      `file:line: key path: what is wrong`.
  """
  if not isinstance(path, (str, os.PathLike)):
    raise ConfigError(f"load_config: expected the path of a YAML file, got {path!r:.80} ({type(path).__name__})")
  file = pathlib.Path(path).expanduser()
  shipped = {one.stem: one for one in sorted(_SHIPPED.glob("*.yaml"))}
  if not os.path.exists(file):
    file = shipped.get(os.fspath(path), file)
  try:
    text = file.read_text(encoding="utf-8")
  except FileNotFoundError:
    raise ConfigError(f"{file}: no such file{_nearest_file(file, shipped)}") from None
  except (OSError, UnicodeDecodeError) as e:
    raise ConfigError(f"{file}: cannot be read: {e}") from None

  document = _Document()
  try:
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    data = None if root is None else document.data(root, ())
  except yaml.MarkedYAMLError as e:
    mark = e.problem_mark or e.context_mark
    where = f"{file}:{mark.line + 1}" if mark else f"{file}"
    raise ConfigError(f"{where}: not YAML: {e.problem or e.context}") from None
  except (yaml.YAMLError, RecursionError) as e:
    raise ConfigError(f"{file}: not YAML: {' '.join(str(e).split())}") from None
  if not isinstance(data, dict | None):
    raise ConfigError(f"{file}:1: expected sections such as `retention: {{last: 3}}`, got {data!r:.60}")

  try:
    config = Config.model_validate(data or {})
  except pydantic.ValidationError as e:
    document.problems += [(document.line_of(keys), message) for keys, message in problems_of(Config, e)]
  if document.problems:
    raise ConfigError("\n".join(f"{file}:{line}: {message}" for line, message in sorted(document.problems)))
  return config


class _Document:
  """Plain data from YAML nodes, with the line of each key, and the keys that are given twice or are no words."""

  def __init__(self) -> None:
    self.problems: list[tuple[int, str]] = []
    self._lines: dict[tuple[str, ...], int] = {}

  def data(self, node: yaml.Node, keys: tuple[str, ...]) -> Any:
    if len(keys) > _DEEPEST:
      raise yaml.YAMLError(f"{'.'.join(keys[:3])}: nested too deep")
    if isinstance(node, yaml.SequenceNode):
      return [self.data(value, (*keys, str(i))) for i, value in enumerate(node.value)]
    if not isinstance(node, yaml.MappingNode):
      return _scalar(node)
    data: dict[str, Any] = {}
    for key_node, value_node in node.value:
      line = key_node.start_mark.line + 1
      if not isinstance(key_node, yaml.ScalarNode):
        self.problems.append((line, f"{'.'.join(keys) or 'top level'}: a key must be a word"))
        continue
      here = (*keys, key_node.value)
      if here in self._lines:
        self.problems.append((line, f"{'.'.join(here)}: given twice, first on line {self._lines[here]}"))
        continue
      self._lines[here] = line
      data[key_node.value] = self.data(value_node, here)
    return data

  def line_of(self, keys: tuple[str, ...]) -> int:
    """The line of the innermost of these keys that the file has."""
    return next((self._lines[keys[:n]] for n in range(len(keys), 0, -1) if keys[:n] in self._lines), 1)


def _scalar(node: yaml.Node) -> Any:
  if node.tag == "tag:yaml.org,2002:int" and ":" in node.value:
    return node.value  # YAML 1.1 reads 1:30 as ninety, base 60, which nobody means
  try:
    return yaml.constructor.SafeConstructor().construct_object(node)
  except (ValueError, KeyError):  # 2026-13-45, an integer of 5,000 digits, `!!bool x`
    return node.value


def _nearest_file(file: pathlib.Path, shipped: Mapping[str, pathlib.Path]) -> str:
  siblings = {one.name: one for one in file.parent.glob("*")}
  near = difflib.get_close_matches(file.name, [*siblings, *shipped], n=1)
  if near:
    return f"; did you mean {siblings.get(near[0], near[0])}?"
  return f"; ckpt_jax ships {', '.join(shipped)}"
