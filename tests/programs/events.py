"""Saves of several processes, whose costs process 0 records: events.py RUN."""

import sys

from ckpt_jax import multihost

multihost.initialize()

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import ckpt_jax as ckpt

mesh = Mesh(np.array(jax.devices()), ("x",))
rows = 64 * jax.device_count()
w = jax.make_array_from_callback((rows, 64), NamedSharding(mesh, P("x")), lambda i: np.ones((rows, 64), np.float32)[i])
n = jax.make_array_from_callback((), NamedSharding(mesh, P()), lambda i: np.int32(0))
with ckpt.Checkpointer(sys.argv[1]) as c:
  for step in range(3):
    c.save(step, {"w": w, "n": n})
assert len(c.saves[-1].processes) == (jax.process_count() if jax.process_index() == 0 else 0)
