"""What the processes of a job do where another program was: foreign.py PREFIXED_RUN PARENT V1_RUN."""

import sys

from ckpt_jax import multihost

multihost.initialize()

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import ckpt_jax as ckpt
from ckpt_jax.errors import NotARunError

logging.set_verbosity("error")
prefixed, parent, v1_run = sys.argv[1:]
sharding = NamedSharding(Mesh(np.array(jax.devices()), ("x",)), P("x"))


def init(value=0.0):
  return {"w": jax.make_array_from_callback((8,), sharding, lambda index: np.full(8, value, np.float32)[index])}


try:
  ckpt.Checkpointer(parent)
  raise AssertionError("opened")
except NotARunError as e:
  assert "prefixed" in str(e) and "v1" in str(e), e

for run in (prefixed, v1_run):
  with ckpt.Checkpointer(run) as c:
    restored = c.restore_or_init(init)
    assert restored.next_step == 13 and np.all(np.asarray(restored.state["w"].addressable_data(0)) == 12)
    assert c.save(13, init(13.0), metrics={"loss": 1.0})
    c.wait()
    assert [s.step for s in c.steps()] == [12, 13]
  with ckpt.Checkpointer(run) as c:
    assert c.restore_or_init(init).report.verified == 1
