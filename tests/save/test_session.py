"""Several Checkpointers on one run in one process: a notebook cell that is run twice, an object that is dropped."""

import contextlib
import functools
import gc
import logging
import os
import pathlib
import signal
import threading
import weakref

import jax.numpy as jnp
import pytest

import ckpt_jax as ckpt
from ckpt_jax.run.steps import run_directory
from ckpt_jax.save import session

STATE = {"x": jnp.arange(4.0)}


@contextlib.contextmanager
def slow_write(directory):
  """Writes into a run do not end before the block does."""
  released = threading.Event()
  (run,) = [s for s in session._open if s._directory == run_directory(directory) and s.writes]
  gate = run.run.admission
  check = gate.lease.check
  gate.lease.check = lambda: (released.wait(60), check())[1]
  yield released
  released.set()


def test_a_cell_that_is_run_again_takes_the_run_over_from_the_object_before(tmp_path):
  old = ckpt.Checkpointer(tmp_path)
  old.save(0, STATE)
  with ckpt.Checkpointer(tmp_path) as new:
    assert new.restore_or_init(lambda: STATE).step == 0, "what the old one was writing counts"
    assert old.save(1, STATE), "until the new one saves, the old one may"
    assert new.save(2, STATE)
    for use in (lambda: old.save(4, STATE), old.restore, lambda: old.restore_or_init(dict), lambda: old.rollback(0)):
      with pytest.raises(ckpt.CheckpointError, match=r"newer Checkpointer of this process .* taken it over"):
        use()
    old.wait()
    old.close()
    old.close()
    new.wait()
    assert old.latest_step() == 2
    assert [s.step for s in new.steps()] == [0, 1, 2]
    assert new._saver.manager.all_steps() == [0, 1, 2], "it knows what the old one has saved since it was opened"


@pytest.mark.parametrize("alias", ["link", "dots", "file_url"])
def test_the_same_run_under_another_name_is_the_same_run(alias, tmp_path):
  (tmp_path / "run").mkdir()
  (tmp_path / "link").symlink_to(tmp_path / "run")
  name = {
    "link": tmp_path / "link",
    "dots": tmp_path / "x" / ".." / "run",
    "file_url": os.path.relpath(tmp_path / "run"),
  }
  (tmp_path / "x").mkdir()
  old = ckpt.Checkpointer(tmp_path / "run")
  old.save(0, STATE)
  with ckpt.Checkpointer(name[alias]) as new:
    new.save(1, STATE)
    with pytest.raises(ckpt.CheckpointError, match="taken it over"):
      old.save(2, STATE)


def test_a_run_in_a_bucket_is_taken_over_too(s3):
  old = ckpt.Checkpointer(s3.url + "/run")
  old.save(0, STATE)
  with ckpt.Checkpointer(s3.url + "/run/") as new:
    assert new.save(1, STATE)
    with pytest.raises(ckpt.CheckpointError, match="taken it over"):
      old.save(2, STATE)
    new.wait()
    assert [s.step for s in new.steps()] == [0, 1]


def test_an_older_object_cannot_take_the_run_back(tmp_path):
  older, newer = ckpt.Checkpointer(tmp_path), ckpt.Checkpointer(tmp_path)
  newer.save(0, STATE)
  with pytest.raises(ckpt.CheckpointError, match="taken it over"):
    older.save(1, STATE)
  older.close()
  newer.close()


def test_reading_beside_a_trainer_takes_nothing_over(tmp_path):
  with ckpt.Checkpointer(tmp_path) as trainer:
    trainer.save(0, STATE)
    trainer.wait()
    with ckpt.Checkpointer(tmp_path) as reader:
      assert reader.restore().step == 0
      assert trainer.save(1, STATE)


def test_the_new_object_waits_for_the_write_under_way_and_says_so(tmp_path, caplog):
  old = ckpt.Checkpointer(tmp_path)
  old.save(0, STATE)
  old.wait()
  with slow_write(tmp_path) as released, ckpt.Checkpointer(tmp_path) as new:
    old.save(1, STATE)
    with caplog.at_level(logging.WARNING):
      saving = threading.Thread(target=new.save, args=(2, STATE))
      saving.start()
      while "waiting for step 1" not in caplog.text:
        assert saving.is_alive()
      assert "(up to " in caplog.text
    released.set()
    saving.join(60)
    new.wait()
    assert [s.step for s in new.steps()] == [0, 1, 2]


