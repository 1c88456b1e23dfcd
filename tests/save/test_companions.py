"""Several Checkpointers in one process, threads, plain Orbax beside, failures and Ctrl-C: what was said is true."""

import asyncio
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading

import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint._src.checkpointers import async_checkpointer
from orbax.checkpoint._src.metadata import checkpoint

import ckpt_jax as ckpt
from ckpt_jax.integrity import health
from ckpt_jax.integrity.record import RecordingHandler
from ckpt_jax.job.errand import Errand
from ckpt_jax.layout.staging import HostCopies
from ckpt_jax.orbax import saves
from ckpt_jax.run import steps as run
from ckpt_jax.save import commit
from ckpt_jax.save.write import SaveRecord, Write

PROGRAMS = pathlib.Path(__file__).parents[1] / "programs"
AT_ONCE = 15  # programs in one process
NOISE = ("never awaited", "Exception ignored", "terminate called", "FATAL", "Traceback")
STATE = {"x": jnp.arange(4.0)}


def run_program(name, *arguments, timeout, options=()):
  command = [sys.executable, *options, PROGRAMS / name, *map(str, arguments)]
  return subprocess.run(
    command, capture_output=True, text=True, timeout=timeout, env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
  )


@pytest.mark.parametrize("first", range(0, int(os.environ.get("CKPT_JAX_PROGRAMS", AT_ONCE)), AT_ONCE))
def test_what_save_wait_and_close_said_is_true_of_the_disk_in_random_programs(first, tmp_path):
  """CKPT_JAX_PROGRAMS=200 runs 200 of them."""
  done = run_program("companions.py", tmp_path, first, AT_ONCE, timeout=1200)
  assert done.returncode == 0, f"a program hangs or breaks:\n{done.stderr[-20000:]}"
  assert json.loads(done.stdout) == {}
  assert not [
    x for x in done.stderr.splitlines() if any(n in x for n in ("never awaited", "terminate called", "FATAL"))
  ]


def test_interrupt_tears_no_save_and_the_next_call_waits_for_it(tmp_path):
  done = run_program("interrupted.py", tmp_path, timeout=300)
  assert done.returncode == 0, done.stderr
  ended = json.loads(done.stdout)
  for name in ("in_wait", "in_save", "in_save_that_fails", "in_close", "in_a_handler"):
    assert ended[name][0] == 0, (name, ended[name])
  code, log = ended["leaves_a_block"]
  assert code == -signal.SIGINT and "waiting for step 1 (16 B) to commit, Ctrl-C again" in log, ended["leaves_a_block"]
  assert [s.step for s in run.list_steps(tmp_path / "leaves_a_block")] == [1]
  code, log = ended["insists"]
  assert code == 130 and log.count("left before step 1 was committed; it may be lost") == 2, ended["insists"]
  assert run.list_steps(tmp_path / "insists") == []
  assert ended["in_restore"][0] == -signal.SIGINT, ended["in_restore"]


def test_log_has_one_line_a_commit_and_failures_leave_no_warning_and_no_traceback(tmp_path):
  done = run_program("quiet.py", tmp_path, timeout=300, options=("-W", "error"))
  assert done.returncode == 0, done.stderr
  parts = dict(part.split("\n", 1) for part in done.stderr.split("== ")[1:])
  ours = [line for line in parts["three saves"].splitlines() if line.startswith("ckpt_jax")]
  commits = [line for line in ours if "is committed" in line]
  assert parts["three saves"].splitlines() == ours and len(ours) <= 6 and len(commits) == 3, parts["three saves"]
  assert all(f"step {i} is committed: " in line and "/s)" in line for i, line in enumerate(commits))
  for name in ("restore", "failures", "end"):
    assert not [line for line in parts[name].splitlines() if not line.startswith("ckpt_jax")], (name, parts[name])
  assert not [word for word in NOISE if word in done.stderr]
  assert parts["plain Orbax beside"].count("\nabsl INFO") > 20 < parts["asked for"].count("\nabsl INFO")


def test_save_that_fails_in_one_leaves_the_other_alone(tmp_path, monkeypatch):
  a, b = ckpt.Checkpointer(tmp_path / "a"), ckpt.Checkpointer(tmp_path / "b")
  seal, a_has_failed = commit.seal, threading.Event()

  def seal_b_late(path, how):
    if path.startswith(str(tmp_path / "b")):
      assert a_has_failed.wait(60)
    seal(path, how)

  monkeypatch.setattr(commit, "seal", seal_b_late)
  assert b.save(1, STATE)
  monkeypatch.setattr(health, "BEFORE_SAVE_NBYTES", 0)  # so that it is found behind the save
  assert a.save(1, {"x": jnp.full(4, jnp.nan)})
  with pytest.raises(ckpt.UnhealthyStateError, match="step 1 was not saved"):
    a.wait()
  a_has_failed.set()
  b.close()
  assert b.latest_step() == 1
  assert a.save(2, STATE)
  a.close()
  assert a.latest_step() == 2


