"""What a job that goes on finds in the last committed step of leaves that do not change: see `unchanged`."""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import math
from collections.abc import Callable

from etils import epath

from ckpt_jax.config import LayoutConfig
from ckpt_jax.job.threads import Worker
from ckpt_jax.layout.homes import FILE, Home, Saved, read_homes
from ckpt_jax.orbax.format import COMMIT_MARKER, process_database
from ckpt_jax.storage.objects import BACKEND
from ckpt_jax.storage.urls import is_object_store


class LookBack:
  """What a job that goes on finds in the last committed step.

  On a disk that is read when the first save asks. A save waits for no request to a bucket: there it is read ahead, and
  the first save does without if it has not arrived.
  """

  def __init__(self) -> None:
    self._begun = False
    self._worker: Worker | None = None
    self._found: tuple[epath.Path, concurrent.futures.Future[dict[str, Home]]] | None = None

  def begin(self, newest: Callable[[], epath.Path | None], number: int) -> None:
    """Begins to read ahead what process `number` wrote of the state that `newest` returns; once."""
    if self._begun:
      return
    self._begun = True
    if (item := newest()) is not None and is_object_store(item):
      self._worker = Worker("ckpt_jax-homes")
      self._found = item, self._worker.submit(functools.partial(_read_in_bucket, item, number))

  def end(self, item: epath.Path | None, number: int) -> Saved | None:
    """What is known of the state `item`; None if it has no homes."""
    homes: dict[str, Home] = {}
    if item is not None and not is_object_store(item):
      homes = read_homes(item / process_database(number))
    elif self._found is not None and self._found[0] == item and self._found[1].done():
      with contextlib.suppress(Exception):  # the bucket does not answer: everything is written
        homes = self._found[1].result()
    if self._worker is not None:
      self._worker.close()
    if item is None or not homes:
      return None
    still = {kept.path: 1 for home in homes.values() for kept in home.leaves.values()}
    return Saved(item, LayoutConfig(), {}, {}, {}, still, {}, homes)


def _read_in_bucket(item: epath.Path, number: int) -> dict[str, Home]:
  """The homes of process `number` in a committed step of a bucket, but for those of which an object was written since.

  Copies that the bucket makes are objects of their own, so that nothing else says that they are what they were.
  """
  database = item / process_database(number)
  if not (homes := read_homes(database)):
    return {}
  objects = {key: entry.mtime for key, entry in BACKEND.tree(item.parent).items()}
  committed, inside = objects.get(COMMIT_MARKER, 0.0), f"{item.name}/{database.name}"

  def is_as_committed(home: Home) -> bool:
    return all(objects.get(f"{inside}/{home.name}/{file}", math.inf) <= committed for file in home.files)

  noted = objects.get(f"{inside}/{FILE}", math.inf) <= committed
  return {name: home for name, home in homes.items() if noted and is_as_committed(home)}
