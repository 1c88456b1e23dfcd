"""exports.py RUN OUT FORMAT kill|memory: an export that is killed, or the bytes of memory that one of 400 MB took."""

import os
import pathlib
import signal
import sys

import jax.numpy as jnp
import numpy as np

import ckpt_jax as ckpt

run, out, form, what = sys.argv[1:]


def memory():
  """The most resident memory since the last call, and what is resident now."""
  lines = dict(line.split(":", 1) for line in pathlib.Path("/proc/self/status").read_text().splitlines())
  found = tuple(int(lines[name].split()[0]) * 1024 for name in ("VmHWM", "VmRSS"))
  pathlib.Path("/proc/self/clear_refs").write_text("5")
  return found


def kill(done, total):
  if done > total * 0.7:
    os.kill(os.getpid(), signal.SIGKILL)


if what == "kill":
  ckpt.export(run, 5, out, format=form, shard_size=30_000, memory=1 << 16, progress=kill)
else:
  some = np.random.default_rng(0).standard_normal((1024, 1024), dtype=np.float32)
  with ckpt.Checkpointer(run, {"layout": {"chunk_size": "16MiB"}}) as c:
    rest = [jnp.asarray(np.tile(some, (8, 1))) for _ in range(4)]
    c.save(5, {"params": {"large": jnp.asarray(np.tile(some, (64, 1))), "rest": rest}})
    del rest
  before = memory()[1]
  ckpt.export(run, 5, out, format=form, quantize=None if form == "orbax" else "int8")
  print(memory()[0] - before)
