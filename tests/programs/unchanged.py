"""Saves a state of which 1% moves, from all processes, on two meshes in turn: unchanged.py DIRECTORY DONATE LIMIT."""

import json
import os
import sys

from ckpt_jax import multihost

multihost.initialize()

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import ckpt_jax as ckpt
from ckpt_jax.layout import unchanged
from ckpt_jax.save import host_memory

run, donate, limit = sys.argv[1], sys.argv[2] == "donate", sys.argv[3]
unchanged._LEAST_NBYTES = 0
host_memory._LEAST_RING_NBYTES = 1
one, other = (
  Mesh(np.array(jax.devices()).reshape(2, -1), ("data", "fsdp")),
  Mesh(np.array(jax.devices()[::-1]), ("fsdp",)),
)
rng = np.random.default_rng(0)
VALUES = {f"f{i}": rng.standard_normal((128, 256), dtype=np.float32) for i in range(8)}


def on(mesh, values, spec):
  place = NamedSharding(mesh, spec)
  return jax.make_array_from_callback(values.shape, place, lambda at: values[at], dtype=values.dtype)


def frozen_on(mesh):
  return {name: on(mesh, x, P("fsdp") if int(name[1:]) % 2 else P()) for name, x in VALUES.items()}


def state(step, frozen, mesh):
  return {"frozen": frozen, "lora": on(mesh, np.full((4, 16), step, np.float32), P())}


def files(step):
  """Inode and bytes of a step's files."""
  found = [os.lstat(os.path.join(top, name)) for top, _, names in os.walk(f"{run}/{step}") for name in names]
  return {info.st_ino: info.st_size for info in found}


def new_nbytes(step):
  """Bytes of a step's files that the one before does not have."""
  before = files(step - 1)
  return sum(nbytes for inode, nbytes in files(step).items() if inode not in before)


pass_on = jax.jit(lambda tree: tree, donate_argnums=0)
with ckpt.Checkpointer(run, {"limits": {"host_memory": limit}}) as c:
  for step in range(8):
    mesh = one if step < 5 else other
    if step in (0, 5):
      frozen = frozen_on(mesh)
    elif donate:
      frozen = pass_on(frozen)
    c.save(step, state(step, frozen, mesh))
    c.wait()
  for step in (0, 4, 7):
    like = state(step, frozen_on(mesh), mesh)
    got = c.restore(step, like=like).state
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(like), strict=True):
      for x, y in zip(a.addressable_shards, b.addressable_shards, strict=True):
        assert np.asarray(x.data).tobytes() == np.asarray(y.data).tobytes()
if jax.process_index() == 0:
  print(json.dumps([new_nbytes(step) for step in range(8)]))
