"""A process with an open Checkpointer, and children forked from it: worker_processes.py RUN. Prints OK at the end."""

import gc
import json
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
import warnings

import jax.numpy as jnp

import ckpt_jax as ckpt
from ckpt_jax.job import garbage

warnings.simplefilter("ignore")  # jax's own about os.fork()
run = sys.argv[1]
fork = multiprocessing.get_context("fork")
state = {"w": jnp.ones(4)}
signal.signal(signal.SIGTERM, lambda *_: os._exit(77))
c = ckpt.Checkpointer(run)
c.save(0, state)
c.wait()
assert "preemption" in type(signal.getsignal(signal.SIGTERM)).__module__


def sleeps():
  """Sleeps in slices: a signal that comes between Python's last look at signals and a sleep is seen after the sleep."""
  for _ in range(600):
    time.sleep(0.1)


def child(function, *, want, sig=None):
  """Runs `function` in a forked process; it must end with the code `want`."""
  read, write = os.pipe()
  process = fork.Process(target=lambda: (os.write(write, b"x"), function()))
  process.start()
  os.read(read, 1)
  if sig is not None:
    os.kill(process.pid, sig)
  process.join(60)
  assert process.exitcode == want, (process.exitcode, want)


def refused(use, words):
  try:
    use()
  except ckpt.CheckpointError as e:
    assert words in str(e), e
  else:
    raise SystemExit("a child used its parent's Checkpointer")


def uses_everything():
  refused(lambda: c.save(1, state), "opened in another process")
  refused(lambda: c.restore(), "opened in another process")
  refused(lambda: c.restore_or_init(dict), "opened in another process")
  refused(lambda: c.rollback(0), "opened in another process")
  refused(lambda: c.wait(), "opened in another process")
  refused(lambda: ckpt.Checkpointer(run + "/other"), "spawn")
  assert c.latest_step() == 0
  c.close()
  c.close()


def drops_it():
  global c
  del c
  gc.collect()


def leaves_a_block():
  with c:
    sys.exit(5)


lease = pathlib.Path(run, ".ckpt_jax", "lease")
owner = json.loads(lease.read_text())["owner"]
child(lambda: None, want=0)
child(lambda: sys.exit(3), want=3)
child(lambda: os.abort(), want=-signal.SIGABRT)
child(sleeps, want=77, sig=signal.SIGTERM)  # the user's own handler
for _ in range(20):  # at any moment after the fork
  process = fork.Process(target=sleeps)
  process.start()
  process.terminate()
  process.join(30)
  assert process.exitcode in (77, -signal.SIGTERM), process.exitcode
child(uses_everything, want=0)
child(drops_it, want=0)
child(leaves_a_block, want=5)
ended = threading.Event()
garbage.pause(ended, 60)
child(lambda: sys.exit(gc.isenabled()), want=1)
ended.set()
subprocess.run(["true"], preexec_fn=lambda: None, check=True)

c.save(1, state)  # forks in the middle of a write
child(lambda: None, want=0)
pool = fork.Pool(2)
pool.apply_async(sleeps)
signal.signal(signal.SIGALRM, lambda *_: os._exit(1))
signal.alarm(60)
pool.terminate()
pool.join()
signal.alarm(0)

assert json.loads(lease.read_text())["owner"] == owner
c.save(2, state)
c.close()
assert [s.step for s in c.steps()][-2:] == [1, 2]
assert json.loads(lease.read_text())["released"]
print("OK", flush=True)
