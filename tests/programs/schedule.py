"""Counts what a schedule by the clock asks of a job of several processes: schedule.py RUN EVERY STEPS."""

import json
import sys
import time

from ckpt_jax import multihost

multihost.initialize()

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import ckpt_jax as ckpt

run, every, steps = sys.argv[1], sys.argv[2], int(sys.argv[3])
mesh = jax.make_mesh((jax.device_count(),), ("x",))
state = {"x": jax.jit(lambda: jnp.zeros(8), out_shardings=NamedSharding(mesh, P("x")))()}
collectives = []
for name in ("broadcast_one_to_all", "process_allgather", "sync_global_devices"):
  real = getattr(multihost_utils, name)
  setattr(multihost_utils, name, lambda *a, real=real, name=name, **k: collectives.append(name) or real(*a, **k))
with ckpt.Checkpointer(run, ckpt.Config(schedule={"every": every}, retention={"last": None})) as c:
  # The processes' clocks and speeds differ; their decisions must not.
  collectives.clear()
  saved = []
  for step in range(steps):
    time.sleep(0.002 * (1 + jax.process_index()))
    if c.save(step, state):
      saved.append(step)
  print("found", json.dumps({"saved": saved, "collectives": len(collectives)}), flush=True)
