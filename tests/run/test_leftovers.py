"""What unfinished saves leave behind goes, if it is ours and dead; nothing else does."""

import os
import shutil
import subprocess
import sys
import time

import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest
from etils import epath

import ckpt_jax as ckpt
from ckpt_jax.run import leftovers

STATE = {"x": jnp.arange(4.0)}
KILLED = """
import os, signal, sys, time, jax.numpy as jnp, ckpt_jax as ckpt
from orbax.checkpoint._src.path import atomicity
c = ckpt.Checkpointer(sys.argv[1])
c.save(0, {"x": jnp.arange(4.0)})
c.wait()
from ckpt_jax.save import commit
commit.seal = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
c.save(1, {"x": jnp.arange(4.0)})
c.wait()
"""


def killed_run(path):
  done = subprocess.run([sys.executable, "-c", KILLED, str(path)], capture_output=True, text=True, timeout=120)
  assert done.returncode == -9, done.stderr
  assert (path / "1.orbax-checkpoint-tmp").is_dir()


def gone(path):
  deadline = time.monotonic() + 10
  while path.exists() and time.monotonic() < deadline:
    time.sleep(0.05)
  return not path.exists()


def test_leftover_of_a_killed_job_is_gone_at_the_next_open(tmp_path):
  killed_run(tmp_path / "run")
  with ckpt.Checkpointer(tmp_path / "run") as c:
    assert not (tmp_path / "run" / "1.orbax-checkpoint-tmp").exists()
    assert [s.step for s in c.steps()] == [0]
    trash = tmp_path / "run" / ".ckpt_jax" / "trash"
    deadline = time.monotonic() + 10
    while list(trash.iterdir()) and time.monotonic() < deadline:
      time.sleep(0.05)
    assert not list(trash.iterdir())
    assert c.save(1, STATE)


def test_leftover_of_a_living_job_stays(tmp_path):
  run = tmp_path / "run"
  first = ckpt.Checkpointer(run)
  first.save(0, STATE)
  first.wait()
  first._saver._run.admission.lease.begin(1)
  (run / "1.orbax-checkpoint-tmp").mkdir()
  with ckpt.Checkpointer(run):
    pass
  assert (run / "1.orbax-checkpoint-tmp").exists()
  first.close()
  with ckpt.Checkpointer(run):
    assert gone(run / "1.orbax-checkpoint-tmp")


def test_what_plain_orbax_left_stays_and_is_told(tmp_path, caplog):
  with ckpt.Checkpointer(tmp_path / "run") as c:
    c.save(0, STATE)
  foreign = tmp_path / "run" / "7.orbax-checkpoint-tmp"
  foreign.mkdir()
  (foreign / "file").write_text("x")
  with ckpt.Checkpointer(tmp_path / "run") as c:
    c.save(1, STATE)
  assert (foreign / "file").exists()
  assert "7.orbax-checkpoint-tmp: left by a save of another program" in caplog.text


@pytest.mark.parametrize("copy", ["copytree", "cp", "rsync"])
def test_copied_run_restores_and_nothing_of_it_is_taken_for_a_leftover(copy, tmp_path, assert_same):
  # google/orbax#394: copied checkpoints were deleted as unfinished ones.
  with ckpt.Checkpointer(tmp_path / "run") as c:
    for step in range(3):
      c.save(step, {"x": jnp.full(4, step)})
  target = tmp_path / "copy"
  if copy == "copytree":
    shutil.copytree(tmp_path / "run", target)
  else:
    if shutil.which(copy) is None:
      pytest.skip(f"no {copy} here")
    flags = {"cp": ["-r"], "rsync": ["-r"]}[copy]  # without times and modes, as a copy through a bucket
    subprocess.run([copy, *flags, f"{tmp_path}/run/", target], check=True)
  shutil.rmtree(tmp_path / "run")
  with ckpt.Checkpointer(target, {"retention": {"last": None}}) as c:
    assert [s.step for s in c.steps()] == [0, 1, 2]
    for step in range(3):
      assert_same(c.restore(step, like={"x": jnp.zeros(4, jnp.int32)}).state, {"x": jnp.full(4, step)})
    assert c.save(3, {"x": jnp.full(4, 3)})
    c.wait()
    assert [s.step for s in c.steps()] == [0, 1, 2, 3]


def test_empty_and_foreign_directories_do_not_stop_a_save_and_are_not_lost(tmp_path):
  (tmp_path / "4").mkdir()
  (tmp_path / "5").mkdir()
  (tmp_path / "5" / "notes.txt").write_text("mine")
  with ckpt.Checkpointer(tmp_path) as c:
    assert c.latest_step() is None
    for step in range(7):
      assert c.save(step, STATE), f"step {step}: Orbax took a directory for a newer step"
    c.wait()
    assert c.latest_step() == 6
  assert [p.read_text() for p in tmp_path.glob("5.set-aside-*/notes.txt")] == ["mine"]


def test_plain_orbax_would_have_believed_in_the_empty_directory(tmp_path):
  (tmp_path / "4").mkdir()
  with ocp.CheckpointManager(tmp_path) as manager:
    assert manager.latest_step() == 4 and not manager.should_save(3)


def test_step_directory_deleted_under_a_save_fails_once_and_the_next_save_works(tmp_path, monkeypatch):
  from ckpt_jax.save import commit

  with ckpt.Checkpointer(tmp_path) as c:
    c.save(0, STATE)
    c.wait()
    real = commit.seal
    monkeypatch.setattr(commit, "seal", lambda top, how: (shutil.rmtree(top), real(top, how)))
    c.save(1, STATE)
    with pytest.raises(ckpt.SaveFailedError, match="step 1 was not saved"):
      c.wait()
    monkeypatch.undo()
    c.wait()
    assert c.save(2, STATE)
    c.wait()
    assert [s.step for s in c.steps()] == [0, 2]


def test_failed_save_leaves_nothing_behind(tmp_path, monkeypatch):
  from ckpt_jax.save import commit

  def full(*_):
    raise OSError(28, "No space left on device")

  with ckpt.Checkpointer(tmp_path) as c:
    monkeypatch.setattr(commit, "seal", full)
    c.save(1, STATE)
    with pytest.raises(ckpt.OutOfSpaceError):
      c.wait()
    assert not list(tmp_path.glob("*.orbax-checkpoint-tmp*"))


def test_unfinished_step_in_a_bucket_goes_and_a_copied_one_stays(gcs):
  with ckpt.Checkpointer(gcs.url + "/run") as c:
    c.save(0, STATE)
    c.wait()
    run = c.directory
    c._saver._run.admission.lease.begin(1)  # as a job that is killed now would leave it
    (run / "1" / "default" / "manifest.ocdbt").write_text("begun by us")
    (run / "9" / "default" / "manifest.ocdbt").write_text("a copy that is under way")
  with ckpt.Checkpointer(gcs.url + "/run") as c:
    c.save(2, STATE)
    c.wait()
    assert leftovers.find(epath.Path(run), {1}) == ({}, [])
    assert (run / "9" / "default" / "manifest.ocdbt").exists()
    assert [s.step for s in c.steps()] == [0, 2]
    with pytest.raises(ckpt.SaveFailedError, match="no committed step, and saving would delete them"):
      c.save(9, STATE)
      c.wait()
    c.save(10, STATE)
    c.wait()
    assert (run / "9" / "default" / "manifest.ocdbt").exists()
    assert os.fspath(run).startswith("gs://")
