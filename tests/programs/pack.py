"""Saves a packed state of sharded and replicated leaves from all processes, or restores and checks it."""

import sys

from ckpt_jax import multihost

multihost.initialize()

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import ckpt_jax as ckpt

mesh = jax.make_mesh((2, jax.device_count() // 2), ("data", "fsdp"))


def put(x, spec):
  return jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), lambda index: x[index])


rng = np.random.default_rng(0)
words = [rng.integers(0, 2**32, (32, 64), np.uint32).view(np.float32) for _ in range(40)]
state = {f"w{i}": put(w, P("fsdp")) for i, w in enumerate(words)}
state |= {f"r{i}": put(w, P()) for i, w in enumerate(words)} | {"odd": put(np.full(7, -0.0, np.float32), P())}
with ckpt.Checkpointer(sys.argv[1], ckpt.Config(layout={"pack": "on"}, health={"nonfinite": "ignore"})) as c:
  if sys.argv[2] == "save":
    c.save(0, state)
    c.wait()
  got = c.restore(like=state).state
  for name, leaf in state.items():
    for a, b in zip(got[name].addressable_shards, leaf.addressable_shards, strict=True):
      assert np.asarray(a.data).tobytes() == np.asarray(b.data).tobytes(), name
