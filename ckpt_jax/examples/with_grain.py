"""Grain: the position in the data is saved beside the state, so that no example is seen twice or skipped.

    python -m ckpt_jax.examples.with_grain --run /tmp/grain --steps 300

Stop it at any moment and start it again: it goes on with the next batch, and bit for bit as if it had not been stopped.
"""

from __future__ import annotations

import argparse
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax

import ckpt_jax as ckpt

optimizer = optax.adam(1e-2)


def example(index: int) -> dict[str, Any]:
  """A point, and whether it is in the unit circle."""
  x = np.random.default_rng(index).standard_normal(2, np.float32)
  return {"x": x, "y": np.float32(np.hypot(*x) < 1)}


def batches() -> grain.DatasetIterator:
  """10,000 examples, in a new order each time round."""
  return iter(grain.MapDataset.range(10_000).shuffle(seed=0).map(example).repeat().to_iter_dataset().batch(128))


def init() -> dict[str, Any]:
  """The state at the start."""
  inner, outer = jax.random.split(jax.random.key(0))
  params = {"inner": jax.random.normal(inner, (3, 64)), "outer": jax.random.normal(outer, (64,)) / 8}
  return {"params": params, "opt": optimizer.init(params)}


@jax.jit
def train_step(state: dict[str, Any], batch: dict[str, jax.Array]) -> tuple[dict[str, Any], jax.Array]:
  """The next state, and the loss."""
  x = jnp.concatenate([batch["x"], jnp.ones((len(batch["x"]), 1))], axis=1)

  def loss_fn(params: dict[str, jax.Array]) -> jax.Array:
    logits = jax.nn.relu(x @ params["inner"]) @ params["outer"]
    return optax.sigmoid_binary_cross_entropy(logits, batch["y"]).mean()

  loss, grads = jax.value_and_grad(loss_fn)(state["params"])
  updates, opt = optimizer.update(grads, state["opt"])
  return {"params": optax.apply_updates(state["params"], updates), "opt": opt}, loss


def main(argv: list[str] | None = None) -> None:
  """Trains to `--steps`, from the newest checkpoint if there is one."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--run", required=True, help="directory of the run; start again with the same one to resume")
  parser.add_argument("--steps", type=int, default=300)
  parser.add_argument("--every", type=int, default=50, help="steps between saves")
  args = parser.parse_args(argv)

  data = batches()
  with ckpt.Checkpointer(args.run, ckpt.Config(schedule={"every_steps": args.every}, retention={"last": 3})) as c:
    restored = c.restore_or_init(init)
    state = restored.state
    if restored.extras:
      data.set_state(restored.extras["data"])
    print(f"from step {restored.next_step}, data at {data.get_state()}")
    for step in range(restored.next_step, args.steps):
      state, loss = train_step(state, next(data))
      # A dict of numbers. The state of a grain.DataLoader is bytes: extras={"data": data.get_state().decode()}.
      extras = {"data": data.get_state()}
      if c.save(step, state, metrics={"loss": loss}, extras=extras, final=step == args.steps - 1):
        print(f"step {step}: loss {loss:.4f}, saving")


if __name__ == "__main__":
  main()
