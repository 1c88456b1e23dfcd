"""A run with leaves of every kind, and damage to its files."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import ckpt_jax as ckpt


def state(seed):
  rng = np.random.default_rng(seed)
  mesh = jax.make_mesh((2,), ("a",))
  w = jax.device_put(rng.standard_normal((64, 300), dtype=np.float32), NamedSharding(mesh, P("a")))
  return {
    "params": {"w": w, "b": jnp.asarray(rng.standard_normal(30), jnp.bfloat16), "q": jnp.arange(9, dtype=jnp.int4)},
    "key": jax.random.key(seed),
    "step": seed,
    "name": f"s{seed}",
    "host": rng.standard_normal(5),
    "empty": jnp.zeros((0, 3)),
  }


def save(run, steps=(0, 1), **config):
  with ckpt.Checkpointer(run, ckpt.Config(**config)) as c:
    for step in steps:
      c.save(step, state(step), metrics={"loss": step / 4}, extras={"batch": step * 1000})


def files(step_dir):
  return sorted(p for p in step_dir.rglob("*") if p.is_file())


def flip(file, rng):
  data = bytearray(file.read_bytes())
  data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
  file.write_bytes(data)


def truncate(file, rng):
  data = file.read_bytes()
  file.write_bytes(data[: rng.randrange(len(data))])


def zero(file, rng):
  data = bytearray(file.read_bytes())
  at = rng.randrange(len(data))
  data[at : at + 4096] = bytes(len(data[at : at + 4096]))
  file.write_bytes(data)


def remove(file, rng):
  file.unlink()


def find_data(step_dir, value):
  """The data file that holds the raw bytes of an array, and where."""
  raw = np.asarray(value).tobytes()
  return next((f, at) for f in files(step_dir) if (at := f.read_bytes().find(raw[:512])) >= 0)


def damage_params(run, step):
  file, at = find_data(run / str(step), state(step)["params"]["w"].addressable_shards[0].data)
  data = bytearray(file.read_bytes())
  data[at + 5] ^= 4
  file.write_bytes(data)
