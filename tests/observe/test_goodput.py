"""Goodput across restarts, from records whose truth is known."""

import json

import pytest
from commands import cli

import ckpt_jax as ckpt
from ckpt_jax.observe import End, Restore, Save, Start, read_records
from ckpt_jax.observe.goodput import goodput
from ckpt_jax.run.events import ProcessCost
from ckpt_jax.run.journal import _Segment
from ckpt_jax.run.steps import run_directory

STEP_S, EVERY, BLOCKING, BACKGROUND = 1.0, 10, 0.5, 2.0


def job(run, started, restored, saves, end=None):
  """A job that takes 5 s to begin, then saves every 10 steps of 1 s; returns the time of its last record."""
  events, now, step = [Start(time=started)], started + 5.0, -1 if restored is None else restored
  if restored is not None:
    events.append(Restore(time=now, step=restored, seconds=2.0))
  for _ in range(saves):
    now, step = now + EVERY * STEP_S + BLOCKING, step + EVERY
    events.append(
      Save(
        time=now + BACKGROUND,
        step=step,
        nbytes=100,
        blocking_s=BLOCKING,
        background_s=BACKGROUND,
        processes=(ProcessCost(0, BLOCKING, 0.1, 1.0, 0, 0, 100),),
      )
    )
  if end:
    events.append(End(time=now + BACKGROUND, how=end))
  _Segment(run_directory(run), True, started).write(events)
  return now + BACKGROUND, step


def test_goodput_of_killed_and_restarted_jobs_is_what_stayed(tmp_path):
  ended, step = job(tmp_path, 1000.0, None, 5)
  again, later = job(tmp_path, ended + 30, step - EVERY, 4)  # the newest step was damaged: 10 steps are trained again
  last, newest = job(tmp_path, again + 40, later, 2, "closed")
  found = goodput(run_directory(tmp_path), read_records(tmp_path))
  assert found.step_s == pytest.approx(STEP_S) and found.steps == newest + 1 == 100
  assert found.seconds == pytest.approx(last - 1000.0) and found.share == pytest.approx(100 / (last - 1000.0))
  assert (found.attempts, found.interruptions) == (3, 2)
  assert found.saving_s == pytest.approx(11 * BLOCKING)
  assert found.redone_s > EVERY * STEP_S, "the steps below the damaged one, and what the killed jobs had not saved"
  assert found.down_s + found.redone_s == pytest.approx(30 + 40 + 5 + 5 + EVERY * STEP_S)
  total = found.productive_s + found.saving_s + found.redone_s + found.down_s + found.other_s
  assert total == pytest.approx(found.seconds, rel=0.1)
  shown = cli("ls", tmp_path, "--goodput")
  assert "3 jobs, 2 interruptions" in shown.stdout and "100 steps of 1 s" in shown.stdout
  assert json.loads(cli("ls", tmp_path, "--goodput", "--json").stdout)["goodput"] == pytest.approx(found.share)


def test_simulate_is_calibrated_by_the_same_records(tmp_path):
  ended, step = job(tmp_path, 1000.0, None, 5)
  job(tmp_path, ended + 30, step, 5, "closed")
  told = json.loads(cli("simulate", "--calibrate", tmp_path, "--json").stdout)
  assert told["blocking_s"] == pytest.approx(BLOCKING) and told["background_s"] == pytest.approx(BACKGROUND)
  assert told["restore_s"] == pytest.approx(2.0)


def test_a_run_without_records_says_so(tmp_path):
  with ckpt.Checkpointer(tmp_path, {"observe": {"events": False}}) as c:
    c.save(0, {"x": 1})
  for command in (("ls", tmp_path, "--goodput"), ("simulate", "--calibrate", tmp_path)):
    done = cli(*command)
    assert done.returncode == 1 and "no recorded saves" in done.stderr