def test_many_in_threads_each_save_their_own(tmp_path):
  def train(i):
    with ckpt.Checkpointer(tmp_path / str(i), {"preemption": {"enabled": False}}) as c:
      for step in range(3):
        assert c.save(step, {"x": jnp.full(100, i)})

  async def sweep():
    await asyncio.gather(*(asyncio.to_thread(train, i) for i in range(4)))

  asyncio.run(sweep())
  for i in range(4):
    assert [s.step for s in run.list_steps(tmp_path / str(i))] == [0, 1, 2]


def test_threads_that_share_one_lose_no_step(tmp_path):
  said, errors = set(), []
  with ckpt.Checkpointer(tmp_path) as c:

    def work(first):
      try:
        for step in range(first, 24, 4):
          if c.save(step, {"x": jnp.full(1000, float(step))}, force=True):
            said.add(step)
          if step % 3 == 0:
            c.wait()
            assert run.is_step(c.directory / str(step))
          if step % 5 == 0:
            assert float(np.asarray(c.restore(step).state["x"])[0]) == step
      except BaseException as e:
        errors.append(e)

    threads = [threading.Thread(target=work, args=[first], daemon=True) for first in range(4)]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join(120)
    assert not errors and not any(thread.is_alive() for thread in threads)
  assert said == set(range(24)) == {s.step for s in c.steps()}


def test_step_that_is_there_is_never_said_to_have_failed(tmp_path, monkeypatch, caplog):
  """An error after the commit, and one of the sync behind the rename, which takes the step back."""
  with ckpt.Checkpointer(tmp_path) as c:
    monkeypatch.setattr(c._saver._run.admission.lease, "done", lambda step: 1 / 0)
    assert c.save(1, STATE)
    c.wait()
    assert "step 1 is committed, but afterwards" in caplog.text
    monkeypatch.undo()
    sync = commit.sync_directory

    def fail(path):
      if path == str(tmp_path):
        raise OSError(5, "Input/output error")
      sync(path)

    monkeypatch.setattr(commit, "sync_directory", fail)
    assert c.save(2, STATE)
    with pytest.raises(ckpt.SaveFailedError, match=r"step 2 was not saved: .* the newest committed step is 1"):
      c.wait()
    assert [s.step for s in c.steps()] == [1]
    monkeypatch.undo()
    assert c.save(2, STATE)
  assert [s.step for s in c.steps()] == [1, 2]


def test_save_after_one_that_failed_early_does_not_raise_what_became_of_its_metadata(tmp_path, monkeypatch):
  store = checkpoint._MetadataStoreImpl
  update, cleared = store.update, threading.Event()

  def update_late(self, file_path, **options):
    assert cleared.wait(60)
    update(self, file_path, **options)

  with ckpt.Checkpointer(tmp_path) as c:
    with monkeypatch.context() as patch:
      patch.setattr(store, "update", update_late)
      patch.setattr(RecordingHandler, "finalize", lambda *_: 1 / 0)
      threading.Timer(0.5, cleared.set).start()
      assert c.save(1, STATE)
      with pytest.raises(ckpt.SaveFailedError, match="step 1 was not saved: division by zero"):
        c.wait()
    assert c.save(2, STATE)
  assert [s.step for s in c.steps()] == [2]


def test_save_that_ends_without_commit_and_without_error_is_said_to_have_failed(tmp_path, monkeypatch):
  with ckpt.Checkpointer(tmp_path) as c:
    with monkeypatch.context() as patch:
      # As Orbax ends a save that somebody has cancelled.
      patch.setattr(async_checkpointer._AsyncManager, "_thread_func", lambda *_: None)
      c._saver._replace_manager(c.config)
      assert c.save(1, STATE)
      with pytest.raises(ckpt.SaveFailedError, match=r"step 1 was not saved: .* without a commit") as raised:
        c.wait()
      assert raised.value.step == 1
    c._saver._replace_manager(c.config)
    c.wait()
    assert c.save(1, STATE)
  assert c.latest_step() == 1


def test_a_write_is_given_up_or_committed_never_both():
  def write():
    return Write(SaveRecord(1, 1), saves.Operation("once"), HostCopies().ring, 60, lambda record: None)

  given_up, late = write(), write()
  assert given_up.give_up() and not given_up.begin_commit()
  assert late.begin_commit() and not late.give_up()


def test_errand_goes_on_without_its_caller_and_raises_once():
  free, did = threading.Event(), []

  def work():
    free.wait(60)
    did.append(1)
    raise ValueError("what it came to")

  errand = Errand(work)
  errand.start()
  free.set()
  assert errand.wait() and did == [1]
  with pytest.raises(ValueError, match="what it came to"):
    errand.outcome()
  errand.outcome()
  assert not Errand(work).wait(), "one whose caller was interrupted before it began is never begun"
  assert did == [1]
