"""Saves steps of a small sharded state, with ckpt_jax or plain Orbax: flips_worker SIDE RUN CASE-AS-JSON."""

import json
import sys
from typing import Any

import numpy as np

from ckpt_jax import multihost


def values(step: int, *, rows: int = 64, frozen: bool = False) -> dict[str, Any]:
  """The state of a step, in host memory; if `frozen`, its matrices are the same in each step, all but one."""
  rng, still = np.random.default_rng(step), np.random.default_rng(10**6 if frozen else step + 1000)
  arrays = {f"w{i}": still.standard_normal((rows, 512), dtype=np.float32) for i in range(3)}
  # As in trained weights, many values are equal: compressed blocks repeat, and a flip may be harmless.
  sparse = np.where(still.random((64, 512)) < 0.9, 0, still.standard_normal((64, 512))).astype(np.float32)
  arrays |= {"w3": rng.standard_normal((64, 512), dtype=np.float32), "sparse": sparse}
  return arrays | {"bias": rng.standard_normal(100).astype(np.float32), "count": np.int32(step)}


def beside(step: int) -> dict[str, Any]:
  """Metrics and extras of a step."""
  return {"metrics": {"loss": step / 4}, "extras": {"batch": 1000 * step}}


def main() -> None:
  """Saves the steps, on each process."""
  multihost.initialize()

  import jax  # after joining the job
  import orbax.checkpoint as ocp
  from jax.sharding import NamedSharding
  from jax.sharding import PartitionSpec as P

  import ckpt_jax as ckpt

  side, run, case = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
  config, steps, state = case["config"], range(case["newest"] + 1), case["state"]
  mesh = jax.make_mesh((jax.device_count(),), ("fsdp",))

  def put(x: Any) -> Any:
    spec = P("fsdp") if x.ndim == 2 else P()
    return jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), lambda index: np.asarray(x)[index])

  if side == "ckpt_jax":
    with ckpt.Checkpointer(run, ckpt.Config(**config)) as c:
      for step in steps:
        c.save(step, jax.tree.map(put, values(step, **state)), **beside(step))
    return
  handler = ocp.PyTreeCheckpointHandler(use_compression=config["layout"]["compression"] != "off")
  with ocp.CheckpointManager(run, item_handlers=handler) as manager:
    for step in steps:
      manager.save(step, args=ocp.args.PyTreeSave(jax.tree.map(put, values(step, **state))))


if __name__ == "__main__":
  main()
