"""The two clients of a bucket: TensorStore's driver for data, an fsspec file system for metadata.

Both get the same endpoint, credentials and retries. This module holds no credentials: both clients find them (the
standard AWS variables, profiles and instance roles; Google's application default credentials), and only their names can
appear in a message.
"""

from __future__ import annotations

import functools
import os
import urllib.parse
from typing import Any

from ckpt_jax.config import StorageConfig
from ckpt_jax.errors import ConfigError, StorageError
from ckpt_jax.storage.retry import gcs_middleware, max_retries, s3_session_class
from ckpt_jax.storage.urls import is_object_store, split_url

_options: dict[str, StorageConfig] = {}


def use_options(url: str | os.PathLike[str], options: StorageConfig) -> None:
  """Sets the options for all paths of the bucket of `url`.

  Raises:
    ConfigError: if the options contradict each other or the URL.
  """
  scheme, bucket, _ = split_url(url)
  _check(scheme, options)
  _options[f"{scheme}://{bucket}"] = options


def options_of(url: str | os.PathLike[str]) -> StorageConfig:
  """The options that `use_options` set for the bucket of `url`, else the defaults."""
  scheme, bucket, _ = split_url(url)
  return _options.get(f"{scheme}://{bucket}", StorageConfig())


def _check(scheme: str, options: StorageConfig) -> None:
  if options.endpoint is not None:
    parts = urllib.parse.urlsplit(options.endpoint)
    if parts.scheme not in ("http", "https") or not parts.hostname:
      raise ConfigError("storage.endpoint: expected http://HOST[:PORT] or https://HOST[:PORT]")
    if parts.username or parts.password:
      raise ConfigError("storage.endpoint: holds credentials; pass them by the AWS variables or a profile")
    if scheme == "s3" and options.path_style is False:
      raise ConfigError(
        "storage.path_style: false does not work with storage.endpoint: TensorStore puts the bucket into the path of "
        "an endpoint of your own; leave path_style out"
      )
  if options.profile and options.anonymous:
    raise ConfigError("storage.anonymous and storage.profile exclude each other; leave one out")


# -- TensorStore


def kvstore_spec(url: str | os.PathLike[str]) -> dict[str, Any]:
  """TensorStore's key-value store for everything under `url`, as JSON; for a local path with the `file` driver.

  Context resources (request retries and concurrency) are inline, so that the spec is complete.
  """
  text = os.fspath(url)
  if not is_object_store(text):
    return {"driver": "file", "path": os.path.join(os.path.abspath(os.path.expanduser(text)), "")}
  scheme, bucket, key = split_url(text)
  options = options_of(text)
  retries = {
    "max_retries": max_retries(options.retry),
    "initial_delay": f"{options.retry.initial_delay * 1e3:.0f}ms",
    "max_delay": f"{options.retry.max_delay * 1e3:.0f}ms",
  }
  path = key + "/" if text.endswith("/") and key else key
  if scheme == "gs":
    driver = options.driver or os.environ.get("TENSORSTORE_GCS_BACKEND", "gcs")
    spec: dict[str, Any] = {"driver": driver, "bucket": bucket, "path": path, "gcs_request_retries": retries}
    endpoint = os.environ.get("STORAGE_EMULATOR_GRPC_HOST")
    if driver == "gcs_grpc":
      return spec | ({"endpoint": endpoint} if endpoint else {})
    return spec if options.requests == "auto" else spec | {"gcs_request_concurrency": {"limit": options.requests}}
  spec = {"driver": "s3", "bucket": bucket, "path": path, "s3_request_retries": retries}
  endpoint, region = _s3_endpoint_and_region(options)
  spec |= {name: value for name, value in (("endpoint", endpoint), ("aws_region", region)) if value}
  if _anonymous(options):
    spec["aws_credentials"] = {"type": "anonymous"}
  elif options.profile:
    spec["aws_credentials"] = {"type": "profile", "profile": options.profile}
  elif "AWS_ACCESS_KEY_ID" in os.environ:
    # The default chain would find it too, after complaints on stderr about missing config files.
    spec["aws_credentials"] = {"type": "environment"}
  if options.requests != "auto":
    spec["s3_request_concurrency"] = {"limit": options.requests}
  return spec


