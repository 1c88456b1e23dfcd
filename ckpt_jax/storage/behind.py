"""Small objects that are written behind the caller, into a place in a bucket that one process alone fills.

Behind a link with 30 ms of round-trip time the dozen small files of a step cost as much as 20 MB of its data, one after
the other. Most depend on nothing, so they go out at once. What safety needs is kept here:

- an object is written again only after what was written to it before;
- a commit marker is written only after all that was written beneath its directory before it, and not at all if any of
  that has failed.
"""

from __future__ import annotations

import concurrent.futures
import threading

from ckpt_jax.orbax.format import COMMIT_MARKER
from ckpt_jax.storage import requests

_AT_A_TIME = 8
_Future = concurrent.futures.Future[None]


class WriteBehind:
  """Objects on their way, by URL. Each ends by itself: the clients give up after the deadline of their retries."""

  def __init__(self) -> None:
    self._under_way: dict[str, _Future] = {}
    self._lock = threading.Lock()
    self._pool: concurrent.futures.ThreadPoolExecutor | None = None

  def write(self, url: str, content: bytes) -> None:
    """Starts to write an object.

    Raises:
      StorageError: if an earlier one beneath the same directory has failed.
    """
    directory = url.rpartition("/")[0]
    with self._lock:
      before = self._beneath(directory) if url.endswith(f"/{COMMIT_MARKER}") else self._beneath(url)
      failed = [f for f in self._beneath(directory) if f.done() and f.exception()]
      for future in failed:
        future.result()
      # First in, first out: what one waits for has begun, or is next in line, so that no thread waits for ever.
      self._pool = self._pool or concurrent.futures.ThreadPoolExecutor(_AT_A_TIME, "ckpt_jax_objects")
      self._under_way[url] = self._pool.submit(_store, url, content, before)

  def settle(self, url: str) -> None:
    """Waits for what is on its way to an object, or beneath a directory.

    Raises:
      StorageError: if some of it could not be written.
    """
    with self._lock:
      waited = self._beneath(url)
    concurrent.futures.wait(waited)
    self._drop(waited)
    for future in waited:
      future.result()

  def forget(self, url: str) -> None:
    """As `settle`, for what is to be deleted or replaced: nothing arrives afterwards, and failures do not count."""
    with self._lock:
      waited = self._beneath(url)
    concurrent.futures.wait(waited)
    self._drop(waited)

  def _beneath(self, url: str) -> list[_Future]:
    return [future for u, future in self._under_way.items() if u == url or u.startswith(url + "/")]

  def _drop(self, done: list[_Future]) -> None:
    with self._lock:
      self._under_way = {u: future for u, future in self._under_way.items() if future not in done}


def _store(url: str, content: bytes, before: list[_Future]) -> None:
  for future in before:
    future.result()
  requests.store(url, content)
