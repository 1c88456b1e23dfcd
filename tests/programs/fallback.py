"""Two steps of a sharded state, saved or restored by many: fallback.py RUN save|restore|deleted.

`deleted`: somebody deletes the newest while it is read.
"""

import sys

from ckpt_jax import multihost

multihost.initialize()

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import ckpt_jax as ckpt
from ckpt_jax.restore import restorer
from ckpt_jax.run.deletion import StepDeleter

mesh = jax.make_mesh((2, jax.device_count() // 2), ("data", "fsdp"))


def state(step):
  def put(x, spec):
    return jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), lambda index: x[index])

  rng = np.random.default_rng(step)
  leaves = {f"w{i}": put(rng.standard_normal((64, 1024), dtype=np.float32), P("fsdp")) for i in range(4)}
  return leaves | {"replicated": put(rng.standard_normal(99, dtype=np.float32), P()), "step": step}


with ckpt.Checkpointer(sys.argv[1]) as c:
  if sys.argv[2] == "save":
    for step in range(2):
      c.save(step, state(step), extras=step)
  else:
    if sys.argv[2] == "deleted":
      Step = restorer.Step

      def deleting(step_dir, *arguments):
        if step_dir.name == "1" and jax.process_index() == 0:
          deleter = StepDeleter(c.directory)
          deleter.delete(1)
          deleter.finish()
        return Step(step_dir, *arguments)

      restorer.Step = deleting
    got = c.restore_or_init(lambda: state(0))
    assert got.extras == got.step == got.state["step"]
    for name, leaf in state(got.step).items():
      if isinstance(leaf, jax.Array):
        for a, b in zip(got.state[name].addressable_shards, leaf.addressable_shards, strict=True):
          assert np.asarray(a.data).tobytes() == np.asarray(b.data).tobytes(), name
    print("restored step", got.step, "quarantined", list(got.report.quarantined), "gone", got.report.gone, flush=True)
