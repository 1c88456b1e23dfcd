"""A tiny sharded trainer for multi-process tests: train.py RUN MODE."""

import os
import resource
import signal
import sys
import time

from ckpt_jax import multihost

multihost.initialize()

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import psutil
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import ckpt_jax as ckpt

run, mode = sys.argv[1:3]
mesh = jax.make_mesh((2, jax.device_count() // 2), ("data", "fsdp"))


def put(x, spec):
  return jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), lambda index: x[index])


def init():
  rng = np.random.default_rng(0)
  state = {f"w{i}": put(rng.standard_normal((64, 1024), dtype=np.float32), P("fsdp")) for i in range(20)}
  return state | {"bias": put(np.full(7, -0.0, np.float32), P()), "step": put(np.int32(0), P())}


def check(state):
  want = init()
  for name, leaf in want.items():
    for a, b in zip(state[name].addressable_shards, leaf.addressable_shards, strict=True):
      assert np.asarray(a.data).tobytes() == np.asarray(b.data).tobytes(), name


def lose(c, step, state):
  """Saves a step that cannot be written, and prints after how long the error came."""
  started = time.monotonic()
  try:
    c.save(step, state)
    c.wait()
  except ckpt.SaveFailedError as e:
    print(f"raised after {time.monotonic() - started:.1f} s: {e}", flush=True)
  else:
    raise SystemExit(f"nobody said that step {step} was lost")


if mode == "save":
  with ckpt.Checkpointer(run) as c:
    c.save(0, init(), metrics={"loss": 1.0}, extras={"data": 3})
elif mode == "reopen":
  for step in range(0, 6, 2):
    with ckpt.Checkpointer(run) as c:
      c.save(step, init())
      c.wait()
      c.save(step + 1, init())
elif mode == "reads":
  # What a save reads: its own code and small files, and nothing like the shards of another process.
  with ckpt.Checkpointer(run) as c:
    for step in (1, 0):  # the first imports and connects
      c.wait()
      before = psutil.Process().io_counters().read_chars
      c.save(step, init(), force=True)
      c.wait()
    print("read", psutil.Process().io_counters().read_chars - before, flush=True)
elif mode == "restore":
  with ckpt.Checkpointer(run) as c:
    got = c.restore_or_init(init)
    assert got.step == 0 and got.extras == {"data": 3} and got.metrics == {"loss": 1.0}
    check(got.state)
elif mode == "sigterm":
  if jax.process_count() == 1 and len(sys.argv) > 3:
    signal.signal(signal.SIGTERM, lambda *_: print("users handler", flush=True))
  with ckpt.Checkpointer(run, ckpt.Config(schedule={"every_steps": 100000})) as c:
    state = init()
    for step in range(1, 2000):
      c.save(step, state)
      time.sleep(0.02)
      if step == 20:
        print("ready", flush=True)
        if jax.process_count() > 1 and jax.process_index() == 1:
          os.kill(os.getpid(), signal.SIGTERM)
  raise SystemExit("the notice never came")
elif mode == "cells":
  # A notebook cell that is run again, and workers forked beside it.
  import multiprocessing

  state = init()
  c = before = ckpt.Checkpointer(run)
  c.save(0, state)
  c = ckpt.Checkpointer(run)
  assert c.restore_or_init(init).step == 0
  before.save(1, state)
  c.save(2, state)
  try:
    before.save(3, state)
  except ckpt.CheckpointError as e:
    assert "taken it over" in str(e), e
  else:
    raise SystemExit("two objects write into one run")
  del c
  c = ckpt.Checkpointer(run)
  assert c.restore().step == 2
  c.save(3, state)
  pool = multiprocessing.get_context("fork").Pool(2)
  pool.apply_async(time.sleep, (60,))
  signal.alarm(60)
  pool.terminate()
  pool.join()
  signal.alarm(0)
  c.close()
  assert [s.step for s in c.steps()][-3:] == [1, 2, 3]
elif mode == "minutes":
  with ckpt.Checkpointer(run, ckpt.Config(schedule={"every": 0.5})) as c:
    state = init()
    saved = []
    for step in range(100):
      if c.save(step, state):
        saved.append(step)
      time.sleep(0.02 + 0.002 * jax.process_index())
    print("saved", saved, flush=True)
elif mode == "local":
  with ckpt.Checkpointer(run) as c:
    try:
      c.save(0, {"x": jnp.ones(3)})
    except ckpt.CheckpointError as e:
      assert "x: lives on this process only" in str(e)
    else:
      raise SystemExit("a process-local array was saved")
elif mode == "one_fails":
  # Only process 1 cannot write: its files may not grow.
  with ckpt.Checkpointer(run) as c:
    state = init()
    c.save(0, state)
    c.wait()
    if jax.process_index() == 1:
      resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    lose(c, 1, state)
    if jax.process_index() == 1:
      resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    c.save(2, state)
    c.wait()
    assert [s.step for s in c.steps()] == [0, 2]
elif mode == "first_fails":
  # Process 0 cannot make the step's directory, for which the others wait.
  temporary = ocp.path.atomicity.AtomicRenameTemporaryPath
  create = temporary.create

  async def no_room(self):
    raise OSError(28, "No space left on device")

  with ckpt.Checkpointer(run) as c:
    state = init()
    c.save(0, state)
    c.wait()
    if jax.process_index() == 0:
      temporary.create = no_room
    lose(c, 1, state)
    temporary.create = create
    c.save(2, state)
    c.wait()
    assert [s.step for s in c.steps()] == [0, 2]
elif mode == "one_is_late":
  from ckpt_jax.job.rendezvous import Rendezvous

  here = Rendezvous("test")
  here.wait("all to start", 60)
  here.wait("all to start", 60)
  if jax.process_index() != 1:
    try:
      here.wait("the late one", 1.5)
    except TimeoutError as e:
      print(f"timeout: {e}", flush=True)
