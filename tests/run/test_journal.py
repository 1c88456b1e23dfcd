"""The records of a run: complete, small, safe from kills and from each other, and never in the way of a save."""

import json
import logging
import pathlib
import subprocess
import sys
import threading

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from commands import cli
from jobs import together

import ckpt_jax as ckpt
from ckpt_jax.observe import Attempt, Deletion, End, Failure, Restore, Save, Start, read_records
from ckpt_jax.observe.goodput import goodput
from ckpt_jax.run import journal as journals
from ckpt_jax.run.events import ProcessCost, RolledUp, from_line, slowest, to_line
from ckpt_jax.run.journal import record, roll_up
from ckpt_jax.run.steps import run_directory

STATE = {"params": {"w": jnp.ones((64, 64))}, "n": jnp.int32(0)}


def test_what_happens_to_a_run_is_recorded(tmp_path):
  with ckpt.Checkpointer(tmp_path, {"retention": {"last": 1}}) as c:
    state = c.restore_or_init(lambda: STATE).state
    for step in range(2):
      c.save(step, state)
    c.wait()
    c.restore(like=STATE)
  events = read_records(tmp_path).events
  assert sorted(e.kind for e in events) == ["deletion", "end", "plan", "restore", "save", "save", "start"]
  start, _, save, *_, end = events  # the deletion comes when it comes
  (deleted,), (restored,) = ([e for e in events if isinstance(e, kind)] for kind in (Deletion, Restore))
  assert isinstance(start, Start) and start.processes == 1 and start.version == ckpt.__version__
  assert isinstance(save, Save) and save.step == 0 and save.nbytes == 64 * 64 * 4 + 4 and save.healthy
  assert save.files and save.stored_nbytes >= save.nbytes and save.norms == {"params": 64.0}
  (cost,) = save.processes
  assert cost.nbytes_written >= save.nbytes and cost.blocking_s == pytest.approx(save.blocking_s)
  assert 0 < cost.snapshot_s <= cost.blocking_s and 0 < save.commit_s <= save.background_s + save.blocking_s
  assert isinstance(deleted, Deletion) and deleted.step == 0 and "last=1" in deleted.why
  assert (
    isinstance(restored, Restore) and restored.step == 1 and restored.strategy == "direct" and restored.verified == 2
  )
  assert isinstance(end, End) and end.how == "closed"


def test_those_who_only_read_leave_no_records(tmp_path):
  with ckpt.Checkpointer(tmp_path, {"observe": {"events": False}}) as c:
    c.save(0, STATE)
  with ckpt.Checkpointer(tmp_path) as c:
    c.restore()
    c.steps()
  assert not (tmp_path / ".ckpt_jax" / "events").exists()
  with pytest.raises(ckpt.NoCheckpointError, match="no recorded saves"):
    goodput(c.directory, read_records(tmp_path))


def test_a_damaged_step_and_a_failed_save_are_recorded(tmp_path):
  with ckpt.Checkpointer(tmp_path) as c:
    for step in range(2):
      c.save(step, STATE)
  next((tmp_path / "1" / "default" / "d").iterdir()).write_bytes(b"")
  with ckpt.Checkpointer(tmp_path) as c:
    assert c.restore(like=STATE).step == 0
    with pytest.raises(ckpt.UnhealthyStateError):
      c.save(1, STATE | {"params": {"w": jnp.full((64, 64), jnp.nan)}})
      c.wait()
  found = {event.kind: event for event in read_records(tmp_path).events}
  assert found["quarantine"].step == 1 and found["quarantine"].reason and found["fallback"].skipped.keys() == {1}
  assert found["failure"].what == "save" and found["failure"].step == 1 and "params/w" in found["failure"].error


