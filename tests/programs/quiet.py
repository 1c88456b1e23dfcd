"""Saves and restores that succeed and fail under INFO and -W error: quiet.py DIRECTORY. The parent reads stderr."""

import contextlib
import logging
import os
import pathlib
import sys

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

import ckpt_jax as ckpt
from ckpt_jax.integrity import health
from ckpt_jax.layout.handler import ArrayHandler
from ckpt_jax.save import commit

logging.basicConfig(level=logging.INFO, format="%(name)s %(levelname)s %(message)s", force=True)
logging.getLogger("jax").setLevel(logging.WARNING)
top = pathlib.Path(sys.argv[1])
state = {"w": jnp.ones(1000), "key": jax.random.key(0), "text": "a", "n": 1}


def section(name):
  print(f"== {name}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def fails():
  try:
    yield
  except ckpt.CheckpointError:
    return
  raise SystemExit("it did not fail")


@contextlib.contextmanager
def replaced(module, name, function):
  real = getattr(module, name)
  setattr(module, name, function)
  try:
    yield
  finally:
    setattr(module, name, real)


def io_error(*_):
  raise OSError(5, "Input/output error")


section("three saves")
c = ckpt.Checkpointer(top / "run")
for step in range(3):
  c.save(step, state, metrics={"loss": 1.0})
  c.wait()
section("restore")
c.restore(like=state)

section("failures")
with replaced(ArrayHandler, "serialize", io_error), fails():
  c.save(4, state)
  c.wait()
with fails():
  c.save(5, state, extras=object())
with replaced(health, "BEFORE_SAVE_NBYTES", 0), fails():
  c.save(6, {**state, "x": jnp.full(10**6, jnp.nan)})
  c.wait()
with replaced(commit, "seal", io_error), fails():
  c.save(7, state)
  c.wait()
path_class = ocp.path.atomicity.AtomicRenameTemporaryPath


async def no_directory(self):
  io_error()


with replaced(path_class, "create", no_directory), fails():
  c.save(8, state)
  c.wait()
for file in (top / "run" / "1" / "default").glob("**/d/*"):
  os.truncate(file, file.stat().st_size // 2)
for like in (None, state):
  with fails():
    c.restore(1, like=like)
with fails():
  c.restore(99)
with fails():
  c.restore(like={"other": jnp.ones(3)})
c.close()
with fails():
  c.save(9, state)

section("plain Orbax beside")
with ocp.CheckpointManager(top / "plain") as manager:
  manager.save(0, args=ocp.args.StandardSave({"w": jnp.ones(3)}))

section("asked for")
logging.getLogger("ckpt_jax").setLevel(logging.DEBUG)
with ckpt.Checkpointer(top / "loud") as c:
  c.save(0, state)
section("end")
