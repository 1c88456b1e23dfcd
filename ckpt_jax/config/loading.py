"""A YAML file to a Config, with the line of everything that is wrong in it."""

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


def as_config(config: Config | Mapping[str, Any] | str | os.PathLike[str] | None) -> Config:
  """What a caller may give as configuration: a Config, a dict of its sections, a YAML file, or nothing.

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

  Raises:
    ConfigError: if the file cannot be read, is not YAML, or holds unknown, doubled or wrong keys: one line a problem,
      `file:line: key path: what is wrong`.
  """
  if not isinstance(path, (str, os.PathLike)):
    raise ConfigError(f"load_config: expected the path of a YAML file, got {path!r:.80} ({type(path).__name__})")
  file = pathlib.Path(path).expanduser()
  try:
    text = file.read_text(encoding="utf-8")
  except FileNotFoundError:
    raise ConfigError(f"{file}: no such file{_nearest_file(file)}") from None
  except (OSError, UnicodeDecodeError) as e:
    raise ConfigError(f"{file}: cannot be read: {e}") from None

  problems: list[tuple[int, str]] = []
  lines: dict[tuple[str, ...], int] = {}
  try:
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    data = {} if root is None else _to_data(root, (), lines, problems)
  except yaml.MarkedYAMLError as e:
    mark = e.problem_mark or e.context_mark
    where = f"{file}:{mark.line + 1}" if mark else f"{file}"
    raise ConfigError(f"{where}: not YAML: {e.problem or e.context}") from None
  except (yaml.YAMLError, RecursionError) as e:
    raise ConfigError(f"{file}: not YAML: {' '.join(str(e).split())}") from None
  if data is None:
    data = {}
  if not isinstance(data, dict):
    raise ConfigError(f"{file}:1: expected sections such as `retention: {{last: 3}}`, got {data!r:.60}")

  try:
    config = Config.model_validate(data)
  except pydantic.ValidationError as e:
    problems += [(_line_of(keys, lines), message) for keys, message in problems_of(Config, e)]
  if problems:
    raise ConfigError("\n".join(f"{file}:{line}: {message}" for line, message in sorted(problems)))
  return config


def _to_data(
  node: yaml.Node,
  keys: tuple[str, ...],
  lines: dict[tuple[str, ...], int],
  problems: list[tuple[int, str]],
) -> Any:
  """Plain data from YAML nodes; notes the line of each key in `lines` and doubled keys in `problems`."""
  if len(keys) > 16:  # an anchor that refers to itself has no end
    raise yaml.YAMLError(f"{'.'.join(keys[:3])}: nested too deep")
  if isinstance(node, yaml.SequenceNode):
    return [_to_data(v, (*keys, str(i)), lines, problems) for i, v in enumerate(node.value)]
  if not isinstance(node, yaml.MappingNode):
    try:
      constructor = yaml.constructor.SafeConstructor()
      if node.tag == "tag:yaml.org,2002:int" and ":" in node.value:
        return node.value  # YAML 1.1 reads 1:30 as ninety, base 60; whoever writes it means something else
      return constructor.construct_object(node)
    except (ValueError, KeyError):  # 2026-13-45, an integer of 5,000 digits, `!!bool x`
      return node.value
  data: dict[str, Any] = {}
  for key_node, value_node in node.value:
    line = key_node.start_mark.line + 1
    if not isinstance(key_node, yaml.ScalarNode):
      problems.append((line, f"{'.'.join(keys) or 'top level'}: a key must be a word"))
      continue
    here = (*keys, key_node.value)
    if here in lines:
      problems.append((line, f"{'.'.join(here)}: given twice, first on line {lines[here]}"))
      continue
    lines[here] = line
    data[key_node.value] = _to_data(value_node, here, lines, problems)
  return data


def _line_of(keys: tuple[str, ...], lines: Mapping[tuple[str, ...], int]) -> int:
  while keys and keys not in lines:
    keys = keys[:-1]
  return lines.get(keys, 1)


def _nearest_file(file: pathlib.Path) -> str:
  try:
    names = [p.name for p in file.parent.iterdir()]
  except OSError:
    return ""
  near = difflib.get_close_matches(file.name, names, n=1)
  return f"; did you mean {file.parent / near[0]}?" if near else ""
