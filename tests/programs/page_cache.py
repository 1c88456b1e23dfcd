"""Two steps past the page cache by all processes, the second one restored: page_cache.py DIRECTORY."""

import sys
import time

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

import ckpt_jax as ckpt
from ckpt_jax.storage.page_cache import cached_nbytes

sharding = NamedSharding(jax.make_mesh((jax.device_count(),), ("x",)), PartitionSpec("x"))
values = {f"w{i}": np.random.default_rng(i).standard_normal((1024, 1024), dtype=np.float32) for i in range(6)}
state = {name: jax.make_array_from_callback(x.shape, sharding, x.__getitem__) for name, x in values.items()}
with ckpt.Checkpointer(sys.argv[1], {"limits": {"file_io": "direct"}, "preemption": {"enabled": False}}) as c:
  for step in (1, 2):
    c.save(step, state)
    c.wait()
    if jax.process_index() == 0:
      until = time.monotonic() + 60
      while (found := cached_nbytes(f"{sys.argv[1]}/{step}"))[0] > 0.05 * found[1]:
        assert time.monotonic() < until, found
        time.sleep(0.01)
  restored = c.restore(like=state).state
for name, x in values.items():
  for shard in restored[name].addressable_shards:
    assert np.array_equal(shard.data, x[shard.index]), name
print("restored")
