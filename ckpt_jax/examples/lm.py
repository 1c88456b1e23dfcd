"""The main job: a byte-level GPT that trains on the source of the Python standard library and survives being killed.

    python -m ckpt_jax.examples.lm --run /tmp/lm --steps 60 --every 10
    python -m ckpt_jax.multihost --processes 4 --devices 2 -m ckpt_jax.examples.lm --run /tmp/lm
    mpirun -n 4 python -m ckpt_jax.examples.lm --run /shared/lm

The lines that checkpointing needs are in `train`; the rest is an ordinary Flax NNX trainer and its log.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import pathlib
import sysconfig
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import ckpt_jax as ckpt
from ckpt_jax import multihost
from ckpt_jax.layout.structure import path_name

PyTree = Any


class Block(nnx.Module):
  """Pre-norm attention and MLP."""

  def __init__(self, width: int, heads: int, dropout: float, rngs: nnx.Rngs):
    self.norm1 = nnx.LayerNorm(width, rngs=rngs)
    self.attention = nnx.MultiHeadAttention(heads, width, decode=False, rngs=rngs)
    self.norm2 = nnx.LayerNorm(width, rngs=rngs)
    self.up = nnx.Linear(width, 4 * width, rngs=rngs)
    self.down = nnx.Linear(4 * width, width, rngs=rngs)
    self.dropout = nnx.Dropout(dropout)

  def __call__(self, x: jax.Array, mask: jax.Array, rngs: nnx.Rngs) -> jax.Array:
    x = x + self.attention(self.norm1(x), mask=mask)
    return x + self.dropout(self.down(jax.nn.gelu(self.up(self.norm2(x)))), deterministic=False, rngs=rngs)


class ByteGPT(nnx.Module):
  """int32[batch, context] bytes to float32[batch, context, 256] logits of the next byte."""

  def __init__(self, width: int, layers: int, heads: int, context: int, dropout: float, *, rngs: nnx.Rngs):
    self.bytes = nnx.Embed(256, width, rngs=rngs)
    self.positions = nnx.Embed(context, width, rngs=rngs)
    self.blocks = nnx.List([Block(width, heads, dropout, rngs) for _ in range(layers)])
    self.norm = nnx.LayerNorm(width, rngs=rngs)

  def __call__(self, tokens: jax.Array, rngs: nnx.Rngs) -> jax.Array:
    length = tokens.shape[1]
    x = self.bytes(tokens) + self.positions(jnp.arange(length))
    mask = nnx.make_causal_mask(tokens)
    for block in self.blocks:
      x = block(x, mask, rngs)
    return self.bytes.attend(self.norm(x))


class Batches:
  """Random windows of the text. Batch n depends on seed and n alone, not on how many processes there are.

  Attributes:
    state: JSON-able; goes into `extras=`, and is set again to resume.
  """

  def __init__(self, text: np.ndarray, batch: int, context: int, seed: int):
    self._text, self._batch, self._context = text, batch, context
    self.state = {"seed": seed, "next": 0}

  def peek(self) -> np.ndarray:
    """The next batch without moving on to the one after it."""
    rng = np.random.default_rng([self.state["seed"], self.state["next"]])
    starts = rng.integers(len(self._text) - self._context - 1, size=self._batch)
    return self._text[starts[:, None] + np.arange(self._context + 1)].astype(np.int32)

  def next(self, sharding: jax.sharding.Sharding) -> jax.Array:
    """The next batch, int32[batch, context + 1], on the mesh; each process holds only its own rows."""
    rows = self.peek()
    self.state["next"] += 1
    return jax.make_array_from_callback(rows.shape, sharding, lambda index: rows[index])


def stdlib_text(limit: int = 4_000_000, pattern: str = "*.py") -> np.ndarray:
  """uint8[<= limit]: sources of the standard library, by default those at its top, in alphabetical order."""
  files = sorted(pathlib.Path(sysconfig.get_paths()["stdlib"]).glob(pattern))
  return np.frombuffer(b"\n".join(f.read_bytes() for f in files)[:limit], np.uint8)


def shard(leaf: Any, mesh: Mesh) -> NamedSharding:
  """FSDP: the last axis that is divisible by the mesh's `fsdp` axis is split over it; small leaves are replicated."""
  if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) or leaf.size < 1024:
    return NamedSharding(mesh, P())
  for axis in reversed(range(leaf.ndim)):
    if leaf.shape[axis] % mesh.shape["fsdp"] == 0:
      return NamedSharding(mesh, P(*[None] * axis, "fsdp"))
  return NamedSharding(mesh, P())


