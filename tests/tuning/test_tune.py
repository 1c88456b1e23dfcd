"""ckpt-jax tune: the search on a clock of its own, and the command on real storage."""

import sys

import jax.numpy as jnp
import numpy as np
import pytest
from commands import cli

import ckpt_jax as ckpt
from ckpt_jax.bench.predictions import summary
from ckpt_jax.bench.trial import bounded, trials
from ckpt_jax.storage.objects import BACKEND
from ckpt_jax.tuning.profile import HostProfile, StateProfile
from ckpt_jax.tuning.sampling import Compressibility, Kind
from ckpt_jax.tuning.search import PLAN, Sample, candidates, search, table, to_yaml

RANDOM = Compressibility(0.92, 0.45e9, 0.6e9, 8 << 20)
HOST = HostProfile(
  cores=4, memory_nbytes=64 * 10**9, copy_bytes_per_s=3e9, task_s=4e-6, codecs={"zstd": RANDOM, "shuffled": RANDOM}
)
STATE = StateProfile(
  leaves=100,
  nbytes=10**9,
  largest_leaf_nbytes=10**7,
  kinds=(Kind("float32", 10**9, {"zstd": RANDOM, "shuffled": RANDOM}),),
)
PLANNED = ckpt.make_plan(STATE, "local", HOST)


class Storage:
  """Trials whose seconds a function of the configuration gives; counts them, and moves a clock of its own."""

  def __init__(self, seconds):
    self.now, self.tried, self._seconds = 0.0, [], seconds

  def __call__(self, config):
    seconds = self._seconds(config, len(self.tried))
    self.tried.append(config)
    self.now += seconds
    return Sample(0.01, seconds * 0.6, seconds * 0.4, 10**9)

  def clock(self):
    return self.now


def tuned(seconds, budget=300.0, user=None, plan=PLANNED):
  storage = Storage(seconds)
  return search(plan, user or ckpt.Config(), storage, budget, clock=storage.clock), storage


def test_change_that_helps_is_taken_and_the_rest_stays_the_plans():
  found, _ = tuned(lambda c, _: 1.0 if c.layout.compression == "shuffled" else 2.0)
  assert found.config.layout.compression == "shuffled" and found.best.changes == {"layout.compression": "shuffled"}
  assert found.config.limits == PLANNED.apply(ckpt.Config()).limits


def test_changes_that_help_alone_are_tried_together():
  def seconds(config, _):
    small = config.limits.save_concurrency != PLANNED.values["limits.save_concurrency"]
    return 4.0 / (1.5 if small else 1) / (1.5 if config.layout.compression == "shuffled" else 1)

  found, _ = tuned(seconds)
  assert set(found.best.changes) == {"layout.compression", "limits.save_concurrency"}


def test_plan_stays_where_nothing_is_better_than_the_noise():
  noise = np.random.default_rng(0).uniform(0.98, 1.02, 1000)
  found, _ = tuned(lambda _, n: noise[n])
  assert found.best.name == PLAN and found.config == PLANNED.apply(ckpt.Config())


def test_one_lucky_round_does_not_win():
  found, storage = tuned(lambda c, n: 0.2 if n == 3 else 1.0, budget=12.0)
  assert found.best.name == PLAN and len(storage.tried) <= 12


@pytest.mark.parametrize("budget", [0.1, 10.0, 60.0])
def test_budget_is_kept_but_for_the_first_measurement_of_the_plan(budget):
  found, storage = tuned(lambda *_: 1.0, budget=budget)
  assert storage.now <= max(budget, 2.0)
  assert found.candidates[0].name == PLAN and len(found.candidates[0].samples) >= 1


def test_slow_minute_hits_all_candidates_alike():
  found, _ = tuned(lambda c, n: 10.0 if n < 8 else 1.0, budget=1000.0)
  assert found.best.name == PLAN


def test_what_the_user_set_is_not_tried():
  user = ckpt.Config(layout={"compression": "on"}, limits={"save_concurrency": "2GB"})
  plan = ckpt.make_plan(STATE, "local", HOST, user)
  _, storage = tuned(lambda *_: 1.0, user=user, plan=plan)
  assert {c.layout.compression for c in storage.tried} == {"on"}
  assert {c.limits.save_concurrency for c in storage.tried} == {2 * 10**9}
  assert not any("pack" in key for c in candidates(plan, user) for key in c.changes)


def test_where_the_user_set_everything_the_plan_alone_is_measured():
  limits = {
    "save_concurrency": 10**9,
    "restore_concurrency": 10**9,
    "data_copy_concurrency": 2,
    "file_io_concurrency": 9,
  }
  user = ckpt.Config(layout={"compression": "off"}, limits=limits)
  found, storage = tuned(lambda *_: 1.0, user=user, plan=ckpt.make_plan(STATE, "local", HOST, user))
  assert found.best.name == PLAN and [c.name for c in found.candidates] == [PLAN] and len(storage.tried) == 2


def test_file_loads_holds_the_users_settings_and_the_measured_table(tmp_path):
  user = ckpt.Config(
    retention={"last": 7, "daily": 3}, schedule={"every": "10m"}, layout={"replica_parallel": "off"}, item="items"
  )
  found, _ = tuned(lambda c, _: 1.0 if c.layout.compression == "shuffled" else 2.0, user=user)
  file = tmp_path / "tuned.yaml"
  file.write_text(to_yaml(found, PLANNED, user, ["where and when"]))
  loaded = ckpt.load_config(file)
  assert loaded.layout.compression == "shuffled" and loaded.layout.replica_parallel == "off"
  assert loaded.retention.last == 7 and loaded.retention.daily == 3 and loaded.schedule.every == 600
  assert loaded.item == "items"
  assert loaded.limits.save_concurrency == found.config.limits.save_concurrency
  text = file.read_text()
  assert all(f"# {row}".rstrip() in text for row in table(found)) and "<- taken" in text


