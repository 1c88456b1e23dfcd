"""Saves arrays spread over all devices; each process then reads its half of the bytes, by rows and by columns."""

import sys

from ckpt_jax import multihost

multihost.initialize()

import jax
import numpy as np
import tensorstore as ts
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import ckpt_jax as ckpt


def bytes_read():
  found = ts.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
  return sum(v["value"] for m in found for v in m["values"])


mesh = jax.make_mesh((4,), ("x",))
whole = np.arange(1 << 20, dtype=np.float32).reshape(1024, 1024)
spread = NamedSharding(mesh, P("x"))
state = {str(i): jax.make_array_from_callback(whole.shape, spread, lambda at: whole[at]) for i in range(4)}
with ckpt.Checkpointer(sys.argv[1]) as c:
  c.save(0, state)
  c.wait()
  for spec in (P("x"), P(None, "x")):
    like = {
      name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec)) for name, x in state.items()
    }
    before = bytes_read()
    got = c.restore(like=like, strategy="direct").state
    read = bytes_read() - before
    for x in got.values():
      for shard in x.addressable_shards:
        assert np.asarray(shard.data).tobytes() == whole[shard.index].tobytes()
    total = 4 * whole.nbytes
    assert total / 2 <= read < total / 2 * 1.05, f"read {read} of {total} for {spec}"
  assert "reads 1.00 times what it needs instead of 2.00" in c.plan.explain(), c.plan.explain()