def evaluate(params: PyTree, batches: int = 4, batch: int = 16) -> float:
  """The loss, in nats a byte, on sources that training does not see; `ckpt-jax export --eval` calls it.

  Args:
    params: of a `ByteGPT` of any size, in nested containers with the same paths.
    batches, batch: how much text.
  """
  leaves = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
  context, width = leaves["positions/embedding/value"].shape
  heads = leaves["blocks/0/attention/query/kernel/value"].shape[1]
  layers = sum(path.endswith("/norm1/bias/value") for path in leaves)
  graph, shapes = nnx.split(nnx.eval_shape(lambda: ByteGPT(width, layers, heads, context, 0.0, rngs=nnx.Rngs(0))))
  state = jax.tree_util.tree_map_with_path(lambda path, _: leaves[path_name(path)], shapes)

  @jax.jit
  def loss(state, tokens):
    logits = nnx.merge(graph, state)(tokens[:, :-1], nnx.Rngs(dropout=0))
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

  unseen = Batches(stdlib_text(pattern="email/*.py"), batch, context, seed=0)
  here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return float(np.mean([loss(state, unseen.next(here)) for _ in range(batches)]))


def digests(state: PyTree, batches: Batches) -> dict[str, str]:
  """SHA-256 of the bits of every leaf as it is in memory, and of the batch that comes next. All processes call it."""
  found = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(state):
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      leaf = jax.random.key_data(leaf)
    whole = leaf if leaf.is_fully_addressable else multihost_utils.process_allgather(leaf, tiled=True)
    found[jax.tree_util.keystr(path)] = hashlib.sha256(np.asarray(whole).tobytes()).hexdigest()
  found["next batch"] = hashlib.sha256(batches.peek().tobytes()).hexdigest()
  return found


def compiled(args: argparse.Namespace, mesh: Mesh) -> tuple[Callable[[], PyTree], Callable[..., tuple[PyTree, Any]]]:
  """`init()` -> state, sharded over the mesh, and `train_step(state, tokens)` -> state, loss; both are jitted."""
  build = functools.partial(ByteGPT, args.width, args.layers, args.heads, args.context, args.dropout)
  graph, _ = nnx.split(nnx.eval_shape(lambda: build(rngs=nnx.Rngs(args.seed))))
  optimizer = optax.adamw(3e-4)

  def build_state() -> dict[str, Any]:
    params = nnx.split(build(rngs=nnx.Rngs(args.seed)))[1]
    return {"params": params, "opt": optimizer.init(params), "step": jnp.int32(0), "rng": jax.random.key(args.seed)}

  shardings = jax.tree.map(lambda leaf: shard(leaf, mesh), jax.eval_shape(build_state))
  whole = NamedSharding(mesh, P())

  @functools.partial(jax.jit, donate_argnums=0, out_shardings=(shardings, whole))
  def train_step(state, tokens):
    rng, dropout = jax.random.split(state["rng"])

    def loss_fn(params):
      # FSDP: parameters are gathered for the computation, gradients are scattered back to the shards.
      params = jax.tree.map(lambda p: jax.lax.with_sharding_constraint(p, whole), params)
      logits = nnx.merge(graph, params)(tokens[:, :-1], nnx.Rngs(dropout=dropout))
      return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    loss, grads = jax.value_and_grad(loss_fn)(state["params"])
    updates, opt = optimizer.update(grads, state["opt"], state["params"])
    params = optax.apply_updates(state["params"], updates)
    return {"params": params, "opt": opt, "step": state["step"] + 1, "rng": rng}, loss

  return jax.jit(build_state, out_shardings=shardings), train_step


