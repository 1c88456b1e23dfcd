"""Older kept steps that lose their optimizer state: what stays, what a crash leaves, and what says that it was done."""

import datetime
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from etils import epath
from hypothesis import given
from hypothesis import strategies as st

import ckpt_jax as ckpt
from ckpt_jax.layout import contents
from ckpt_jax.orbax.format import STEP_METADATA
from ckpt_jax.policies import Retention
from ckpt_jax.policies.retention import PROMISES
from ckpt_jax.rewrite import swap
from ckpt_jax.rewrite.thin import Thinner, thin_step
from ckpt_jax.run import steps as run
from ckpt_jax.run.steps import StepInfo

KEEP = ("params",)


def init():
  params = {
    "layer": {"kernel": jnp.arange(12.0).reshape(3, 4), "odd": jnp.array([-0.0, 1e-40], jnp.bfloat16)},
    "empty": jnp.zeros((0, 3)),
  }
  return {"params": params, "opt": optax.adam(1e-3).init(params), "step": 3, "key": jax.random.key(1), "name": "a"}


def save_steps(path, steps, **config):
  with ckpt.Checkpointer(path, ckpt.Config(**{"retention": {"last": None}, **config})) as c:
    for step in steps:
      state = init()
      state["params"]["layer"]["kernel"] += step
      c.save(step, state, metrics={"loss": float(step)}, extras={"n": [step]}, force=True)
  return c


def age(path, step, days):
  """Moves a step's commit into the past."""
  file = path / str(step) / STEP_METADATA
  data = json.loads(file.read_text())
  data["commit_timestamp_nsecs"] -= int(days * 86400e9)
  file.write_text(json.dumps(data))


def whole(path):
  return {s.step: s.resumable for s in run.list_steps(path)}


def test_a_thinned_step_keeps_its_parameters_bit_for_bit_and_all_that_describes_it(tmp_path, assert_same):
  c = save_steps(tmp_path, [1, 2])
  before = run.list_steps(tmp_path)
  assert thin_step(c.directory, 1, KEEP)
  old, thinned = before[0], run.list_steps(tmp_path)[0]
  assert (thinned.time, thinned.metrics, thinned.resumable) == (old.time, old.metrics, False)
  assert thinned.nbytes == 48 + 4 < old.nbytes / 2
  assert {leaf.path for leaf in contents.saved_leaves(c.directory / "1")} == {
    "params/empty",
    "params/layer/kernel",
    "params/layer/odd",
  }
  want = init()
  want["params"]["layer"]["kernel"] += 1
  with ckpt.Checkpointer(tmp_path, ckpt.Config(retention={"last": None})) as c:
    restored = c.restore(1, like={"params": init()["params"]})
    assert_same(restored.state["params"], want["params"])
    assert restored.extras == {"n": [1]} and restored.metrics == {"loss": 1.0}
  assert not (tmp_path / ".ckpt_jax" / "rewriting" / "1").exists()


def test_plain_orbax_reads_a_thinned_step(tmp_path):
  c = save_steps(tmp_path, [1, 2])
  thin_step(c.directory, 1, ["params/layer"])
  with ocp.CheckpointManager(tmp_path) as manager:
    assert sorted(manager.all_steps()) == [1, 2]
    state = manager.restore(1, args=ocp.args.PyTreeRestore())
  np.testing.assert_array_equal(state["params"]["layer"]["kernel"], np.arange(12.0).reshape(3, 4) + 1)


@pytest.mark.parametrize("options", [{"compression": "on"}, {"target_file_size": "1MiB"}, {"replica_parallel": "off"}])
def test_every_layout_can_be_thinned(tmp_path, options, assert_same):
  c = save_steps(tmp_path, [1, 2], layout=options)
  thin_step(c.directory, 1, KEEP)
  want = init()
  want["params"]["layer"]["kernel"] += 1
  with ckpt.Checkpointer(tmp_path, ckpt.Config(retention={"last": None})) as c:
    got = c.restore(1, like={"params": init()["params"]}).state
  assert_same(got["params"], want["params"])


def test_a_running_job_thins_what_is_older_than_the_limit(tmp_path):
  save_steps(tmp_path, range(4))
  for step in range(4):
    age(tmp_path, step, 10 - step)
  save_steps(tmp_path, [4, 5], retention={"last": None, "thin": {"after": "8d12h", "keep": "params"}})
  assert whole(tmp_path) == {0: False, 1: False, 2: True, 3: True, 4: True, 5: True}


