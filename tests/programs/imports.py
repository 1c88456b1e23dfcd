"""imports.py DIRECTORY: loads safetensors onto a mesh of all processes; prints the bytes that this one read."""

import sys

from ckpt_jax import multihost

multihost.initialize()

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import ckpt_jax as ckpt
from ckpt_jax.storage import ranges

read = [0]
into = ranges.Ranges.into


def counted(self, memory, name, start):
  read[0] += memory.nbytes
  into(self, memory, name, start)


ranges.Ranges.into = counted
mesh = jax.make_mesh((2, jax.device_count() // 2), ("data", "model"))
specs = {
  "rows": P("model"),
  "columns": P(None, "model"),
  "both": P("data", "model"),
  "replicated": P(),
  "turned": P("model"),
}
want = {name: np.load(f"{sys.argv[1]}/{name}.npy") for name in specs}
like = {n: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, specs[n])) for n, x in want.items()}
got = ckpt.load_safetensors(sys.argv[1], like=like, rename={"turned": "other.turned:T"})
for name, array in got.items():
  assert array.sharding == like[name].sharding
  for shard in array.addressable_shards:
    assert np.asarray(shard.data).tobytes() == want[name][shard.index].tobytes(), name
print(read[0])
