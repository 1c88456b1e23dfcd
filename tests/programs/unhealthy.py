"""One NaN on one process of many: unhealthy.py RUN."""

import sys

from ckpt_jax import multihost

multihost.initialize()

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import ckpt_jax as ckpt

mesh = jax.make_mesh((jax.device_count(),), ("fsdp",))
w = np.ones((64, 64), np.float32)


def state():
  return {"w": jax.make_array_from_callback(w.shape, NamedSharding(mesh, P("fsdp")), lambda index: w[index])}


with ckpt.Checkpointer(sys.argv[1]) as c:
  assert c.save(0, state())
  w[63, 63] = np.nan
  try:
    c.save(1, state())
  except ckpt.UnhealthyStateError as e:
    print("refused", "w: 1" if "w: 1" in str(e) else e, flush=True)
  w[63, 63] = 0
  assert c.save(2, state())
assert [s.step for s in c.steps()] == [0, 2]
