"""epath on object stores with few requests: the file system calls of Orbax on a map from keys to objects.

A bucket has no directories: one listing with the name as prefix answers `exists` and `is_dir`, where fsspec sends two
or three requests. Small files are written and read whole, one request each. Some things need no request at all:

- what this process itself wrote in the last seconds exists, and
- a committed step never changes, so within `snapshot(step)` one recursive listing answers everything beneath it; while
  a process creates a step, `claim(step)` does the same and knows what the process adds.
"""

from __future__ import annotations

import bisect
import contextlib
import fnmatch
import io
import os
import threading
import time
import typing
from collections.abc import Callable, Iterator
from typing import Any

from etils import epath
from etils.epath import backend as epath_backend
from etils.epath import stat_utils

from ckpt_jax.orbax.format import COMMIT_MARKER
from ckpt_jax.storage import requests
from ckpt_jax.storage.behind import WriteBehind
from ckpt_jax.storage.requests import Entry
from ckpt_jax.storage.urls import is_beneath, is_object_store, split_url

# Long enough for the checks that follow a write at once, short enough that another process's deletion is noticed.
_OWN_WRITES_S = 10.0
_MAX_SNAPSHOT_PAGES = 8
_KEPT_NBYTES = 2**22  # the largest object that is kept for a second read
Path = str | os.PathLike[str]


class _Snapshot:
  """All objects under one URL, as listed once.

  Attributes:
    entries: by key.
    claimed: whether this process alone writes there, so that its own writes are added.
    contents: of small objects that were read, by key, unless it is claimed.
    users: blocks that rely on it.
  """

  def __init__(self, entries: dict[str, Entry], claimed: bool):
    self.entries = entries
    self.claimed = claimed
    self.contents: dict[str, bytes] = {}
    self.users = 0
    self._keys = sorted(entries)

  def add(self, key: str) -> None:
    if key not in self.entries:
      self.entries[key] = Entry(0, time.time())
      bisect.insort(self._keys, key)

  def under(self, key: str) -> list[str]:
    if not key:  # the bucket itself
      return self._keys
    start = bisect.bisect_left(self._keys, key + "/")
    return self._keys[start : bisect.bisect_left(self._keys, key + "0")]  # "0" is the character after "/"


