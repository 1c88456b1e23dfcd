"""Restores of four processes whose CPU devices count as accelerators: accelerator_restores.py RUN."""

import sys

from ckpt_jax import multihost

multihost.initialize()

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import ckpt_jax as ckpt
from ckpt_jax.layout import staging
from ckpt_jax.restore import exchange

mesh = jax.make_mesh((2, jax.device_count() // 2), ("data", "fsdp"))
SPECS = [P("fsdp"), P(), P("data"), P(None, "fsdp"), P("data", "fsdp")]


def put(x, spec, kind=None):
  where = NamedSharding(mesh, spec, memory_kind=kind)
  return jax.make_array_from_callback(x.shape, where, lambda index: x[index])


def values():
  rng = np.random.default_rng(0)
  return {f"{kind}{i}": rng.standard_normal((512, 1024), dtype=np.float32) for kind in "wp" for i in range(5)}


def state():
  """Some in device memory, some pinned, one small one."""
  made = {n: put(x, SPECS[int(n[1])], "pinned_host" if n[0] == "p" else None) for n, x in values().items()}
  return made | {"b": put(np.full(7, -0.0, np.float32), P())}


def check(got, want):
  for name, leaf in want.items():
    assert got[name].sharding == leaf.sharding, (name, got[name].sharding)
    for a, b in zip(got[name].addressable_shards, leaf.addressable_shards, strict=True):
      assert np.asarray(a.data).tobytes() == np.asarray(b.data).tobytes(), name


programs = []


def listen(event, seconds, **_):
  if event == "/jax/core/compile/backend_compile_duration":
    programs.append(seconds)


def run(c, like, strategy):
  programs.clear()
  before = len(exchange._compile_s)
  got = c.restore(like=like, strategy=strategy)
  return got, len(programs) - (len(exchange._compile_s) - before)


staging.as_accelerators = True
jax.monitoring.register_event_duration_secs_listener(listen)
try:
  want = state()
  like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), want)
  with ckpt.Checkpointer(sys.argv[1]) as c, ckpt.Checkpointer(sys.argv[1], {"restore": {"verify": False}}) as plain:
    c.save(0, want)
    c.wait()
    run(plain, like, "direct")  # connects
    for strategy in ("direct", "gather", "broadcast"):
      got, others = run(c, like, strategy)
      check(got.state, want)
      assert got.report.verified == len(want), got.report
      assert others <= 1, f"{strategy}: {others} programs beside the exchange; one adds up what all processes found"
      got, others = run(c, like, strategy)
      assert not programs, f"{strategy}: the second restore compiled {len(programs)} programs"
    # What arrives from other processes is summed where it arrived.
    whole = exchange.spread
    if jax.process_index() == 2:
      exchange.spread = lambda *args: -whole(*args)
    try:
      c.restore(like=like, strategy="gather", step=0)
    except ckpt.CorruptCheckpointError as e:
      assert "w1" in str(e) and "p1" not in str(e), e
    else:
      raise SystemExit("a leaf that changed on its way was not noticed")
    exchange.spread = whole
finally:
  staging.as_accelerators = False
  jax.monitoring.unregister_event_duration_listener(listen)
