"""epath on object stores with few requests: what Orbax asks of a file system, in terms of a key-value map.

A bucket has no directories: `exists` and `is_dir` are answered by one listing of the name as a prefix, where fsspec
sends two or three requests. Small files are written and read whole, one request each. And two things need not be asked:

- what this process wrote or made itself in the last seconds is there, and
- a committed step never changes, so within `snapshot(step)` one recursive listing answers everything beneath it.
"""

from __future__ import annotations

import bisect
import concurrent.futures
import contextlib
import dataclasses
import datetime
import fnmatch
import glob
import io
import os
import posixpath
import threading
import time
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import fsspec.asyn
from etils import epath
from etils.epath import backend as epath_backend
from etils.epath import stat_utils

from ckpt_jax.errors import ConfigError, StorageError
from ckpt_jax.failures import without_secrets
from ckpt_jax.orbax.format import COMMIT_MARKER
from ckpt_jax.storage.clients import filesystem
from ckpt_jax.storage.urls import is_object_store, split_url

# Long enough for the checks that follow a write at once, short enough that another process's deletion is noticed.
_OWN_WRITES_S = 10.0
_PAGE = 1000
_DELETES = 16
_MAX_SNAPSHOT_PAGES = 8
Path = str | os.PathLike[str]


@dataclasses.dataclass(frozen=True)
class Entry:
  """An object: its size in bytes and when it was written, in seconds since the epoch."""

  nbytes: int
  mtime: float


class _Snapshot:
  """All objects under one URL, as listed once."""

  def __init__(self, entries: dict[str, Entry]):
    self.entries = entries
    self.keys = sorted(entries)

  def under(self, key: str) -> list[str]:
    prefix = key + "/"
    start = bisect.bisect_left(self.keys, prefix)
    end = bisect.bisect_left(self.keys, key + "0")  # "0" is the character after "/"
    return self.keys[start:end]


@contextlib.contextmanager
def _client_errors(url: Path) -> Iterator[None]:
  """Turns what gcsfs, s3fs, botocore and google.auth raise into StorageError; missing and existing files stay what they
  are, since Orbax asks for them.
  """
  try:
    yield
  except (FileNotFoundError, FileExistsError, NotImplementedError, StorageError, ConfigError):
    raise
  except PermissionError as e:
    raise StorageError(f"{os.fspath(url)}: access refused ({without_secrets(str(e))}); check the credentials") from e
  except Exception as e:
    text = without_secrets(" ".join(str(e).split()))
    if type(e).__name__ in ("NoCredentialsError", "DefaultCredentialsError", "CredentialRetrievalError"):
      text = f"no credentials ({text}); set the standard variables, a profile, or storage.anonymous: true"
    raise StorageError(f"{os.fspath(url)}: {text or type(e).__name__}") from e