class Log:
  """Progress on the terminal, and notes as JSON in `args.notes`; process 0 prints and writes."""

  def __init__(self, args: argparse.Namespace, mesh: Mesh):
    self._args, self._mesh = args, mesh
    self._first = jax.process_index() == 0
    self._saves = 0  # shown so far
    self._steps, self._since = 0, time.perf_counter()

  def begin(self, restored: ckpt.Restored, batches: Batches) -> None:
    """Shows where training begins."""
    size = sum(x.size for x in jax.tree.leaves(restored.state["params"]))
    came = "from scratch" if restored.step is None else f"resumed from step {restored.step}"
    self._print(f"{size / 1e6:.1f}M parameters, mesh {dict(self._mesh.shape)}, {jax.process_count()} processes: {came}")
    if restored.step is not None:
      self.digests(f"restored-{restored.step}", restored.state, batches)

  def step(self, step: int, loss: jax.Array) -> None:
    """Shows loss and speed now and then."""
    self._steps += 1
    if step % self._args.show == self._args.show - 1 or step == self._args.steps - 1:
      value = float(loss)  # waits for the step
      speed = self._steps * self._args.batch * self._args.context / (time.perf_counter() - self._since)
      self._print(f"step {step + 1:4d}  loss {value:.3f}  {speed:,.0f} tokens/s")
      self._steps, self._since = 0, time.perf_counter()

  def saves(self, saves: Sequence[Any]) -> None:
    """Shows the saves whose background write has ended since the last call."""
    for record in saves[self._saves :]:
      if record.background_s is not None:
        self._saves += 1
        times = f"{record.blocking_s:.2f} s blocking, {record.background_s:.2f} s in the background"
        self._print(f"  saved step {record.step}: {record.nbytes / 1e6:.0f} MB, {times}")
        self._note(f"save-{record.step}", vars(record))

  def digests(self, name: str, state: PyTree, batches: Batches) -> None:
    """Notes the digests of a state. All processes call it."""
    if self._args.notes:
      self._note(name, digests(state, batches))

  def _print(self, line: str) -> None:
    if self._first:
      print(line, flush=True)

  def _note(self, name: str, content: Any) -> None:
    if self._first and self._args.notes:
      path = pathlib.Path(self._args.notes)
      path.mkdir(parents=True, exist_ok=True)
      (path / f"{name}.json").write_text(json.dumps(content))


def train(args: argparse.Namespace) -> None:
  """Trains from the newest checkpoint, or from scratch, to `args.steps`."""
  devices = np.array(jax.devices())
  mesh = Mesh(devices.reshape(-1, min(args.fsdp, len(devices))), ("data", "fsdp"))
  rows = NamedSharding(mesh, P(("data", "fsdp")))
  batches = Batches(stdlib_text(), args.batch, args.context, args.seed)
  init, train_step = compiled(args, mesh)
  log = Log(args, mesh)
  config = ckpt.Config(
    schedule={"every_steps": args.every}, retention={"last": 3}, preemption={"exit_code": args.preempted_exit_code}
  )
  with ckpt.Checkpointer(args.run, config) as c:
    restored = c.restore_or_init(init)
    state = restored.state
    if restored.extras:
      batches.state = restored.extras["data"]
    log.begin(restored, batches)
    for step in range(restored.next_step, args.steps):
      state, loss = train_step(state, batches.next(rows))
      extras = {"data": batches.state}
      if c.save(step, state, metrics={"loss": loss}, extras=extras, final=step == args.steps - 1):
        log.digests(f"trained-{step}", state, batches)
      log.saves(c.saves)
      log.step(step, loss)
  log.saves(c.saves)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
  """The command line."""
  parser = argparse.ArgumentParser(prog="python -m ckpt_jax.examples.lm", description=__doc__.splitlines()[0])
  parser.add_argument("--run", required=True, help="directory of the run; start again with the same one to resume")
  parser.add_argument("--steps", type=int, default=60)
  parser.add_argument("--every", type=int, default=10, help="steps between saves")
  parser.add_argument("--show", type=int, default=5, help="steps between progress lines")
  parser.add_argument("--fsdp", type=int, default=2, help="devices that share one copy of the parameters")
  parser.add_argument("--batch", type=int, default=8)
  parser.add_argument("--context", type=int, default=64)
  parser.add_argument("--width", type=int, default=256)
  parser.add_argument("--layers", type=int, default=4)
  parser.add_argument("--heads", type=int, default=8)
  parser.add_argument("--dropout", type=float, default=0.1)
  parser.add_argument("--preempted-exit-code", type=int, default=143, help="exit code after SIGTERM and a last save")
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--notes", help="directory for digests of the state and costs of the saves, as JSON")
  return parser.parse_args(argv)


if __name__ == "__main__":
  options = arguments()
  multihost.initialize()
  train(options)
