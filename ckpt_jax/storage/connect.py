"""Makes epath, TensorStore and Orbax reach a bucket."""

from __future__ import annotations

import os
import threading

from ckpt_jax.config import StorageConfig
from ckpt_jax.storage.clients import kvstore_spec, options_of, use_options
from ckpt_jax.storage.objects import BACKEND
from ckpt_jax.storage.urls import is_object_store, split_url

_lock = threading.Lock()


def connect(url: str | os.PathLike[str], options: StorageConfig | None = None) -> None:
  """Makes epath, TensorStore and Orbax reach the bucket of `url`; without effect on local paths.

  Call it before Orbax opens a gs:// or s3:// path.

  Args:
    url: any path.
    options: used for all paths of this bucket from now on; None keeps the current ones.

  Raises:
    ConfigError: if the options contradict each other or the URL.
    StorageError: if the client library is not installed.
  """
  if not is_object_store(url):
    return
  from ckpt_jax.orbax import private  # a local run is listed without Orbax, whose import takes half a second

  with _lock:
    if options is not None:
      use_options(url, options)
    if split_url(url)[0] == "gs":
      # TensorStore and gcsfs read one variable each.
      endpoint = options_of(url).endpoint or os.environ.get("STORAGE_EMULATOR_HOST")
      if endpoint:
        os.environ.setdefault("TENSORSTORE_GCS_HTTP_URL", endpoint)
        # Spares TensorStore the search for credentials that an emulator does not need.
        os.environ.setdefault("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")
    private.teach_object_stores(BACKEND, kvstore_spec)
