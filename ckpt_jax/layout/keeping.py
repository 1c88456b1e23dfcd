"""What is found out of an object once, for as long as a save looks at it: several rooms ask the same of an array."""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

_S = TypeVar("_S")
_T = TypeVar("_T")


class _Kept:
  found: dict[Any, dict[int, tuple[Any, Any]]] | None

  def __init__(self) -> None:
    self.found = {}


_here: contextvars.ContextVar[_Kept | None] = contextvars.ContextVar("ckpt_jax_kept", default=None)


@contextlib.contextmanager
def keeping() -> Iterator[None]:
  """Within it, and in what it starts with its context, a function that is `kept` is called once for each object.

  The objects may not change meanwhile.
  """
  kept_here = _Kept()
  token = _here.set(kept_here)
  try:
    yield
  finally:
    kept_here.found = None  # for those too that have a copy of the context, and live on behind the save
    _here.reset(token)


def kept(function: Callable[[_S], _T]) -> Callable[[_S], _T]:
  """`function` of one object, which is asked once within `keeping()`, and each time outside of it."""

  @functools.wraps(function)
  def ask(subject: _S) -> _T:
    here = _here.get()
    everything = None if here is None else here.found
    if everything is None:
      return function(subject)
    found = everything.get(function)
    if found is None:
      found = everything[function] = {}
    known = found.get(id(subject))
    if known is None:
      known = found[id(subject)] = subject, function(subject)  # the object too, lest its id be another's
    return known[1]

  return ask