class ObjectBackend(epath_backend.Backend):
  """epath's back end for gs:// and s3://."""

  def __init__(self):
    self._lock = threading.Lock()
    self._own: dict[str, tuple[float, bool]] = {}  # URL -> when this process made it, and whether it is an object
    self._snapshots: dict[str, _Snapshot] = {}
    self._written: dict[str, dict[str, bytes]] = {}  # claimed URL -> small objects that were written beneath it, by URL
    self._behind = WriteBehind()

  # -- reading

  def exists(self, path: Path) -> bool:
    return any(self._look(path))

  def isdir(self, path: Path) -> bool:
    return self._look(path)[1]

  def stat(self, path: Path) -> stat_utils.StatResult:
    entry, is_directory = self._look(path, own_writes=False)
    if entry is not None:
      return stat_utils.StatResult(is_directory=False, length=entry.nbytes, mtime=int(entry.mtime))
    if is_directory:
      return stat_utils.StatResult(is_directory=True, length=0, mtime=0)
    raise FileNotFoundError(f"{os.fspath(path)}: no such object")

  def listdir(self, path: Path) -> list[str]:
    scheme, bucket, key = split_url(path)
    snapshot = self._snapshot_of(path)
    prefix = key + "/" if key else ""
    if snapshot is not None:
      return sorted({k[len(prefix) :].partition("/")[0] for k in snapshot.under(key)})
    names: set[str] = set()
    for entries, prefixes in requests.pages(path, prefix, delimiter="/"):
      names.update(k[len(prefix) :] for k in entries)
      names.update(p[len(prefix) :].rstrip("/") for p in prefixes)
    names.discard("")
    if not names and key and self._own_kind(path) is None:
      raise FileNotFoundError(f"{scheme}://{bucket}/{key}: no such directory")
    return sorted(names)

  def glob(self, path: Path) -> list[str]:
    """The paths that match a pattern in the last part of the path; its other parts are taken literally."""
    parent, _, pattern = os.fspath(path).rpartition("/")
    try:
      names = self.listdir(parent)
    except FileNotFoundError:
      return []
    return [f"{parent}/{name}" for name in names if fnmatch.fnmatchcase(name, pattern)]

  def walk(
    self, top: Path, *, top_down: bool = True, on_error: Any = None
  ) -> Iterator[tuple[Path, list[str], list[str]]]:
    root = os.fspath(top).rstrip("/")
    found: dict[str, tuple[set[str], set[str]]] = {root: (set(), set())}
    for key in self.tree(top):
      *folders, name = key.split("/")
      directory = root
      for folder in folders:
        found[directory][0].add(folder)
        directory = f"{directory}/{folder}"
        found.setdefault(directory, (set(), set()))
      found[directory][1].add(name)
    for directory in sorted(found, reverse=not top_down):
      dirs, files = found[directory]
      yield directory, sorted(dirs), sorted(files)

  def tree(self, path: Path) -> dict[str, Entry]:
    """All objects beneath `path`, by their keys relative to it."""
    _, _, key = split_url(path)
    prefix = key + "/" if key else ""
    snapshot = self._snapshot_of(path)
    if snapshot is not None:
      return {k[len(prefix) :]: snapshot.entries[k] for k in snapshot.under(key)}
    return {
      k[len(prefix) :]: e for entries, _ in requests.pages(path, prefix) for k, e in entries.items() if k != prefix
    }

  def open(self, path: Path, mode: str) -> typing.IO[Any]:
    """Whole objects only: reading fetches all of it, writing stores it on close."""
    url = os.fspath(path)
    if "r" in mode:
      data = io.BytesIO(self._fetch(url))
      return data if "b" in mode else io.TextIOWrapper(data, encoding="utf-8")
    if "w" not in mode:
      raise NotImplementedError(f"{url}: mode {mode!r}; objects can be read and written, not appended to")
    file = _Upload(lambda content: self._write(url, content))
    return file if "b" in mode else io.TextIOWrapper(file, encoding="utf-8", write_through=True)

  def _fetch(self, url: str) -> bytes:
    _, written = self._claimed_around(url)
    if written is not None and url in written:
      return written[url]
    snapshot, key = self._snapshot_of(url), split_url(url)[2]
    if snapshot is not None and key not in snapshot.entries:
      raise FileNotFoundError(f"{url}: no such object")
    if snapshot is None or snapshot.claimed:
      return requests.fetch(url)
    if key not in snapshot.contents:
      content = requests.fetch(url)
      if len(content) > _KEPT_NBYTES:
        return content
      snapshot.contents[key] = content
    return snapshot.contents[key]

  # -- writing

  def _write(self, url: str, content: bytes) -> None:
    root, written = self._claimed_around(url)
    commits, small = url == f"{root}/{COMMIT_MARKER}", len(content) <= _KEPT_NBYTES
    if written is not None and small and not commits:
      self._behind.write(url, content)
    else:  # a step counts once its marker is there, which comes after all the rest
      self._behind.settle(root if commits else url)
      requests.store(url, content)
    if written is not None:
      with self._lock:
        if small:
          written[url] = content
        else:
          written.pop(url, None)
    self._note_own(url, is_object=True)

  def makedirs(self, path: Path, *, exist_ok: bool = False, mode: int | None = None) -> None:
    del mode  # objects have none
    if not exist_ok and self.exists(path):
      raise FileExistsError(f"{os.fspath(path)} exists already")
    self._note_own(path, is_object=False)

  mkdir = makedirs

  def remove(self, path: Path) -> None:
    url = os.fspath(path)
    snapshot = self._snapshot_of(path)
    _, written = self._claimed_around(url)
    claimed_marker = written is not None and url.endswith(COMMIT_MARKER) and url not in written
    if claimed_marker or (snapshot and snapshot.claimed and split_url(path)[2] not in snapshot.entries):
      raise FileNotFoundError(f"{url}: no such object")
    self._forget(url)
    # A key that is not there is no error to S3; GCS says so.
    requests.delete([url])

  def rmtree(self, path: Path) -> None:
    url = os.fspath(path).rstrip("/")
    known = self._own_kind(url) is not None
    self._forget(url)
    keys = list(self.tree(url))
    if not keys and not known:
      raise FileNotFoundError(f"{url}: no such directory")
    # Commit markers go first, so that a deletion that is cut off leaves something that nobody takes for a checkpoint.
    markers = [k for k in keys if k.endswith(COMMIT_MARKER)]
    for group in (markers, sorted({*keys} - {*markers})):
      requests.delete([f"{url}/{k}" for k in group])

  def rename(self, path: Path, dst: Path) -> None:
    raise NotImplementedError(f"{os.fspath(path)}: object stores cannot rename; copy, and delete what was copied")

  replace = rename

  def copy(self, path: Path, dst: Path, overwrite: bool) -> None:
    source, target = os.fspath(path), os.fspath(dst)
    if not overwrite and epath.Path(target).exists():
      raise FileExistsError(f"{target} exists already")
    self._forget(target)
    self._behind.settle(source)
    requests.copy(source, target)
    if is_object_store(target):
      self._note_own(target, is_object=True)

  # -- what needs no request

  @contextlib.contextmanager
  def snapshot(self, path: Path) -> Iterator[None]:
    """Within the block, one listing answers for everything beneath `path`, unless it is longer than 8,000 objects.

    What is read meanwhile is requested once. For a path that does not change meanwhile (a committed step), or a run
    that is looked at once. The first write of this process beneath it ends it.
    """
    url = os.fspath(path).rstrip("/")
    around = None if url in self._snapshots else self._snapshot_of(url)
    with contextlib.nullcontext() if around is not None and not around.claimed else self._listed(url, claimed=False):
      yield

  @contextlib.contextmanager
  def claim(self, path: Path) -> Iterator[None]:
    """As `snapshot`, for a path where only this process writes, and through this back end; its writes are added.

    Until the end of the block, small objects that it writes are read back without a request, and written behind the
    caller (see `behind`), but for the commit marker of `path` itself, whose write waits for all of them.
    """
    url = os.fspath(path).rstrip("/")
    self._forget(url)  # an earlier claim, or what was written there before it was removed
    with self._listed(url, claimed=True):
      self._written[url] = {}
      try:
        yield
      finally:
        self._written.pop(url, None)

  def end_claim(self, path: Path) -> None:
    """Ends claims to what is around `path`: from here on files count that TensorStore or other processes wrote.

    What this process itself wrote there is still as it wrote it.
    """
    url = os.fspath(path).rstrip("/")
    self._behind.settle(url)
    with self._lock:
      for root in [r for r, s in self._snapshots.items() if s.claimed and is_beneath(url, r)]:
        del self._snapshots[root]

  def wrote(self, path: Path) -> None:
    """Notes an object that another client of this process has written, as TensorStore does."""
    self._note_own(path, is_object=True)

  @contextlib.contextmanager
  def _listed(self, url: str, *, claimed: bool) -> Iterator[None]:
    held = self._snapshots.get(url) or self._list_all(url, claimed)
    if held is None:
      yield
      return
    with self._lock:
      self._snapshots[url] = held
      held.users += 1
    try:
      yield
    finally:
      with self._lock:
        held.users -= 1
        if not held.users and self._snapshots.get(url) is held:
          del self._snapshots[url]

  def _list_all(self, url: str, claimed: bool) -> _Snapshot | None:
    _, _, key = split_url(url)
    entries: dict[str, Entry] = {}
    for count, (page, _) in enumerate(requests.pages(url, key + "/" if key else "")):
      if count == _MAX_SNAPSHOT_PAGES:
        return None
      entries.update(page)
    return _Snapshot(entries, claimed)

  def _snapshot_of(self, path: Path) -> _Snapshot | None:
    if not self._snapshots:
      return None
    url = os.fspath(path).rstrip("/")
    with self._lock:
      for root, snapshot in self._snapshots.items():
        if is_beneath(url, root):
          return snapshot
    return None

  def _note_own(self, path: Path, *, is_object: bool) -> None:
    scheme, bucket, key = split_url(path)
    url, own_key = os.fspath(path), key
    now = time.monotonic()
    with self._lock:
      self._own = {p: made for p, made in self._own.items() if made[0] > now - _OWN_WRITES_S}
      while key:
        self._own[f"{scheme}://{bucket}/{key}"] = now, is_object and key == own_key  # its parents are directories
        key = key.rpartition("/")[0]
      for root in [r for r in self._snapshots if url.startswith(r + "/")] if is_object else []:
        if self._snapshots[root].claimed:
          self._snapshots[root].add(own_key)
        else:
          del self._snapshots[root]  # it does change, after all

  def _claimed_around(self, url: str) -> tuple[str, dict[str, bytes] | None]:
    """The claimed place around an object, and what was written there; nothing if there is none."""
    return next((found for found in list(self._written.items()) if url.startswith(found[0] + "/")), ("", None))

  def _forget(self, url: str) -> None:
    self._behind.forget(url)  # else it would come back
    with self._lock:
      for objects in self._written.values():
        for gone in [u for u in objects if is_beneath(u, url)]:
          del objects[gone]
      self._own = {p: made for p, made in self._own.items() if not is_beneath(p, url)}
      for root in [r for r in self._snapshots if is_beneath(url, r)]:
        del self._snapshots[root]

  def _own_kind(self, path: Path) -> bool | None:
    """True if this process wrote an object at `path` a moment ago, False for a directory, None for neither."""
    made = self._own.get(os.fspath(path).rstrip("/"))
    return made[1] if made is not None and made[0] > time.monotonic() - _OWN_WRITES_S else None

  # -- requests

  def _look(self, path: Path, own_writes: bool = True) -> tuple[Entry | None, bool]:
    """The object at `path`, and whether there are objects beneath it."""
    _, _, key = split_url(path)
    snapshot = self._snapshot_of(path)
    is_object = self._own_kind(path) if own_writes and (snapshot is None or snapshot.claimed) else None
    if is_object is not None:
      return (Entry(0, 0.0), False) if is_object else (None, True)
    if snapshot is not None:
      return snapshot.entries.get(key), bool(snapshot.under(key))
    if not key:
      next(requests.pages(path, ""))  # raises if there is no such bucket
      return None, True
    for entries, prefixes in requests.pages(path, key, delimiter="/"):
      entry = entries.get(key)
      if entry is not None or key + "/" in prefixes:
        return entry, key + "/" in prefixes
      if any(name > key + "/" for name in (*entries, *prefixes)):
        break
    return None, False


class _Upload(io.BytesIO):
  """Stores its content when it is closed, unless an exception closes it."""

  def __init__(self, store: Callable[[bytes], None]):
    super().__init__()
    self._store: Callable[[bytes], None] | None = store

  def close(self) -> None:
    store, self._store = self._store, None
    if store is not None:
      content = self.getvalue()
      super().close()
      store(content)

  def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
    if kind is not None:
      self._store = None
    self.close()


BACKEND = ObjectBackend()  # for all of the process, once `connect` has registered it with epath


def snapshot(path: Path) -> contextlib.AbstractContextManager[None]:
  """`ObjectBackend.snapshot` for a gs:// or s3:// path; without effect on others."""
  return BACKEND.snapshot(path) if is_object_store(path) else contextlib.nullcontext()