def test_failure_of_the_last_write_of_an_object_that_lost_its_run_is_raised_by_it_once(tmp_path):
  old = ckpt.Checkpointer(tmp_path)
  old.save(0, STATE)
  old.wait()
  (run,) = [s for s in session._open if s.writes]
  run.run.admission.lease.check = lambda: (_ for _ in ()).throw(OSError(5, "the disk is broken"))
  old.save(1, STATE)
  with ckpt.Checkpointer(tmp_path) as new:
    assert new.save(2, STATE)
    with pytest.raises(ckpt.SaveFailedError, match="disk is broken"):
      old.wait()
    old.wait()
    old.close()
  assert [s.step for s in ckpt.Checkpointer(tmp_path).steps()] == [0, 2]


def test_failure_that_a_newer_object_has_waited_for_is_still_raised_by_the_older_one(tmp_path):
  old = ckpt.Checkpointer(tmp_path)
  for step in range(3):
    old.save(step, STATE)
    old.wait()
    run = old._session
    check, run.run.admission.lease.check = run.run.admission.lease.check, lambda: os.mkdir(tmp_path)
    old.save(step + 100, STATE)
    with ckpt.Checkpointer(tmp_path) as new:
      assert new.restore_or_init(lambda: STATE).step == step
    run.run.admission.lease.check = check
    with pytest.raises(ckpt.SaveFailedError, match=f"step {step + 100}"):
      [old.wait, functools.partial(old.save, step + 1, STATE), old.close][step]()
    old.close() if step == 2 else old.wait()


def test_dropped_object_commits_what_it_writes_and_then_lets_go_of_everything(tmp_path):
  before = set(threading.enumerate())
  handler = signal.getsignal(signal.SIGTERM)
  gc.disable()
  try:
    c = ckpt.Checkpointer(tmp_path, ckpt.Config(retention={"last": 1}))
    for step in range(3):
      c.save(step, STATE)
    gone = weakref.ref(c)
    del c
    assert gone() is None
    with ckpt.Checkpointer(tmp_path) as again:
      assert again.restore_or_init(lambda: STATE).step == 2
  finally:
    gc.enable()
  assert signal.getsignal(signal.SIGTERM) == handler
  lease = pathlib.Path(tmp_path / ".ckpt_jax" / "lease").read_text()
  assert '"released": true' in lease
  left = {t.name for t in set(threading.enumerate()) - before}
  assert not [name for name in left if name in ("ckpt_jax_lease", "ckpt_jax_deleter", "save_finalize", "async_save")]


def test_an_error_that_somebody_keeps_does_not_keep_the_run(tmp_path):
  # A notebook keeps the traceback of the last error, and with it the object whose method raised it.
  old = ckpt.Checkpointer(tmp_path, ckpt.Config(schedule={"every_steps": 1}))
  old.save(0, STATE)
  with pytest.raises(ckpt.CheckpointError) as kept:
    old.save(1, {"x": float("nan") * jnp.ones(3)})
    old.wait()
  gone = weakref.ref(old)
  del old
  with ckpt.Checkpointer(tmp_path) as new:
    assert new.save(1, STATE)
  assert gone() is not None and kept.value


def test_inode_of_a_deleted_run_makes_no_other_run_the_same(tmp_path):
  """A file system gives the inode of a directory that is gone to the next one."""
  old = ckpt.Checkpointer(tmp_path / "old")
  assert old.save(0, STATE)
  old.wait()
  inode = os.stat(tmp_path / "old").st_ino
  assert session._same_run(old._session._place, str(tmp_path / "old"))
  os.rename(tmp_path / "old", tmp_path / "other")
  assert os.stat(tmp_path / "other").st_ino == inode
  with ckpt.Checkpointer(tmp_path / "other", {"preemption": {"enabled": False}}) as other:
    other.wait()
    assert not session._same_run(old._session._place, other._session._place)
  os.rename(tmp_path / "other", tmp_path / "old")
  assert old.save(1, STATE)
  old.close()
  assert old.latest_step() == 1
