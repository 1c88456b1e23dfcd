"""What people see while they wait, and what their own functions get."""

import io
import threading
import time
from unittest import mock

import jax.numpy as jnp
import pytest
from rich.console import Console

import ckpt_jax as ckpt
from ckpt_jax.job import progress as job_progress
from ckpt_jax.job.progress import Counter, Progress, reported
from ckpt_jax.observe import Bar
from ckpt_jax.restore import restorer, verify
from ckpt_jax.rewrite import pruning
from ckpt_jax.run.deletion import StepDeleter
from ckpt_jax.save import commit

STATE = {"a": jnp.ones((64, 64)), "b": jnp.zeros(100), "n": jnp.int32(3)}
NBYTES = 64 * 64 * 4 + 400 + 4


@pytest.fixture
def often(monkeypatch):
  monkeypatch.setattr(job_progress, "_EVERY_S", 0.001)


def slowed(function):
  def slow(*args, **options):
    time.sleep(0.05)
    return function(*args, **options)

  return slow


def test_work_is_reported_from_another_thread_until_it_ends(often):
  seen, counter, reported_one = [], Counter(), threading.Event()

  def see(progress):
    seen.append((progress, threading.get_ident()))
    reported_one.set()

  with pytest.raises(KeyError), reported(see, "work", 10, counter, "steps"):
    counter.add(4)
    assert reported_one.wait(60)
    raise KeyError
  assert seen[-1][0] == Progress("work", 4, 10, "steps", finished=True), "the last one, also after an error"
  assert {thread for _, thread in seen} != {threading.get_ident()}


def test_short_work_is_not_reported_and_a_failing_function_stops_nothing(often, caplog):
  seen = []
  with reported(seen.append, "nothing", None, lambda: 0):
    pass
  assert [p for p in seen if not p.finished] == []
  failed = threading.Event()

  def fail(progress):
    failed.set()
    raise RuntimeError("no screen")

  with reported(fail, "work", None, lambda: 0):
    assert failed.wait(60)
  assert "work: its progress cannot be shown: RuntimeError: no screen" in caplog.text


def test_a_restore_counts_each_byte_once_and_a_wait_the_bytes_written(tmp_path, often, monkeypatch):
  seen = []
  monkeypatch.setattr(commit, "seal", slowed(commit.seal))
  monkeypatch.setattr(restorer.Verifier, "finish", slowed(restorer.Verifier.finish))
  monkeypatch.setattr(restorer, "fetch_state", lambda *a, **o: (fetched(*a, **o), time.sleep(0.05))[0])
  fetched = slowed(_fetch_state)
  with ckpt.Checkpointer(tmp_path, on_progress=seen.append) as c:
    for checked in (True, False):
      c._restorer.config = c.config.model_copy(update={"restore": ckpt.Config(restore={"verify": checked}).restore})
      c.save(int(checked), STATE, force=True)
      c.wait()
      c.restore(int(checked), like=STATE)
  restores = [p for p in seen if p.what.startswith("restoring") and p.finished]
  assert [(p.what, p.done, p.total, p.unit) for p in restores] == [
    ("restoring step 1", NBYTES, NBYTES, "B"),
    ("restoring step 0", NBYTES, NBYTES, "B"),
  ]
  writes = [p for p in seen if p.what == "writing step 1" and p.finished]
  assert writes and writes[-1].done >= NBYTES and writes[-1].total == NBYTES


_fetch_state = restorer.fetch_state


def test_nothing_is_shown_unless_it_is_asked_for(tmp_path, capfd, often):
  for options in ({}, {"progress": True}):
    with ckpt.Checkpointer(tmp_path / str(len(options)), **options) as c:
      c.save(0, STATE)
    assert (c._saver.on_progress is not None) == bool(options)
  configured = ckpt.Checkpointer(tmp_path / "2", {"observe": {"progress": True}})
  assert isinstance(configured._saver.on_progress, Bar)
  configured.close()


def test_verify_and_prune_report(tmp_path, often, monkeypatch):
  with ckpt.Checkpointer(tmp_path) as c:
    for step in range(4):
      c.save(step, STATE)
  seen = []
  monkeypatch.setattr(verify._Check, "_tree", slowed(verify._Check._tree))
  assert ckpt.verify(tmp_path, 2, on_progress=seen.append) == []
  assert seen[-1] == Progress("verifying step 2", NBYTES, NBYTES, finished=True)
  monkeypatch.setattr(StepDeleter, "_remove", slowed(StepDeleter._remove))
  plan = pruning.plan_pruning(c.directory, ckpt.policies.Retention(last=1))
  plan.carry_out(seen.append)
  assert seen[-1] == Progress("pruning", 3, 3, "steps", finished=True)


def test_lines_appear_where_there_is_no_terminal_and_name_speed_and_time_left():
  out, now = io.StringIO(), iter([0.0, 5.0, 12.0, 13.0, 30.0])
  bar = Bar(Console(file=out, width=100), line_s=10.0, clock=lambda: next(now))
  for done, finished in ((0, False), (1 << 20, False), (3 << 20, False), (4 << 20, False), (8 << 20, True)):
    bar(Progress("restoring step 3", done, 8 << 20, finished=finished))
  assert out.getvalue().splitlines() == [
    "restoring step 3: 3.0 MiB of 8.0 MiB, 256.0 KiB/s, 20 s left",
    "restoring step 3: 8.0 MiB of 8.0 MiB, 273.1 KiB/s",
  ]


def test_a_bar_moves_in_a_terminal_and_leaves_nothing_behind():
  out = io.StringIO()
  bar = Bar(Console(file=out, width=100, force_terminal=True))
  for done in (1, 2, 3):
    bar(Progress("tuning", done, 3, "steps"))
  bar._shown.refresh()
  bar(Progress("tuning", 3, 3, "steps", finished=True))
  assert bar._shown is None and not bar._tasks and "3 of 3 steps" in out.getvalue()


def test_a_notebook_gets_one_bar_that_is_updated(monkeypatch):
  shown = []
  handle = mock.Mock(update=shown.append)
  monkeypatch.setattr("IPython.display.display", lambda html, display_id: shown.append(html) or handle)
  bar = Bar(Console(file=io.StringIO(), force_jupyter=True))
  for done in (1, 2):
    bar(Progress("restoring <step>", done << 20, 2 << 20, finished=done == 2))
  assert [html.data.split(">")[0] for html in shown] == [
    'restoring &lt;step&gt; <progress value="1048576" max="2097152"',
    'restoring &lt;step&gt; <progress value="2097152" max="2097152"',
  ]
