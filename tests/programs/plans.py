"""Saves and restores a sharded state with the plan left to the Checkpointer: plans.py RUN; prints the plan as JSON."""

import json
import sys

from ckpt_jax import multihost

multihost.initialize()

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import ckpt_jax as ckpt

mesh = jax.make_mesh((2, jax.device_count() // 2), ("data", "fsdp"))
rng = np.random.default_rng(0)
state = {}
for i in range(12):
  values = rng.standard_normal((1024, 1024), dtype=np.float32)
  state[f"w{i}"] = jax.make_array_from_callback(
    values.shape, NamedSharding(mesh, P("fsdp")), lambda index, values=values: values[index]
  )
with ckpt.Checkpointer(sys.argv[1]) as c:
  c.save(0, state)
  c.wait()
  back = c.restore(like=state).state
  for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(state), strict=True):
    assert all(
      (np.asarray(x.data) == np.asarray(y.data)).all()
      for x, y in zip(a.addressable_shards, b.addressable_shards, strict=True)
    )
  print("PLAN" + json.dumps({"values": c.plan.values, "state": c.plan.state.nbytes, "process": jax.process_index()}))
