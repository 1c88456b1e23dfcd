"""Plain JAX: a dict of arrays, sharded over all devices.

    python -m ckpt_jax.examples.with_jax --run /tmp/jax --steps 300
    XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m ckpt_jax.examples.with_jax --run /tmp/jax --steps 600

The second command goes on from the first, on another number of devices: `init` says where each array goes.
"""

from __future__ import annotations

import argparse
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import ckpt_jax as ckpt


def shardings(mesh: Mesh) -> dict[str, Any]:
  """Where each part of the state is: the hidden units are split over the devices, the rest is on all of them."""
  params = {"inner": NamedSharding(mesh, P(None, "x")), "outer": NamedSharding(mesh, P("x"))}
  return {"params": params, "momentum": params, "rng": NamedSharding(mesh, P())}


def init() -> dict[str, Any]:
  """The state at the start."""
  inner, outer, rng = jax.random.split(jax.random.key(0), 3)
  params = {"inner": jax.random.normal(inner, (2, 64)), "outer": jax.random.normal(outer, (64,)) / 64}
  return {"params": params, "momentum": jax.tree.map(jnp.zeros_like, params), "rng": rng}


def train_step(state: dict[str, Any]) -> tuple[dict[str, Any], jax.Array]:
  """The next state, and the loss: the network learns a product. The random key is part of the state."""
  rng, batch = jax.random.split(state["rng"])
  x = jax.random.normal(batch, (256, 2))

  def loss_fn(params: dict[str, jax.Array]) -> jax.Array:
    return jnp.mean((jax.nn.relu(x @ params["inner"]) @ params["outer"] - x[:, 0] * x[:, 1]) ** 2)

  loss, grads = jax.value_and_grad(loss_fn)(state["params"])
  momentum = jax.tree.map(lambda m, g: 0.9 * m + g, state["momentum"], grads)
  params = jax.tree.map(lambda p, m: p - 0.01 * m, state["params"], momentum)
  return {"params": params, "momentum": momentum, "rng": rng}, loss


def main(argv: list[str] | None = None) -> None:
  """Trains to `--steps`, from the newest checkpoint if there is one."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--run", required=True, help="directory of the run; start again with the same one to resume")
  parser.add_argument("--steps", type=int, default=300)
  parser.add_argument("--every", type=int, default=50, help="steps between saves")
  args = parser.parse_args(argv)

  places = shardings(jax.make_mesh((jax.device_count(),), ("x",), axis_types=(jax.sharding.AxisType.Auto,)))
  step_fn = jax.jit(train_step, donate_argnums=0, out_shardings=(places, None))
  with ckpt.Checkpointer(args.run, ckpt.Config(schedule={"every_steps": args.every}, retention={"last": 3})) as c:
    restored = c.restore_or_init(jax.jit(init, out_shardings=places))
    state = restored.state
    print(f"from step {restored.next_step} on {jax.device_count()} devices")
    for step in range(restored.next_step, args.steps):
      state, loss = step_fn(state)
      if c.save(step, state, metrics={"loss": loss}, final=step == args.steps - 1):
        print(f"step {step}: loss {loss:.4f}, saving")  # the state may be donated to the next step meanwhile


if __name__ == "__main__":
  main()
