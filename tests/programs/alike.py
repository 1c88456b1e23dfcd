"""Processes of a job that do not do the same: alike.py RUN."""

import sys

from ckpt_jax import multihost

multihost.initialize()

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import ckpt_jax as ckpt

logging.set_verbosity("error")
run = sys.argv[1]
last = jax.process_index() == jax.process_count() - 1
who = f"process {jax.process_count() - 1}"
mesh = Mesh(np.array(jax.devices()), ("x",))
everywhere, split = P(), P("x")


def put(value, spec=everywhere):
  return jax.make_array_from_callback(value.shape, NamedSharding(mesh, spec), value.__getitem__, dtype=value.dtype)


def state(fill=1):
  whole = np.full((len(jax.devices()) * 3, 5), fill, np.float32)
  return {"w": put(whole), "rows": put(whole, split), "table": np.arange(3), "n": fill}


def raised(kind, call, *words):
  """All processes raise this kind of error, whose message has these words."""
  try:
    call()
  except ckpt.CheckpointError as e:
    assert type(e) is kind and all(word in str(e) for word in words), f"{type(e).__name__}: {e}"
    print("raised", e, flush=True)
  else:
    raise SystemExit(f"no {kind.__name__} with {words}")


error, mismatch = ckpt.CheckpointError, ckpt.StructureMismatchError
raised(ckpt.ConfigError, lambda: ckpt.Checkpointer(run + "-other" * last), f"{who}: the run is", "-other")
raised(
  ckpt.ConfigError,
  lambda: ckpt.Checkpointer(run, {"layout": {"chunk_size": 4096 if last else 8192}}),
  f"{who}: layout.chunk_size is 4096, on process 0 8192",
)
raised(ckpt.ConfigError, lambda: ckpt.Checkpointer("" if last else run), f"{who}: the directory of a run is ''")

raised(ckpt.ConfigError, lambda: ckpt.Checkpointer(run, "none.yaml" if last else None), f"{who}: ", "none.yaml")
raised(
  ckpt.ConfigError,
  lambda: ckpt.Checkpointer(run, {"storage": "nfs" if last else "local"}),
  f"{who}: its storage is nfs",
)

odd = {
  "w is int32": {"w": put(np.ones((len(jax.devices()) * 3, 5), np.int32))},
  "w is float32[7,5]": {"w": put(np.ones((7, 5), np.float32))},
  "rows is float32": {"rows": state()["w"]},
  "more (int64[2]) is not on process 0": {"more": np.arange(2)},
  "table is ndarray int64[4], on process 0 ndarray int64[3]": {"table": np.arange(4)},
  "n is float, on process 0 int": {"n": 1.0},
  "cannot save this state": {"n": print},
}
with ckpt.Checkpointer(run) as c:
  c.save(1, state())
  for step, (words, leaf) in enumerate(odd.items(), 2):
    words = words.replace("more (", "more (ndarray ")
    raised(error, lambda step=step, leaf=leaf: c.save(step, state() | leaf if last else state()), who, words)
  raised(
    error, lambda: c.save(10, {n: x for n, x in state().items() if n != "w" or not last}), "w (", "only on process 0"
  )
  raised(error, lambda: c.save(11 + last, state()), f"{who} saves step 12", "process 0 saves step 11")
  raised(error, lambda: c.save(1 if last else 11, state()), f"{who} asks whether step 1 is there already")
  like = state()
  raised(mismatch, lambda: c.restore(like={"typo": 1} | like if last else like), who, "typo")
  raised(mismatch, lambda: c.restore(like=like | {"rows": like["w"]} if last else like), who, "rows")
  raised(mismatch, lambda: c.restore(like=like, only="w" if last else "rows"), "only", who)
  raised(mismatch, lambda: c.restore(like=like, strategy="gather" if last else "direct"), "strategy", who)
  assert [s.step for s in c.steps()] == [1]
  c.save(2, state(2))
  c.wait()
  got = c.restore(like=like).state
  assert np.asarray(got["w"].addressable_data(0)).tolist() == np.asarray(state(2)["w"].addressable_data(0)).tolist()
  assert [s.step for s in c.steps()] == [1, 2]
  raised(ckpt.NoCheckpointError, lambda: c.pin(99), "no committed step 99")
  # A process alone may look into what all have written.
  assert ckpt.verify(run) == []
  assert ckpt.diff(run, 2, run, 2).same and not ckpt.diff(run, 1, run, 2).same
print("done", flush=True)
