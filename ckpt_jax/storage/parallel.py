"""Calls that wait for storage, many at a time."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

T = TypeVar("T")


def in_threads(function: Callable[..., T], *arguments: Iterable[Any], threads: int = 16) -> list[T]:
  """`list(map(function, *arguments))`, at most `threads` calls at a time. Raises what the first that failed raised."""
  with concurrent.futures.ThreadPoolExecutor(threads) as pool:
    return list(pool.map(function, *arguments))
