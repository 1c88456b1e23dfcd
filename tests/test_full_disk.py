"""A disk that is really full: a small tmpfs."""

import os
import subprocess
import time

import jax.numpy as jnp
import pytest

import ckpt_jax as ckpt


@pytest.fixture
def small_disk(tmp_path):
  if os.geteuid() != 0:
    pytest.skip("mounting a tmpfs needs root")
  mounted = subprocess.run(
    ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", tmp_path], capture_output=True, text=True
  )
  if mounted.returncode:
    pytest.skip(f"cannot mount a tmpfs here: {mounted.stderr.strip()}")
  yield tmp_path
  subprocess.run(["umount", "-l", tmp_path], check=True)


def test_full_disk_reaches_the_next_save_once_and_earlier_steps_stay(small_disk):
  small, large = {"x": jnp.arange(1000.0)}, {"x": jnp.arange(8.0 * (1 << 20))}
  c = ckpt.Checkpointer(small_disk / "run")
  c.save(0, small)
  c.save(1, large)  # 32 MB on 12 MB; either save or the write behind it fails
  deadline = time.monotonic() + 60
  with pytest.raises(ckpt.SaveFailedError, match="step 1 was not saved") as e:
    while time.monotonic() < deadline:
      c.save(2, small)
      time.sleep(0.05)
  assert isinstance(e.value, ckpt.OutOfSpaceError), "told as what it is"
  assert c.latest_step() == 0
  for leftover in (small_disk / "run").glob("*.orbax-checkpoint-tmp*"):
    subprocess.run(["rm", "-r", leftover], check=True)
  assert c.save(3, small)
  c.close()
  with ckpt.Checkpointer(small_disk / "run") as again:
    assert [s.step for s in again.steps()] == [0, 3]
    assert again.restore(0).state["x"].sum() == small["x"].sum()


def test_directory_that_cannot_be_made_is_a_storage_error(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(ckpt.StorageError, match="cannot open the run"):
    ckpt.Checkpointer(tmp_path / "file" / "run")
