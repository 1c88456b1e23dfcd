"""When to save: the schedules, and what they learn."""

import dataclasses
import itertools
import json
import subprocess
import sys

import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jobs import together

import ckpt_jax as ckpt
from ckpt_jax.policies import AllOf, AnyOf, AtSteps, EveryMinutes, EverySteps, Never, OnPreemption, Retention, YoungDaly
from ckpt_jax.policies.youngdaly import daly_interval, learned_mtti, young_interval
from ckpt_jax.run.attempts import exposure, read_attempts


@dataclasses.dataclass
class Step:
  step: int


@dataclasses.dataclass
class Context:
  reached_preemption: bool = False


def asks(policy, step, preempted=False):
  return policy.should_save(Step(step), [], context=Context(preempted))


class Clock:
  def __init__(self):
    self.now = 0.0

  def __call__(self):
    return self.now


def train(policy, clock, steps, *, step_s=1.0, blocking_s=0.5, background_s=2.0, slowdown=0.0, first=0):
  """Trains on a made-up clock; returns when saves began. Steps are `slowdown` slower while a write runs."""
  began, commit_at = [], None
  for step in range(first, first + steps):
    busy = commit_at is not None
    clock.now += step_s * (1 + slowdown * busy)
    if busy and clock.now >= commit_at:
      policy.finished(blocking_s, background_s)
      commit_at = None
    if asks(policy, step):
      assert commit_at is None, "saves overlap"
      began.append(clock.now)
      policy.begun(step)
      clock.now += blocking_s
      commit_at = clock.now + background_s
  return began


def gaps(times):
  return [b - a for a, b in itertools.pairwise(times)]


def test_every_steps():
  assert [s for s in range(10) if asks(EverySteps(4), s)] == [0, 4, 8]


def test_at_steps_and_never():
  assert [s for s in range(9) if asks(AtSteps([3, 7]), s)] == [3, 7]
  assert not any(asks(Never(), s) for s in range(9))


def test_any_and_all_of_schedules():
  both = [EverySteps(2), EverySteps(3)]
  assert [s for s in range(1, 13) if asks(AnyOf(both), s)] == [2, 3, 4, 6, 8, 9, 10, 12]
  assert [s for s in range(1, 13) if asks(AllOf(both), s)] == [6, 12]
  assert AnyOf([EverySteps(2), Never()]).explain().startswith("every 2 steps or never")
  assert not asks(AllOf([]), 0)


def test_any_of_saves_on_preemption_between_due_steps():
  policy = AnyOf([EverySteps(100), OnPreemption()])
  assert not asks(policy, 7)
  assert asks(policy, 7, preempted=True)


def test_every_minutes_follows_the_clock_and_asks_rarely():
  now, looks = [0.0], []
  policy = EveryMinutes(1, clock=lambda: looks.append(now[0]) or now[0])
  saved = []
  for step in range(300):
    if asks(policy, step):
      saved.append(now[0])
    now[0] += 1.0
  assert saved == [60, 120, 180, 240]
  assert len(looks) < 150, "steps that cannot be due cost no look at the clock, and no broadcast"


def test_the_interval_settles_at_youngs():
  clock = Clock()
  policy = YoungDaly(mtti=3600, clock=clock)
  began = train(policy, clock, 2000)
  assert gaps(began)[-1] == pytest.approx(daly_interval(0.5, 3600) + 0.5, abs=1.5)
  assert young_interval(0.5, 3600) == 60 and policy.interval() == pytest.approx(60, rel=0.01)
  assert "cost and MTTI (Daly)" in policy.explain() and "MTTI 1 h" not in policy.explain()


def test_overhead_alone_saves_as_often_as_it_allows():
  clock = Clock()
  policy = YoungDaly(max_overhead="1%", clock=clock)
  began = train(policy, clock, 2000)
  assert gaps(began)[-1] == pytest.approx(50, abs=1.5)
  assert "overhead" in policy.explain()


def test_saves_never_overlap_even_if_failures_are_frequent():
  clock = Clock()
  policy = YoungDaly(mtti=1, clock=clock)
  began = train(policy, clock, 500, background_s=30.0)
  assert min(gaps(began)) >= 30 and gaps(began)[-1] == pytest.approx(30.5, abs=1.5)
  assert "takes to commit" in policy.explain()


