"""Checks of what callers pass to the public functions, so that a wrong type is one clear error at the call."""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from ckpt_jax.config.units import parse_dtype
from ckpt_jax.errors import CheckpointError, ConfigError

T = TypeVar("T")


def whole_number(value: Any) -> int | None:
  """An int from an integer of Python, numpy or jax; None for anything else, True and 3.0 included."""
  jax = sys.modules.get("jax")  # commands that only list steps do without it
  try:
    if jax is not None and isinstance(value, jax.Array):
      value = jax.device_get(value)  # explicit, so that jax.transfer_guard("disallow") lets it pass
    if isinstance(value, bool) or getattr(getattr(value, "dtype", None), "kind", "") == "b":
      return None
    return operator.index(value)
  except Exception:  # whatever a foreign __index__ raises; jax's tracers have errors of their own
    return None


def step_number(value: Any, argument: str = "step") -> int:
  """A step number as a Python int.

  Args:
    value: an integer of Python, numpy or jax, not negative and below 2**63.
    argument: the caller's name for it, for the message.

  Raises:
    CheckpointError: if it is anything else.
  """
  number = whole_number(value)
  if number is None:
    kind = type(value).__name__
    raise CheckpointError(
      f"{argument}: expected a whole number such as 100, got {value!r:.80} ({kind})", topic="configuration"
    )
  if number.bit_length() > 63:  # Python refuses to print one of thousands of digits
    raise CheckpointError(
      f"{argument}: a number of {number.bit_length()} bits; 63 are the limit", topic="configuration"
    )
  if number < 0:
    raise CheckpointError(f"{argument}: {number} must not be negative", topic="configuration")
  return number


def check_request(only: Any, init_missing: Any, cast: Any, item: Any) -> None:
  """Checks the types of a restore's arguments.

  Raises:
    ConfigError: for the first wrong one, with its name.
  """
  for name, value in (("only", only), ("init_missing", init_missing)):
    check_type(name, value, value is None or isinstance(value, Iterable), "a leaf path such as 'params', or several")
  check_type("cast", cast, cast is None or isinstance(cast, (bool, Mapping)), "True, or {'params': 'bfloat16'}")
  named = item is None or (isinstance(item, str) and item)
  check_type("item", item, named, "the name of an item of the step, such as 'state'")
  for pattern, dtype in cast.items() if isinstance(cast, Mapping) else ():
    checked(f"cast={{{pattern!r}: ...}}", parse_dtype, dtype)


def checked(argument: str, parse: Callable[..., T], *given: Any) -> T:
  """What `parse` makes of an argument.

  Raises:
    ConfigError: naming the argument, if `parse` raises a ValueError.
  """
  try:
    return parse(*given)
  except ValueError as e:
    raise ConfigError(f"{argument}: {e}") from None


def check_type(argument: str, value: Any, right: object, what: str) -> None:
  """Checks an argument of any other kind: `what` says what it should be, and `right` whether it is.

  Raises:
    ConfigError: if it is not.
  """
  if not right:
    raise ConfigError(f"{argument}: expected {what}, got {value!r:.80}")


def check_schedule(schedule: Any, argument: str = "schedule") -> None:
  """Checks that something is a schedule; else the first save would fail.

  Raises:
    ConfigError: if it has no `should_save`.
  """
  what = (
    "a policy with should_save(), such as policies.EverySteps(500) (settings go into "
    'config={"schedule": {"every_steps": 500}})'
  )
  right = not isinstance(schedule, type) and callable(getattr(schedule, "should_save", None))
  check_type(argument, schedule, right, what)
