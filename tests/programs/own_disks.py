"""A save whose run is on another disk for each process: own_disks.py RUN."""

import sys

from ckpt_jax import multihost

multihost.initialize()

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import ckpt_jax as ckpt
from ckpt_jax.storage import look

logging.set_verbosity("error")
look.PATIENCE_S = 0.5
everywhere = NamedSharding(Mesh(np.array(jax.devices()), ("x",)), P())
w = jax.make_array_from_callback((8, 3), everywhere, np.ones((8, 3), np.float32).__getitem__)
with ckpt.Checkpointer(sys.argv[1], {"storage": "nfs"}) as c:
  c.save(1, {"w": w})
  try:
    c.wait()
  except ckpt.SaveFailedError as e:
    print("raised", e, flush=True)
