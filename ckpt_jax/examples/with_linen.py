"""Flax Linen: a TrainState with batch statistics and a random key.

    python -m ckpt_jax.examples.with_linen --run /tmp/linen --steps 300

Stop it at any moment and start it again: it goes on bit for bit as if it had not been stopped.
"""

from __future__ import annotations

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax.training import train_state

import ckpt_jax as ckpt


class Classifier(nn.Module):
  """Tells points inside the unit circle from those outside."""

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
    x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Dense(64)(x)))
    return nn.Dense(1)(nn.Dropout(0.1, deterministic=not train)(x))[:, 0]


class TrainState(train_state.TrainState):
  """Flax's state, and what else changes while training. All is saved but `apply_fn` and `tx`, which are code."""

  batch_stats: Any
  rng: jax.Array


def init() -> TrainState:
  """The state at the start."""
  model = Classifier()
  variables = model.init(jax.random.key(0), jnp.zeros((1, 2)), train=False)
  return TrainState.create(
    apply_fn=model.apply,
    params=variables["params"],
    tx=optax.adam(1e-2),
    batch_stats=variables["batch_stats"],
    rng=jax.random.key(1),
  )


@jax.jit
def train_step(state: TrainState, x: jax.Array, y: jax.Array) -> tuple[TrainState, jax.Array]:
  """The next state, and the loss."""
  rng, dropout = jax.random.split(state.rng)

  def loss_fn(params: Any) -> tuple[jax.Array, Any]:
    variables = {"params": params, "batch_stats": state.batch_stats}
    logits, changed = state.apply_fn(variables, x, mutable=["batch_stats"], rngs={"dropout": dropout})
    return optax.sigmoid_binary_cross_entropy(logits, y).mean(), changed["batch_stats"]

  (loss, batch_stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
  return state.apply_gradients(grads=grads, batch_stats=batch_stats, rng=rng), loss


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
    state = restored.state
    print(f"from step {restored.next_step}")
    for step in range(restored.next_step, args.steps):
      state, loss = train_step(state, *batch(step))
      if c.save(step, state, metrics={"loss": loss}, final=step == args.steps - 1):
        print(f"step {step}: loss {loss:.4f}, saving")


if __name__ == "__main__":
  main()
