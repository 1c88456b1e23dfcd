"""What each retention rule promises."""

import dataclasses
import datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ckpt_jax as ckpt
from ckpt_jax.policies import Retention, RetentionContext
from ckpt_jax.policies.retention import PROMISES

START = datetime.datetime(2026, 1, 1, tzinfo=datetime.timezone.utc)
HOUR, DAY = 3600.0, 86400.0


@dataclasses.dataclass
class Info:
  step: int
  time: datetime.datetime | None
  metrics: dict | None = None
  nbytes: int = 10
  healthy: bool | None = None
  pinned: bool = False


def at(seconds):
  return START + datetime.timedelta(seconds=seconds)


def saved(*seconds):
  return [Info(i, at(s)) for i, s in enumerate(seconds)]


def kept(policy, infos, **context):
  return policy.decide(infos, context=RetentionContext(**context)).kept


def restic(policy, infos):
  """restic's ApplyPolicy, written down a second time in its own form: counters walking from the newest snapshot."""
  listed = sorted(infos, key=lambda c: (c.time, c.step), reverse=True)
  bucket = {
    "last": lambda t, i: i,
    "hourly": lambda t, i: t.strftime("%Y%m%d%H"),
    "daily": lambda t, i: t.strftime("%Y%m%d"),
    "weekly": lambda t, i: t.strftime("%G%V"),
    "monthly": lambda t, i: t.strftime("%Y%m"),
  }
  left = {name: getattr(policy, name) or 0 for name in bucket}
  previous = dict.fromkeys(bucket)
  keep = set()
  for i, c in enumerate(listed):
    if policy.within is not None and c.time > listed[0].time - datetime.timedelta(seconds=policy.within):
      keep.add(c.step)
    for name, period in bucket.items():
      value = period(c.time, i)
      if left[name] > 0 and (value != previous[name] or i == len(listed) - 1):
        keep.add(c.step)
        previous[name] = value
        left[name] -= 1
  return sorted(keep | {listed[0].step})


NAMES = ("hourly", "daily", "within", "every_steps", "best")
counts = st.none() | st.integers(1, 6)
timed = dict.fromkeys(("last", "hourly", "daily", "weekly", "monthly"), counts)
timed["within"] = st.none() | st.floats(60, 40 * DAY)
timed_rules = st.builds(Retention, **timed)
rules = st.builds(
  Retention,
  **timed,
  every_steps=st.none() | st.integers(1, 50),
  best=st.none() | st.builds(dict, metric=st.just("loss"), mode=st.sampled_from(["min", "max"]), n=st.integers(1, 4)),
  budget=st.none() | st.integers(1, 300),
)
seconds = st.floats(0, 90 * DAY)


@st.composite
def forward_runs(draw):
  """Steps and times both rise: a run that never goes back."""
  times = sorted(draw(st.lists(seconds, min_size=1, max_size=40, unique=True)))
  return [Info(i, at(s)) for i, s in enumerate(times)]


@st.composite
def any_runs(draw):
  """Times in any order: runs that went back, with metrics, sizes, health and pins."""
  steps = draw(st.lists(st.integers(0, 300), min_size=1, max_size=25, unique=True))
  return [
    Info(
      s,
      draw(st.none() | seconds.map(at)) if draw(st.integers(0, 9)) == 0 else at(draw(seconds)),
      draw(st.none() | st.builds(dict, loss=st.floats())),
      draw(st.integers(0, 50)),
      draw(st.sampled_from([None, True, False])),
      draw(st.integers(0, 9)) == 0,
    )
    for s in steps
  ]


@given(timed_rules, forward_runs())
@settings(max_examples=300)
def test_buckets_decide_as_restic_does(policy, infos):
  want = [c.step for c in infos] if policy.keeps_all else restic(policy, infos)
  assert kept(policy, infos) == want


@given(rules, any_runs())
def test_the_newest_and_the_newest_healthy_step_are_never_deleted(policy, infos):
  stays = kept(policy, infos)
  assert max(c.step for c in infos) in stays
  healthy = [c.step for c in infos if c.healthy is not False]
  assert not healthy or max(healthy) in stays


@given(rules, any_runs(), st.sets(st.integers(0, 300)), st.sets(st.integers(0, 300)))
def test_pinned_steps_and_those_being_restored_survive_every_rule(policy, infos, pinned, restoring):
  there = {c.step for c in infos}
  marked = {c.step for c in infos if c.pinned}
  assert ((pinned | restoring) & there) | marked <= set(kept(policy, infos, pinned=pinned, restoring=restoring))


@given(rules, any_runs())
def test_deciding_twice_deletes_nothing_more(policy, infos):
  once = kept(policy, infos)
  assert kept(policy, [c for c in infos if c.step in once]) == once


@given(rules, rules, any_runs())
def test_adding_a_rule_never_deletes_more(a, b, infos):
  a, b = dataclasses.replace(a, budget=None, last=a.last or 1), dataclasses.replace(b, budget=None)
  both = dataclasses.replace(
    a,
    **{f: getattr(a, f) if getattr(a, f) is not None else getattr(b, f) for f in NAMES},
  )
  assert set(kept(a, infos)) <= set(kept(both, infos))


@given(rules, any_runs(), st.integers(0, 300), st.floats(-5, 5))
@settings(max_examples=300)
def test_an_older_step_saved_later_never_deletes_a_newer_one(policy, infos, step, loss):
  infos = [c for c in infos if c.step != step and c.time is not None]
  late = Info(step, at(91 * DAY), {"loss": loss}, 30)
  before = {s for s in kept(policy, infos) if s > step}
  stays = kept(policy, [*infos, late])
  assert before <= set(stays)
  assert step in stays, "and the step saved last stays itself"