def _anonymous(options: StorageConfig) -> bool:
  if options.anonymous is not None:
    return options.anonymous
  return os.environ.get("AWS_NO_SIGN_REQUEST", "").lower() in ("1", "true", "yes")


def _s3_endpoint_and_region(options: StorageConfig) -> tuple[str | None, str | None]:
  """Endpoint and region as botocore finds them in options, variables and profile, so that both clients agree."""
  variables = {k: v for k, v in os.environ.items() if k.startswith("AWS_") and "SECRET" not in k}
  return _found_by_botocore(options, frozenset(variables.items()))


@functools.lru_cache(maxsize=64)
def _found_by_botocore(options: StorageConfig, variables: frozenset[tuple[str, str]]) -> tuple[str | None, str | None]:
  import botocore
  import botocore.config
  import botocore.exceptions
  import botocore.session

  try:
    client = botocore.session.Session(profile=options.profile).create_client(
      "s3",
      endpoint_url=options.endpoint,
      region_name=options.region or dict(variables).get("AWS_REGION"),  # which botocore alone of AWS's SDKs ignores
      config=botocore.config.Config(signature_version=botocore.UNSIGNED),
    )
  except botocore.exceptions.BotoCoreError as e:
    raise ConfigError(f"s3: {e}; check AWS_PROFILE, AWS_REGION and storage.profile", topic="credentials") from None
  found = client.meta.endpoint_url
  own = None if (urllib.parse.urlsplit(found).hostname or "").endswith(".amazonaws.com") else found
  name = client.meta.region_name
  return own, None if name == "aws-global" else (name or ("us-east-1" if own else None))


# -- fsspec


def filesystem(url: str | os.PathLike[str]) -> Any:
  """The fsspec file system (gcsfs or s3fs) for the bucket of `url`: our retries, and no cache of listings."""
  scheme, _, _ = split_url(url)
  options = options_of(url)
  if scheme == "gs":
    return _gcs_filesystem(options, options.endpoint or os.environ.get("STORAGE_EMULATOR_HOST"))
  endpoint, region = _s3_endpoint_and_region(options)
  return _s3_filesystem(options, endpoint, region, _anonymous(options))


@functools.cache
def _gcs_filesystem(options: StorageConfig, endpoint: str | None) -> Any:
  # The core class: gcsfs's default class looks for hierarchical namespaces, and hangs for 60 s without credentials.
  try:
    from gcsfs.core import GCSFileSystem
  except ImportError as e:
    raise StorageError("gs:// needs gcsfs: pip install gcsfs", topic="missing-package") from e
  return GCSFileSystem(
    token="anon" if endpoint or options.anonymous else _gcs_token(),
    endpoint_url=endpoint,
    use_listings_cache=False,
    skip_instance_cache=True,
    session_kwargs={"middlewares": (gcs_middleware(options.retry),)},
  )


def _gcs_token() -> str:
  """The method of gcsfs that will find credentials. Left alone it asks the metadata server once more, for 15 s."""
  import google.auth

  try:
    google.auth.default()
    return "google_default"
  except google.auth.exceptions.DefaultCredentialsError:
    return "anon"


@functools.cache
def _s3_filesystem(options: StorageConfig, endpoint: str | None, region: str | None, anonymous: bool) -> Any:
  try:
    import s3fs
  except ImportError as e:
    raise StorageError('s3:// needs s3fs: pip install "ckpt_jax[s3]"', topic="missing-package") from e
  config: dict[str, Any] = {"http_session_cls": s3_session_class(options.retry), "retries": {"total_max_attempts": 1}}
  if endpoint or options.path_style is not None:
    config["s3"] = {"addressing_style": "path" if endpoint or options.path_style else "virtual"}
  return s3fs.S3FileSystem(
    anon=anonymous,
    endpoint_url=endpoint,
    profile=options.profile,
    client_kwargs={"region_name": region} if region else {},
    config_kwargs=config,
    use_listings_cache=False,
    skip_instance_cache=True,
  )
