"""Flax NNX: the module and its optimizer are saved as they are.

    python -m ckpt_jax.examples.with_nnx --run /tmp/nnx --steps 300

Stop it at any moment and start it again: it goes on bit for bit as if it had not been stopped.
"""

from __future__ import annotations

import argparse

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import ckpt_jax as ckpt


class Classifier(nnx.Module):
  """Tells points inside the unit circle from those outside. Statistics and random numbers are part of its state."""

  def __init__(self, rngs: nnx.Rngs):
    self.inner = nnx.Linear(2, 64, rngs=rngs)
    self.norm = nnx.BatchNorm(64, rngs=rngs)
    self.dropout = nnx.Dropout(0.1, rngs=rngs)
    self.outer = nnx.Linear(64, 1, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    return self.outer(self.dropout(nnx.relu(self.norm(self.inner(x)))))[:, 0]


def init() -> dict[str, nnx.Pytree]:
  """The state at the start."""
  model = Classifier(nnx.Rngs(0))
  return {"model": model, "optimizer": nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)}


@nnx.jit
def train_step(model: Classifier, optimizer: nnx.Optimizer, x: jax.Array, y: jax.Array) -> jax.Array:
  """Changes model and optimizer in place; returns the loss."""

  def loss_fn(model: Classifier) -> jax.Array:
    return optax.sigmoid_binary_cross_entropy(model(x), y).mean()

  loss, grads = nnx.value_and_grad(loss_fn)(model)
  optimizer.update(model, grads)
  return loss


def batch(step: int) -> tuple[jax.Array, jax.Array]:
  """Points and labels; batch n is the same in every run."""
  x = jax.random.normal(jax.random.fold_in(jax.random.key(1), step), (128, 2))
  return x, jnp.float32(jnp.linalg.norm(x, axis=1) < 1)


def main(argv: list[str] | None = None) -> None:
  """Trains to `--steps`, from the newest checkpoint if there is one."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--run", required=True, help="directory of the run; start again with the same one to resume")
  parser.add_argument("--steps", type=int, default=300)
  parser.add_argument("--every", type=int, default=50, help="steps between saves")
  args = parser.parse_args(argv)

  with ckpt.Checkpointer(args.run, ckpt.Config(schedule={"every_steps": args.every}, retention={"last": 3})) as c:
    restored = c.restore_or_init(init)
    model, optimizer = restored.state["model"], restored.state["optimizer"]
    print(f"from step {restored.next_step}")
    for step in range(restored.next_step, args.steps):
      loss = train_step(model, optimizer, *batch(step))
      state = {"model": model, "optimizer": optimizer}
      if c.save(step, state, metrics={"loss": loss}, final=step == args.steps - 1):
        print(f"step {step}: loss {loss:.4f}, saving")


if __name__ == "__main__":
  main()