def test_records_disturb_neither_plain_orbax_nor_the_commands(tmp_path):
  with ckpt.Checkpointer(tmp_path) as c:
    for step in range(3):
      c.save(step, STATE)
  with ocp.CheckpointManager(tmp_path) as manager:
    assert manager.all_steps() == [0, 1, 2]
    manager.save(3, args=ocp.args.StandardSave({"w": np.ones(3)}))
  before = {p.name: p.read_bytes() for p in (tmp_path / ".ckpt_jax" / "events").iterdir()}
  assert cli("prune", tmp_path, "--keep-last", 2, "--yes").returncode == 0
  assert cli("verify", tmp_path).returncode == 0
  with ckpt.Checkpointer(tmp_path) as c:
    assert [s.step for s in c.steps()] == [2, 3]
  after = {p.name: p.read_bytes() for p in (tmp_path / ".ckpt_jax" / "events").iterdir()}
  assert before.items() <= after.items(), "no retention, cleaning or foreign program touches them"
  deleted = [e for e in read_records(tmp_path).events if isinstance(e, Deletion)]
  assert [e.step for e in deleted] == [0, 1], "those of the command are recorded too"


def test_a_run_with_nothing_but_records_is_a_new_run(tmp_path):
  record(run_directory(tmp_path), Failure(error="no step was ever committed"))
  with ckpt.Checkpointer(tmp_path) as c:
    assert c.restore_or_init(lambda: STATE).step is None
    assert c.save(0, STATE)


@pytest.mark.parametrize(
  "last",
  [
    b'{"kind":"save","time":1.5,"st',
    b"\xff\x00",
    b'{"kind":"later","time":1}',
    b"[]",
    b'{"kind":"save","time":"x","step":[]}',
  ],
)
def test_a_line_that_cannot_be_read_is_left_out(tmp_path, last):
  place = tmp_path / ".ckpt_jax" / "events"
  place.mkdir(parents=True)
  (place / "1000000-1-aa.00000.jsonl").write_bytes(to_line(Save(time=2.0, step=7)).encode() + b"\n" + last)
  (event,) = read_records(tmp_path).events
  assert event == Save(time=2.0, step=7, attempt="1000000-1-aa")


def test_a_record_comes_back_as_it_was_written():
  costs = tuple(ProcessCost(p, 0.5, 0.25, 1.0, 3, 1, 10) for p in range(2))
  for event in (
    Save(time=1.5, step=3, processes=costs, norms={"params": 2.0}, healthy=False),
    Attempt(time=5.0, attempt="a", started=1.25, restored=3, trained_from=2.5),
    RolledUp(time=6.0, replaces=("a", "b")),
  ):
    assert from_line(to_line(event)) == event
  many = [ProcessCost(p, 0.0, 0.0, float(p % 100), 0, 0, 0) for p in range(1000)]
  assert len(slowest(many)) == 64 and min(c.write_s for c in slowest(many)) >= 93


def test_a_save_goes_on_where_records_cannot_be_kept_and_where_a_sink_fails(tmp_path, caplog):
  (tmp_path / ".ckpt_jax").mkdir()
  (tmp_path / ".ckpt_jax" / "events").write_text("in the way")

  def wandb(event):
    raise RuntimeError("no network")

  with caplog.at_level(logging.WARNING, "ckpt_jax"), ckpt.Checkpointer(tmp_path, on_event=wandb) as c:
    for step in range(3):
      c.save(step, STATE)
  assert [s.step for s in c.steps()] == [0, 1, 2]
  said = [r.getMessage() for r in caplog.records if r.name == "ckpt_jax.run.journal"]
  assert len(said) == 2 and any("cannot be kept" in s for s in said) and any("no network" in s for s in said)


def test_a_slow_sink_does_not_slow_a_save(tmp_path):
  seen, free = [], threading.Event()

  def slow(event):
    free.wait(60)
    seen.append(event.kind)

  c = ckpt.Checkpointer(tmp_path, on_event=slow)
  for step in range(2):
    assert c.save(step, STATE)
    c.wait()
  assert seen == [], "both steps are committed, and the sink has not returned once"
  free.set()
  c.close()
  assert seen[-1] == "end"


