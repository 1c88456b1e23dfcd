"""Saves from CPU devices that count as accelerators, and restores: accelerators.py RUN PACK REPLICA_PARALLEL LIMIT."""

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

run, pack, replica_parallel, limit = sys.argv[1:]


@contextlib.contextmanager
def staging_as_accelerators():
  """Yields the bytes of each piece that is sent. In these processes other programs follow."""
  sent, send = [], staging._send

  def counted(copies):
    send(copies)
    sent.extend(copy.found.nbytes for copy in copies)

  staging.as_accelerators, staging._send = True, counted
  try:
    yield sent
  finally:
    staging.as_accelerators, staging._send = False, send


mesh = jax.make_mesh((2, jax.device_count() // 2), ("data", "fsdp"))


def put(x, spec):
  return jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), lambda index: x[index])


rng = np.random.default_rng(0)
state = {}
for i, spec in enumerate([P("fsdp"), P(), P("data"), P(None, "fsdp"), P("data", "fsdp")] * 3):
  state[f"w{i}"] = put(rng.standard_normal((32, 64), dtype=np.float32), spec)
state["w15"] = put(rng.standard_normal((1024, 1024), dtype=np.float32), P())
state["w16"] = put(rng.standard_normal((1023, 257), dtype=np.float32), P())  # in parts of different sizes
state |= {"odd": put(np.full(7, -0.0, np.float32), P()), "step": 3}
update = jax.jit(lambda x: jax.tree.map(lambda leaf: leaf + 1, x), donate_argnums=0)
layout = {"pack": pack, "replica_parallel": replica_parallel, "min_slice_for_replica_parallel": 1}
limits = {"host_memory": limit}
with staging_as_accelerators() as sent, ckpt.Checkpointer(run, ckpt.Config(layout=layout, limits=limits)) as c:
  arrays = {name: leaf for name, leaf in state.items() if name.startswith("w")}
  want = {name: [np.array(s.data) for s in leaf.addressable_shards] for name, leaf in arrays.items()}
  c.save(0, state)
  after = update(arrays)
  c.wait()
  if (pack, replica_parallel) == ("off", "on"):
    even = sum(leaf.nbytes for leaf in arrays.values()) / jax.process_count()
    passes = 1 if limit == "auto" else 2  # a small state is looked at before it is written
    assert sum(sent) <= 1.01 * even * passes, "of replicas, each process sends a part to host memory"
  like = state | {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for name, x in after.items()}
  restored = c.restore(like=like)
  assert restored.report.verified == len(state), restored.report
  for name, shards in want.items():
    for a, b in zip(restored.state[name].addressable_shards, shards, strict=True):
      assert np.asarray(a.data).tobytes() == b.tobytes(), name
