"""A save of step 3 is killed after so many links, or right before its commit: killed_between_links.py RUN LINKS LIMIT.

LINKS: how many; -1: right before the commit. LIMIT: of host memory.
"""

import os
import signal
import sys

import jax.numpy as jnp

import ckpt_jax as ckpt
from ckpt_jax.save import commit

frozen = {f"f{i}": jnp.full((64, 256), i, jnp.float32) for i in range(8)}
run, left, limit = sys.argv[1], int(sys.argv[2]), sys.argv[3]
link, seal = os.link, commit.seal


def killed(source, target):
  global left
  link(source, target)
  left -= 1
  if left == 0:
    os.kill(os.getpid(), signal.SIGKILL)


def killed_before_commit(*args):
  seal(*args)
  os.kill(os.getpid(), signal.SIGKILL)


with ckpt.Checkpointer(run, {"limits": {"host_memory": limit}}) as c:
  for step in range(3):
    c.save(step, {"frozen": frozen, "w": jnp.full(100, step)})
  c.wait()
  os.link = killed
  if left < 0:
    commit.seal = killed_before_commit
  c.save(3, {"frozen": frozen, "w": jnp.full(100, 3)})
