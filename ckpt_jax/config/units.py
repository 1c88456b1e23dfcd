"""Durations, sizes, shares and the like, as people write them; numbers as text for people."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, StrictStr

from ckpt_jax.config.explain import did_you_mean

_SECONDS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}
_COUNTS = {"k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}
_BYTES = {"b": 1} | {
  prefix + suffix: base**power
  for power, prefix in enumerate("kmgtp", start=1)
  for suffix, base in (("b", 1000), ("ib", 1024))
}
_DTYPES = ("float32", "bfloat16", "float16", "float8_e4m3fn", "int8", "int4")
_NUMBER = r"(?:\d+(?:\.\d*)?(?:e[+-]?\d+)?|\.\d+)"


def parse_duration(value: Any) -> float:
  """Seconds from a number of seconds or from text such as `90s`, `10m`, `1h30m`, `2d6h` (m is minutes).

  Raises:
    ValueError: if `value` is neither, or not above zero.
  """
  seconds = _number(value)
  text = value.strip().lower() if isinstance(value, str) else ""
  if seconds is None and re.fullmatch(rf"({_NUMBER}\s*(ms|[smhdw])\s*)+", text):
    parts = re.findall(rf"({_NUMBER})\s*(ms|[smhdw])", text)
    seconds = sum(float(count) * _SECONDS[unit] for count, unit in parts)
  if seconds is None:
    raise ValueError(f"{value!r} is no duration; write seconds or text such as 90s, 10m, 1h30m, 2d6h")
  if not 0 < seconds < 2**63:
    raise ValueError(f"{value!r} is out of range: a duration must be above zero and finite")
  return float(seconds)


def parse_bytes(value: Any) -> int:
  """Bytes from a whole number or from text such as `512MiB`, `2TiB` (powers of 1024) or `1.5GB` (powers of 1000).

  Raises:
    ValueError: if `value` is neither, or below one byte.
  """
  size = _with_unit(value, _BYTES)
  if size is None:
    raise ValueError(f"{value!r} is no size; write bytes or text such as 512MiB, 2TiB, 1.5GB")
  if not 1 <= size < 2**63:
    raise ValueError(f"{value!r} is out of range: a size must be above zero and finite")
  return int(size)


def parse_count(value: Any) -> int:
  """A number of parameters from a number or from text such as `7b`, `70B`, `350M`, `1.5t`, `70e9`.

  Raises:
    ValueError: if `value` is neither, or below one.
  """
  number = _with_unit(value, _COUNTS)
  if number is None:
    raise ValueError(f"{value!r} is no count; write a number or text such as 7b, 350M, 70e9")
  if not 1 <= number < 2**63:
    raise ValueError(f"{value!r} is out of range: it must be at least one, and finite")
  return round(number)


def parse_dtype(value: Any) -> str:
  """The name of a dtype that is given by its name, or as a type of numpy or jax.

  Raises:
    ValueError: if it is none.
  """
  import ml_dtypes  # noqa: F401  numpy then knows bfloat16 and its like by name
  import numpy as np

  try:
    if isinstance(value, (str, type, np.dtype)):
      return np.dtype(value).name
  except TypeError:
    pass
  near = did_you_mean(str(value), _DTYPES) or f"; write {', '.join(_DTYPES)} ..."
  raise ValueError(f"{value!r:.60} is no dtype{near}")


def parse_share(value: Any) -> float:
  """A fraction between 0 and 1, both excluded, from a number or from text such as `1%`.

  Raises:
    ValueError: if `value` is neither, or out of range.
  """
  is_percent = isinstance(value, str) and value.strip().endswith("%")
  share = _number(value.strip()[:-1] if is_percent else value)
  if share is not None and is_percent:
    share /= 100
  if share is None or not 0 < share < 1:
    raise ValueError(f"{value!r} is no share between 0 and 1; write 0.01 or 1%")
  return float(share)


def size_text(nbytes: float) -> str:
  """`1.5 GiB`: one decimal, in powers of 1024; bytes are whole."""
  for unit in ("B", "KiB", "MiB", "GiB"):
    if abs(nbytes) < 1024:
      return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
    nbytes /= 1024
  return f"{nbytes:.1f} TiB"


def decimal_text(nbytes: float) -> str:
  """`1.02 GB`: powers of 1000, as storage and links are sold."""
  for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
    if nbytes >= size:
      return f"{nbytes / size:.3g} {unit}"
  return f"{nbytes:.0f} B"


def count(number: int, one: str = "step", many: str | None = None) -> str:
  """A counted noun: `1 step`, `5,000 arrays`, `2 processes`."""
  return f"{number:,} {one if number == 1 else many or one + ('es' if one.endswith('s') else 's')}"


def duration_text(seconds: float) -> str:
  """`1.5 h`: three digits, in the largest unit of which there are two or more."""
  if seconds < 1:
    return f"{seconds * 1e3:.3g} ms"
  for unit, length in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
    if seconds >= 2 * length:
      return f"{seconds / length:.3g} {unit}"
  return f"{seconds:.3g} s"


def pairs_text(values: Mapping[str, Any]) -> str:
  """Names and values on one line: `loss=0.5  step=3`."""
  return "  ".join(f"{k}={v:.6g}" if isinstance(v, float) else f"{k}={v}" for k, v in values.items())


# -- what the settings take


def _number(value: Any) -> float | None:
  """A number, or text that is one; None for anything else, True and False included."""
  if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 1023:
    return math.inf  # none of the settings; math's functions raise OverflowError for it
  if isinstance(value, (int, float)) and not isinstance(value, bool):
    return value
  if isinstance(value, str) and re.fullmatch(_NUMBER, value.strip().lower()):
    return float(value)
  return None


def _with_unit(value: Any, units: Mapping[str, float]) -> float | None:
  """A number, or text of one with or without a unit behind it; None for anything else."""
  match = re.fullmatch(rf"({_NUMBER})\s*([a-z]+)", value.strip().lower()) if isinstance(value, str) else None
  return float(match[1]) * units[match[2]] if match and match[2] in units else _number(value)


def _whole(least: int) -> Callable[[Any], int]:
  def parse(value: Any) -> int:
    number = None if isinstance(value, float) else _number(value)
    # Text may be 1e3: JSON and YAML 1.2 take that for a number, PyYAML does not.
    if number is None or not math.isfinite(number) or number != int(number) or number < least:
      raise ValueError(f"{value!r} is no count; write a whole number from {least}")
    return int(number)

  return parse


def _or(word: str, parse: Callable[[Any], Any]) -> BeforeValidator:
  """Takes `word` beside what `parse` takes."""

  def validate(value: Any) -> Any:
    if value == word:
      return value
    try:
      return parse(value)
    except ValueError as e:
      raise ValueError(f"{e}, or {word}") from None

  return BeforeValidator(validate)


def _switch(value: Any) -> Any:
  # YAML 1.1 reads a bare on or off as a boolean.
  if isinstance(value, bool):
    return "on" if value else "off"
  return value


def _compression(value: Any) -> Any:
  if not isinstance(value, Mapping):
    return one_of(_switch(value), ("auto", "on", *_CODECS))
  return {str(kind): one_of(_switch(codec), _CODECS) for kind, codec in value.items()}


def one_of(value: Any, allowed: Sequence[str]) -> str:
  """`value`, which must be in `allowed`.

  Raises:
    ValueError: naming the nearest that is.
  """
  if not isinstance(value, str) or value not in allowed:
    raise ValueError(f"{value!r:.80} is not one of {', '.join(allowed)}{did_you_mean(str(value), allowed)}")
  return value


def is_uncompressed(compression: Any) -> bool:
  """Whether `layout.compression` compresses no leaf; `auto`, without a plan that has decided, does not."""
  return compression in ("off", "auto") or not compression


def _file_mode(value: Any) -> str:
  if isinstance(value, int) and not isinstance(value, bool):
    # YAML 1.1 reads 0640 as 416 and 640 as 640; only text says which was meant.
    raise ValueError(f'{value!r} is ambiguous; write permission bits in quotes, e.g. "0640"')
  if not isinstance(value, str) or not re.fullmatch(r"(0o?)?[0-7]{3}", value.strip()):
    raise ValueError(f'{value!r} is no mode; write octal permission bits in quotes, e.g. "0640"')
  bits = int(value.strip().replace("o", ""), 8)
  if bits & 0o600 != 0o600:
    raise ValueError(f"{value!r} takes reading or writing from the owner, who could not save or delete any more")
  if bits & 0o002:
    raise ValueError(f"{value!r} lets the whole world write checkpoints")
  return f"{bits:04o}"


def _price(value: Any) -> float:
  price = _number(value)
  if price is None or not 0 < price < math.inf:
    raise ValueError(f"{value!r} is no price; write a number above zero, such as 0.02")
  return float(price)


def _leaf_paths(value: Any) -> Any:
  paths = (value,) if isinstance(value, str) else value
  if not isinstance(paths, (list, tuple)) or not paths or not all(isinstance(p, str) and p.strip("/") for p in paths):
    raise ValueError(f"{value!r} names no leaves; write a path in the state such as params, or a list of them")
  return tuple(paths)


def _item_name(value: Any) -> Any:
  # The name of a directory in a step, where Orbax keeps `metrics` to itself.
  if isinstance(value, str) and (value == "metrics" or not re.fullmatch(r"[A-Za-z0-9][\w.-]*", value)):
    raise ValueError(f"{value!r} is no name of an item; write letters, digits, _, - and points, and not metrics")
  return value


Duration = Annotated[float, BeforeValidator(parse_duration)]
LearnedOrDuration = Annotated[float | Literal["learned"], _or("learned", parse_duration)]
Share = Annotated[float, BeforeValidator(parse_share)]
Bytes = Annotated[int, BeforeValidator(parse_bytes)]
Count = Annotated[int, BeforeValidator(_whole(1))]
StepNumber = Annotated[int, BeforeValidator(_whole(0))]
Price = Annotated[float, BeforeValidator(_price)]
FileMode = Annotated[str, BeforeValidator(_file_mode)]
ItemName = Annotated[StrictStr, BeforeValidator(_item_name)]
LeafPaths = Annotated[tuple[StrictStr, ...], BeforeValidator(_leaf_paths)]
AutoOrBytes = Annotated[int | Literal["auto"], _or("auto", parse_bytes)]
AutoOrDuration = Annotated[float | Literal["auto"], _or("auto", parse_duration)]
AutoOrCount = Annotated[int | Literal["auto"], _or("auto", _whole(1))]
Switch = Annotated[Literal["auto", "on", "off"], BeforeValidator(_switch)]
AutoOrOff = Annotated[Literal["auto", "off"], BeforeValidator(_switch)]
_CODECS = ("off", "zstd", "shuffled")
Compression = Annotated[
  Literal["auto", "on", "off", "zstd", "shuffled"] | dict[str, Literal["off", "zstd", "shuffled"]],
  BeforeValidator(_compression),
]
