"""Fine-tuning: starts from the weights in a safetensors file, then from the run's own checkpoints.

    python -m ckpt_jax.examples.from_safetensors --run /tmp/tuned --steps 300 --weights model.safetensors

Without --weights it makes up a file, under names and in the layout that PyTorch uses.
"""

from __future__ import annotations

import argparse
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from safetensors.numpy import save_file

import ckpt_jax as ckpt

optimizer = optax.adam(1e-3)
# Our name: the file's name. T: PyTorch keeps a kernel as [out, in].
NAMES = {"layers/*/kernel": "model.layers.*.weight:T", "layers/*/bias": "model.layers.*.bias"}


def made_up(path: pathlib.Path) -> pathlib.Path:
  """A file as another program would have written it."""
  rng = np.random.default_rng(0)
  tensors = {}
  for i, (n_in, n_out) in enumerate([(1, 64), (64, 64), (64, 1)]):
    tensors[f"model.layers.{i}.weight"] = rng.standard_normal((n_out, n_in), np.float32) / np.float32(n_in**0.5)
    tensors[f"model.layers.{i}.bias"] = np.zeros(n_out, np.float32)
  path.parent.mkdir(parents=True, exist_ok=True)
  save_file(tensors, path)
  return path


def init() -> dict[str, Any]:
  """The state before the weights are read: its shapes, dtypes and shardings are what the file must fit."""
  sizes = [(1, 64), (64, 64), (64, 1)]
  params = {"layers": [{"kernel": jnp.zeros(size), "bias": jnp.zeros(size[1])} for size in sizes]}
  return {"params": params, "opt": optimizer.init(params)}


@jax.jit
def train_step(state: dict[str, Any], x: jax.Array) -> tuple[dict[str, Any], jax.Array]:
  """The next state, and the loss: the network learns a sine."""

  def loss_fn(params: dict[str, Any]) -> jax.Array:
    *hidden, last = params["layers"]
    y = x
    for layer in hidden:
      y = jnp.tanh(y @ layer["kernel"] + layer["bias"])
    return jnp.mean((y @ last["kernel"] + last["bias"] - jnp.sin(x)) ** 2)

  loss, grads = jax.value_and_grad(loss_fn)(state["params"])
  updates, opt = optimizer.update(grads, state["opt"])
  return {"params": optax.apply_updates(state["params"], updates), "opt": opt}, loss


def main(argv: list[str] | None = None) -> None:
  """Trains to `--steps`, from the newest checkpoint if there is one, else from the weights."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--run", required=True, help="directory of the run; start again with the same one to resume")
  parser.add_argument("--weights", type=pathlib.Path, help="safetensors file, or directory of files, to start from")
  parser.add_argument("--steps", type=int, default=300)
  parser.add_argument("--every", type=int, default=50, help="steps between saves")
  args = parser.parse_args(argv)

  with ckpt.Checkpointer(args.run, ckpt.Config(schedule={"every_steps": args.every}, retention={"last": 3})) as c:
    restored = c.restore_or_init(init)
    state = restored.state
    if restored.step is None:  # once: a run that resumes needs the file no longer
      weights = args.weights or made_up(pathlib.Path(f"{args.run}-weights") / "model.safetensors")
      state["params"] = ckpt.load_safetensors(weights, like=state["params"], rename=NAMES)
    print(f"from step {restored.next_step}")
    for step in range(restored.next_step, args.steps):
      x = jax.random.uniform(jax.random.fold_in(jax.random.key(1), step), (64, 1), minval=-3, maxval=3)
      state, loss = train_step(state, x)
      if c.save(step, state, metrics={"loss": loss}, final=step == args.steps - 1):
        print(f"step {step}: loss {loss:.4f}, saving")


if __name__ == "__main__":
  main()
