"""Steps that are deleted while somebody reads them: the newer one is read, and nobody calls it damage."""

import os
import pathlib
import shutil
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jobs import together
from typer.testing import CliRunner

import ckpt_jax as ckpt
from ckpt_jax.cli.app import app
from ckpt_jax.layout import contents
from ckpt_jax.restore import fallback, restorer
from ckpt_jax.restore import verify as verification
from ckpt_jax.rewrite.swap import rewrite_step
from ckpt_jax.run import steps as run
from ckpt_jax.run.deletion import StepDeleter
from ckpt_jax.storage import look

PROGRAMS = pathlib.Path(__file__).parents[1] / "programs"


def state(step):
  return {"w": jnp.full(1000, step, jnp.float32)}


def save(path, *steps):
  with ckpt.Checkpointer(path, {"retention": {"last": None}}) as c:
    for step in steps:
      c.save(step, state(step), extras={"at": step}, force=True)


def delete(path, step):
  """As the retention of a trainer elsewhere does."""
  deleter = StepDeleter(run.run_directory(path))
  deleter.delete(step)
  deleter.finish()


def before(monkeypatch, module, name, action):
  """Has `action` happen once, at the beginning of a function."""
  original, todo = getattr(module, name), [action]

  def function(*arguments, **options):
    if todo:
      todo.pop()()
    return original(*arguments, **options)

  monkeypatch.setattr(module, name, function)


def test_evaluator_beside_a_trainer_that_keeps_one_step_reads_the_newest_every_time(tmp_path):
  path, stop = tmp_path / "run", tmp_path / "stop"
  command = [sys.executable, PROGRAMS / "trainer.py", path, stop]
  trainer = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
  try:
    deadline = time.monotonic() + 120
    while not run.committed_steps(run.run_directory(path)):
      assert time.monotonic() < deadline and trainer.poll() is None, trainer.stderr.read()
      time.sleep(0.05)
    like = {f"w{i}": jnp.zeros(10) for i in range(20)}
    seen = []
    with ckpt.Checkpointer(path) as c:
      # Thirty times at least, and until the trainer has gone on a while: each step that was seen is deleted by then.
      while len(seen) < 30 or len(set(seen)) < 5:
        assert time.monotonic() < deadline and trainer.poll() is None
        restored = c.restore(like=like)
        seen.append(restored.step)
        assert restored.extras == {"at": restored.step} and not restored.report.quarantined
        assert all(np.all(leaf == restored.step) for leaf in jax.tree.leaves(restored.state))
        steps = c.steps()
        assert steps and steps[-1].step >= restored.step and c.latest_step() is not None
        assert contents.describe(path).step >= restored.step
        if len(seen) % 10 == 0:
          assert ckpt.verify(path) == []
          for command in (["ls"], ["show"], ["verify"]):
            done = CliRunner().invoke(app, [*command, str(path)])
            assert done.exit_code == 0, done.output
    assert seen == sorted(seen)
    assert not (path / ".ckpt_jax" / "quarantine").exists()
  finally:
    stop.touch()
    trainer.communicate(timeout=120)


def test_newest_step_that_is_deleted_while_it_is_read_gives_way_to_the_next(tmp_path, monkeypatch):
  save(tmp_path, 0, 1, 2)
  with ckpt.Checkpointer(tmp_path) as c:
    before(monkeypatch, restorer, "Step", lambda: delete(tmp_path, 2))
    restored = c.restore(like=state(0))
    assert restored.step == 1 and restored.extras == {"at": 1} and np.all(restored.state["w"] == 1)
    assert restored.report.gone == (2,) and not restored.report.quarantined
    # What the deletion takes first is what says which extras there were.
    before(monkeypatch, restorer, "read_record", lambda: delete(tmp_path, 1))
    restored = c.restore(like=state(0))
    assert restored.step == 0 and restored.extras == {"at": 0}
    assert not (tmp_path / ".ckpt_jax" / "quarantine").exists()


def test_step_asked_for_by_number_that_is_deleted_meanwhile_is_no_checkpoint(tmp_path, monkeypatch):
  save(tmp_path, 0, 1)
  with ckpt.Checkpointer(tmp_path) as c:
    with pytest.raises(ckpt.NoCheckpointError, match=r"no committed step 7; committed steps: 0, 1"):
      c.restore(7)
    before(monkeypatch, restorer, "Step", lambda: delete(tmp_path, 1))
    with pytest.raises(ckpt.NoCheckpointError, match="step 1 was deleted while it was read"):
      c.restore(1, like=state(1))
    save(tmp_path / "other", 0)
  with ckpt.Checkpointer(tmp_path / "other") as c:  # by a program that leaves no mark
    before(monkeypatch, restorer, "Step", lambda: shutil.rmtree(tmp_path / "other" / "0"))
    with pytest.raises(ckpt.NoCheckpointError, match="step 0 was deleted while it was read"):
      c.restore(0, like=state(0))


