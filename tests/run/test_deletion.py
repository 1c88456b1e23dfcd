"""Steps that retention drops: marked, removed behind training, and to the end even after a crash."""

import logging
import os
import pathlib
import shutil
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath

import ckpt_jax as ckpt
from ckpt_jax.orbax.format import STEP_METADATA
from ckpt_jax.run import steps as run
from ckpt_jax.run.deletion import StepDeleter
from ckpt_jax.run.pins import pinned
from ckpt_jax.storage.objects import BACKEND


def save_steps(path, steps, **config):
  with ckpt.Checkpointer(path, ckpt.Config(**config)) as c:
    for step in steps:
      c.save(step, {"x": jnp.full(4, step)}, metrics={"loss": float(step)}, force=True)
  return c


def numbers(path):
  return [s.step for s in run.list_steps(path)]


KEEP_ALL = {"retention": {"last": None}}


def test_steps_that_no_rule_keeps_are_gone_after_close(tmp_path):
  save_steps(tmp_path, range(6), retention={"last": 2})
  assert numbers(tmp_path) == [4, 5]
  assert sorted(p.name for p in tmp_path.iterdir() if p.name.isdigit()) == ["4", "5"]
  assert not list((tmp_path / ".ckpt_jax" / "deleting").iterdir()), "no mark outlives its step"


def test_without_rules_every_step_stays_and_with_them_each_deletion_is_logged_with_its_rule(tmp_path, caplog):
  caplog.set_level(logging.INFO, "ckpt_jax")
  with ocp.CheckpointManager(tmp_path) as manager:
    for step in range(5):
      manager.save(step, args=ocp.args.PyTreeSave({"x": jnp.ones(4)}))
  (tmp_path / "empty.yaml").write_text("retention:\n")
  defaults = [None, {"retention": {}}, ckpt.Config(**ckpt.Config().to_dict()), tmp_path / "empty.yaml"]
  for step, config in enumerate(defaults, start=5):
    with ckpt.Checkpointer(tmp_path, config) as c:
      c.save(step, {"x": jnp.full(4, step)})
  assert numbers(tmp_path) == list(range(9)) and "removed" not in caplog.text
  save_steps(tmp_path, [9], retention={"last": 5, "every_steps": 2})
  assert numbers(tmp_path) == [0, 2, 4, 5, 6, 7, 8, 9]
  said = {r.getMessage().partition(": ")[2]: r.levelname for r in caplog.records if "removed step" in r.message}
  rule = "no retention rule keeps it (last=5, every_steps=2)"
  assert said == {f"removed step {n}, which another program wrote: {rule}": "WARNING" for n in (1, 3)}
  caplog.clear()
  save_steps(tmp_path, [10], retention={"budget": 32})
  said = [r.getMessage().partition(": ")[2] for r in caplog.records if "removed step" in r.message]
  assert "removed step 5: the budget of 32 B has no room for it" in said


def test_steps_removed_by_hand_do_not_take_the_places_of_those_that_are_there(tmp_path):
  with ckpt.Checkpointer(tmp_path, {"retention": {"last": 3}}) as c:
    for step in range(3):
      c.save(step, {"x": jnp.ones(4)})
    c.wait()
    shutil.rmtree(tmp_path / "2")
    c.save(3, {"x": jnp.ones(4)})
  assert numbers(tmp_path) == [0, 1, 3]


def test_a_pinned_step_stays_until_it_is_unpinned(tmp_path):
  with ckpt.Checkpointer(tmp_path, ckpt.Config(retention={"last": 1})) as c:
    c.save(0, {"x": jnp.ones(2)})
    c.wait()
    c.pin(0)
    for step in range(1, 4):
      c.save(step, {"x": jnp.ones(2)})
    c.wait()
    assert [(s.step, s.pinned) for s in c.steps()] == [(0, True), (3, False)]
    c.unpin(0)
    c.save(4, {"x": jnp.ones(2)})
  assert numbers(tmp_path) == [4]


def test_pinning_what_is_not_there_names_what_is(tmp_path):
  c = save_steps(tmp_path, [3, 5])
  with pytest.raises(ckpt.NoCheckpointError, match="committed steps: 3, 5"):
    c.pin(4)
  assert pinned(tmp_path) == set()


