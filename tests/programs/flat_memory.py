"""flat_memory.py RUN LIMIT N: N saves from CPU devices that count as accelerators, after 10 to warm up.

Prints the arrays that are alive beyond those of the start, and the bytes of RSS by which each ten saves grew, per save.
"""

import gc
import itertools
import json
import pathlib
import sys

import jax
import numpy as np

import ckpt_jax as ckpt
from ckpt_jax.layout import staging

run, limit, saves = sys.argv[1:]
staging.as_accelerators = True
rng = np.random.default_rng(0)
state = {f"x{i}": jax.device_put(rng.standard_normal((512, 128), np.float32)) for i in range(16)}  # 4 MiB
update = jax.jit(lambda x: jax.tree.map(lambda leaf: leaf + 1, x), donate_argnums=0)


def rss():
  gc.collect()
  lines = pathlib.Path("/proc/self/status").read_text().splitlines()
  return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


config = {"limits": {"host_memory": limit}, "retention": {"last": 1}, "storage": {"fsync": False}}
seen = []
with ckpt.Checkpointer(run, config) as c:
  for step in range(10 + int(saves)):
    c.save(step, state)
    state = update(state)
    if step % 10 == 9:
      c.wait()
      gc.collect()
      seen.append((rss(), len(jax.live_arrays())))
growth = [(b - a) / 10 for (a, _), (b, _) in itertools.pairwise(seen)]
print(json.dumps({"live": seen[-1][1] - seen[0][1], "growth": growth}))
