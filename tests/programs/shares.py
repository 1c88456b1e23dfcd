"""Saves arrays that no number of replicas divides, from 3, 5, 6 and 7 of the 7 processes: shares.py DIRECTORY."""

import sys

from ckpt_jax import multihost

multihost.initialize()

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import ckpt_jax as ckpt

SHAPES = [(1024, 512), (1024, 512), (17,), (3, 5, 7), (333, 77), (4096, 33), (128,), (50257, 4), (2, 3, 257), ()]

for n in (3, 5, 6, 7):
  on = NamedSharding(Mesh(np.array(jax.devices()[:n]), ("data",)), P())
  rng = np.random.default_rng(n)
  values = {f"w{i}": rng.standard_normal(shape, dtype=np.float32) for i, shape in enumerate(SHAPES)}
  state = {
    name: jax.make_array_from_callback(x.shape, on, lambda at, x=x: x[at], dtype=x.dtype) for name, x in values.items()
  }
  state = {"w": state, "key": jax.random.key(3), "table": np.arange(50_000)}
  with ckpt.Checkpointer(f"{sys.argv[1]}/{n}") as c:
    c.save(0, state)
    c.wait()
    got = c.restore(like=state).state
  for name, x in values.items():
    for shard in got["w"][name].addressable_shards:
      assert np.asarray(shard.data).tobytes() == x[shard.index].tobytes(), name
