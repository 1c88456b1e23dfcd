"""killed_in_ring.py RUN: a save of step 1 that goes through a ring is killed after some of its writes."""

import os
import signal
import sys

import jax
import numpy as np

import ckpt_jax as ckpt
from ckpt_jax.layout import staging, writing

staging.as_accelerators = True
state = {f"x{i}": jax.device_put(np.full((256, 256), i, np.float32)) for i in range(16)}  # 4 MiB
landed, land = [], writing.Writer.land


def killed(writer):
  land(writer)
  landed.append(1)
  if len(landed) == 8:
    os.kill(os.getpid(), signal.SIGKILL)


with ckpt.Checkpointer(sys.argv[1], {"limits": {"host_memory": "1MB"}}) as c:
  c.save(0, state)
  c.wait()
  writing.Writer.land = killed
  c.save(1, state)
