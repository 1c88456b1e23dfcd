"""Only proven damage is damage: what cannot be read for now is a StorageError, and stays where it is."""

import os
import pathlib
import shutil
import subprocess
import sys

import jax.numpy as jnp
import pytest

import ckpt_jax as ckpt
from ckpt_jax.failures import is_damage, is_unreachable

PROGRAM = str(pathlib.Path(__file__).parents[1] / "programs" / "unreadable.py")
STATE = {"w": jnp.ones(4), "n": 3}


def test_files_without_permission_and_want_of_descriptors_prove_nothing_of_a_step(tmp_path):
  command = [sys.executable, PROGRAM, str(tmp_path)]
  if os.geteuid() == 0:  # root reads everything
    if shutil.which("setpriv") is None:
      pytest.skip("needs setpriv to be refused anything as root")
    command = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search", *command]
  done = subprocess.run(
    command,
    capture_output=True,
    text=True,
    timeout=300,
    env={**os.environ, "JAX_PLATFORMS": "cpu"},
  )
  assert done.returncode == 0 and "fine" in done.stdout, done.stdout + done.stderr[-3000:]


def test_link_that_leads_nowhere_and_a_loop_of_links_are_told_apart(tmp_path):
  with ckpt.Checkpointer(tmp_path) as c:
    for step in range(2):
      c.save(step, STATE)
    c.wait()
    manifest = tmp_path / "1" / "default" / "manifest.ocdbt"
    content = manifest.read_bytes()
    manifest.unlink()
    manifest.symlink_to(manifest)  # as a broken mount answers: ELOOP here
    with pytest.raises(ckpt.StorageError, match="symbolic links"):
      c.restore(like=STATE)
    manifest.unlink()
    manifest.write_bytes(content)
    assert c.restore(like=STATE).step == 1
    manifest.unlink()  # gone from a step that is there: that is damage
    restored = c.restore(like=STATE)
    assert restored.step == 0 and list(restored.report.quarantined) == [1]


def test_step_that_retention_cannot_read_for_now_stays_and_is_judged_again(tmp_path):
  rules = {"retention": {"last": 1, "best": {"metric": "loss", "mode": "min", "n": 1}}}
  with ckpt.Checkpointer(tmp_path, rules) as c:
    c.save(0, STATE, metrics={"loss": 0.1})
    c.save(1, STATE, metrics={"loss": 0.5})
  metadata = tmp_path / "0" / "_CHECKPOINT_METADATA"
  content = metadata.read_bytes()
  metadata.unlink()
  metadata.symlink_to(metadata)  # ELOOP: there, and not to be read
  with ckpt.Checkpointer(tmp_path, rules) as c:
    for step in (2, 3):
      c.save(step, STATE, metrics={"loss": 0.9})
      c.wait()
    metadata.unlink()
    metadata.write_bytes(content)
    c.save(4, STATE, metrics={"loss": 0.9})
    c.wait()
    assert [s.step for s in c.steps()] == [0, 4] and c.best_step() == 0


@pytest.mark.parametrize("scheme", ["gcs", "s3"])
def test_bucket_that_lets_nobody_in_for_now_loses_no_step(request, scheme):
  bucket = request.getfixturevalue(scheme)
  config = {"storage": {"retry": {"deadline": "300ms"}}}
  with ckpt.Checkpointer(bucket.url + "/run", config) as c:
    for step in range(2):
      c.save(step, STATE)
    c.wait()
    for status in (401, 403, 503):
      bucket.proxy.fail_status, bucket.proxy.fail_share = status, 1.0
      # The arrays alone, behind metadata that can be read; then everything.
      for fails in (lambda method, path: "ocdbt" in path, lambda method, path: True):
        bucket.proxy.fails = fails
        with pytest.raises(ckpt.StorageError):
          c.restore(like=STATE)
        with pytest.raises(ckpt.StorageError):
          c.restore_or_init(lambda: STATE)
        if fails("GET", "/"):
          with pytest.raises(ckpt.StorageError) as refused:
            ckpt.verify(c.directory)
          assert refused.value.topic == ("store-does-not-answer" if status == 503 else "credentials")
        else:
          assert {f.kind for f in ckpt.verify(c.directory, 1)} == {"unreadable"}
      bucket.proxy.fail_share = 0.0
      restored = c.restore(like=STATE)
      assert restored.step == 1 and not restored.report.quarantined
    assert not (c.directory / ".ckpt_jax" / "aside").exists()


@pytest.mark.parametrize(
  ("message", "unreachable", "damage"),
  [
    ("PERMISSION_DENIED: Error reading local file: Permission denied [os_error_code='13']", True, False),
    ("UNKNOWN: Failed to open: Too many levels of symbolic links [os_error_code='40']", True, False),
    ("INTERNAL: Error reading: Input/output error [os_error_code='5']", True, False),
    ("RESOURCE_EXHAUSTED: Failed to open: Too many open files [os_error_code='24']", True, False),
    ("FAILED_PRECONDITION: Stale file handle [os_error_code='116']", True, False),
    ("UNAUTHENTICATED: Error reading gs://b/x [http_response_code='401']", True, False),
    ("PERMISSION_DENIED: s3 access denied [http_response_code='403']", True, False),
    ("ABORTED: All 3 retry attempts failed: HTTP 503", True, False),
    ("NOT_FOUND: Error reading local file [os_error_code='2']", False, True),
    ("DATA_LOSS: Error decoding manifest: CRC-32C checksum verification failed", False, True),
    ("OUT_OF_RANGE: Requested byte range [0, 9) is not valid for value of size 3", False, True),
    ("NOT_FOUND: Error reading gs://b/x [http_response_code='404']", False, True),
    ("an error of a library that nobody expected", False, False),
  ],
)
def test_errors_are_sorted_by_what_they_prove(message, unreachable, damage):
  error = RuntimeError("wrapped")
  error.__cause__ = ValueError(message)
  assert is_unreachable(error) == unreachable
  assert not unreachable or not damage
  if not unreachable:
    assert is_damage(error) == damage
