"""Random states saved and restored on random meshes, many in one job: reshard.py RUNS MODE FIRST COUNT.

MODE is `save`, or the strategies to restore with, with commas between. What a seed means depends on the seed alone, so
that a job of any size can check what another one saved.
"""

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
runs, mode, first, count = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])

DTYPES = [
  "float32",
  "bfloat16",
  "float16",
  "float8_e4m3fn",
  "float8_e5m2",
  "int4",
  "uint4",
  "int8",
  "uint8",
  "int32",
  "uint32",
  "bool",
  "complex64",
  "key",
]
# -0.0, signalling and quiet NaNs with payloads, both infinities, the smallest denormals, the largest numbers.
ODD32 = [0x80000000, 0x7F800001, 0x7FC00123, 0xFFC00001, 0x7F800000, 0xFF800000, 1, 0x80000001, 0x007FFFFF, 0x7F7FFFFF]


def odd_values(rng, shape, dtype):
  """Random bits, with every odd float among them."""
  n = int(np.prod(shape, dtype=np.int64))
  if dtype == "key":
    return rng.integers(0, 2**32, (*shape, 2), dtype=np.uint32)
  if dtype == "bool":
    return rng.integers(0, 2, shape).astype(bool)
  if dtype in ("int4", "uint4"):
    return rng.integers(-8 if dtype == "int4" else 0, 8 if dtype == "int4" else 16, shape).astype(jnp.dtype(dtype))
  size = np.dtype(jnp.dtype(dtype)).itemsize
  raw = rng.integers(0, 256, n * size, dtype=np.uint8)
  values = raw.view(np.dtype(jnp.dtype(dtype)))[:n]
  if dtype in ("float32", "complex64") and n:
    words = values.view(np.uint32)
    words[:] = np.where(rng.random(words.size) < 0.5, rng.choice(np.array(ODD32, np.uint32), words.size), words)
  if dtype == "bfloat16" and n:
    words = values.view(np.uint16)
    odd = np.array([0x8000, 0x7F81, 0x7FC1, 0xFF81, 0x7F80, 1, 0x8001, 0x007F], np.uint16)
    words[:] = np.where(rng.random(words.size) < 0.5, rng.choice(odd, words.size), words)
  return values.reshape(shape)


def values_of(seed):
  """Host values of a seed's state, by name."""
  rng = np.random.default_rng(seed)
  tree = {}
  for i in range(rng.integers(3, 7)):
    dtype = DTYPES[rng.integers(len(DTYPES))]
    ndim = rng.integers(0, 4)
    shape = tuple(int(rng.choice([1, 2, 3, 4, 5, 7, 8, 16, 24, 64])) for _ in range(ndim))
    tree[f"{dtype}_{i}"] = odd_values(rng, shape, dtype)
  tree["big"] = odd_values(rng, (64, 1024), "float32")
  tree["odd_shape"] = odd_values(rng, (int(rng.choice([3, 7, 101])), int(rng.choice([5, 4096, 33333]))), "bfloat16")
  return tree


def is_key(name):
  return name.startswith("key_")


def mesh_and_specs(seed, tree):
  """A random mesh over all devices of this job, and a random spec for each leaf that its shape allows."""
  rng = np.random.default_rng(seed)
  n = jax.device_count()
  shapes = [
    s for s in [(n,), (1, n), (n, 1), (2, n // 2), (n // 2, 2), (2, 2, n // 4)] if np.prod(s) == n and min(s) > 0
  ]
  shape = shapes[rng.integers(len(shapes))]
  devices = np.array(jax.devices())
  if rng.random() < 0.3:
    devices = devices[rng.permutation(n)]
  mesh = Mesh(devices.reshape(shape), ("data", "fsdp", "tensor")[: len(shape)])
  specs = {}
  for name, value in tree.items():
    dims = value.shape[:-1] if is_key(name) else value.shape
    spec = [[] for _ in dims]
    for axis in mesh.axis_names:
      if dims and rng.random() < 0.5:
        dim = int(rng.integers(len(dims)))
        parts = int(np.prod([mesh.shape[a] for a in spec[dim]])) * mesh.shape[axis]
        if dims[dim] % parts == 0:
          spec[dim].append(axis)
    specs[name] = P(*[tuple(s) if len(s) > 1 else s[0] if s else None for s in spec])
  return mesh, specs


def place(name, value, sharding):
  if is_key(name):
    words = NamedSharding(sharding.mesh, P(*sharding.spec, *[None] * (value.ndim - len(sharding.spec))))
    data = jax.make_array_from_callback(value.shape, words, lambda i: value[i])
    return jax.jit(lambda x: jax.random.wrap_key_data(x))(data)
  return jax.make_array_from_callback(value.shape, sharding, lambda i: value[i])


def wanted(name, value, sharding):
  if is_key(name):
    return jax.ShapeDtypeStruct(value.shape[:-1], jax.random.key(0).dtype, sharding=sharding)
  return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding)


def check(name, got, value, sharding, what):
  assert got.sharding == sharding, f"{what} {name}: {got.sharding} instead of {sharding}"
  data = jax.random.key_data(got) if is_key(name) else got
  for shard in data.addressable_shards:
    have, want = np.asarray(shard.data), np.ascontiguousarray(value[shard.index])
    assert have.dtype == want.dtype and have.tobytes() == want.tobytes(), f"{what} {name}{value.shape} {sharding}"


for seed in range(first, first + count):
  tree = values_of(seed)
  where = f"{runs}/{seed}"
  if mode == "save":
    mesh, specs = mesh_and_specs(seed + 1000, tree)
    state = {name: place(name, value, NamedSharding(mesh, specs[name])) for name, value in tree.items()}
    with ckpt.Checkpointer(where, ckpt.Config(health={"nonfinite": "ignore"})) as c:
      c.save(0, state)
    continue
  mesh, specs = mesh_and_specs(seed + 2000 + jax.process_count(), tree)
  shardings = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
  like = {name: wanted(name, value, shardings[name]) for name, value in tree.items()}
  with ckpt.Checkpointer(where) as c:
    for strategy in mode.split(","):
      got = c.restore(like=like, strategy=strategy)
      for name, value in tree.items():
        check(name, got.state[name], value, shardings[name], f"seed {seed} {strategy}")
    if seed == first:
      host = c.restore().state
      for name, value in tree.items():
        have = np.asarray(jax.random.key_data(host[name])) if is_key(name) else host[name]
        assert have.tobytes() == value.tobytes(), f"seed {seed} numpy {name}"
print("all exact", flush=True)
