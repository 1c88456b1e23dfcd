"""Requests to buckets for everything but array data: pages of listings, small objects, copies, deletions.

The only module that knows how the two clients, gcsfs and s3fs, differ. Where fsspec would send two or three requests,
these functions send one.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import datetime
import glob
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

import fsspec.asyn

from ckpt_jax.errors import ConfigError, StorageError
from ckpt_jax.failures import without_secrets
from ckpt_jax.storage.clients import filesystem
from ckpt_jax.storage.retry import GaveUpError
from ckpt_jax.storage.urls import is_object_store, split_url

_PAGE = 1000
_DELETES = 16


@dataclasses.dataclass(frozen=True)
class Entry:
  """An object: its size in bytes and when it was written, in seconds since the epoch."""

  nbytes: int
  mtime: float


_Page = tuple[dict[str, Entry], list[str], str | None]  # objects by key, common prefixes, token of the next page


def pages(
  url: str | os.PathLike[str], prefix: str, delimiter: str = ""
) -> Iterator[tuple[dict[str, Entry], list[str]]]:
  """Pages of a listing of the bucket of `url`: objects by key, and common prefixes with their slash.

  Raises:
    StorageError: if there is no such bucket, or it does not answer.
  """
  scheme, bucket, _ = split_url(url)
  fs = filesystem(url)
  list_page = _gcs_page if scheme == "gs" else _s3_page
  token: str | None = ""
  while token is not None:
    with _client_errors(f"{scheme}://{bucket}/{prefix}"):
      try:
        entries, prefixes, token = list_page(fs, bucket, prefix, delimiter, token)
      except FileNotFoundError as e:
        raise StorageError(f"{scheme}://{bucket}: no such bucket", topic="no-such-bucket") from e
    yield entries, prefixes


def _gcs_page(fs: Any, bucket: str, prefix: str, delimiter: str, token: str) -> _Page:
  extra = {name: value for name, value in (("delimiter", delimiter), ("pageToken", token)) if value}
  page = fs.call("GET", "b/{}/o", bucket, prefix=prefix, maxResults=_PAGE, json_out=True, **extra)
  entries = {o["name"]: Entry(int(o["size"]), _seconds(o.get("updated"))) for o in page.get("items", [])}
  return entries, page.get("prefixes", []), page.get("nextPageToken")


def _s3_page(fs: Any, bucket: str, prefix: str, delimiter: str, token: str) -> _Page:
  extra = {name: value for name, value in (("Delimiter", delimiter), ("ContinuationToken", token)) if value}
  page = fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, MaxKeys=_PAGE, **extra)
  entries = {o["Key"]: Entry(int(o["Size"]), _seconds(o.get("LastModified"))) for o in page.get("Contents", [])}
  return entries, [p["Prefix"] for p in page.get("CommonPrefixes", [])], page.get("NextContinuationToken")


def _seconds(when: Any) -> float:
  if isinstance(when, str):
    when = datetime.datetime.fromisoformat(when.replace("Z", "+00:00"))
  return when.timestamp() if when else 0.0


def fetch(url: str) -> bytes:
  """The content of an object.

  Raises:
    FileNotFoundError: if there is none.
    StorageError: if it cannot be read.
  """
  scheme, bucket, key = split_url(url)
  fs = filesystem(url)
  with _client_errors(url):
    if scheme == "gs":
      return fs.cat_file(url)
    # s3fs would ask for the object's head first.
    answer = fs.call_s3("get_object", Bucket=bucket, Key=key)
    return fsspec.asyn.sync(fs.loop, answer["Body"].read)


def store(url: str, content: bytes) -> None:
  """Writes an object. Raises StorageError if that fails."""
  with _client_errors(url):
    filesystem(url).pipe_file(url, content)


def copy(source: str, target: str) -> None:
  """Copies an object within the store, or from or to a local file, whose path is then not a URL.

  Raises:
    FileNotFoundError: if there is no `source`.
    StorageError: if that fails.
  """
  remote = target if is_object_store(target) else source
  fs = filesystem(remote)
  with _client_errors(remote):
    if is_object_store(source) and is_object_store(target):
      fs.cp_file(source, target)
    elif is_object_store(target):
      fs.put_file(source, target)
    else:
      fs.get_file(source, target)


def delete(objects: Sequence[str]) -> None:
  """Deletes objects of one bucket by URL, each literally: fsspec's `rm` would delete what brackets and stars match.

  Raises:
    FileNotFoundError: for an object that is not there on gs://; to S3 that is no error.
    StorageError: if that fails.
  """
  if not objects:
    return
  scheme, bucket, _ = split_url(objects[0])
  fs = filesystem(objects[0])
  with _client_errors(objects[0]):
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
      list(pool.map(fs.rm_file, [o for o in objects if glob.has_magic(o)]))


# What the clients say where they raise no PermissionError: gcsfs for 401 and 403, s3fs for 401 and expired tokens.
_REFUSED = re.compile(r"^Forbidden|\b401\b|Unauthorized|Expired ?Token|Invalid ?Token")


@contextlib.contextmanager
def _client_errors(url: str) -> Iterator[None]:
  """Raises StorageError for what the clients raise, except for missing and existing files, which Orbax expects."""
  try:
    yield
  except (FileNotFoundError, FileExistsError, NotImplementedError, StorageError, ConfigError):
    raise
  except PermissionError as e:
    raise StorageError(
      f"{url}: access refused ({without_secrets(str(e))}); check the credentials", topic="credentials"
    ) from e
  except Exception as e:
    text = without_secrets(" ".join(str(e).split()))
    topic = "store-does-not-answer" if isinstance(e, GaveUpError) else None
    if _REFUSED.search(text) and not isinstance(e, GaveUpError):
      text, topic = f"access refused ({text}); check the credentials", "credentials"
    if type(e).__name__ in ("NoCredentialsError", "DefaultCredentialsError", "CredentialRetrievalError"):
      text = f"no credentials ({text}); set the standard variables, a profile, or storage.anonymous: true"
      topic = "credentials"
    raise StorageError(f"{url}: {text or type(e).__name__}", topic=topic) from e
