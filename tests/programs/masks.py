"""Infinities that are meant to be there, in a job: masks.py RUN."""

import sys

from ckpt_jax import multihost

multihost.initialize()

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import ckpt_jax as ckpt

mesh = jax.make_mesh((jax.device_count(),), ("fsdp",))
mask = np.triu(np.full((64, 64), -np.inf, np.float32), 1)


def state():
  return {"mask": jax.make_array_from_callback(mask.shape, NamedSharding(mesh, P("fsdp")), lambda index: mask[index])}


for step in (0, 1):  # the second one knows what the first one has noted
  with ckpt.Checkpointer(sys.argv[1]) as c:
    assert c.save(step, state())
mask[63, 0] = np.inf
with ckpt.Checkpointer(sys.argv[1]) as c:
  try:
    c.save(2, state())
  except ckpt.UnhealthyStateError as e:
    print("refused", "2016 infinities and 0 NaNs are meant" in str(e), flush=True)
  mask[63, 0] = 0
  assert c.save(2, state())
assert [(s.step, s.healthy) for s in c.steps()] == [(0, True), (1, True), (2, True)]
