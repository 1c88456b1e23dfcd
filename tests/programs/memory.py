"""memory.py RUN LIMIT COMPRESSION DEVICES: prints what a save and a restore took of host memory beside the state."""

import json
import pathlib
import sys

import jax
import numpy as np

import ckpt_jax as ckpt
from ckpt_jax.layout import staging


def peak():
  """The most resident memory since the last call, and what is resident now."""
  lines = dict(line.split(":", 1) for line in pathlib.Path("/proc/self/status").read_text().splitlines())
  found = tuple(int(lines[name].split()[0]) * 1024 for name in ("VmHWM", "VmRSS"))
  pathlib.Path("/proc/self/clear_refs").write_text("5")
  return found


staging.as_accelerators = sys.argv[4] == "accelerators"
limits = {} if sys.argv[2] == "none" else {"host_memory": sys.argv[2]}
rng = np.random.default_rng(0)
state = {f"x{i}": jax.device_put(rng.standard_normal((1024, 1024), np.float32), jax.devices()[0]) for i in range(40)}
nbytes = sum(x.nbytes for x in state.values())
layout = {"compression": sys.argv[3]}
with ckpt.Checkpointer(sys.argv[1], ckpt.Config(limits=limits, layout=layout)) as c:
  c.save(0, {"warm": jax.numpy.ones(3)})
  c.wait()
  _, before = peak()
  c.save(1, state)
  c.wait()
  saving = peak()[0] - before
  _, before = peak()
  restored = c.restore(1, like=state).state
  restoring = peak()[0] - before - nbytes
print(json.dumps({"saving": saving, "restoring": restoring, "state": nbytes}))
