"""Saves at and below the newest step, and one whose directory is gone, in a job: order.py RUN."""

import shutil
import sys

from ckpt_jax import multihost

multihost.initialize()

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import ckpt_jax as ckpt

mesh = jax.make_mesh((jax.device_count(),), ("fsdp",))
state = {"w": jax.device_put(jnp.ones((8, 4)), NamedSharding(mesh, P("fsdp")))}
with ckpt.Checkpointer(sys.argv[1]) as c:
  said = [c.save(5, state), c.save(9, state), c.save(9, state)]
  try:
    c.save(6, state)
  except ckpt.CheckpointError as e:
    said.append("rollback(9)" in str(e) or "rollback(5)" in str(e))
  c.wait()
  if jax.process_index() == 0:
    shutil.rmtree(c.directory / "9")
  said += [c.save(9, state), c.save(6, state, force=True)]
print("said", said, flush=True)
assert [s.step for s in c.steps()] == [5, 6, 9]
