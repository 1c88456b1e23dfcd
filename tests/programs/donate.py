"""donate.py RUN: prints what a restore and the first step after it take of memory beside the state, in bytes."""

import json
import pathlib
import sys

import jax
import jax.numpy as jnp

import ckpt_jax as ckpt


def peak():
  """The most resident memory since the last call, and what is resident now."""
  lines = dict(line.split(":", 1) for line in pathlib.Path("/proc/self/status").read_text().splitlines())
  found = tuple(int(lines[name].split()[0]) * 1024 for name in ("VmHWM", "VmRSS"))
  pathlib.Path("/proc/self/clear_refs").write_text("5")
  return found


def init():
  return {f"w{i}": jnp.full((512, 1024), i, jnp.float32) for i in range(96)}


state = init()
nbytes = sum(x.nbytes for x in state.values())
# Values that are not compressed, which these would be, are read straight into their places; 32 MiB are on their way.
config = {"layout": {"compression": "off"}, "limits": {"restore_concurrency": "32MiB"}}
with ckpt.Checkpointer(sys.argv[1], config) as c:
  c.save(0, {"warm": jnp.ones(3)})
  c.save(1, state)
  del state
  c.wait()
  step = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
  step = step.lower(jax.eval_shape(init)).compile()
  c.restore(0)
  _, before = peak()
  state = c.restore_or_init(init).state
  restoring = peak()[0] - before - nbytes
  pointers = {name: x.unsafe_buffer_pointer() for name, x in state.items()}
  state = jax.block_until_ready(step(state))
  stepping = peak()[0] - before - nbytes
  donated = sum(x.unsafe_buffer_pointer() == pointers[name] for name, x in state.items())
  assert all(float(x[3, 5]) == int(name[1:]) + 1 for name, x in state.items())
print(json.dumps({"restoring": restoring, "stepping": stepping, "donated": donated, "state": nbytes}))
