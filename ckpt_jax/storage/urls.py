"""URLs of object stores and their parts."""

from __future__ import annotations

import os

from ckpt_jax.errors import ConfigError

SCHEMES = ("gs", "s3")


def is_object_store(path: str | os.PathLike[str]) -> bool:
  """Whether `path` is a gs:// or s3:// URL."""
  return os.fspath(path).startswith(tuple(f"{scheme}://" for scheme in SCHEMES))


def is_beneath(url: str, directory: str) -> bool:
  """Whether a URL is that of `directory`, which ends without a slash, or of something in it."""
  return url == directory or url.startswith(directory + "/")


def split_url(url: str | os.PathLike[str]) -> tuple[str, str, str]:
  """Scheme, bucket and key of a URL; the key has no slash at either end.

  Raises:
    ConfigError: if it is no gs:// or s3:// URL, or has no bucket.
  """
  text = os.fspath(url)
  scheme, _, rest = text.partition("://")
  bucket, _, key = rest.partition("/")
  if scheme not in SCHEMES or not bucket:
    raise ConfigError(f"{text}: expected gs://BUCKET/PATH or s3://BUCKET/PATH", topic="run-directory")
  return scheme, bucket, key.strip("/")
