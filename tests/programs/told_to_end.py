"""Processes that get SIGTERM: told_to_end.py RUN INSISTS. Prints {what: [exit code, log]} as JSON.

They are forked before anything touches jax or TensorStore, which is fine, and spares ten imports.
"""

import asyncio
import contextlib
import json
import os
import pathlib
import signal
import sys
import time

import jax.numpy as jnp

import ckpt_jax as ckpt

run, insists = sys.argv[1], float(sys.argv[2])
state = {}


def ready():
  os.write(told[1], b"!")


def train(c):
  for step in range(1, 10**6):
    c.save(step, state)
    if step == 3:
      ready()
    time.sleep(0.01)


def idle():
  ready()
  while True:
    time.sleep(0.05)


def only_restores():
  with ckpt.Checkpointer(run, {"schedule": {"every_steps": 1}}) as c:
    c.restore()
    assert c.restore_or_init(lambda: state).step is not None
    idle()


def all_closed():
  a, b = ckpt.Checkpointer(run + "/a"), ckpt.Checkpointer(run + "/b")
  for c in (a, b):
    c.save(0, state)
  a.close()
  b.close()
  idle()


def dropped():
  c = ckpt.Checkpointer(run + "/c")
  c.save(0, state)
  c.wait()
  del c
  idle()


def below_the_newest():
  with ckpt.Checkpointer(run, {"schedule": {"every_steps": 10**7}}) as c:
    train(c)


def switched_off():
  with ckpt.Checkpointer(run + "/off", {"preemption": {"enabled": False}, "schedule": {"every_steps": 10**7}}) as c:
    train(c)


def never_saves_again():
  c = ckpt.Checkpointer(run + "/never")
  c.save(0, state)
  idle()


def after_the_last_save():
  with ckpt.Checkpointer(run + "/last") as c:
    c.save(0, state)
    ready()
    for _ in range(600):
      time.sleep(0.05)
      if c._run.notice.received:
        break
  raise SystemExit("the signal was swallowed")


def step_is_there():
  with ckpt.Checkpointer(run, {"schedule": {"every_steps": 10**7}}) as c:
    ready()
    while True:
      c.save(1000, state)
      time.sleep(0.01)


def two():
  with ckpt.Checkpointer(run + "/model") as a, ckpt.Checkpointer(run + "/data") as b:
    for step in range(1, 10**6):
      a.save(step, state)
      b.save(step, state)
      if step == 3:
        ready()


def other_thread():
  async def main():
    with ckpt.Checkpointer(run + "/thread", {"schedule": {"every_steps": 10**7}}) as c:
      await asyncio.to_thread(c.save, 0, state)
      assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
      ready()
      for step in range(1, 10**6):
        await asyncio.to_thread(c.save, step, state)
        await asyncio.sleep(0.01)

  asyncio.run(main())


def wait_for(child, seconds):
  """How it ended; None if it still runs."""
  deadline = time.monotonic() + seconds
  while time.monotonic() < deadline:
    done, status = os.waitpid(child, os.WNOHANG)
    if done:
      return os.waitstatus_to_exitcode(status)
    time.sleep(0.02)
  return None


def end(child, said, insist):
  """Ends a child by SIGTERM, once it is ready; by a second one if `insist`."""
  try:
    assert os.read(said, 1) == b"!", "it ended before"
    os.kill(child, signal.SIGTERM)
    if insist:
      assert wait_for(child, 1.5 * insists) is None, "the first notice alone has ended it"
      os.kill(child, signal.SIGTERM)
    return wait_for(child, 60)
  finally:
    with contextlib.suppress(ProcessLookupError):
      os.kill(child, signal.SIGKILL)


MODES = [
  only_restores,
  all_closed,
  dropped,
  below_the_newest,
  switched_off,
  never_saves_again,
  after_the_last_save,
  step_is_there,
  two,
  other_thread,
]
children = {}
for mode in MODES:
  log = pathlib.Path(run, f"{mode.__name__}.log")
  told = os.pipe()
  child = os.fork()
  if child == 0:
    os.dup2(os.open(log, os.O_CREAT | os.O_WRONLY), 2)
    state["w"] = jnp.ones(4)
    mode()
    sys.exit(0)
  os.close(told[1])
  children[mode] = child, told[0], log
ended = {m.__name__: [end(c, said, m is never_saves_again), log.read_text()] for m, (c, said, log) in children.items()}
print(json.dumps(ended))
