"""Steps ascend, the disk is the truth, and the end of training is not lost in silence."""

import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jobs import together

import ckpt_jax as ckpt
from ckpt_jax.config.arguments import step_number
from ckpt_jax.policies import AllOf, AnyOf, AtSteps, EveryMinutes, EverySteps

STATE = {"w": jnp.ones(2)}


def numbers(c):
  return [s.step for s in c.steps()]


def test_training_begun_anew_in_an_old_run_is_an_error_at_each_due_save(tmp_path):
  with ckpt.Checkpointer(tmp_path) as c:
    c.save(1000, STATE)
  with ckpt.Checkpointer(tmp_path) as c:
    for step in range(3):
      with pytest.raises(ckpt.CheckpointError, match=rf"step {step} was not saved.*1000 is committed") as e:
        c.save(step, STATE)
      assert "rollback(" in str(e.value) and "force=True" in str(e.value) and "new directory" in str(e.value)
    with pytest.raises(ckpt.CheckpointError, match=r"step 1000 is saved already.*new directory"):
      c.save(1000, STATE)
    assert c.save(1001, STATE)


@pytest.mark.parametrize(
  "schedule", [{"every_steps": 10}, EverySteps(10), ocp.checkpoint_managers.FixedIntervalPolicy(10)], ids=repr
)
def test_training_on_from_an_older_step_raises_at_the_first_due_save_and_names_the_step(tmp_path, schedule):
  given = {"config": {"schedule": schedule}} if isinstance(schedule, dict) else {"schedule": schedule}
  with ckpt.Checkpointer(tmp_path) as c:
    for step in (40, 50, 100):
      c.save(step, STATE)
  with ckpt.Checkpointer(tmp_path, **given) as c:
    c.restore(50)
    assert [c.save(step, STATE) for step in range(51, 60)] == [False] * 9
    for step in (60, 70):
      with pytest.raises(ckpt.CheckpointError, match=r"rollback\(50\)"):
        c.save(step, STATE)
    c.rollback(50)
    assert c.save(60, STATE)
  assert numbers(c) == [40, 50, 60]


def test_the_step_that_this_object_saved_or_restored_last_is_there_already(tmp_path):
  with ckpt.Checkpointer(tmp_path) as c:
    assert c.save(3, STATE) and not c.save(3, STATE) and not c.save(3, STATE, final=True)
  with ckpt.Checkpointer(tmp_path) as c:
    assert c.restore_or_init(lambda: STATE).step == 3
    assert not c.save(3, STATE, final=True)
  with ckpt.Checkpointer(tmp_path) as c, pytest.raises(ckpt.CheckpointError, match="step 3 is saved already"):
    c.save(3, STATE, final=True)  # by a training that knows nothing of the one that saved it


@pytest.mark.parametrize("retention", [{"last": 1}, {"budget": "20B"}, {"best": {"metric": "loss"}}], ids=str)
def test_a_forced_older_step_stays_and_costs_no_newer_one(tmp_path, retention):
  with ckpt.Checkpointer(tmp_path, {"retention": retention}) as c:
    c.save(10, STATE, metrics={"loss": 1.0})
    c.save(4, STATE, metrics={"loss": 2.0}, force=True)
    c.wait()
    c._run.deleter.wait_for()
    assert numbers(c) == [4, 10]
    with pytest.raises(ckpt.CheckpointError, match=r"step 5 was not saved, since step 10.*rollback\(4\)"):
      c.save(5, STATE)


def test_a_step_removed_by_hand_can_be_saved_again(tmp_path):
  with ckpt.Checkpointer(tmp_path) as c:
    for step in range(4):
      c.save(step, STATE)
    c.wait()
    shutil.rmtree(tmp_path / "3")
    assert c.save(3, STATE)
    c.wait()
    shutil.rmtree(tmp_path / "2")
    shutil.rmtree(tmp_path / "3")
    assert c.save(2, STATE, final=True)
    shutil.rmtree(tmp_path / "0")
    assert c.save(0, STATE, force=True)
  assert numbers(c) == [0, 1, 2]