def test_pinned_steps_stay_whole(tmp_path):
  c = save_steps(tmp_path, range(3))
  for step in range(3):
    age(tmp_path, step, 5)
  c = ckpt.Checkpointer(tmp_path, ckpt.Config(retention={"last": None}))
  c.pin(1)
  c.close()
  save_steps(tmp_path, [3], retention={"last": None, "thin": {"after": "1d"}})
  assert whole(tmp_path) == {0: False, 1: True, 2: False, 3: True}


def test_a_step_pinned_after_the_decision_stays_whole(tmp_path):
  c = save_steps(tmp_path, range(3))
  from ckpt_jax.run import pins
  from ckpt_jax.run.deletion import StepDeleter

  thinner = Thinner(c.directory, KEEP, StepDeleter(c.directory), restoring={1})
  pins.pin(tmp_path, 0)
  thinner.thin([0, 1, 2])
  thinner.finish()
  assert whole(tmp_path) == {0: True, 1: True, 2: True}, "pinned, being restored, the newest that can be resumed"


def test_training_goes_on_from_the_newest_step_that_is_whole(tmp_path):
  c = save_steps(tmp_path, [1, 2, 3])
  thin_step(c.directory, 3, KEEP)
  with ckpt.Checkpointer(tmp_path, ckpt.Config(retention={"last": None})) as c:
    restored = c.restore_or_init(init)
    assert restored.step == 2 and restored.next_step == 3
    assert c.restore(like=init()).step == 2


def test_restoring_a_whole_state_from_a_thinned_step_says_what_can_be_done(tmp_path):
  c = save_steps(tmp_path, [1, 2])
  thin_step(c.directory, 1, KEEP)
  with ckpt.Checkpointer(tmp_path, ckpt.Config(retention={"last": None})) as c:
    with pytest.raises(ckpt.StructureMismatchError) as told:
      c.restore(1, like=init())
    message = str(told.value)
    assert 'only="params"' in message and "step 2" in message and "thinned" in message
    assert len(message) < 600, "one clear sentence rather than a list of all optimizer leaves"


def test_a_run_of_thinned_steps_alone_does_not_start_afresh_in_silence(tmp_path):
  c = save_steps(tmp_path, [1])
  thin_step(c.directory, 1, KEEP)
  config = ckpt.Config(retention={"last": None})
  with ckpt.Checkpointer(tmp_path, config) as c, pytest.raises(ckpt.StructureMismatchError, match="thinned"):
    c.restore_or_init(init)


def test_a_path_that_leads_nowhere_is_named_and_the_step_stays_whole(tmp_path, caplog):
  c = save_steps(tmp_path, [1, 2])
  with pytest.raises(ckpt.CheckpointError, match=r"no leaf is under 'parms'; at the top there are .*params"):
    thin_step(c.directory, 1, ["parms"])
  age(tmp_path, 1, 9)
  save_steps(tmp_path, [3], retention={"last": None, "thin": {"after": "1d", "keep": "parms"}})
  assert "step 1 is not thinned" in caplog.text and all(whole(tmp_path).values())


KILLED = """
import os, sys
from etils import epath
from ckpt_jax.rewrite import swap
from ckpt_jax.rewrite.thin import thin_step
where, path = sys.argv[1:]

def dies(function, after):
  def call(*arguments, **keywords):
    if not after: os._exit(9)
    result = function(*arguments, **keywords)
    os._exit(9)
  return call

if where == "copy": swap._copy_rest = dies(swap._copy_rest, False)
if where == "ready": swap._swap = dies(swap._swap, False)
if where == "between": swap.os.rename = dies(os.rename, True)
if where == "after":
  remove = swap._remove
  swap._remove = lambda d: os._exit(9) if (d / "old").exists() else remove(d)
thin_step(epath.Path(path), 1, ["params"])
"""


@pytest.mark.parametrize("where", ["copy", "ready", "between", "after"])
def test_a_process_killed_while_thinning_leaves_one_whole_form_of_the_step(tmp_path, where, assert_same):
  save_steps(tmp_path, [1, 2])
  done = subprocess.run([sys.executable, "-c", KILLED, where, tmp_path], timeout=120, check=False)
  assert done.returncode == 9
  with ckpt.Checkpointer(tmp_path, ckpt.Config(retention={"last": None})) as c:
    assert [s.step for s in c.steps()] == [1, 2]
    assert whole(tmp_path) == {1: where == "copy", 2: True}
    like = {"params": init()["params"]}
    got = c.restore(1, like=like if where != "copy" else init()).state
    want = init()["params"]
    want["layer"]["kernel"] += 1
    assert_same(got["params"], want)
  assert os.listdir(tmp_path / ".ckpt_jax" / "rewriting") == []


