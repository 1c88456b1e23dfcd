"""Processes that get Ctrl-C: interrupted.py DIRECTORY. Prints {what: [exit code, log]} as JSON.

They are forked before anything touches jax or TensorStore, which is fine, and spares six imports.
"""

import faulthandler
import json
import logging
import os
import pathlib
import signal
import sys
import threading
import time

import jax.numpy as jnp

import ckpt_jax as ckpt
from ckpt_jax.job import threads
from ckpt_jax.run import lease
from ckpt_jax.save import commit

top = pathlib.Path(sys.argv[1])
state = {}


def interrupt(number=signal.SIGINT):
  os.kill(os.getpid(), number)


def waits_in():
  """The functions that the main thread is in, if it waits for something within ckpt_jax."""
  frame = sys._current_frames()[threading.main_thread().ident]
  names, files = [], []
  while frame is not None:
    names.append(frame.f_code.co_name)
    files.append(frame.f_code.co_filename)
    frame = frame.f_back
  return names if names[0] == "wait" and any("ckpt_jax" in pathlib.Path(file).parts for file in files) else []


def once(condition, *do):
  """In another thread: does things, one each time that a condition holds and the main thread waits for something."""

  def watch():
    for action in do:
      while not (condition() and waits_in()):
        time.sleep(0.01)
      action()

  threading.Thread(target=watch).start()


class Logged(logging.Handler):
  """Whether something was logged."""

  def __init__(self, text):
    super().__init__()
    self.text, self.found = text, False
    logging.getLogger("ckpt_jax").addHandler(self)

  def __call__(self):
    return self.found

  def emit(self, record):
    self.found = self.found or self.text in record.getMessage()


class Held:
  """A function that does not return before it is let go."""

  def __init__(self, module, name):
    self.inside, self.free = threading.Event(), threading.Event()
    real = getattr(module, name)

    def hold(*args, **options):
      self.inside.set()
      self.free.wait()
      return real(*args, **options)

    setattr(module, name, hold)


def interrupted(call, held):
  """Makes a call that is interrupted once it waits for what is held."""
  once(held.inside.is_set, interrupt)
  try:
    call()
  except KeyboardInterrupt:
    return
  raise SystemExit("it was not interrupted")


def in_wait():
  seal = Held(commit, "seal")
  with ckpt.Checkpointer(top / "in_wait") as c:
    assert c.save(1, state)
    for _ in range(3):
      interrupted(c.wait, seal)
    once(lambda: True, seal.free.set)
    c.wait()
    assert c.latest_step() == 1


def in_save():
  acquire = Held(lease.Lease, "acquire")
  with ckpt.Checkpointer(top / "in_save") as c:
    interrupted(lambda: c.save(1, state), acquire)
    once(lambda: True, acquire.free.set)
    c.wait()
    assert c.latest_step() == 1, "what was begun goes on, and wait() waits for it"
    assert c.save(2, state)
  assert c.latest_step() == 2


def in_save_that_fails():
  acquire = Held(lease.Lease, "acquire")
  with ckpt.Checkpointer(top / "in_save_that_fails") as c:
    interrupted(lambda: c.save(1, state), acquire)
    seal, commit.seal = commit.seal, None  # raises a TypeError
    once(lambda: True, acquire.free.set)
    try:
      c.wait()
      raise SystemExit("wait() was silent")
    except ckpt.SaveFailedError as e:
      assert e.step == 1
    c.wait()
    commit.seal = seal
    assert c.save(2, state)
  assert c.latest_step() == 2


def in_close():
  seal = Held(commit, "seal")
  c = ckpt.Checkpointer(top / "in_close")
  assert c.save(1, state)
  interrupted(c.close, seal)
  once(lambda: True, seal.free.set)
  c.close()
  assert c.latest_step() == 1


def in_a_handler():
  seal = Held(commit, "seal")
  with ckpt.Checkpointer(top / "in_a_handler") as c:

    def on_signal(*_):
      c.save(2, state)

    signal.signal(signal.SIGUSR1, on_signal)
    assert c.save(1, state)
    once(lambda: True, lambda: interrupt(signal.SIGUSR1))
    once(lambda: "on_signal" in waits_in(), seal.free.set)
    c.wait()
    c.wait()
    assert [s.step for s in c.steps()] == [1, 2]


def leaves_a_block():
  seal = Held(commit, "seal")
  once(Logged("waiting for step 1"), seal.free.set)
  with ckpt.Checkpointer(top / "leaves_a_block") as c:
    assert c.save(1, state)
    raise KeyboardInterrupt


def insists():
  Held(commit, "seal")
  once(Logged("waiting for step 1"), interrupt)
  once(Logged("at exit: waiting for step 1"), interrupt)
  with ckpt.Checkpointer(top / "insists") as c:
    assert c.save(1, state)
    raise KeyboardInterrupt


def in_restore():
  path = top / "in_restore"
  with ckpt.Checkpointer(path) as c:
    c.save(1, {f"w{i}": jnp.ones(1000) for i in range(200)})
  began, real = threading.Event(), threads.check

  def slow():
    began.set()
    time.sleep(0.01)
    real()

  threads.check = slow
  threading.Thread(target=lambda: (began.wait(100), time.sleep(0.05), interrupt())).start()
  ckpt.Checkpointer(path).restore()


MODES = [in_wait, in_save, in_save_that_fails, in_close, in_a_handler, leaves_a_block, insists, in_restore]
children = {}
for mode in MODES:
  log = top / f"{mode.__name__}.log"
  child = os.fork()
  if child == 0:
    os.dup2(os.open(log, os.O_CREAT | os.O_WRONLY), 2)
    faulthandler.dump_traceback_later(240, exit=True)
    state.update(w=jnp.ones(4))
    mode()
    sys.exit(0)
  children[mode] = child, log
ended = {}
for mode, (child, log) in children.items():
  _, status = os.waitpid(child, 0)
  ended[mode.__name__] = [os.waitstatus_to_exitcode(status), log.read_text()]

print(json.dumps(ended))
