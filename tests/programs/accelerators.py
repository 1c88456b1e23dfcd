"""Saves from CPU devices that count as accelerators, and restores: accelerators.py RUN PACK REPLICA_PARALLEL."""

import contextlib
import sys

from ckpt_jax import multihost

multihost.initialize()

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import ckpt_jax as ckpt
from ckpt_jax.layout import staging

run, pack, replica_parallel = sys.argv[1:]


@contextlib.contextmanager
def staging_as_accelerators():
  """In these processes other programs follow."""
  staging.as_accelerators = True
  try:
    yield
  finally:
    staging.as_accelerators = False


mesh = jax.make_mesh((2, jax.device_count() // 2), ("data", "fsdp"))


def put(x, spec):
  return jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), lambda index: x[index])


rng = np.random.default_rng(0)
state = {}
for i, spec in enumerate([P("fsdp"), P(), P("data"), P(None, "fsdp"), P("data", "fsdp")] * 3):
  state[f"w{i}"] = put(rng.standard_normal((32, 64), dtype=np.float32), spec)
state |= {"odd": put(np.full(7, -0.0, np.float32), P()), "step": 3}
update = jax.jit(lambda x: jax.tree.map(lambda leaf: leaf + 1, x), donate_argnums=0)
layout = {"pack": pack, "replica_parallel": replica_parallel}
with staging_as_accelerators(), ckpt.Checkpointer(run, ckpt.Config(layout=layout)) as c:
  arrays = {name: leaf for name, leaf in state.items() if name.startswith("w")}
  want = {name: [np.array(s.data) for s in leaf.addressable_shards] for name, leaf in arrays.items()}
  c.save(0, state)
  after = update(arrays)
  c.wait()
  like = state | {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for name, x in after.items()}
  restored = c.restore(like=like)
  assert restored.report.verified == len(state), restored.report
  for name, shards in want.items():
    for a, b in zip(restored.state[name].addressable_shards, shards, strict=True):
      assert np.asarray(a.data).tobytes() == b.tobytes(), name