def test_steps_slowed_down_by_the_write_count_as_cost():
  clock = Clock()
  calm, slowed = YoungDaly(mtti=3600, clock=clock), YoungDaly(mtti=3600, clock=clock)
  train(calm, clock, 3000, background_s=10.0)
  train(slowed, clock, 3000, background_s=10.0, slowdown=0.5)
  assert calm.cost == pytest.approx(0.5)
  assert slowed.cost == pytest.approx(0.5 + 3, abs=1.1), "10 s of steps that take half as long again"


def test_one_slow_save_does_not_move_the_interval_but_a_lasting_change_does():
  policy = YoungDaly(mtti=3600, clock=Clock())
  for _ in range(9):
    policy.finished(1.0, 2.0)
  steady = policy.interval()
  policy.finished(50.0, 2.0)
  assert policy.interval() == steady
  for _ in range(9):
    policy.finished(4.0, 2.0)
  assert policy.interval() == pytest.approx(2 * steady, rel=0.01), "four times the cost, twice the interval"


def test_the_first_save_of_a_process_counts_only_until_the_second():
  policy = YoungDaly(mtti=3600, clock=Clock())
  policy.finished(20.0, 1.0)
  assert policy.cost == 20
  policy.finished(1.0, 1.0)
  assert policy.cost == 1


def test_a_job_that_goes_back_is_saved_again():
  clock = Clock()
  policy = EveryMinutes(1, clock=clock)
  first = train(policy, clock, 1000)
  again = train(policy, clock, 200, first=10)
  assert len(first) >= 15 and len(again) >= 3


@given(st.floats(1e-3, 1e4), st.floats(1, 1e7), st.none() | st.floats(1e-3, 0.5), st.floats(0, 1e4))
def test_the_interval_never_breaks_overhead_or_overlaps(cost, mtti, overhead, background):
  policy = YoungDaly(mtti, overhead, clock=Clock())
  policy.finished(cost, background)
  assert policy.interval() >= cost + background - 1e-9
  if overhead is not None:
    assert cost / policy.interval() <= overhead * (1 + 1e-9)


@given(st.floats(1e-3, 100), st.floats(1e3, 1e7))
def test_daly_and_young_agree_where_saving_is_cheap(cost, mtti):
  period = daly_interval(cost, mtti) + cost
  assert young_interval(cost, mtti) <= period * (1 + 1e-9)
  assert period <= young_interval(cost, mtti) * (1 + (cost / mtti) ** 0.5)


def test_mtti_of_a_job_is_that_of_a_node_by_the_number_of_nodes():
  policy = YoungDaly(node_mtti="30d", nodes=720)
  assert policy.mtti == 3600 and "720 nodes" in policy.explain()


@pytest.mark.parametrize(
  "make",
  [
    YoungDaly,
    lambda: YoungDaly(0),
    lambda: YoungDaly("6x"),
    lambda: YoungDaly(60, 2),
    lambda: AtSteps(3),
    lambda: EverySteps(0),
    lambda: EveryMinutes(-1),
  ],
)
def test_senseless_schedules_are_refused(make):
  with pytest.raises(ckpt.ConfigError):
    make()


def test_mtti_is_learned_from_interruptions():
  assert learned_mtti(0, 0) == 86400
  assert learned_mtti(9 * 86400, 9) == 86400
  assert learned_mtti(86400, 23) == pytest.approx(7200)


def test_a_plain_manager_that_reports_no_costs_is_watched_instead():
  clock = Clock()
  policy = YoungDaly(max_overhead="10%", clock=clock)
  began = []
  for step in range(200):
    clock.now += 1
    if asks(policy, step):
      began.append(step)
      clock.now += 3
  assert policy.cost == 3 and gaps(began)[-1] == pytest.approx(27, abs=2)


@pytest.mark.parametrize(
  ("make", "saved"), [(lambda _: EverySteps(2), [2, 4]), (lambda clock: YoungDaly(max_overhead=0.01, clock=clock), [0])]
)
def test_policies_work_in_a_plain_manager(tmp_path, make, saved):
  clock = Clock()
  options = ocp.CheckpointManagerOptions(save_decision_policy=make(clock), preservation_policy=Retention(last=2))
  with ocp.CheckpointManager(tmp_path, options=options) as manager:
    for step in range(5):
      clock.now += 1
      manager.save(step, args=ocp.args.PyTreeSave({"x": step}))
    manager.wait_until_finished()
    assert manager.all_steps() == saved


