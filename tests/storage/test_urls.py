"""URLs of object stores and their parts."""

import pathlib

import pytest

from ckpt_jax.errors import ConfigError
from ckpt_jax.storage.urls import is_object_store, split_url


@pytest.mark.parametrize(
  ("url", "parts"),
  [
    ("gs://bucket", ("gs", "bucket", "")),
    ("gs://bucket/", ("gs", "bucket", "")),
    ("s3://bucket/a/run/", ("s3", "bucket", "a/run")),
    ("s3://bucket//a//b", ("s3", "bucket", "a//b")),
    ("s3://bucket/layers=[64]?#%41", ("s3", "bucket", "layers=[64]?#%41")),
  ],
)
def test_url_has_a_scheme_a_bucket_and_a_key_without_slashes_around_it(url, parts):
  assert is_object_store(url) and split_url(url) == parts


@pytest.mark.parametrize("url", ["gs://", "s3:///key", "hdfs://name/run", "/gs/bucket", "gs:/bucket", ""])
def test_anything_else_is_refused_with_the_form_to_use(url):
  with pytest.raises(ConfigError, match="expected gs://BUCKET/PATH or s3://BUCKET/PATH"):
    split_url(url)


@pytest.mark.parametrize("path", ["/data/run", "run/gs://bucket", pathlib.Path("/gs/bucket"), "GS://bucket/run"])
def test_path_of_a_disk_is_no_object_store(path):
  assert not is_object_store(path)
