"""Explains what is wrong with a setting: key path, value, and the nearest right name."""

from __future__ import annotations

import difflib
import re
import typing
from collections.abc import Iterable
from typing import Any

import pydantic
from pydantic import BaseModel

from ckpt_jax.errors import ConfigError


def config_error(model: type[BaseModel], error: pydantic.ValidationError) -> ConfigError:
  """All problems of a section given in Python, one a line."""
  return ConfigError("\n".join(message for _, message in problems(model, error)))


def problems(model: type[BaseModel], error: pydantic.ValidationError) -> list[tuple[tuple[str, ...], str]]:
  """(key path, message) of each error; the message starts with the key path."""
  found: dict[tuple[str, ...], str] = {}
  for detail in error.errors(include_url=False):
    keys = tuple(map(str, detail["loc"]))
    found.setdefault(keys, f"{'.'.join(keys) or model.__name__}: {_explain(model, keys, detail)}")
  return list(found.items())


def did_you_mean(wrong: str, right: Iterable[str]) -> str:
  """`; did you mean X?`, or nothing if no name is near."""
  near = difflib.get_close_matches(wrong.lower(), list(right), n=1)
  return f"; did you mean {near[0]}?" if near else ""


def _explain(model: type[BaseModel], keys: tuple[str, ...], detail: Any) -> str:
  kind, value, context = detail["type"], detail["input"], detail.get("ctx", {})
  if kind == "extra_forbidden":
    return f"unknown key{_right_key(model, keys)}"
  if kind == "missing":
    return f"missing; {keys[-1]} is required here"
  if kind == "value_error":
    return str(context["error"])
  if kind == "literal_error":
    allowed = re.findall(r"'([^']*)'", context["expected"]) or [context["expected"]]
    return f"{value!r:.80} is not one of {', '.join(allowed)}{did_you_mean(str(value), allowed)}"
  if kind in ("model_type", "model_attributes_type", "dict_type"):
    return f"expected a mapping of keys, got {value!r:.80}"
  if kind.startswith("int"):
    return f"expected a whole number, got {value!r:.80}"
  if kind.startswith("bool"):
    return f"expected true or false, got {value!r:.80}"
  message = detail["msg"]
  return f"{message[:1].lower()}{message[1:]}, got {value!r:.80}"


def _right_key(model: type[BaseModel], keys: tuple[str, ...]) -> str:
  section = model
  for key in keys[:-1]:  # a key that is no field is a place in a list of sections
    field = section.model_fields.get(key)
    section = (field and _section_in(field.annotation)) or section
  known = list(section.model_fields)
  # A right name in the wrong section, such as `every_steps` at the top level.
  elsewhere = dict(_all_keys(model))
  moved = difflib.get_close_matches(keys[-1].lower(), list(elsewhere.values()), n=1, cutoff=0.8)
  places = [path for path, name in elsewhere.items() if [name] == moved]
  return (
    did_you_mean(keys[-1], known)
    or (places and f"; did you mean {' or '.join(places)}?")
    or f"; known here: {', '.join(known)}"
  )


def _all_keys(model: type[BaseModel], prefix: str = "") -> Iterable[tuple[str, str]]:
  """(path, name) of each key, those of nested sections included."""
  for name, field in model.model_fields.items():
    yield prefix + name, name
    section = _section_in(field.annotation)
    if section is not None and section is not model:  # schedules hold schedules
      yield from _all_keys(section, f"{prefix}{name}.")


def _section_in(annotation: Any) -> type[BaseModel] | None:
  """The section in a type such as `tuple[ScheduleConfig, ...] | None`."""
  if isinstance(annotation, type) and issubclass(annotation, BaseModel):
    return annotation
  return next(filter(None, map(_section_in, typing.get_args(annotation))), None)