STATE = {"x": jnp.ones(4)}


def test_the_checkpointers_schedule_learns_from_its_saves(tmp_path):
  with ckpt.Checkpointer(tmp_path, ckpt.Config(schedule={"overhead": "50%", "mtti": "6h"})) as c:
    assert "no save has been measured yet" in c.schedule.explain()
    assert c.save(0, STATE)
    c.wait()
    assert c.schedule.cost == pytest.approx(c.saves[0].blocking_s - c.saves[0].waited_s)
    assert not c.save(1, STATE) and "MTTI 6 h (given)" in c.schedule.explain()


def test_a_restarted_job_starts_from_what_saves_cost_before(tmp_path):
  for _ in range(2):
    with ckpt.Checkpointer(tmp_path, ckpt.Config(schedule={"overhead": "1%", "mtti": "learned"})) as c:
      seen = c.schedule.cost
      c.save(len(c.steps()), STATE, force=True)
  assert seen is not None and "learned: 0 interruptions" in c.schedule.explain()


def test_a_schedule_can_be_given_as_an_object(tmp_path):
  with ckpt.Checkpointer(tmp_path, schedule=AtSteps([2])) as c:
    assert [s for s in range(4) if c.save(s, STATE)] == [2]


KILLED = """
import os, sys
import jax.numpy as jnp
import ckpt_jax as ckpt
c = ckpt.Checkpointer(sys.argv[1])
c.save(int(sys.argv[2]), {"x": jnp.ones(4)})
c.wait()
os._exit(9)
"""


def test_a_killed_job_counts_as_an_interruption_and_a_closed_one_does_not(tmp_path):
  subprocess.run([sys.executable, "-c", KILLED, tmp_path, "0"], timeout=120, check=False)
  with ckpt.Checkpointer(tmp_path) as c:
    c.save(1, STATE)
  with ckpt.Checkpointer(tmp_path) as c:
    c.restore()
  attempts = read_attempts(c.directory)
  assert [a.end for a in attempts] == [None, "closed"], "a job that saved nothing leaves no trace"
  assert exposure(attempts)[1] == 1 and attempts[0].last_step == 0


@pytest.mark.parametrize(
  ("text", "saved"),
  [
    ("schedule: {every_steps: 3}", [0, 3, 6]),
    ("schedule: {at_steps: [1, 5]}", [1, 5]),
    ("schedule: {never: true}", []),
    ("schedule: {any: [{every_steps: 4}, {at_steps: [5]}]}", [0, 4, 5]),
    ("schedule: {all: [{every_steps: 2}, {every_steps: 3}]}", [0, 6]),
    ("schedule:\n  any:\n    - all: [{every_steps: 2}, {at_steps: [4, 5]}]\n    - at_steps: [7]\n", [4, 7]),
  ],
)
def test_schedules_in_a_file_do_as_they_say(tmp_path, text, saved):
  (tmp_path / "run.yaml").write_text(text)
  with ckpt.Checkpointer(tmp_path / "run", tmp_path / "run.yaml") as c:
    assert [s for s in range(8) if c.save(s, STATE)] == saved


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("schedule: {every_steps: 3, at_steps: [1]}", "every_steps and at_steps exclude each other"),
    ("schedule: {any: []}", "any names nothing"),
    (
      "schedule:\n  any:\n    - every_step: 3\n",
      r"yaml:3: schedule.any.0.every_step: unknown key; did you mean every_steps",
    ),
  ],
)
def test_schedules_in_a_file_that_make_no_sense_are_named_with_their_line(tmp_path, text, message):
  (tmp_path / "run.yaml").write_text(text)
  with pytest.raises(ckpt.ConfigError, match=message):
    ckpt.load_config(tmp_path / "run.yaml")


@pytest.mark.multiprocess
def test_processes_agree_on_when_to_save_and_steps_that_cannot_be_due_cost_no_collective(tmp_path):
  def found(every, steps):
    done = together("schedule.py", tmp_path / every, every, steps, processes=2)
    lines = [line for r in done for line in r.log.splitlines() if "found {" in line]
    return [json.loads(line.partition("found ")[2]) for line in lines]

  one, other = found("1h", 300)
  assert one["saved"] == other["saved"] == [] and one["collectives"] <= 6, "300 steps"
  one, other = found("300ms", 300)
  assert one["saved"] == other["saved"] and len(one["saved"]) >= 2
