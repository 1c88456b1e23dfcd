"""Durations, sizes, shares and switches, as people write them."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, StrictInt, StrictStr

_SECONDS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}
_BYTES = {"": 1, "b": 1} | {
  prefix + suffix: base**power
  for power, prefix in enumerate("kmgtp", start=1)
  for suffix, base in (("b", 1000), ("ib", 1024))
}
_NUMBER = r"\d+(?:\.\d*)?(?:e[+-]?\d+)?|\.\d+"


def _plain_number(value: Any) -> float | None:
  if isinstance(value, (int, float)) and not isinstance(value, bool):
    return value
  if isinstance(value, str) and re.fullmatch(_NUMBER, value.strip().lower()):
    return float(value)
  return None


def parse_duration(value: Any) -> float:
  """Seconds from a number of seconds or from text such as `90s`, `10m`, `1h30m`, `2d6h` (m is minutes).

  Raises:
    ValueError: if `value` is neither, or not above zero.
  """
  seconds = _plain_number(value)
  if seconds is None and isinstance(value, str):
    parts = re.findall(rf"({_NUMBER})\s*(ms|[smhdw])\s*", value.strip().lower())
    if parts and re.fullmatch(rf"(?:(?:{_NUMBER})\s*(?:ms|[smhdw])\s*)+", value.strip().lower()):
      seconds = sum(float(count) * _SECONDS[unit] for count, unit in parts)
  if seconds is None:
    raise ValueError(f"{value!r} is no duration; write seconds or text such as 90s, 10m, 1h30m, 2d6h")
  return _positive(seconds, value, "a duration")


def parse_bytes(value: Any) -> int:
  """Bytes from a whole number or from text such as `512MiB`, `2TiB` (powers of 1024) or `1.5GB` (powers of 1000).

  Raises:
    ValueError: if `value` is neither, or below one byte.
  """
  size = _plain_number(value)
  if size is None and isinstance(value, str):
    match = re.fullmatch(rf"({_NUMBER})\s*([a-z]*)", value.strip().lower())
    if match and match[2] in _BYTES:
      size = float(match[1]) * _BYTES[match[2]]
  if size is None:
    raise ValueError(f"{value!r} is no size; write bytes or text such as 512MiB, 2TiB, 1.5GB")
  return int(_positive(size, value, "a size", least=1))


def parse_share(value: Any) -> float:
  """A fraction between 0 and 1, both excluded, from a number or from text such as `1%`.

  Raises:
    ValueError: if `value` is neither, or out of range.
  """
  share = _plain_number(value)
  if share is None and isinstance(value, str) and value.strip().endswith("%"):
    percent = _plain_number(value.strip()[:-1])
    share = None if percent is None else percent / 100
  if share is None or not 0 < share < 1:
    raise ValueError(f"{value!r} is no share between 0 and 1; write 0.01 or 1%")
  return float(share)


def size_text(nbytes: float) -> str:
  """`1.5 GiB`: three digits or so, in powers of 1024."""
  for unit in ("B", "KiB", "MiB", "GiB"):
    if abs(nbytes) < 1024:
      return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
    nbytes /= 1024
  return f"{nbytes:.1f} TiB"


def duration_text(seconds: float) -> str:
  """`1.5 h`: three digits, in the largest unit of which there are two or more."""
  if seconds < 1:
    return f"{seconds * 1e3:.3g} ms"
  for unit, length in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
    if seconds >= 2 * length:
      return f"{seconds / length:.3g} {unit}"
  return f"{seconds:.3g} s"


def _positive(number: float, value: Any, what: str, least: float = 0.0) -> float:
  # An int too big for a float is out of range too, hence the comparison before any conversion.
  if not (least <= number < 2**63) or number <= 0 or math.isnan(number):
    raise ValueError(f"{value!r} is out of range: {what} must be above zero and finite")
  return number if least else float(number)


def _auto_or_bytes(value: Any) -> Any:
  if value == "auto":
    return value
  try:
    return parse_bytes(value)
  except ValueError as e:
    raise ValueError(f"{e}, or auto") from None


def _auto_or_duration(value: Any) -> Any:
  if value == "auto":
    return value
  try:
    return parse_duration(value)
  except ValueError as e:
    raise ValueError(f"{e}, or auto") from None


def _auto_or_count(value: Any) -> Any:
  if value == "auto":
    return value
  number = _whole(value)
  if isinstance(number, bool) or not isinstance(number, int) or number < 1:
    raise ValueError(f"{value!r} is no count; write a whole number from 1, or auto")
  return number


def learned_or_duration(value: Any) -> Any:
  return value if value == "learned" else parse_duration(value)


def _switch(value: Any) -> Any:
  # YAML 1.1 reads a bare on or off as a boolean.
  if value is True:
    return "on"
  return "off" if value is False else value


def file_mode(value: Any) -> Any:
  if isinstance(value, str) and re.fullmatch(r"(0o?)?[0-7]{3}", value.strip()):
    bits = int(value.strip().replace("o", ""), 8)
    if bits & 0o600 != 0o600:
      raise ValueError(f"{value!r} takes reading or writing from the owner, who could not save or delete any more")
    if bits & 0o002:
      raise ValueError(f"{value!r} lets the whole world write checkpoints")
    return f"{bits:04o}"
  if isinstance(value, int) and not isinstance(value, bool):
    # YAML 1.1 reads 0640 as 416 and 640 as 640; only text says which was meant.
    raise ValueError(f'{value!r} is ambiguous; write permission bits in quotes, e.g. "0640"')
  raise ValueError(f'{value!r} is no mode; write octal permission bits in quotes, e.g. "0640"')


def _price(value: Any) -> float:
  price = _plain_number(value)
  if price is None or not 0 < price < math.inf:
    raise ValueError(f"{value!r} is no price; write a number above zero, such as 0.02")
  return float(price)


def _leaf_paths(value: Any) -> Any:
  paths = (value,) if isinstance(value, str) else value
  if not isinstance(paths, (list, tuple)) or not paths or not all(isinstance(p, str) and p.strip("/") for p in paths):
    raise ValueError(f"{value!r} names no leaves; write a path in the state such as params, or a list of them")
  return tuple(paths)


def _whole(value: Any) -> Any:
  # JSON and YAML 1.2 writers may spell 1000 as 1e3 or 1000.0; PyYAML reads the first as text.
  number = _plain_number(value)
  if isinstance(value, str) and number is not None and math.isfinite(number) and number == int(number):
    return int(number)
  return value


def item_name(value: Any) -> Any:
  """A name for an item of a step, which is a directory there.

  Raises:
    ValueError: if Orbax, or the file system, means something else by it.
  """
  if isinstance(value, str) and (value == "metrics" or not re.fullmatch(r"[A-Za-z0-9][\w.-]*", value)):
    raise ValueError(f"{value!r} is no name of an item; write letters, digits, _, - and points, and not metrics")
  return value


Duration = Annotated[float, BeforeValidator(parse_duration)]
Share = Annotated[float, BeforeValidator(parse_share)]
Bytes = Annotated[int, BeforeValidator(parse_bytes)]
Count = Annotated[StrictInt, BeforeValidator(_whole), Field(gt=0)]
StepNumber = Annotated[StrictInt, BeforeValidator(_whole), Field(ge=0)]
Price = Annotated[float, BeforeValidator(_price)]
ItemName = Annotated[StrictStr, BeforeValidator(item_name)]
LeafPaths = Annotated[tuple[StrictStr, ...], BeforeValidator(_leaf_paths)]
AutoOrBytes = Annotated[int | Literal["auto"], BeforeValidator(_auto_or_bytes)]
AutoOrDuration = Annotated[float | Literal["auto"], BeforeValidator(_auto_or_duration)]
AutoOrCount = Annotated[int | Literal["auto"], BeforeValidator(_auto_or_count)]
Switch = Annotated[Literal["auto", "on", "off"], BeforeValidator(_switch)]