# -- trials


def test_sample_is_bounded_and_spread_over_the_state():
  state = {"a": {f"w{i}": np.ones((1000, 25), np.float32) for i in range(100)}, "b": np.ones((4000, 250), np.float32)}
  sample = bounded(state, 3_000_000)
  assert 1_000_000 < sum(x.nbytes for x in sample.values()) <= 3_000_000
  one = bounded({"big": np.ones((1000, 1000), np.float32)}, 10**6)
  assert sum(x.nbytes for x in one.values()) == 10**6
  assert bounded(state, 10**9) is state


def test_trials_measure_and_leave_nothing_even_when_interrupted(tmp_path):
  state = {"w": jnp.ones((64, 1024))}
  where = tmp_path / "not" / "there"
  with trials(where, state) as measure:
    sample = measure(ckpt.Config())
    assert 0 < sample.blocking_s <= sample.commit_s and sample.restore_s > 0 and sample.nbytes > state["w"].nbytes
    assert measure(ckpt.Config(layout={"compression": "on"})).nbytes < state["w"].nbytes
  assert list(tmp_path.iterdir()) == []
  with pytest.raises(KeyboardInterrupt), trials(where, state):
    raise KeyboardInterrupt
  assert list(tmp_path.iterdir()) == []


def test_trials_in_a_bucket_measure_and_leave_nothing(gcs):
  rng = np.random.default_rng(0)
  state = {f"w{i}": jnp.asarray(rng.standard_normal((64, 1024), dtype=np.float32)) for i in range(4)}
  with trials(f"{gcs.url}/runs", state) as measure:
    sample = measure(ckpt.Config(layout={"compression": "on"}))
  assert sample.restore_s > 0 and 2**20 * 0.8 < sample.nbytes < 2**20 * 1.1
  assert BACKEND.tree(gcs.url) == {}


# -- the command


PROGRAM = """
import jax.numpy as jnp
import numpy as np

def init_state():
  rng = np.random.default_rng(0)
  return {f"w{i}": jnp.asarray(rng.standard_normal((256, 1024), dtype=np.float32)) for i in range(20)}

def fails():
  raise ValueError("no mesh here")

def nothing():
  return {}
"""


@pytest.fixture
def command(tmp_path, monkeypatch):
  (tmp_path / "mytrain.py").write_text(PROGRAM)
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  monkeypatch.setattr(sys, "path", [*sys.path])
  monkeypatch.delitem(sys.modules, "mytrain", raising=False)
  return lambda *arguments: cli("tune", *arguments)


def test_tune_writes_a_file_that_a_checkpointer_loads_and_cleans_up(command, tmp_path):
  done = command(tmp_path / "runs", "--state", "mytrain:init_state", "--budget", "1s", "-o", tmp_path / "tuned.yaml")
  assert done.returncode == 0, done.stderr
  assert "<- taken" in done.stdout and not (tmp_path / "runs").exists()
  state = {"w": jnp.arange(1000.0)}
  with ckpt.Checkpointer(tmp_path / "run", tmp_path / "tuned.yaml") as c:
    assert c.config.layout.compression in ("on", "off")
    c.save(3, state)
  # A run's own state is what the next tune can take.
  done = command(tmp_path / "runs", "--like", f"{tmp_path / 'run'}@3", "--explain")
  assert done.returncode == 0 and "layout.compression: " in done.stdout and "4 kB in 1 array" in done.stdout


@pytest.mark.parametrize(
  ("args", "code", "message"),
  [
    (["--state", "mytrian:init_state"], 2, "did you mean mytrain?"),
    (["--state", "mytrain:init_sate"], 2, "did you mean init_state?"),
    (["--state", "mytrain"], 2, "expected MODULE:FUNCTION"),
    (["--state", "mytrain:nothing"], 2, "returned no arrays"),
    (["--state", "mytrain:fails"], 1, "fails() failed: ValueError: no mesh here"),
    (["--like", "run"], 2, "expected RUN@STEP"),
    (["--like", "run@1"], 1, "there is no such directory"),
    (["--budget", "soon"], 2, "is no duration"),
    (["-o", "not/there/x.yaml"], 2, "cannot be written"),
  ],
)
def test_mistakes_are_named_before_anything_is_measured(command, tmp_path, args, code, message):
  done = command("runs", *args)
  assert done.returncode == code and message in done.stderr
  assert not (tmp_path / "runs").exists()


def test_summary_of_predictions_compares_medians_and_the_plan_with_the_best_fixed_choice():
  def row(setting, predicted, measured):
    seconds = lambda s: {"blocking_s": 0.1, "commit_s": s, "restore_s": s, "nbytes": 10}  # noqa: E731
    return {
      "setting": setting,
      "compression": "on" if setting == "auto" else setting,
      "predicted": seconds(predicted),
      "measured": seconds(measured),
    }

  rows = [
    row("auto", 2.0, 1.0),
    row("auto", 1.2, 1.1),
    row("auto", 1.2, 9.0),
    row("on", 1.2, 1.0),
    row("off", 3.0, 3.3),
  ]
  found = summary(rows)
  assert found["auto"]["commit_s"]["ratio"] == pytest.approx(1.2 / 1.1)
  assert found["auto"]["loss_to_best_fixed"] == pytest.approx(0.1) and found["auto"]["compression"] == "on"
