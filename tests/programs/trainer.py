"""Saves step after step and keeps the last alone, until told to stop: trainer.py RUN STOP."""

import os
import sys

import jax.numpy as jnp

import ckpt_jax as ckpt

step = 0
with ckpt.Checkpointer(sys.argv[1], {"retention": {"last": 1}}) as c:
  while not os.path.exists(sys.argv[2]):
    c.save(step, {f"w{i}": jnp.full(10, step, jnp.float32) for i in range(20)}, extras={"at": step})
    step += 1
