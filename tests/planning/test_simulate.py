"""The model of goodput and storage, against closed forms and against itself."""

import json
import math

import commands
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ckpt_jax as ckpt
from ckpt_jax.planning.estimate import Storage
from ckpt_jax.planning.simulate import Job, best_interval, closed_form, simulate, storage_use
from ckpt_jax.policies import Retention
from ckpt_jax.policies.youngdaly import daly_interval

jobs = st.builds(
  Job,
  mtti=st.floats(100, 1e6),
  blocking_s=st.floats(0.01, 30),
  background_s=st.floats(0, 20),
  restart_s=st.floats(0, 60),
  restore_s=st.floats(0, 30),
)


@settings(max_examples=30, deadline=None)
@given(jobs, st.floats(0.2, 5))
def test_monte_carlo_agrees_with_the_closed_form(job, times):
  interval = best_interval(job) * times
  expected = closed_form(job, interval)
  got = simulate(job, interval, interruptions=500, trials=400)
  assert got.goodput == pytest.approx(expected, rel=0.03, abs=0.005)
  assert got.low - 0.01 <= expected <= got.high + 0.01


@settings(max_examples=30, deadline=None)
@given(jobs, st.floats(0.1, 10))
def test_shares_of_the_time_add_up_to_all_of_it(job, times):
  got = simulate(job, best_interval(job) * times)
  assert got.goodput + got.saving + got.rework + got.down == pytest.approx(1)


@given(jobs, st.floats(0.05, 20))
def test_no_interval_beats_the_best(job, times):
  best = best_interval(job)
  other = max(best * times, job.background_s)
  assert closed_form(job, other) <= closed_form(job, best) * (1 + 1e-9)


@given(st.floats(1e-5, 0.1))
def test_dalys_estimate_lies_close_to_the_exact_optimum(cost_by_mtti):
  """Daly 2006, eq. 37, is a series; the exact optimum of his eq. 20 is by Lambert's W."""
  job = Job(1.0, cost_by_mtti)
  assert daly_interval(cost_by_mtti, 1.0) == pytest.approx(best_interval(job), rel=0.002)


@pytest.mark.parametrize(("hours", "minutes"), [(24, "117"), (6, "57"), (0.25, "9.1")])
def test_the_optimum_is_the_one_that_daly_published(hours, minutes):
  """Daly 2006, figures 3 to 5: delta 5 min, R 10 min, Ts 500 h; his model's tau_opt."""
  digits = len(minutes.partition(".")[2])
  assert f"{daly_interval(300, hours * 3600) / 60:.{digits}f}" == minutes
  exact = best_interval(Job(hours * 3600, 300, restart_s=600)) / 60
  assert exact == pytest.approx(float(minutes), rel=0.01)


def test_a_life_too_short_for_a_commit_is_lost():
  got = simulate(Job(100, 1, 2, 10, 5), 30, lifetimes=[47, 49])
  assert got.goodput == pytest.approx(30 / 96), "the first commit comes at 10 + 5 + 30 + 1 + 2 = 48 s"
  assert got.lost_s == pytest.approx((31 - 1 + 32 - 1 - 30 + 1 + 0) / 2, abs=1.1)


def test_goodput_falls_with_the_hosts():
  shares = [
    closed_form(job, best_interval(job))
    for hosts in (1, 100, 10_000, 100_000)
    for job in [Job(50 * 365 * 86400 / hosts, 5.0, 60.0, 300.0)]
  ]
  assert shares == sorted(shares, reverse=True) and shares[0] > 0.999 and 0 < shares[-1] < 0.98


def test_32_hosts_that_read_100_gb_each_divide_a_fixed_bandwidth():
  """The article's case."""
  server = Storage(bandwidth=10e9, interconnect=12.5e9)
  assert server.restore_seconds(100e9, 32, "direct", copies=32) == pytest.approx(320)
  assert server.restore_seconds(100e9, 32, "gather", copies=32) == pytest.approx(10 + 8)
  assert server.restore_seconds(100e9, 32, "broadcast", copies=32) == pytest.approx(10 + 8)
  assert server.restore_seconds(100e9, 32) == pytest.approx(10), "one copy, sharded over the hosts"
  bucket = Storage(per_host=1e9, interconnect=12.5e9)
  assert bucket.restore_seconds(100e9, 32, "direct", copies=32) == pytest.approx(100)
  assert bucket.restore_seconds(100e9, 32, "gather", copies=32) == pytest.approx(100 / 32 + 8)
  assert bucket.restore_seconds(100e9, 32, "broadcast", copies=32) == pytest.approx(100 + 8), "one host reads it all"


