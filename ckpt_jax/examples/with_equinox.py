"""Equinox: the arrays of a module are saved; its functions are code.

    python -m ckpt_jax.examples.with_equinox --run /tmp/equinox --steps 300

Stop it at any moment and start it again: it goes on bit for bit as if it had not been stopped.
"""

from __future__ import annotations

import argparse
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

import ckpt_jax as ckpt

optimizer = optax.adam(1e-2)


def init() -> dict[str, Any]:
  """The state at the start: the arrays of the module, with None where it has functions and constants."""
  model, _ = eqx.partition(build(), eqx.is_array)
  return {"model": model, "opt": optimizer.init(model)}


def build() -> eqx.nn.MLP:
  """The module."""
  return eqx.nn.MLP(in_size=2, out_size=1, width_size=64, depth=2, key=jax.random.key(0))


@eqx.filter_jit
def train_step(state: dict[str, Any], static: Any, x: jax.Array, y: jax.Array) -> tuple[dict[str, Any], jax.Array]:
  """The next state, and the loss."""

  def loss_fn(arrays: Any) -> jax.Array:
    model = eqx.combine(arrays, static)
    return optax.sigmoid_binary_cross_entropy(jax.vmap(model)(x)[:, 0], y).mean()

  loss, grads = eqx.filter_value_and_grad(loss_fn)(state["model"])
  updates, opt = optimizer.update(grads, state["opt"])
  return {"model": eqx.apply_updates(state["model"], updates), "opt": opt}, loss


def batch(step: int) -> tuple[jax.Array, jax.Array]:
  """Points, and whether they are in the unit circle; batch n is the same in every run."""
  x = jax.random.normal(jax.random.fold_in(jax.random.key(1), step), (128, 2))
  return x, jnp.float32(jnp.linalg.norm(x, axis=1) < 1)


def main(argv: list[str] | None = None) -> None:
  """Trains to `--steps`, from the newest checkpoint if there is one."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--run", required=True, help="directory of the run; start again with the same one to resume")
  parser.add_argument("--steps", type=int, default=300)
  parser.add_argument("--every", type=int, default=50, help="steps between saves")
  args = parser.parse_args(argv)

  _, static = eqx.partition(eqx.filter_eval_shape(build), lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))
  with ckpt.Checkpointer(args.run, ckpt.Config(schedule={"every_steps": args.every}, retention={"last": 3})) as c:
    restored = c.restore_or_init(init)
    state = restored.state
    print(f"from step {restored.next_step}")
    for step in range(restored.next_step, args.steps):
      state, loss = train_step(state, static, *batch(step))
      if c.save(step, state, metrics={"loss": loss}, final=step == args.steps - 1):
        print(f"step {step}: loss {loss:.4f}, saving")


if __name__ == "__main__":
  main()
