"""What is found out of an object once, for as long as a save looks at it: several rooms ask the same of an array."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

_S = TypeVar("_S")
_T = TypeVar("_T")

_here = threading.local()


@contextlib.contextmanager
def keeping() -> Iterator[None]:
  """Within it, this thread calls a function that is `kept` once for each object. They may not change meanwhile."""
  _here.found = {}
  try:
    yield
  finally:
    _here.found = None


def kept(function: Callable[[_S], _T]) -> Callable[[_S], _T]:
  """`function` of one object, which is asked once within `keeping()`, and each time outside of it."""

  @functools.wraps(function)
  def ask(subject: _S) -> _T:
    everything: dict[Any, dict[int, tuple[_S, _T]]] | None = getattr(_here, "found", None)
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