class ObjectBackend(epath_backend.Backend):
  """epath's back end for gs:// and s3://."""

  def __init__(self):
    self._lock = threading.Lock()
    self._own: dict[str, tuple[float, bool]] = {}  # URL -> when this process made it, and whether it is an object
    self._snapshots: dict[str, tuple[_Snapshot, int]] = {}

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
    for entries, prefixes in self._pages(path, prefix, delimiter="/"):
      names.update(k[len(prefix) :] for k in entries)
      names.update(p[len(prefix) :].rstrip("/") for p in prefixes)
    names.discard("")
    if not names and key and not self._is_own(path):
      raise FileNotFoundError(f"{scheme}://{bucket}/{key}: no such directory")
    return sorted(names)

  def glob(self, path: Path) -> list[str]:
    """Matches one level: the pattern may only be in the last part of the path; before it nothing is one."""
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
      parts = key.split("/")
      for depth in range(len(parts)):
        directory = posixpath.join(root, *parts[:depth])
        dirs, files = found.setdefault(directory, (set(), set()))
        (files if depth == len(parts) - 1 else dirs).add(parts[depth])
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
    return {k[len(prefix) :]: e for entries, _ in self._pages(path, prefix) for k, e in entries.items() if k != prefix}

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
    scheme, bucket, key = split_url(url)
    fs = filesystem(url)
    with _client_errors(url):
      if scheme == "gs":
        return fs.cat_file(url)
      # s3fs would ask for the object's head first.
      answer = fs.call_s3("get_object", Bucket=bucket, Key=key)
      return fsspec.asyn.sync(fs.loop, answer["Body"].read)

  # -- writing

  def _write(self, url: str, content: bytes) -> None:
    with _client_errors(url):
      filesystem(url).pipe_file(url, content)
    self._note_own(url, is_object=True)

  def mkdir(self, path: Path, *, exist_ok: bool = False, mode: int | None = None) -> None:
    self.makedirs(path, exist_ok=exist_ok, mode=mode)

  def makedirs(self, path: Path, *, exist_ok: bool = False, mode: int | None = None) -> None:
    del mode  # objects have none
    if not exist_ok and self.exists(path):
      raise FileExistsError(f"{os.fspath(path)} exists already")
    self._note_own(path, is_object=False)

  def remove(self, path: Path) -> None:
    url = os.fspath(path)
    self._forget(url)
    # A key that is not there is no error to S3; GCS says so.
    self._delete(url, [url])

  def rmtree(self, path: Path) -> None:
    url = os.fspath(path).rstrip("/")
    known = self._is_own(url)
    self._forget(url)
    keys = list(self.tree(url))
    if not keys and not known:
      raise FileNotFoundError(f"{url}: no such directory")
    if keys:
      # In batches: up to 1000 keys a request on S3, 100 on GCS. Commit markers go first, so that a deletion that is cut
      # off leaves something that nobody takes for a checkpoint.
      markers = [k for k in keys if k.endswith(COMMIT_MARKER)]
      for group in (markers, [k for k in keys if not k.endswith(COMMIT_MARKER)]):
        if group:
          self._delete(url, [f"{url}/{k}" for k in group])

  def _delete(self, url: str, objects: Sequence[str]) -> None:
    """Deletes objects by their URLs, each of which means one object: fsspec's `rm` takes brackets and stars in them for
    patterns, and would delete what they match.
    """
    scheme, bucket, _ = split_url(url)
    fs = filesystem(url)
    with _client_errors(url):
      if scheme == "s3":
        for start in range(0, len(objects), _PAGE):
          keys = [{"Key": o.removeprefix(f"{scheme}://{bucket}/")} for o in objects[start : start + _PAGE]]
          answer = fs.call_s3("delete_objects", Bucket=bucket, Delete={"Objects": keys, "Quiet": True})
          for error in answer.get("Errors", []):
            raise StorageError(f"{scheme}://{bucket}/{error.get('Key')}: cannot be deleted: {error.get('Message')}")
        return
      plain = [o for o in objects if not glob.has_magic(o)]
      if plain:
        fs.rm(plain, recursive=False)
      with concurrent.futures.ThreadPoolExecutor(_DELETES) as pool:
        for _ in pool.map(fs.rm_file, [o for o in objects if glob.has_magic(o)]):
          pass

  def rename(self, path: Path, dst: Path) -> None:
    raise NotImplementedError(f"{os.fspath(path)}: object stores cannot rename; copy, and delete what was copied")

  replace = rename

  def copy(self, path: Path, dst: Path, overwrite: bool) -> None:
    source, target = os.fspath(path), os.fspath(dst)
    remote = target if is_object_store(target) else source
    if not overwrite and epath.Path(target).exists():
      raise FileExistsError(f"{target} exists already")
    with _client_errors(remote):
      fs = filesystem(remote)
      if is_object_store(source) and is_object_store(target):
        fs.cp_file(source, target)
      elif is_object_store(target):
        fs.put_file(source, target)
      else:
        fs.get_file(source, target)
    if is_object_store(target):
      self._note_own(target, is_object=True)

  # -- what need not be asked

  @contextlib.contextmanager
  def snapshot(self, path: Path) -> Iterator[None]:
    """Within the block, one listing answers for everything beneath `path`, unless it is longer than 8,000 objects.

    For what does not change meanwhile: a committed step; or a run that is looked at once.
    """
    url = os.fspath(path).rstrip("/")
    with self._lock:
      held = self._snapshots.get(url)
      if held is not None:
        self._snapshots[url] = (held[0], held[1] + 1)
    made = held is not None
    if held is None:
      _, _, key = split_url(url)
      entries: dict[str, Entry] = {}
      for count, (page, _) in enumerate(self._pages(url, key + "/" if key else "")):
        if count == _MAX_SNAPSHOT_PAGES:
          break
        entries.update(page)
      else:
        made = True
        with self._lock:
          self._snapshots[url] = (_Snapshot(entries), 1)
    try:
      yield
    finally:
      if made:
        with self._lock:
          if url in self._snapshots:
            snapshot, users = self._snapshots.pop(url)
            if users > 1:
              self._snapshots[url] = (snapshot, users - 1)

  def _snapshot_of(self, path: Path) -> _Snapshot | None:
    if not self._snapshots:
      return None
    url = os.fspath(path).rstrip("/")
    with self._lock:
      for root, (snapshot, _) in self._snapshots.items():
        if url == root or url.startswith(root + "/"):
          return snapshot
    return None

  def _note_own(self, path: Path, *, is_object: bool) -> None:
    scheme, bucket, key = split_url(path)
    now = time.monotonic()
    with self._lock:
      self._own = {p: made for p, made in self._own.items() if made[0] > now - _OWN_WRITES_S}
      while key:
        self._own[f"{scheme}://{bucket}/{key}"] = now, is_object
        key, is_object = key.rpartition("/")[0], False  # what it lies in is a directory
      url = os.fspath(path)
      for root in [r for r in self._snapshots if url.startswith(r + "/")]:
        del self._snapshots[root]  # it does change, after all

  def _forget(self, url: str) -> None:
    with self._lock:
      self._own = {p: made for p, made in self._own.items() if p != url and not p.startswith(url + "/")}
      for root in [r for r in self._snapshots if url == r or url.startswith(r + "/")]:
        del self._snapshots[root]

  def _is_own(self, path: Path) -> bool:
    return self._own_kind(path) is not None

  def _own_kind(self, path: Path) -> bool | None:
    """Whether what this process made at `path` a moment ago is an object; None if it made nothing there."""
    made = self._own.get(os.fspath(path).rstrip("/"))
    return made[1] if made is not None and made[0] > time.monotonic() - _OWN_WRITES_S else None

  # -- requests

  def _look(self, path: Path, own_writes: bool = True) -> tuple[Entry | None, bool]:
    """The object at `path`, and whether anything is beneath it."""
    _, _, key = split_url(path)
    snapshot = self._snapshot_of(path)
    if snapshot is not None:
      return snapshot.entries.get(key), bool(snapshot.under(key))
    is_object = self._own_kind(path) if own_writes else None
    if is_object is not None:
      return (Entry(0, 0.0), False) if is_object else (None, True)
    if not key:
      next(self._pages(path, ""))  # raises if there is no such bucket
      return None, True
    for entries, prefixes in self._pages(path, key, delimiter="/"):
      entry = entries.get(key)
      if entry is not None or key + "/" in prefixes:
        return entry, key + "/" in prefixes
      if any(name > key + "/" for name in (*entries, *prefixes)):
        break
    return None, False

  def _pages(
    self, url: Path, prefix: str, delimiter: str | None = None
  ) -> Iterator[tuple[dict[str, Entry], list[str]]]:
    """Pages of a listing: objects by key, and common prefixes with their slash."""
    scheme, bucket, _ = split_url(url)
    try:
      yield from self._listing(filesystem(url), scheme, bucket, prefix, delimiter)
    except FileNotFoundError as e:
      raise StorageError(f"{scheme}://{bucket}: no such bucket") from e

  def _listing(
    self, fs: Any, scheme: str, bucket: str, prefix: str, delimiter: str | None
  ) -> Iterator[tuple[dict[str, Entry], list[str]]]:
    token: dict[str, Any] = {}
    url = f"{scheme}://{bucket}/{prefix}"
    while True:
      if scheme == "gs":
        extra = {"delimiter": delimiter} if delimiter else {}
        with _client_errors(url):
          page = fs.call("GET", "b/{}/o", bucket, prefix=prefix, maxResults=_PAGE, json_out=True, **extra, **token)
        entries = {o["name"]: Entry(int(o["size"]), _seconds(o.get("updated"))) for o in page.get("items", [])}
        prefixes = list(page.get("prefixes", []))
        next_token = page.get("nextPageToken")
        token = {"pageToken": next_token}
      else:
        extra = {"Delimiter": delimiter} if delimiter else {}
        with _client_errors(url):
          page = fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, MaxKeys=_PAGE, **extra, **token)
        entries = {o["Key"]: Entry(int(o["Size"]), _seconds(o.get("LastModified"))) for o in page.get("Contents", [])}
        prefixes = [p["Prefix"] for p in page.get("CommonPrefixes", [])]
        next_token = page.get("NextContinuationToken")
        token = {"ContinuationToken": next_token}
      yield entries, prefixes
      if not next_token:
        return


class _Upload(io.BytesIO):
  """Stores what was written when it is closed, unless an exception closes it."""

  def __init__(self, store: Callable[[bytes], None]):
    super().__init__()
    self._store: Callable[[bytes], None] | None = store

  def close(self) -> None:
    store, self._store = self._store, None
    if store is not None and not self.closed:
      content = self.getvalue()
      super().close()
      store(content)

  def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
    if kind is not None:
      self._store = None
    self.close()


def _seconds(when: Any) -> float:
  if isinstance(when, str):
    when = datetime.datetime.fromisoformat(when.replace("Z", "+00:00"))
  return when.timestamp() if when else 0.0


BACKEND = ObjectBackend()  # epath's for the whole process, once `connect` was called


@contextlib.contextmanager
def snapshot(path: Path) -> Iterator[None]:
  """`ObjectBackend.snapshot` for a gs:// or s3:// path; without effect on others."""
  if is_object_store(path):
    with BACKEND.snapshot(path):
      yield
  else:
    yield