def test_thirty_kills_lose_at_most_the_record_being_written(tmp_path):
  program = pathlib.Path(__file__).parents[1] / "programs" / "killed_journals.py"
  done = subprocess.run([sys.executable, program, tmp_path, "30"], capture_output=True, text=True, timeout=300)
  assert done.returncode == 0, done.stderr
  expected = json.loads(done.stdout)
  found = read_records(tmp_path)
  assert len(found.attempts) == len(expected) == 30 and all(a.end is None for a in found.attempts)
  for attempt, count in zip(found.attempts, expected, strict=True):
    steps = [e.step for e in found.events if e.attempt == attempt.attempt]
    assert steps == list(range(len(steps))) and len(steps) >= count


def saves(journal_run, count, started=1.0, before=0):
  segment = journals._Segment(run_directory(journal_run), True, started)
  cost = (ProcessCost(0, 0.0435, 0.0106, 0.0698, 0, 0, 41867),)
  for first in range(before, before + count, 100):
    segment.write(
      [
        Save(
          time=float(s),
          step=s,
          nbytes=40004,
          files=16,
          stored_nbytes=45163,
          blocking_s=0.0435,
          waited_s=1e-6,
          background_s=0.117,
          commit_s=0.0475,
          processes=cost,
          healthy=True,
          norms={"params": 100.0},
        )
        for s in range(first, first + 100)
      ]
    )
  return segment


def test_a_hundred_thousand_saves_stay_small_and_are_all_counted(tmp_path):
  saves(tmp_path, 100_000)
  place = tmp_path / ".ckpt_jax" / "events"
  assert sum(p.stat().st_size for p in place.iterdir()) < 3e6 and len(list(place.iterdir())) < 60
  found = read_records(tmp_path)
  (attempt,) = found.attempts
  assert (attempt.saves, attempt.first_step, attempt.last_step) == (100_000, 0, 99_999)
  assert len(found.events) > 2000, "the newest are there one by one"


def test_a_roll_up_that_was_cut_off_counts_nothing_twice(tmp_path, monkeypatch):
  monkeypatch.setattr(journals, "_MOST_NBYTES", 1 << 18)
  place = run_directory(tmp_path) / ".ckpt_jax" / "events"
  saves(tmp_path, 1000)
  with monkeypatch.context() as patch:
    patch.setattr(type(place), "unlink", lambda self, missing_ok=False: None)  # killed before it removes anything
    saves(tmp_path, 1000, started=2.0, before=1000)
  assert sorted(a.saves for a in read_records(tmp_path).attempts) == [1000, 1000]
  saves(tmp_path, 1000, started=3.0, before=2000)
  roll_up(place)
  assert [a.saves for a in read_records(tmp_path).attempts] == [1000, 1000, 1000]
  assert not any(name in {p.name for p in place.iterdir()} for name in _replaced(place))


def _replaced(place):
  events = [from_line(line) for p in place.glob("rolled-up-*") for line in p.read_text().splitlines()]
  return {name for e in events if isinstance(e, RolledUp) for name in e.replaces}


@pytest.mark.multiprocess
def test_processes_of_a_job_are_all_in_the_record_of_a_save(gcs):
  together("events.py", gcs.url + "/run", processes=4)
  found = [e for e in read_records(gcs.url + "/run").events if isinstance(e, Save)]
  assert [e.step for e in found] == [0, 1, 2]
  for save in found:
    assert [cost.process for cost in save.processes] == [0, 1, 2, 3]
    assert all(cost.nbytes_written > 0 and cost.requests > 0 and cost.blocking_s > 0 for cost in save.processes)


def test_a_job_that_restores_by_itself_and_is_killed_before_its_first_save_is_recorded(tmp_path):
  with ckpt.Checkpointer(tmp_path, {"schedule": {"every_steps": 10}}) as c:
    c.save(10, STATE)
  killed = """
import os, sys
import ckpt_jax as ckpt

c = ckpt.Checkpointer(sys.argv[1], {"schedule": {"every_steps": 10}})
state = c.restore().state
assert not c.save(11, state)
c._run.journal.flush()
os._exit(9)
"""
  subprocess.run([sys.executable, "-c", killed, str(tmp_path)], check=False)
  starts = [e for e in read_records(tmp_path).events if isinstance(e, Start)]
  assert len(starts) == 2 and starts[0].attempt != starts[1].attempt