def test_an_older_step_saved_after_a_rollback_deletes_no_newer_one(tmp_path):
  save_steps(tmp_path, [10, 20, 30], retention={"last": 2})
  save_steps(tmp_path, [15], retention={"last": 2})
  assert numbers(tmp_path) == [15, 20, 30]


def test_the_newest_healthy_step_outlives_unhealthy_ones(tmp_path):
  tag = {"health": {"nonfinite": "tag"}}
  save_steps(tmp_path, range(2), **KEEP_ALL)
  with ckpt.Checkpointer(tmp_path, ckpt.Config(**KEEP_ALL, **tag)) as c:
    for step in (2, 3):
      c.save(step, {"x": jnp.full(4, jnp.nan)})
  with ckpt.Checkpointer(tmp_path, ckpt.Config(retention={"last": 1}, **tag)) as c:
    c.save(4, {"x": jnp.full(4, jnp.inf)})
  assert numbers(tmp_path) == [1, 4]


def test_the_budget_counts_the_steps_of_earlier_processes(tmp_path):
  save_steps(tmp_path, range(5), **KEEP_ALL)
  save_steps(tmp_path, [5], retention={"budget": 48})
  assert numbers(tmp_path) == [3, 4, 5]


def test_a_marked_step_is_no_step_and_the_next_open_removes_it(tmp_path):
  save_steps(tmp_path, range(3), **KEEP_ALL)
  deleter = StepDeleter(epath.Path(tmp_path))
  deleter._enqueue = lambda steps: None  # the process dies right after marking
  deleter.delete(1)
  (tmp_path / "1" / STEP_METADATA).unlink()  # and has got a little further
  assert numbers(tmp_path) == [0, 2]
  with pytest.raises(ckpt.NoCheckpointError), ckpt.Checkpointer(tmp_path, ckpt.Config(**KEEP_ALL)) as c:
    assert c._saver.manager.all_steps() == [0, 2]
    c.restore(1)
  assert not (tmp_path / "1").exists() and not (tmp_path / ".ckpt_jax/deleting/1").exists()


def test_a_step_saved_anew_under_a_marked_number_is_not_deleted(tmp_path):
  save_steps(tmp_path, range(3), **KEEP_ALL)
  deleter = StepDeleter(epath.Path(tmp_path))
  deleter._enqueue = lambda steps: None
  deleter.delete(1)
  with ocp.CheckpointManager(tmp_path) as manager:  # plain Orbax knows nothing of marks
    manager.delete(1)
    manager.save(1, args=ocp.args.PyTreeSave({"x": jnp.zeros(3)}), force=True)
  save_steps(tmp_path, [3], **KEEP_ALL)
  assert numbers(tmp_path) == [0, 1, 2, 3]


def test_a_step_can_be_saved_again_while_its_old_files_are_being_removed(tmp_path):
  save_steps(tmp_path, range(3), **KEEP_ALL)
  with ckpt.Checkpointer(tmp_path, ckpt.Config(**KEEP_ALL)) as c:
    c._run.deleter._pause = 0.02
    c._saver.manager.delete(2)
    assert c.latest_step() == 1
    c.save(2, {"x": jnp.full(4, 7)})
    c.wait()
    np.testing.assert_array_equal(c.restore(2).state["x"], np.full(4, 7))


def test_saves_do_not_wait_for_a_slow_deletion_and_close_waits_with_a_limit(tmp_path, caplog):
  save_steps(tmp_path, range(4), **KEEP_ALL)
  c = ckpt.Checkpointer(tmp_path, ckpt.Config(retention={"last": 1}, timeouts={"delete": 0.2}))
  c._run.deleter._pause = 30.0
  c.save(4, {"x": jnp.ones(4)})
  c.save(5, {"x": jnp.ones(4)})
  c.wait()
  assert c._run.deleter.pending >= {0, 1, 2, 3} and c.latest_step() == 5
  c.close()
  assert "steps are not removed after" in caplog.text
  assert numbers(tmp_path) == [5]
  save_steps(tmp_path, [6], retention={"last": 1})
  assert sorted(p.name for p in tmp_path.iterdir() if p.name.isdigit()) == ["6"]


