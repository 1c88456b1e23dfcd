"""Small objects that are written behind the caller, into a place in a bucket that one process alone fills.

Behind a link with 30 ms of round-trip time the dozen small files of a step cost as much as 20 MB of its data, one after
the other. Most depend on nothing, so they go out at once. What is written again, as the step's metadata is twice, is
held back until somebody waits for it, so that only the last content goes out, after the first. Before the step's commit
marker is written all the rest is waited for, and it is not written at all if any of that has failed.
"""

from __future__ import annotations

import concurrent.futures
import threading

from ckpt_jax.storage import requests
from ckpt_jax.storage.urls import is_beneath

_AT_A_TIME = 8
_Future = concurrent.futures.Future[None]


class WriteBehind:
  """Objects on their way, by URL. Each ends by itself: the clients give up after the deadline of their retries."""

  def __init__(self) -> None:
    self._under_way: dict[str, _Future] = {}
    self._held: dict[str, bytes] = {}
    self._lock = threading.Lock()
    self._pool: concurrent.futures.ThreadPoolExecutor | None = None

  def write(self, url: str, content: bytes) -> None:
    """Starts to write an object, or holds it back if it is written again.

    Raises:
      StorageError: if an earlier one beneath the same directory has failed.
    """
    with self._lock:
      for future in self._beneath(url.rpartition("/")[0]):
        if future.done():
          future.result()
      if url in self._under_way:
        self._held[url] = content
      else:
        self._start(url, content)

  def settle(self, url: str) -> None:
    """Waits for what is on its way to an object, or beneath a directory, and for what was held back there.

    Raises:
      StorageError: if some of it could not be written.
    """
    with self._lock:
      for again in [u for u in self._held if is_beneath(u, url)]:
        self._start(again, self._held.pop(again), self._under_way.get(again))
      waited = self._beneath(url)
    concurrent.futures.wait(waited)
    self._drop(waited)
    for future in waited:
      future.result()

  def forget(self, url: str) -> None:
    """As `settle`, for what is to be deleted or replaced: nothing arrives afterwards, and failures do not count."""
    with self._lock:
      self._held = {u: content for u, content in self._held.items() if not is_beneath(u, url)}
      waited = self._beneath(url)
    concurrent.futures.wait(waited)
    self._drop(waited)

  def _start(self, url: str, content: bytes, before: _Future | None = None) -> None:
    # First in, first out: what one waits for has begun, or is next in line, so that no thread waits for ever.
    self._pool = self._pool or concurrent.futures.ThreadPoolExecutor(_AT_A_TIME, "ckpt_jax_objects")
    self._under_way[url] = self._pool.submit(_store, url, content, before)

  def _beneath(self, url: str) -> list[_Future]:
    return [future for u, future in self._under_way.items() if is_beneath(u, url)]

  def _drop(self, done: list[_Future]) -> None:
    with self._lock:
      self._under_way = {u: future for u, future in self._under_way.items() if future not in done}


def _store(url: str, content: bytes, before: _Future | None) -> None:
  if before is not None:
    before.result()
  requests.store(url, content)
