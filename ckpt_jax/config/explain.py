"""What is wrong with a setting, in words: key path, value, and the nearest right name."""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Iterable
from typing import Any

import pydantic
from pydantic import BaseModel

from ckpt_jax.errors import ConfigError


def config_error(model: type[BaseModel], error: pydantic.ValidationError) -> ConfigError:
  return ConfigError("\n".join(message for _, message in problems(model, error)))


def problems(model: type[BaseModel], error: pydantic.ValidationError) -> list[tuple[tuple[str, ...], str]]:
  """(key path, message) of each error; the message starts with the key path."""
  found: dict[tuple[str, ...], str] = {}
  for detail in error.errors(include_url=False):
    keys, section = _key_path(model, detail["loc"])
    found.setdefault(keys, f"{'.'.join(keys) or model.__name__}: {_explain(model, section, keys, detail)}")
  return list(found.items())


def _key_path(model: type[BaseModel], loc: tuple[int | str, ...]) -> tuple[tuple[str, ...], type[BaseModel] | None]:
  """The part of `loc` that names keys, and the section that the last key stands in.

  pydantic adds the members of a union to `loc` (`target_file_size.int`), which no user has written.
  """
  keys: list[str] = []
  section: type[BaseModel] | None = model
  parent = section
  for part in loc:
    if section is None:
      break
    keys.append(str(part))
    if isinstance(part, int):  # a place in a list of sections
      continue
    parent = section
    section = _section_of(section, part)
  return tuple(keys), parent


def _section_of(section: type[BaseModel], key: str) -> type[BaseModel] | None:
  field = section.model_fields.get(key)
  if field is None:
    return None
  annotation = field.annotation
  options = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
  for option in [inner for o in options for inner in (typing.get_args(o) or (o,))]:
    if isinstance(option, type) and issubclass(option, BaseModel):
      return option
  return None


def _explain(model: type[BaseModel], section: type[BaseModel] | None, keys: tuple[str, ...], detail: Any) -> str:
  kind, value, context = detail["type"], detail["input"], detail.get("ctx", {})
  if kind == "extra_forbidden" and section is not None:
    return f"unknown key{_nearest_key(model, section, keys)}"
  if kind == "missing":
    return f"missing; {keys[-1]} is required here"
  if kind == "value_error":
    return str(context["error"])
  if kind == "literal_error":
    allowed = re.findall(r"'([^']*)'", context["expected"])
    return f"{value!r:.80} is not one of {', '.join(allowed)}{did_you_mean(str(value), allowed)}"
  if kind in ("model_type", "model_attributes_type", "dict_type"):
    return f"expected a mapping of keys, got {value!r:.80}"
  if kind.startswith("int"):
    return f"expected a whole number, got {value!r:.80}"
  if kind.startswith("bool"):
    return f"expected true or false, got {value!r:.80}"
  message = detail["msg"]
  return f"{message[:1].lower()}{message[1:]}, got {value!r:.80}"


def _nearest_key(model: type[BaseModel], section: type[BaseModel], keys: tuple[str, ...]) -> str:
  known = list(section.model_fields)
  wrong = keys[-1]
  near = difflib.get_close_matches(wrong.lower(), known, n=1)
  if near:
    return f"; did you mean {near[0]}?"
  # A right name in the wrong section, such as `every_steps` at the top level.
  elsewhere = list(_all_keys(model))
  moved = difflib.get_close_matches(wrong.lower(), [name for name, _ in elsewhere], n=1, cutoff=0.8)
  if moved:
    return f"; did you mean {' or '.join(path for name, path in elsewhere if name == moved[0])}?"
  return f"; known here: {', '.join(known)}"


def _all_keys(model: type[BaseModel], prefix: str = "") -> Iterable[tuple[str, str]]:
  for name in model.model_fields:
    yield name, prefix + name
    section = _section_of(model, name)
    if section is not None and section is not model:
      yield from _all_keys(section, f"{prefix}{name}.")


def did_you_mean(wrong: str, right: Iterable[str]) -> str:
  """`; did you mean X?`, or nothing if no name is near."""
  near = difflib.get_close_matches(wrong.lower(), list(right), n=1)
  return f"; did you mean {near[0]}?" if near else ""