def test_steps_are_whole_numbers_of_python_numpy_or_jax(tmp_path):
  steps = (0, np.int64(1), np.array(2), jnp.int32(3), jax.device_put(4))
  with jax.transfer_guard("disallow"):
    assert [step_number(step) for step in steps] == [0, 1, 2, 3, 4]
  with ckpt.Checkpointer(tmp_path) as c:
    for step in steps:
      assert c.save(step, STATE)
    for wrong in ("a", "5", 5.0, True, np.bool_(True), None, np.array([5]), jnp.float32(5), -1):
      for call in (lambda w: c.save(w, STATE), c.rollback, c.pin, c.unpin):
        with pytest.raises(ckpt.CheckpointError, match=r"step: (expected a whole number|-1 must not be negative)"):
          call(wrong)
    with pytest.raises(ckpt.CheckpointError, match="step: expected a whole number such as 100, got '0'"):
      c.restore("0")
  assert numbers(c) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
  "make",
  [
    lambda d: ckpt.Checkpointer(d, schedule=5),
    lambda d: ckpt.Checkpointer(d, schedule="every_steps"),
    lambda d: ckpt.Checkpointer(d, schedule=EverySteps),
    lambda d: ckpt.Checkpointer(d, schedule={"every_steps": 5}),
    lambda d: ckpt.Checkpointer(d, 5),
    lambda d: ckpt.Checkpointer(d, [{"schedule": 5}]),
    lambda d: ckpt.Checkpointer(d, {5: 1}),
    lambda d: ckpt.Checkpointer(d, {"schedule": {"last": 5}}),
    lambda d: AnyOf([5]),
    lambda d: AllOf(5),
    lambda d: AtSteps(5),
    lambda d: AtSteps(["a"]),
    lambda d: EverySteps("5"),
    lambda d: EverySteps(2.5),
    lambda d: EveryMinutes("soon"),
    lambda d: ckpt.policies.Retention(last="3"),
    lambda d: ckpt.policies.Retention(best="loss"),
    lambda d: ckpt.policies.Retention(thin=5),
  ],
)
def test_wrong_settings_are_config_errors_at_the_call(tmp_path, make):
  with pytest.raises(ckpt.ConfigError):
    make(tmp_path / "run")
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("how", ["final", "last"])
def test_the_last_step_of_training_is_saved(tmp_path, how, caplog):
  schedule = {"every_steps": 5} | ({"last": 19} if how == "last" else {})
  with ckpt.Checkpointer(tmp_path, {"schedule": schedule}) as c:
    for step in range(20):
      c.save(step, STATE, **({"final": step == 19} if how == "final" else {}))
  assert numbers(c) == [0, 5, 10, 15, 19] and "offered" not in caplog.text


def test_a_lost_end_is_warned_of_once_and_not_after_an_exception(tmp_path, caplog):
  def train(first, end):
    with ckpt.Checkpointer(tmp_path, {"schedule": {"every_steps": 5}}) as c:
      for step in range(first, 20):
        c.save(step, STATE)
      end()
    c.close()

  with pytest.raises(ZeroDivisionError):
    train(0, lambda: 1 / 0)
  assert not caplog.records
  train(16, lambda: None)
  (record,) = caplog.records
  assert record.levelname == "WARNING" and "step 19 was offered" in caplog.text and "final=True" in caplog.text


ENDS = """
import sys, jax.numpy as jnp, ckpt_jax as ckpt
c = ckpt.Checkpointer(sys.argv[1], {"schedule": {"every_steps": 2}})
for step in range(int(sys.argv[2]), int(sys.argv[2]) + 2):
  c.save(step, {"w": jnp.ones(2)})
if len(sys.argv) > 3:
  raise KeyError
"""


def test_a_program_that_ends_without_close_is_warned_of_its_lost_end_too(tmp_path):
  done = [
    subprocess.run([sys.executable, "-c", ENDS, tmp_path, *args], capture_output=True, text=True, timeout=120)
    for args in (["0"], ["2", "raise"])
  ]
  assert "step 1 was offered" in done[0].stderr and done[0].returncode == 0
  assert "offered" not in done[1].stderr and "KeyError" in done[1].stderr


@pytest.mark.multiprocess
def test_all_processes_of_a_job_take_the_same_decision(tmp_path):
  results = together("order.py", tmp_path, processes=2)
  assert all("said [True, True, False, True, True, True]" in r.log for r in results), results[0].log


def test_wrong_arguments_of_other_calls_are_named_too(tmp_path):
  with ckpt.Checkpointer(tmp_path) as c:
    c.save(0, STATE)
    c.wait()
    for call, name in (
      (lambda: c.restore(only=5), "only"),
      (lambda: c.restore(like=STATE, init_missing=5), "init_missing"),
      (lambda: c.restore(cast="w"), "cast"),
      (lambda: c.restore(cast={"w": "float31"}), "cast"),
      (lambda: c.restore(item=5), "item"),
      (lambda: c.restore(strategy=5), "strategy"),
      (lambda: c.restore_or_init(STATE), "init_fn"),
      (lambda: c.save(1, STATE, metrics=[1.0]), "metrics"),
      (lambda: ckpt.verify(tmp_path, "0"), "step"),
      (lambda: ckpt.load_config(5), "load_config"),
      (lambda: ckpt.detect(5), "directory"),
      (lambda: ckpt.make_plan(STATE, 5), "directory"),
    ):
      with pytest.raises(ckpt.CheckpointError, match=name):
        call()


def test_a_policy_is_a_retention_section_too():
  policy = ckpt.policies.Retention(last=3, best={"metric": "loss"}, budget="2TiB", within="2d")
  config = ckpt.Config(retention=policy)
  assert config == ckpt.Config(retention={"last": 3, "best": {"metric": "loss"}, "budget": "2TiB", "within": "2d"})
  assert ckpt.policies.Retention.from_config(config.retention) == policy