def test_a_step_deleted_while_it_is_thinned_stays_deleted(tmp_path):
  c = save_steps(tmp_path, [1, 2])
  from ckpt_jax.run.deletion import StepDeleter

  deleter = StepDeleter(c.directory)
  calls = []

  def deleted():
    if not calls:
      calls.append(deleter.delete(1))

  assert not thin_step(c.directory, 1, KEEP, pause=deleted, swapping=deleter.moving())
  deleter.finish()
  assert [s.step for s in run.list_steps(tmp_path)] == [2] and not (tmp_path / "1").exists()


def test_a_damaged_copy_is_not_swapped_in(tmp_path, monkeypatch):
  c = save_steps(tmp_path, [1, 2])
  from ckpt_jax.rewrite import copy

  real = copy.zlib.crc32
  monkeypatch.setattr(copy.zlib, "crc32", lambda data, seen=[]: seen.append(0) or (real(data) + len(seen)))
  with pytest.raises(ckpt.CorruptCheckpointError, match="reads back differently"):
    thin_step(c.directory, 1, KEEP)
  assert whole(tmp_path) == {1: True, 2: True}


def test_thinning_waits_while_a_save_is_being_written(tmp_path):
  c = save_steps(tmp_path, [1, 2])
  from ckpt_jax.run.deletion import StepDeleter

  busy = [True]
  thinner = Thinner(c.directory, KEEP, StepDeleter(c.directory), busy=lambda: busy[0])
  thinner.thin([1])
  assert not thinner.wait(0.5) and whole(tmp_path)[1]
  busy[0] = False
  assert thinner.wait(30) and not whole(tmp_path)[1]
  thinner.finish()


START = datetime.datetime(2026, 1, 1, tzinfo=datetime.timezone.utc)


@st.composite
def runs(draw):
  steps = draw(st.lists(st.integers(0, 300), min_size=1, max_size=20, unique=True))
  return [
    StepInfo(
      s,
      draw(st.none() | st.floats(0, 30 * 86400).map(lambda x: START + datetime.timedelta(seconds=x))),
      10,
      {},
      draw(st.sampled_from([None, True, False])),
      draw(st.integers(0, 9)) == 0,
      draw(st.booleans()),
    )
    for s in steps
  ]


thinning = st.builds(
  Retention,
  last=st.none() | st.integers(1, 9),
  daily=st.none() | st.integers(1, 9),
  thin=st.builds(dict, after=st.floats(1, 20 * 86400)),
)


@given(thinning, runs())
def test_thinning_spares_what_must_stay_whole_and_never_deletes(policy, infos):
  decided = policy.decide(infos)
  assert decided.thinned <= set(decided.kept)
  assert decided.reasons.keys() == {s.step for s in infos}
  for s in infos:
    if s.step in decided.thinned:
      assert s.resumable and not s.pinned and not set(decided.reasons[s.step]) & set(PROMISES)
  whole = [s.step for s in infos if s.resumable and s.healthy is not False]
  if whole:
    assert max(whole) in decided.kept and max(whole) not in decided.thinned
  without = Retention(policy.last, daily=policy.daily).decide(infos)
  assert set(without.kept) == set(decided.kept), "thin decides on no step's life"


@given(thinning, runs())
def test_what_was_thinned_once_is_not_thinned_again(policy, infos):
  first = policy.decide(infos)
  import dataclasses

  after = [dataclasses.replace(s, resumable=s.resumable and s.step not in first.thinned) for s in infos]
  again = policy.decide([s for s in after if s.step in first.kept])
  assert not again.thinned and set(again.kept) == set(first.kept)


def test_leftovers_of_a_rewriting_that_was_never_ready_are_removed(tmp_path):
  save_steps(tmp_path, [1])
  (tmp_path / ".ckpt_jax/rewriting/1/new/default").mkdir(parents=True)
  (tmp_path / ".ckpt_jax/rewriting/1.ready").write_text("{")
  assert swap.finish_rewrites(epath.Path(tmp_path)) == []
  assert os.listdir(tmp_path / ".ckpt_jax" / "rewriting") == [] and whole(tmp_path) == {1: True}
