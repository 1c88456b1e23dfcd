"""Leaves that each process of a job has for itself, through a save and a restart: own_leaves.py RUN MODE."""

import sys

from ckpt_jax import multihost

multihost.initialize()

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import ckpt_jax as ckpt

logging.set_verbosity("error")
run, mode = sys.argv[1:3]
me = jax.process_index()
mesh = Mesh(np.array(jax.devices()), ("x",))
spread = NamedSharding(mesh, P("x"))


def init():
  """As trainers write it: weights over the mesh, and beside them whatever jax makes where it stands."""
  return {
    "w": jax.jit(lambda: jnp.arange(8.0), out_shardings=spread)(),
    "step": jnp.int32(0),
    "key": jax.random.key(3),
    "ema": jnp.zeros(3),
    "lr": jnp.asarray(0.5),
    "count": 2,
    "name": "adam",
    "table": np.arange(3, dtype=np.int32),
    "scale": np.float32(1.5),
  }


@jax.jit
def update(arrays):
  changed = {"w": arrays["w"] + 1, "step": arrays["step"] + 1, "ema": arrays["ema"] + 0.5}
  return arrays | changed | {"key": jax.random.split(arrays["key"])[0]}


def train(state):
  arrays = {name: x for name, x in state.items() if isinstance(x, jax.Array)}
  return state | update(arrays) | {"count": state["count"] + 1}


def what(state):
  """The values, types and weak types of what every process must have."""
  leaves = {name: jax.random.key_data(x) if name == "key" else x for name, x in state.items() if name != "w"}
  values = {name: np.asarray(x.addressable_data(0) if isinstance(x, jax.Array) else x) for name, x in leaves.items()}
  return {n: (str(x.dtype), x.tolist(), getattr(state[n], "weak_type", None)) for n, x in values.items()}


def shapes(state):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if isinstance(x, jax.Array) else x, state)


if mode == "resume":
  with ckpt.Checkpointer(run) as c:
    state = train(train(c.restore_or_init(init).state))
    c.save(1, state)
  with ckpt.Checkpointer(run, {"restore": {"on_corruption": "raise"}}) as c:
    for restored in (c.restore_or_init(init), *(c.restore(like=state, strategy=s) for s in ("gather", "broadcast"))):
      got = restored.state
      assert restored.step == 1 and restored.report.verified == 9
      assert what(got) == what(state), (what(got), what(state))
      for a, b in zip(got["w"].addressable_shards, state["w"].addressable_shards, strict=True):
        assert np.asarray(a.data).tolist() == np.asarray(b.data).tolist()
    got = c.restore_or_init(init).state
    for name, x in init().items():  # each is what init makes, here and not on the whole job
      assert type(got[name]) is type(x), name
      if isinstance(x, jax.Array):
        assert got[name].sharding == x.sharding and got[name].committed == x.committed, name
    on, again = train(state), train(got)
    assert what(on) == what(again)
    c.save(2, again)
    c.wait()
    # Whole arrays without a sharding would be read whole by every process: that must be asked for.
    try:
      c.restore(like=shapes(init()))
    except ckpt.StructureMismatchError as e:
      assert "ema: like has no sharding, and 2 processes must know" in str(e) and "step:" not in str(e), e
    else:
      raise SystemExit("shapes without shardings were restored")
    with jax.set_mesh(mesh):
      like = jax.eval_shape(lambda: {name: x for name, x in init().items() if isinstance(x, jax.Array)})
      got = c.restore(like=like, only=list(like)).state
      assert {name: x.sharding for name, x in got.items()} == dict.fromkeys(like, NamedSharding(mesh, P()))
elif mode == "differ":
  with ckpt.Checkpointer(run) as c:
    state = train(init())
    c.save(1, state)
    c.wait()
    others = {
      "table": np.arange(3, dtype=np.int32) + me,
      "count": 2 + me,
      "name": f"adam{me}",
      "key": jax.random.key(me),
    }
    for name, other in others.items():
      try:
        c.save(2, state | {name: other})
        c.wait()
      except ckpt.SaveFailedError as e:
        print("told:", e, flush=True)
        assert f"{name} (process 1)" in str(e) or me, e
      else:
        raise SystemExit(f"{name} differs, and was saved")
    c.save(2, state)
    c.wait()
    assert [s.step for s in c.steps()] == [1, 2]
print("done", flush=True)
