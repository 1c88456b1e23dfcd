"""What several processes do in one restore: restores.py RUN MODE."""

import sys
import time

from ckpt_jax import multihost

multihost.initialize()

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import ckpt_jax as ckpt
from ckpt_jax.job import threads
from ckpt_jax.restore import exchange, fetch
from ckpt_jax.restore.step import Step

logging.set_verbosity("error")
run, mode = sys.argv[1:3]
me, n = jax.process_index(), jax.process_count()
mesh = Mesh(np.array(jax.devices()).reshape(n, -1), ("data", "fsdp"))


def put(x, spec):
  return jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), lambda index: x[index])


def state():
  rng = np.random.default_rng(0)
  big = {f"w{i}": put(rng.standard_normal((256, 4096), dtype=np.float32), P(None, "fsdp")) for i in range(6)}
  return big | {f"b{i}": put(np.full(40, -0.0, np.float32), P()) for i in range(20)}


def abstract(tree):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def check(got):
  for name, leaf in state().items():
    for a, b in zip(got[name].addressable_shards, leaf.addressable_shards, strict=True):
      assert np.asarray(a.data).tobytes() == np.asarray(b.data).tobytes(), name


def rchar():
  with open("/proc/self/io") as file:
    return int(next(line for line in file if line.startswith("rchar")).split()[1])


def expect(error, match, call):
  try:
    call()
  except ckpt.CheckpointError as e:
    assert isinstance(e, error) and match in str(e), f"{type(e).__name__}: {e}"
    print("raised", type(e).__name__, str(e).splitlines()[0], flush=True)
  else:
    raise SystemExit(f"no {error.__name__}")


if mode == "save":
  with ckpt.Checkpointer(run) as c:
    c.save(0, state())
elif mode == "count":
  with ckpt.Checkpointer(run) as c:
    like = abstract(state())
    c.restore(like=like, strategy="gather")  # imports, compiles, connects
    for strategy in ("direct", "gather", "broadcast", "auto"):
      before = rchar()
      got = c.restore(like=like, strategy=strategy)
      print("read", strategy, rchar() - before, got.report.strategy, flush=True)
      check(got.state)
    compiled = len(exchange._compile_s)
    c.restore(like=like, strategy="gather")
    assert len(exchange._compile_s) == compiled, "a second restore compiled again"
elif mode == "reshard":
  # Saved by rows over all processes; wanted by rows over fewer or more, by columns, and on one device.
  rows = Mesh(np.array(jax.devices()), ("x",))
  with ckpt.Checkpointer(run) as c:
    if c.latest_step() is None:
      saved = {n: NamedSharding(rows, P("x")) for n in ("a", "b", "c", "d")}
      rng = np.random.default_rng(1)
      host = {n: rng.standard_normal((512, 2048), dtype=np.float32) for n in saved}
      c.save(0, {n: jax.make_array_from_callback(x.shape, saved[n], x.__getitem__) for n, x in host.items()})
      c.wait()
    for name, spec, strategy in (("rows", P("x"), "direct"), ("columns", P(None, "x"), "gather")):
      like = {n: jax.ShapeDtypeStruct((512, 2048), jnp.float32, sharding=NamedSharding(rows, spec)) for n in "abcd"}
      c.restore(like=like, strategy=strategy)
      before = rchar()
      c.restore(like=like, strategy=strategy)
      print("read", name, rchar() - before, flush=True)
elif mode == "words":
  for dtype in (jnp.float32, jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn, jnp.int8, jnp.bool_):
    target = NamedSharding(mesh, P(None, "fsdp"))
    for program in (
      exchange.spread_program((64, 64), dtype, target, P("data", "fsdp")),
      exchange.replica_program((64, 64), dtype, target),
    ):
      lines = [x for x in program.compile().as_text().splitlines() if " all-" in x or "collective-permute" in x]
      assert lines and all(f"= u{jnp.dtype(dtype).itemsize * 8}[" in x for x in lines), (dtype, lines)
elif mode == "absent":
  with ckpt.Checkpointer(run, ckpt.Config(timeouts={"restore": 3})) as c:
    if me != 1:
      expect(ckpt.errors.RestoreTimeoutError, "these did not arrive: 1", lambda: c.restore(like=abstract(state())))
elif mode == "slow_reader":
  with ckpt.Checkpointer(run, ckpt.Config(timeouts={"restore": 4})) as c:
    whole = Step.read
    if me == 1:
      Step.read = lambda self, *args: time.sleep(9) or whole(self, *args)
    what = "storage to read" if me == 1 else "1"
    expect(ckpt.CheckpointError, what, lambda: c.restore(like=abstract(state()), strategy="gather"))
    Step.read = whole
elif mode == "stuck_exchange":
  with ckpt.Checkpointer(run, ckpt.Config(timeouts={"restore": 6})) as c:
    if me == 1:
      whole = fetch._exchange
      fetch._exchange = lambda part, values: time.sleep(60)
    threads._LEAVE_S = 1.0  # ten for a user, whose read may yet end
    expect(ckpt.CheckpointError, "the exchange of part", lambda: c.restore(like=abstract(state()), strategy="gather"))
  time.sleep(4)  # the first to fail takes the others with it
  raise ValueError("leave without jax's shutdown barrier: a device thread is stuck")
elif mode == "unreadable":
  with ckpt.Checkpointer(run) as c:
    for strategy in ("direct", "gather", "broadcast"):
      if me == 1:
        whole = Step.read

        def fail(self, *args):
          raise ckpt.CorruptCheckpointError(f"{run}: cannot be read: disk on fire")

        Step.read = fail
      call = lambda strategy=strategy: c.restore(like=abstract(state()), strategy=strategy)  # noqa: E731
      expect(ckpt.CorruptCheckpointError, "process 1: ", call)
      if me == 1:
        Step.read = whole
    like = abstract(state())
    if me == 1:
      like["typo"] = like["w0"]
    expect(ckpt.StructureMismatchError, "process 1: ", lambda: c.restore(like=like))
    expect(ckpt.CheckpointError, "ask for different steps", lambda: c.restore(step=0 if me else None))
    check(c.restore(like=abstract(state()), strategy="gather").state)
