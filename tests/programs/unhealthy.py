"""One NaN on one process of many, found before the save or behind it: unhealthy.py RUN before|behind."""

import sys

from ckpt_jax import multihost

multihost.initialize()

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import ckpt_jax as ckpt
from ckpt_jax.integrity import health

mesh = jax.make_mesh((jax.device_count(),), ("fsdp",))
w = np.ones((64, 64), np.float32)


def state():
  return {"w": jax.make_array_from_callback(w.shape, NamedSharding(mesh, P("fsdp")), lambda index: w[index])}


run, when = sys.argv[1:]
with ckpt.Checkpointer(run) as c:
  assert c.save(0, state())
  c.wait()
  w[63, 63] = np.nan
  looked_at, health.BEFORE_SAVE_NBYTES = health.BEFORE_SAVE_NBYTES, 0 if when == "behind" else 2**20
  try:
    began = c.save(1, state())
    assert began and when == "behind"
    c.wait()
  except ckpt.UnhealthyStateError as e:
    print("refused", "w: 1" if "w: 1" in str(e) else e, flush=True)
  finally:
    health.BEFORE_SAVE_NBYTES = looked_at
  w[63, 63] = 0
  assert c.save(2, state())
assert [s.step for s in c.steps()] == [0, 2]
