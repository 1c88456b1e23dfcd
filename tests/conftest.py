"""Two virtual CPU devices in the test process, strict promotion in all processes, buckets of real servers."""

import gc
import os
import signal
import subprocess

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
# Environment variables, so that processes started by tests do not promote dtypes and ranks implicitly either.
os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell runs the suite in the background
  signal.signal(signal.SIGINT, signal.default_int_handler)  # programs started by tests must be interruptible

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ckpt_jax.bench.buckets import gcs_server, s3_bucket, s3_process

# No deadline: on a busy machine slow examples are no finding.
hypothesis.settings.register_profile("patient", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
# Each run of the suite checks the same examples, so that a failure is due to the change under test;
# HYPOTHESIS_PROFILE=random draws new ones (make fuzz).
hypothesis.settings.register_profile("same", hypothesis.settings.get_profile("patient"), derandomize=True)
hypothesis.settings.register_profile("random", hypothesis.settings.get_profile("patient"))
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


def pytest_collection_finish():
  """Exempts imported objects from garbage collection: there are a million, and each collection took half a second."""
  gc.collect()
  gc.freeze()


def bits(leaf):
  """What a restore must preserve: type, dtype, shape and every bit."""
  if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    return jax.Array, str(leaf.dtype), leaf.shape, np.asarray(jax.random.key_data(leaf)).tobytes()
  if isinstance(leaf, jax.Array):
    return jax.Array, str(leaf.dtype), leaf.shape, np.asarray(leaf).tobytes()
  if isinstance(leaf, (np.ndarray, np.generic)):
    return type(leaf), str(leaf.dtype), leaf.shape, leaf.tobytes()
  if isinstance(leaf, (float, complex)):
    return type(leaf), None, None, np.asarray(leaf).tobytes()  # distinguishes -0.0, compares NaNs
  return type(leaf), None, None, leaf


@pytest.fixture
def lenient_jax(monkeypatch):
  """Gives processes that a test starts jax's default promotion, which optax and plain trainers need.

  They also compile with few optimizations, since they run only a few steps.
  """
  monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
  monkeypatch.setenv("JAX_NUMPY_DTYPE_PROMOTION", "standard")
  monkeypatch.setenv("JAX_NUMPY_RANK_PROMOTION", "allow")


@pytest.fixture(scope="session")
def s3_address():
  with s3_process() as address:
    yield address


@pytest.fixture
def s3(s3_address, monkeypatch):
  """An empty bucket on a real S3 server, reachable from this process and its children."""
  with s3_bucket(s3_address) as bucket:
    for name, value in bucket.env.items():
      monkeypatch.setenv(name, value)
    yield bucket


@pytest.fixture
def gcs(tmp_path_factory, monkeypatch):
  """An empty bucket on a real GCS server, reachable from this process and its children."""
  with gcs_server(tmp_path_factory.mktemp("objects")) as bucket:
    for name, value in bucket.env.items():
      monkeypatch.setenv(name, value)
    yield bucket


@pytest.fixture
def small_disk(tmp_path_factory):
  """A disk of 12 MB."""
  if os.geteuid() != 0:
    pytest.skip("mounting a tmpfs needs root")
  place = tmp_path_factory.mktemp("disk")
  mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", place], capture_output=True, text=True)
  if mounted.returncode:
    pytest.skip(f"cannot mount a tmpfs here: {mounted.stderr.strip()}")
  yield place
  subprocess.run(["umount", "-l", place], check=True)


@pytest.fixture
def assert_same():
  """Fails unless two trees have the same structure and their leaves the same types and bits."""

  def check(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
      assert bits(a) == bits(b), jax.tree_util.keystr(path)

  return check