@given(rules, any_runs(), st.data())
def test_the_budget_is_held_or_it_is_said_why_not(policy, infos, data):
  policy = dataclasses.replace(policy, budget=policy.budget or 60)
  infos = sorted(infos, key=lambda c: c.step)
  infos = [dataclasses.replace(c, time=at(HOUR * i)) for i, c in enumerate(infos)]
  files = st.sets(st.sampled_from("abc")).map(lambda names: {name: {"a": 1, "b": 4, "c": 30}[name] for name in names})
  shared = {c.step: data.draw(files) for c in infos}
  decided = policy.decide(infos, context=RetentionContext(shared=shared))
  kept = [c for c in infos if c.step in decided.kept]
  size = sum(max(0, c.nbytes - sum(shared[c.step].values())) for c in kept)
  size += sum({name: nbytes for c in kept for name, nbytes in shared[c.step].items()}.values())
  if size > policy.budget:
    assert "budget" in decided.notes[0]
    assert all(set(decided.reasons[s]) & set(PROMISES) for s in decided.kept if infos_size(infos, s))
  else:
    assert not decided.notes


def infos_size(infos, step):
  return next(c.nbytes for c in infos if c.step == step)


def test_budget_drops_the_oldest_first_and_the_best_last():
  infos = [Info(i, at(i * HOUR), {"loss": abs(i - 1.0)}) for i in range(6)]
  decided = Retention(last=6, best={"metric": "loss"}, budget=30).decide(infos)
  assert decided.kept == [1, 4, 5]
  assert decided.over_budget == {0, 2, 3}
  assert Retention(budget="30B").decide(infos).kept == [3, 4, 5], "a budget alone keeps what it has room for"


def test_hourly_keeps_the_newest_of_each_hour_and_the_oldest_while_there_is_room():
  infos = saved(0, 10, 20, HOUR, HOUR + 1, 3 * HOUR)
  decided = Retention(hourly=9).decide(infos)
  assert decided.kept == [0, 2, 4, 5]
  assert decided.reasons[0] == ("oldest hourly",)
  assert kept(Retention(hourly=2), infos) == [4, 5]


def test_days_and_weeks_are_those_of_utc():
  east = datetime.timezone(datetime.timedelta(hours=9))
  infos = saved(0, 23 * HOUR)
  infos = [dataclasses.replace(c, time=c.time.astimezone(east)) for c in infos]
  assert kept(Retention(daily=1), infos) == [1], "one day in UTC, two in Tokyo"
  naive = [dataclasses.replace(c, time=c.time.astimezone(datetime.timezone.utc).replace(tzinfo=None)) for c in infos]
  assert kept(Retention(daily=1), naive) == [1]


def test_within_counts_from_the_newest_step():
  infos = saved(0, DAY, 2 * DAY, 2 * DAY + 6 * HOUR)
  assert kept(Retention(within="1d6h"), infos) == [2, 3]
  assert kept(Retention(within="2d6h"), infos) == [1, 2, 3], "exactly as old as the limit goes, as in restic"


def test_without_rules_every_step_stays():
  assert kept(Retention(), saved(0, 1, 2)) == [0, 1, 2]


def test_best_are_the_lowest_or_highest_and_missing_metrics_are_kept_on_request():
  infos = saved(*range(6))
  for info, loss in zip(infos, [3.0, None, 1.0, float("nan"), 2.0], strict=False):
    info.metrics = None if loss is None else {"loss": loss}
  assert kept(Retention(best={"metric": "loss"}), infos) == [2, 5]
  assert kept(Retention(best={"metric": "loss", "n": 2}), infos) == [2, 4, 5]
  assert kept(Retention(best={"metric": "loss", "mode": "max"}), infos) == [0, 5]
  assert kept(Retention(best={"metric": "loss", "keep_missing": True}), infos) == [1, 2, 3, 5]


def test_an_unhealthy_step_is_never_the_best():
  infos = [Info(i, at(i), {"loss": float(i)}, healthy=i > 0) for i in range(4)]
  assert kept(Retention(best={"metric": "loss"}), infos) == [1, 3]


def test_budget_counts_what_steps_share_once_and_as_freed_with_the_last_of_them():
  infos = [Info(i, at(i * HOUR), {}) for i in range(6)]
  size = infos[0].nbytes
  shared = {i: {"base": size - 1} for i in range(6)}  # the rest is one byte a step

  def kept(budget, shared):
    return Retention(last=6, budget=budget).decide(infos, context=RetentionContext(shared=shared)).kept

  assert kept(size + 5, shared) == [0, 1, 2, 3, 4, 5]
  assert kept(size + 4, shared) == [1, 2, 3, 4, 5]
  assert kept(2 * size, {}) == [4, 5]
  assert kept(2 * size + 1, {0: {"a": size - 1}, 1: {"a": size - 1}}) == [4, 5], "0 alone frees a byte, 1 the rest"


@pytest.mark.parametrize("make", [{"last": 0}, {"hourly": 0}, {"within": "soon"}, {"budget": -1}, {"within": 0}])
def test_senseless_values_are_config_errors(make):
  with pytest.raises(ckpt.ConfigError, match=next(iter(make))):
    Retention(**make)
