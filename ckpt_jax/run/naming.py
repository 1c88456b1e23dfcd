"""Directory names of a run's steps: `12`, or as Orbax's options `step_prefix` and `step_format_fixed_length` ask for.

ckpt_jax names steps by their plain numbers. In a run that another program began it continues that program's naming, so
that both can read all of it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable

from ckpt_jax.errors import NotARunError
from ckpt_jax.orbax.format import TEMPORARY

# Unfinished saves, and directories that were moved out of the way of one; both names may end in digits.
_TEMPORARY = (TEMPORARY, ".set-aside-")
_NUMBERED = re.compile(r"(.*[^0-9])?([0-9]+)")


@dataclasses.dataclass(frozen=True)
class Naming:
  """Names of steps: `ckpt_00000012` is step 12 with prefix `ckpt_` and width 8.

  Attributes:
    prefix: the text before the number, Orbax's underscore included.
    width: digits to which the number is padded with zeros; 0 for no padding.
  """

  prefix: str = ""
  width: int = 0

  def name(self, step: int) -> str:
    """The directory name of a step."""
    return f"{self.prefix}{step:0{self.width}d}" if self.width else f"{self.prefix}{step}"

  def step(self, name: str) -> int | None:
    """The step of a directory name; None if it does not name a step."""
    digits = name.removeprefix(self.prefix)
    if not name.startswith(self.prefix) or re.fullmatch("[0-9]+", digits) is None:
      return None
    return int(digits) if self.name(int(digits)) == name else None


PLAIN = Naming()


def is_temporary(name: str) -> bool:
  """Whether a directory is left over from an unfinished save, or was moved out of the way of one."""
  return any(mark in name for mark in _TEMPORARY)


def naming_of(
  names: Iterable[str], is_step: Callable[[str], bool], is_empty: Callable[[str], bool], where: str
) -> Naming | None:
  """The naming of a run's steps, given the entries of its directory; None if there are no steps.

  Plain numbers take precedence: `old_10` beside `20` is somebody's copy. `is_step` is called as rarely as possible.

  Raises:
    NotARunError: if the steps are named in several ways, so that some would hide others.
  """
  by_prefix: dict[str, list[str]] = {}
  for name in names:
    match = _NUMBERED.fullmatch(name)
    if match is not None and not name.startswith(".") and not is_temporary(name):
      by_prefix.setdefault(match[1] or "", []).append(match[2])
  plain = by_prefix.pop("", [])
  if plain:
    width = _width("", plain, is_step, where)
    if width or not by_prefix or not all(map(is_empty, plain)):
      return Naming(width=width)
  # A prefix that ends in a digit and a point belongs to a number with a fraction, which is no step.
  found = [
    prefix
    for prefix, numbers in sorted(by_prefix.items())
    if not re.search(r"[0-9]\.$", prefix) and any(is_step(prefix + number) for number in numbers)
  ]
  if len(found) > 1:
    raise NotARunError(
      f"{where}: holds checkpoints of several kinds: {', '.join(f'{p}*' for p in found[:5])}. Move those of one kind "
      "into a directory of their own, and open that"
    )
  return Naming(found[0], _width(found[0], by_prefix[found[0]], is_step, where)) if found else None


def _width(prefix: str, numbers: Iterable[str], is_step: Callable[[str], bool], where: str) -> int:
  """The number of digits to which numbers are padded; 0 for no padding."""
  padded = {n for n in numbers if n.startswith("0") and len(n) > 1 and is_step(prefix + n)}
  if not padded:
    return 0
  width = min(map(len, padded))
  # A number that outgrew its width has no zero in front.
  odd = {n for n in numbers if len(n) < width or (n in padded and len(n) > width)}
  odd = {n for n in odd if n in padded or is_step(prefix + n)}
  if odd:
    shown = ", ".join(prefix + n for n in (min(padded, key=len), *sorted(odd)[:3]))
    raise NotARunError(
      f"{where}: its steps are numbered in several ways ({shown}); move those of one kind into a directory of their own"
    )
  return width
