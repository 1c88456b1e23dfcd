"""When to save and what to keep."""

import dataclasses
import datetime

import orbax.checkpoint as ocp
import pytest
from hypothesis import given
from hypothesis import strategies as st

import ckpt_jax as ckpt
from ckpt_jax.policies import AnyOf, EveryMinutes, EverySteps, OnPreemption, Retention


@dataclasses.dataclass
class Info:
  step: int
  time: datetime.datetime
  metrics: dict | None = None


@dataclasses.dataclass
class Context:
  reached_preemption: bool = False


def infos(steps, losses=None):
  start = datetime.datetime(2026, 1, 1, tzinfo=datetime.timezone.utc)
  return [
    Info(s, start + datetime.timedelta(seconds=i), {"loss": losses[i]} if losses else None) for i, s in enumerate(steps)
  ]


def kept(policy, checkpoints):
  return [c.step for c, keep in zip(checkpoints, policy.should_preserve(checkpoints), strict=True) if keep]


def asks(policy, step, preempted=False):
  return policy.should_save(Info(step, datetime.datetime.now()), [], context=Context(preempted))


def test_every_steps():
  assert [s for s in range(10) if asks(EverySteps(4), s)] == [0, 4, 8]


def test_every_minutes_follows_the_clock_and_asks_rarely():
  now = [0.0]
  looks = []

  def clock():
    looks.append(now[0])
    return now[0]

  policy = EveryMinutes(1, clock=clock)
  saved = []
  for step in range(300):
    if asks(policy, step):
      saved.append(now[0])
    now[0] += 1.0
  assert saved == [60, 120, 180, 240]
  assert len(looks) < 150, "steps that cannot be due cost no look at the clock, and no broadcast"


def test_any_of_saves_on_preemption_between_due_steps():
  policy = AnyOf([EverySteps(100), OnPreemption()])
  assert not asks(policy, 7)
  assert asks(policy, 7, preempted=True)


@pytest.mark.parametrize("make", [lambda: EverySteps(0), lambda: EveryMinutes(-1), lambda: Retention(last=0)])
def test_senseless_numbers_are_config_errors(make):
  with pytest.raises(ckpt.ConfigError):
    make()


def test_retention_without_rules_keeps_all():
  assert kept(Retention(), infos([1, 2, 3])) == [1, 2, 3]


def test_best_ignores_missing_and_nan():
  checkpoints = infos([1, 2, 3, 4], [3.0, float("nan"), 1.0, 2.0])
  checkpoints[3].metrics = None
  assert kept(Retention(last=1, best={"metric": "loss", "n": 2}), checkpoints) == [1, 3, 4]
  assert kept(Retention(last=1, best={"metric": "loss", "mode": "max"}), checkpoints) == [1, 4]


rules = st.builds(
  Retention,
  last=st.none() | st.integers(1, 5),
  every_steps=st.none() | st.integers(1, 50),
  best=st.none() | st.builds(dict, metric=st.just("loss"), mode=st.sampled_from(["min", "max"]), n=st.integers(1, 4)),
)
runs = st.lists(st.tuples(st.integers(0, 200), st.floats()), unique_by=lambda x: x[0], max_size=30).map(
  lambda pairs: infos([s for s, _ in pairs], [loss for _, loss in pairs])
)


@given(rules, runs)
def test_newest_and_last_saved_are_kept_by_every_rule(policy, checkpoints):
  if checkpoints:
    assert max(c.step for c in checkpoints) in kept(policy, checkpoints)
    assert checkpoints[-1].step in kept(policy, checkpoints)


@given(rules, runs)
def test_deciding_twice_deletes_nothing_more(policy, checkpoints):
  first = kept(policy, checkpoints)
  assert kept(policy, [c for c in checkpoints if c.step in first]) == first


@given(runs, st.integers(1, 5), st.integers(1, 50))
def test_adding_a_rule_never_deletes_more(checkpoints, last, every):
  assert set(kept(Retention(last=last), checkpoints)) <= set(kept(Retention(last=last, every_steps=every), checkpoints))


def test_policies_work_in_a_plain_orbax_manager(tmp_path):
  options = ocp.CheckpointManagerOptions(save_decision_policy=EverySteps(2), preservation_policy=Retention(last=2))
  with ocp.CheckpointManager(tmp_path, options=options) as manager:
    for step in range(9):
      manager.save(step, args=ocp.args.PyTreeSave({"x": step}))
    manager.wait_until_finished()
    assert manager.all_steps() == [6, 8]
