"""SIGTERM in one process: answered while somebody saves, never swallowed, and otherwise what it was before."""

import gc
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import jax.numpy as jnp
import pytest

import ckpt_jax as ckpt
from ckpt_jax.job import preemption

PROGRAMS = pathlib.Path(__file__).parents[1] / "programs"
STATE = {"x": jnp.arange(4.0)}
# What the process must end with, and what its log says; two signals where the first one alone must not end it.
ENDS = {
  "only_restores": (-signal.SIGTERM, ""),
  "all_closed": (-signal.SIGTERM, ""),
  "dropped": (-signal.SIGTERM, ""),
  "switched_off": (-signal.SIGTERM, ""),
  "below_the_newest": (143, "the last step saved is"),
  "step_is_there": (143, "step 1000 is there already"),
  "after_the_last_save": (143, "SIGTERM came after the last save"),
  "two": (143, "the last step saved is"),
  "other_thread": (143, "the last step saved is"),
  "never_saves_again": (-signal.SIGTERM, "a second SIGTERM ends it at once"),
}


def test_sigterm_is_answered_or_does_what_it_did_before(tmp_path):
  with ckpt.Checkpointer(tmp_path) as c:
    c.save(1000, {"w": STATE["x"]})
  command = [sys.executable, PROGRAMS / "told_to_end.py", tmp_path, str(preemption._INSISTS_S)]
  done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | {"XLA_FLAGS": ""})
  assert done.returncode == 0, done.stderr
  ended = json.loads(done.stdout)
  for name, (code, log) in ENDS.items():
    assert ended[name][0] == code, (name, ended[name])
    assert log in ended[name][1], (name, ended[name])
  with ckpt.Checkpointer(tmp_path) as c:
    saved = [s.step for s in c.steps()]
    assert saved[-1] == 1000 and len(saved) == 2, "the state at the notice is saved below the newest step"
  assert ckpt.Checkpointer(tmp_path / "model").latest_step() == ckpt.Checkpointer(tmp_path / "data").latest_step()
  assert ckpt.Checkpointer(tmp_path / "thread").latest_step() > 0


@pytest.fixture
def users_handler():
  """A SIGTERM handler of the user's, and the signals that it got."""
  got = []

  def handler(signum, frame):
    got.append(signum)

  before = signal.signal(signal.SIGTERM, handler)
  yield handler, got
  signal.signal(signal.SIGTERM, before)


def test_handler_is_there_from_the_first_save_until_the_last_of_several_goes(tmp_path, users_handler):
  handler, got = users_handler
  names = ["closed first", "dropped", "in another thread", "closed last"]
  opened = [ckpt.Checkpointer(tmp_path / name) for name in names]
  assert signal.getsignal(signal.SIGTERM) is handler, "opening is not saving"
  for c in opened:
    c.save(0, STATE)
    c.wait()
  ours = signal.getsignal(signal.SIGTERM)
  assert ours is not handler
  opened.pop(0).close()
  del c
  gc.disable()
  try:
    opened.pop(0)
  finally:
    gc.enable()
  thread = threading.Thread(target=opened.pop(0).close)
  thread.start()
  thread.join()
  assert signal.getsignal(signal.SIGTERM) is ours
  signal.raise_signal(signal.SIGTERM)
  assert got == [signal.SIGTERM], "the user's handler is called too"
  thread = threading.Thread(target=opened.pop().close)
  thread.start()
  thread.join()
  wait_until(lambda: signal.getsignal(signal.SIGTERM) is handler)


def wait_until(condition, limit=60):
  deadline = time.monotonic() + limit
  while not condition():
    assert time.monotonic() < deadline
    time.sleep(0.01)


def test_handler_that_the_user_puts_on_top_stays_and_may_call_the_one_before(tmp_path, users_handler):
  _, got = users_handler
  c = ckpt.Checkpointer(tmp_path)
  c.save(0, STATE)
  ours = signal.getsignal(signal.SIGTERM)

  def top(signum, frame):
    got.append("top")
    ours(signum, frame)

  signal.signal(signal.SIGTERM, top)
  c.close()
  assert signal.getsignal(signal.SIGTERM) is top
  signal.raise_signal(signal.SIGTERM)
  assert got == ["top", signal.SIGTERM], "nobody saves any more: it goes on to what was there before"
  with ckpt.Checkpointer(tmp_path) as c:
    c.save(1, STATE)
    signal.raise_signal(signal.SIGTERM)
    assert got == ["top", signal.SIGTERM] * 2
    with pytest.raises(SystemExit) as exit:
      c.save(2, STATE)
  assert exit.value.code == 143 and c.latest_step() == 2
  assert signal.getsignal(signal.SIGTERM) is top


def test_notice_is_answered_although_an_earlier_save_fails(tmp_path, users_handler):
  c = ckpt.Checkpointer(tmp_path, {"preemption": {"exit_code": 0}})
  c.save(0, STATE)
  c.wait()
  check = c._saver._run.admission.lease.check
  c._saver._run.admission.lease.check = lambda: (_ for _ in ()).throw(OSError(5, "the disk is broken"))
  c.save(1, STATE)
  signal.raise_signal(signal.SIGTERM)
  wait_until(lambda: not any(t.name == "save_finalize" for t in threading.enumerate()))
  with pytest.raises(ckpt.SaveFailedError, match=r"step 2 .* disk is broken"):
    c.save(2, STATE)
  c._saver._run.admission.lease.check = check
  with pytest.raises(SystemExit) as exit:
    c.save(3, STATE)
  assert exit.value.code == 0, "as configured"
  assert c.latest_step() == 3


def test_workers_forked_beside_a_checkpointer_are_processes_of_their_own(tmp_path):
  program = PROGRAMS / "worker_processes.py"
  done = subprocess.run([sys.executable, program, tmp_path], capture_output=True, text=True, timeout=300)
  assert done.stdout == "OK\n" and done.returncode == 0, done.stderr