def test_storage_of_a_month_is_what_the_rules_keep():
  use = storage_use(Retention(last=3, hourly=24, daily=7), 600, 10, days=30)
  # The run ends at midnight: its last three steps fall into two hours and two days, which the other rules count too.
  assert use.steps[-1] == 3 + 22 + 5 and use.nbytes[-1] == 300 and use.peak_nbytes < 400
  everything = storage_use(Retention(), 3600, 10, days=30)
  assert everything.steps[-1] == 720 and everything.peak_nbytes == 7200


@pytest.mark.parametrize(
  "make",
  [
    lambda: Job(0, 1),
    lambda: Job(1, math.nan),
    lambda: Storage(),
    lambda: simulate(Job(1, 1), 0),
    lambda: Storage(1).restore_seconds(1, 1, "x"),
  ],
)
def test_senseless_numbers_are_config_errors(make):
  with pytest.raises(ckpt.ConfigError):
    make()


def cli(*arguments):
  return commands.cli("simulate", *arguments)


def test_simulate_prints_the_best_interval_and_draws_it(tmp_path):
  picture = tmp_path / "curve.svg"  # its texts are in comments
  pytest.importorskip("matplotlib")
  done = cli(
    "--params",
    "7e9",
    "--hosts",
    32,
    "--node-mtti",
    "90d",
    "--bandwidth",
    "10GB",
    "--keep-last",
    3,
    "--keep-daily",
    7,
    "--price",
    0.02,
    "--currency",
    "EUR",
    "--plot",
    picture,
  )
  assert done.returncode == 0, done.stderr
  assert "best" in done.stdout and " EUR a month" in done.stdout
  text = picture.read_text()
  for label in ("work between saves", "min", "99.", "%", "days", "GB stored", "EUR a month"):
    assert f"<!-- {label}" in text or label in text, label


def test_simulate_gives_json():
  done = cli(
    "--bytes",
    "100GB",
    "--hosts",
    32,
    "--node-mtti",
    "90d",
    "--bandwidth",
    "10GB",
    "--strategy",
    "gather",
    "--copies",
    "32",
    "--blocking",
    "2s",
    "--interval",
    "10m",
    "--json",
  )
  found = json.loads(done.stdout)
  assert found["restore_s"] == pytest.approx(18) and found["background_s"] == pytest.approx(10)
  assert found["chosen"]["interval"] == 600 and found["chosen"]["goodput"] <= found["best"]["goodput"] + 0.01
  assert found["best"]["goodput"] == pytest.approx(found["best"]["closed_form"], rel=0.02)


def test_simulate_assumes_one_copy_sharded_over_the_hosts():
  found = json.loads(cli("--params", "70b", "--hosts", 32, "--bandwidth", "10GB", "--json").stdout)
  assert found["nbytes"] == 840e9 and found["blocking_s"] == pytest.approx(840 / 32 / 5)
  assert found["restore_s"] == found["background_s"] == pytest.approx(84)


def test_simulate_without_a_bandwidth_says_what_it_assumes():
  done = cli("--params", "70e9", "--hosts", 32)
  assert done.returncode == 0 and "a save takes 5.25 s from training and commits 26.2 s later" in done.stdout
  assert "assumed: 1 GB/s a host" in done.stdout


def test_simulate_takes_its_costs_from_a_run(tmp_path):
  with ckpt.Checkpointer(tmp_path, {"retention": {"last": 2}}) as c:
    for step in range(3):
      c.save(step, {"x": jnp.ones(1000)})
  found = json.loads(cli("--calibrate", tmp_path, "--json").stdout)
  assert found["nbytes"] == 4000 and 0 < found["blocking_s"] < 5 and "3 saves in 1 attempt," in found["source"]
  assert found["storage"]["steps"] == [2], "the run's own retention"
  assert json.loads(cli("--calibrate", tmp_path, "--keep-last", 5, "--json").stdout)["storage"]["steps"] == [5]
  assert cli("--calibrate", tmp_path / "none").returncode == 1


@pytest.mark.parametrize(
  "arguments", [[], ["--bytes", "1GB", "--params", "7x"], ["--bytes", "x", "--bandwidth", "1GB"]]
)
def test_simulate_without_what_it_needs_is_wrong_usage(arguments):
  done = cli(*arguments)
  assert done.returncode == 2 and done.stderr.startswith(("error: ", "Usage: "))
