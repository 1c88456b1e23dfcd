"""Saves steps 0 and 1 of a small sharded state, with ckpt_jax or plain Orbax: flips_worker SIDE RUN CONFIG-JSON."""

import json
import sys
from typing import Any

import numpy as np

from ckpt_jax import multihost


def values(step: int) -> dict[str, Any]:
  """The state of a step, in host memory."""
  rng = np.random.default_rng(step)
  arrays = {f"w{i}": rng.standard_normal((64, 512), dtype=np.float32) for i in range(4)}
  # As in trained weights, many values are equal: compressed blocks repeat, and a flip may be harmless.
  arrays["sparse"] = np.where(rng.random((64, 512)) < 0.9, 0, rng.standard_normal((64, 512))).astype(np.float32)
  return arrays | {"bias": rng.standard_normal(100).astype(np.float32), "count": np.int32(step)}


def main() -> None:
  """Saves both steps, on each process."""
  multihost.initialize()

  import jax  # after joining the job
  import orbax.checkpoint as ocp
  from jax.sharding import NamedSharding
  from jax.sharding import PartitionSpec as P

  import ckpt_jax as ckpt

  side, run, config = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
  mesh = jax.make_mesh((jax.device_count(),), ("fsdp",))

  def put(x: Any) -> Any:
    spec = P("fsdp") if x.ndim == 2 else P()
    return jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), lambda index: np.asarray(x)[index])

  if side == "ckpt_jax":
    with ckpt.Checkpointer(run, ckpt.Config(**config)) as c:
      for step in range(2):
        c.save(step, jax.tree.map(put, values(step)), metrics={"loss": step / 4}, extras={"batch": 1000 * step})
    return
  handler = ocp.PyTreeCheckpointHandler(use_compression=config["layout"]["compression"] == "on")
  with ocp.CheckpointManager(run, item_handlers=handler) as manager:
    for step in range(2):
      manager.save(step, args=ocp.args.PyTreeSave(jax.tree.map(put, values(step))))


if __name__ == "__main__":
  main()
