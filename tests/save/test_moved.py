"""A run that is moved, renamed or deleted while a job has it open is not begun anew in silence."""

import os
import shutil

import jax.numpy as jnp
import pytest

import ckpt_jax as ckpt

STATE = {"x": jnp.arange(9.0)}


@pytest.mark.parametrize("put_in_its_place", ["nothing", "an empty directory", "notes alone"])
def test_run_that_is_moved_away_is_an_error_until_it_is_back(tmp_path, put_in_its_place):
  run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
  with ckpt.Checkpointer(run) as c:
    c.save(0, STATE)
    c.wait()
    run.rename(elsewhere)
    if put_in_its_place != "nothing":
      (run / ".ckpt_jax" if put_in_its_place == "notes alone" else run).mkdir(parents=True)
    there = sorted(os.walk(tmp_path))
    for _ in range(2):
      with pytest.raises(ckpt.StorageError, match=r"the run is gone: it was moved.*Move it back") as e:
        c.save(1, STATE)
      assert e.value.topic == "run-directory"
    assert sorted(os.walk(tmp_path)) == there
    shutil.rmtree(run, ignore_errors=True)
    elsewhere.rename(run)
    assert c.save(2, STATE)
  assert [s.step for s in c.steps()] == [0, 2]


def test_run_that_is_moved_away_right_before_a_commit_is_an_error_there(tmp_path):
  run = tmp_path / "run"
  with ckpt.Checkpointer(run) as c:
    c.save(0, STATE)
    c.wait()
    check = c._saver._run.admission.lease.check
    c._saver._run.admission.lease.check = lambda: (run.rename(tmp_path / "elsewhere"), check())
    c.save(1, STATE)
    with pytest.raises(ckpt.SaveFailedError, match=r"step 1 was not saved.*the run is gone"):
      c.wait()
    c._saver._run.admission.lease.check = check
    with pytest.raises(ckpt.StorageError, match="the run is gone"):
      c.save(2, STATE)


def test_run_that_is_deleted_before_the_first_save_is_begun_and_one_without_our_notes_goes_on(tmp_path):
  run = tmp_path / "run"
  with ckpt.Checkpointer(run) as c:
    run.mkdir(exist_ok=True)
    shutil.rmtree(run)
    c.save(0, STATE)
    c.wait()
    shutil.rmtree(run / ".ckpt_jax")
    c.save(1, STATE)
  assert [s.step for s in c.steps()] == [0, 1]
