"""optax: gradients accumulated over several steps, and a moving average of the parameters.

    python -m ckpt_jax.examples.with_optax --run /tmp/optax --steps 400

A run may stop in the middle of an accumulation: the gradients so far are part of the optimizer state. At the end only
the average is read back, for evaluation.
"""

from __future__ import annotations

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import optax

import ckpt_jax as ckpt

# The parameters change once in 4 steps.
optimizer = optax.MultiSteps(optax.adamw(optax.cosine_decay_schedule(1e-2, 1000)), every_k_schedule=4)


def init() -> dict[str, Any]:
  """The state at the start."""
  inner, outer = jax.random.split(jax.random.key(0))
  params = {"inner": jax.random.normal(inner, (1, 64)), "bias": jnp.zeros(64), "outer": jax.random.normal(outer, (64,))}
  params["outer"] /= 8
  return {"params": params, "opt": optimizer.init(params), "ema": params}


def predict(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
  """float32[n, 1] to float32[n]."""
  return jnp.tanh(x @ params["inner"] + params["bias"]) @ params["outer"]


@jax.jit
def train_step(state: dict[str, Any], x: jax.Array) -> tuple[dict[str, Any], jax.Array]:
  """The next state, and the loss: the network learns a sine."""
  loss, grads = jax.value_and_grad(lambda p: jnp.mean((predict(p, x) - jnp.sin(x[:, 0])) ** 2))(state["params"])
  updates, opt = optimizer.update(grads, state["opt"], state["params"])
  params = optax.apply_updates(state["params"], updates)
  ema = optax.incremental_update(params, state["ema"], step_size=0.02)
  return {"params": params, "opt": opt, "ema": ema}, loss


def main(argv: list[str] | None = None) -> None:
  """Trains to `--steps`, from the newest checkpoint if there is one."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--run", required=True, help="directory of the run; start again with the same one to resume")
  parser.add_argument("--steps", type=int, default=400)
  parser.add_argument("--every", type=int, default=50, help="steps between saves")
  args = parser.parse_args(argv)

  with ckpt.Checkpointer(args.run, ckpt.Config(schedule={"every_steps": args.every}, retention={"last": 3})) as c:
    restored = c.restore_or_init(init)
    state = restored.state
    print(f"from step {restored.next_step}, {int(state['opt'].mini_step)} of 4 gradients accumulated")
    for step in range(restored.next_step, args.steps):
      x = jax.random.uniform(jax.random.fold_in(jax.random.key(1), step), (64, 1), minval=-3, maxval=3)
      state, loss = train_step(state, x)
      if c.save(step, state, metrics={"loss": loss}, final=step == args.steps - 1):
        print(f"step {step}: loss {loss:.4f}, saving")

  with ckpt.Checkpointer(args.run) as c:
    ema = c.restore(only="ema").state["ema"]  # a sixth of the state is read
  x = jnp.linspace(-3, 3, 100)[:, None]
  print(f"the average is off by {jnp.abs(predict(ema, x) - jnp.sin(x[:, 0])).max():.3f} at most")


if __name__ == "__main__":
  main()