def test_a_step_that_cannot_be_removed_is_reported_and_tried_again(tmp_path, caplog, monkeypatch):
  save_steps(tmp_path, range(2), **KEEP_ALL)

  def refuse(self, directory):
    raise PermissionError("read-only file system")

  with monkeypatch.context() as patch:
    patch.setattr(StepDeleter, "_remove_files", refuse)
    save_steps(tmp_path, [2], retention={"last": 1})
  assert "step 0 is not removed yet: read-only file system" in caplog.text
  assert numbers(tmp_path) == [2] and (tmp_path / "0").exists()
  save_steps(tmp_path, [3], retention={"last": 1})
  assert not (tmp_path / "0").exists() and not (tmp_path / "1").exists()


KILLED = """
import sys, os
from etils import epath
from ckpt_jax.run.deletion import StepDeleter
deleter = StepDeleter(epath.Path(sys.argv[1]), files_per_second=2)
deleter.delete_steps([0, 1])
deleter.wait_for(timeout=60)
"""


def test_a_process_killed_while_deleting_leaves_nothing_behind_for_good(tmp_path):
  save_steps(tmp_path, range(3), **KEEP_ALL)
  files = [path for step in "01" for path in (tmp_path / step).rglob("*") if path.is_file()]
  with subprocess.Popen([sys.executable, "-c", KILLED, tmp_path]) as child:
    deadline = time.monotonic() + 120
    while all(path.exists() for path in files):
      assert child.poll() is None and time.monotonic() < deadline
      time.sleep(0.01)
    child.kill()
  assert any(path.exists() for path in files), "the kill came too late to test anything"
  assert numbers(tmp_path) == [2]
  with ckpt.Checkpointer(tmp_path, ckpt.Config(**KEEP_ALL)) as c:
    assert c.latest_step() == 2
  assert sorted(os.listdir(tmp_path)) == [".ckpt_jax", "2"]


def test_a_plain_manager_sees_the_same_steps(tmp_path):
  save_steps(tmp_path, range(5), retention={"last": 2, "every_steps": 2})
  with ocp.CheckpointManager(pathlib.Path(tmp_path)) as manager:
    assert sorted(manager.all_steps()) == [0, 2, 3, 4]


def test_no_more_files_are_removed_in_a_second_than_delete_rate_says(tmp_path):
  save_steps(tmp_path, range(3), **KEEP_ALL)
  files = sum(len(names) for step in "012" for _, _, names in os.walk(tmp_path / step))
  c = ckpt.Checkpointer(tmp_path, ckpt.Config(retention={"last": 1, "delete_rate": 20}))
  started = time.monotonic()
  c.save(3, {"x": jnp.ones(4)})
  c.close()
  assert numbers(tmp_path) == [3] and not (tmp_path / "0").exists()
  assert time.monotonic() - started > files / 20 * 0.9


def removes_an_old_step(method, path):
  """Orbax itself deletes objects of the step that it writes, before it writes them."""
  return method == "DELETE" and ("run%2F0%2F" in path or "run%2F1%2F" in path)


def test_a_bucket_whose_deletions_hang_blocks_no_save_and_close_gives_up(gcs, caplog):
  url = gcs.url + "/run"
  save_steps(url, range(2), **KEEP_ALL)
  with ckpt.Checkpointer(url, ckpt.Config(retention={"last": 1}, timeouts={"delete": 0.1})) as c:
    gcs.proxy.delay, gcs.proxy.delayed = 600.0, removes_an_old_step
    started = time.monotonic()
    for step in (2, 3, 4):
      c.save(step, {"x": jnp.ones(4)})
    c.wait()
    assert c._run.deleter.pending and c.latest_step() == 4
  assert time.monotonic() - started < 300, "nothing waited for a deletion that takes 600 s"
  assert "steps are not removed after" in caplog.text
  assert numbers(url) == [4], "what is marked is no step, removed or not"


def test_a_step_on_s3_is_removed_in_batches(s3):
  def deletions(step, **retention):
    s3.proxy.reset()
    save_steps(url, [step], retention=retention)
    return s3.proxy.requests["delete"]

  url = s3.url + "/run"
  save_steps(url, range(4), **KEEP_ALL)
  plain = deletions(4, last=None)
  removing = deletions(5, last=1)
  assert {key.split("/")[0] for key in BACKEND.tree(url)} == {".ckpt_jax", "5"}
  # Of 14 objects: the commit markers first, then the rest; then the mark of the step.
  assert removing - plain <= 5 * 3, (plain, removing)