def test_files_that_somebody_is_removing_one_by_one_are_waited_for(tmp_path, monkeypatch):
  save(tmp_path, 0, 1)

  def remove():
    files = [p for p in sorted((tmp_path / "1").rglob("*")) if p.is_file()]
    files[0].unlink()
    (tmp_path / "1" / "default" / "_METADATA").unlink(missing_ok=True)

    def rest():
      for file in files[1:]:
        time.sleep(0.03)
        file.unlink(missing_ok=True)
      shutil.rmtree(tmp_path / "1")

    threading.Thread(target=rest).start()

  with ckpt.Checkpointer(tmp_path) as c:
    before(monkeypatch, restorer, "Step", remove)
    restored = c.restore(like=state(0))
  assert restored.step == 0 and restored.report.gone == (1,)


def test_damaged_step_that_stays_is_damaged_still(tmp_path):
  save(tmp_path, 0, 1)
  (tmp_path / "1" / "default" / "manifest.ocdbt").unlink()
  with ckpt.Checkpointer(tmp_path) as c:
    with pytest.raises(ckpt.CorruptCheckpointError):
      c.restore(1)
    restored = c.restore(like=state(0))
  assert restored.step == 0 and list(restored.report.quarantined) == [1] and restored.report.gone == ()


def test_steps_that_go_faster_than_they_are_read_end_in_an_error(tmp_path, monkeypatch):
  save(tmp_path, *range(5))
  original = restorer.Step

  def slow(step_dir, *arguments):
    delete(tmp_path, int(step_dir.name))
    return original(step_dir, *arguments)

  monkeypatch.setattr(restorer, "Step", slow)
  monkeypatch.setattr(fallback, "_MOST_GONE", 3)
  with ckpt.Checkpointer(tmp_path) as c, pytest.raises(ckpt.NoCheckpointError, match=r"\[4, 3, 2\].*keep more"):
    c.restore(like=state(0))


def test_step_that_is_rewritten_while_it_is_read_is_read_again(tmp_path, monkeypatch):
  save(tmp_path, 0)

  def rewrite():
    directory = run.run_directory(tmp_path)
    rewrite_step(directory, 0, lambda old, new: run.our_metadata(old), lambda old, new: None)
    (tmp_path / "0" / "default" / "_METADATA").rename(tmp_path / "held")  # as between two renames
    threading.Timer(0.5, lambda: (tmp_path / "held").rename(tmp_path / "0" / "default" / "_METADATA")).start()

  with ckpt.Checkpointer(tmp_path) as c:
    before(monkeypatch, restorer, "Step", rewrite)
    original = fallback._what_became_of

    def after_the_swap(*arguments):
      while not (tmp_path / "0" / "default" / "_METADATA").exists():
        time.sleep(0.05)
      return original(*arguments)

    monkeypatch.setattr(fallback, "_what_became_of", after_the_swap)
    assert c.restore(0, like=state(0)).extras == {"at": 0}


def test_listings_look_again_when_a_step_went_under_their_hands(tmp_path, monkeypatch):
  save(tmp_path, 0)
  directory = run.run_directory(tmp_path)

  def train():
    save(tmp_path, 1)
    shutil.rmtree(tmp_path / "0")

  before(monkeypatch, run, "counts", train)
  assert run.committed_steps(directory) == [1]

  def train_on():
    save(tmp_path, 2)
    delete(tmp_path, 1)

  before(monkeypatch, run, "step_metadata", train_on)
  steps, damaged = run.list_readable_steps(directory)
  assert [s.step for s in steps] == [2] and damaged == {}
  save(tmp_path, 3)
  before(monkeypatch, verification, "Step", lambda: delete(tmp_path, 2))
  found = list(verification.verdicts(tmp_path))
  assert (found[0].step, found[0].how_far, found[0].findings) == (2, verification.DELETED, ())
  assert found[1].step == 3 and found[1].findings == ()
  before(monkeypatch, verification, "Step", lambda: delete(tmp_path, 3))
  with pytest.raises(ckpt.NoCheckpointError, match="deleted while it was read"):
    ckpt.verify(tmp_path, 3)


def test_threads_restore_the_newest_beside_saves_that_keep_one_step(tmp_path):
  errors, seen = [], []
  with ckpt.Checkpointer(tmp_path, {"retention": {"last": 1}}) as c:
    c.save(0, state(0))
    c.wait()
    done = threading.Event()

    def evaluate():
      while not done.is_set():
        try:
          restored = c.restore(like=state(0))
          assert np.all(restored.state["w"] == restored.step) and restored.extras is None
          seen.append(restored.step)
        except Exception as e:
          errors.append(e)

    threads = [threading.Thread(target=evaluate) for _ in range(2)]
    for thread in threads:
      thread.start()
    for step in range(1, 25):
      c.save(step, state(step))
    c.wait()
    done.set()
    for thread in threads:
      thread.join(60)
  assert not errors and seen, errors


@pytest.mark.multiprocess
def test_processes_of_one_job_agree_on_the_step_before_one_that_went(tmp_path):
  for mode in ("save", "deleted"):
    results = together("fallback.py", tmp_path, mode, processes=2)
  assert all("restored step 0 quarantined [] gone (1,)" in r.log for r in results), results[0].log
  assert look.names(run.run_directory(tmp_path)).count("1") == 0
  assert not os.path.exists(tmp_path / ".ckpt_jax" / "quarantine")
