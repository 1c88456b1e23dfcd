"""nnx modules and optimizers that are saved as they are, with what they share."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import ckpt_jax as ckpt
from ckpt_jax.layout import contents
from ckpt_jax.layout.shared import other_names, reunited, shared_nodes


class Tied(nnx.Module):
  """Layers with everything that is awkward: a module and a Variable in two places, statistics, random numbers."""

  def __init__(self, rngs):
    self.first = nnx.Linear(4, 4, rngs=rngs)
    self.norm = nnx.BatchNorm(4, rngs=rngs)
    self.drop = nnx.Dropout(0.5, rngs=rngs)
    self.again = self.first
    self.last = nnx.Linear(4, 4, rngs=rngs)
    self.last.kernel = self.first.kernel
    self.more = nnx.List([nnx.Linear(4, 4, rngs=rngs), self.last])

  def __call__(self, x):
    x = self.again(self.drop(self.norm(self.first(x))))
    return self.more[1](self.more[0](self.last(x)))


def init(seed=0):
  model = Tied(nnx.Rngs(seed))
  return {"model": model, "optimizer": nnx.Optimizer(model, optax.sgd(0.1, momentum=0.9), wrt=nnx.Param), "step": 0}


@nnx.jit
def train_step(model, optimizer, x):
  loss, grads = nnx.value_and_grad(lambda model: jnp.mean(model(x) ** 2))(model)
  optimizer.update(model, grads)
  return loss


def train(state, steps):
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    for i in range(steps):
      train_step(state["model"], state["optimizer"], jax.random.normal(jax.random.key(i), (8, 4)))
  return state


def numbers(state):
  rows = nnx.to_flat_state(nnx.state((state["model"], state["optimizer"])))
  return {path: np.asarray(jax.random.key_data(x[...]) if "key" in path else x[...]).tobytes() for path, x in rows}


HOW = {
  "a fresh state": lambda c: c.restore(like=init(1)),
  "shapes": lambda c: c.restore(like=nnx.eval_shape(lambda: init(1))),
  "restore_or_init": lambda c: c.restore_or_init(lambda: init(1)),
}


@pytest.mark.parametrize("how", HOW)
def test_a_module_and_its_optimizer_train_on_bitwise_and_share_what_they_shared(tmp_path, how):
  with ckpt.Checkpointer(tmp_path) as c:
    state = train(init(), 2)
    c.save(2, state)
    train(state, 2)  # in place, while the step is written
    c.wait()
    restored = HOW[how](c).state
  model = restored["model"]
  assert model.again is model.first and model.more[1] is model.last and model.last.kernel is model.first.kernel
  assert model.norm.mean is not model.norm.var
  assert numbers(train(restored, 2)) == numbers(state)


def test_what_is_shared_is_stored_once_under_its_first_name(tmp_path):
  with ckpt.Checkpointer(tmp_path) as c:
    c.save(0, init())
    c.save(1, {"model": nnx.state(init(1)["model"])})
    c.wait()
    names = {leaf.path for leaf in contents.describe(tmp_path, 0).leaves if leaf.path.startswith("model")}
    assert names == {leaf.path for leaf in contents.describe(tmp_path, 1).leaves}
    assert len([name for name in names if name.endswith("kernel/value")]) == 2
    # A module reads what was saved as its state, and the other way round.
    model = c.restore(1, like={"model": init()["model"]}).state["model"]
    assert model.last.kernel is model.first.kernel
    state = c.restore(0, like=nnx.state(init(1)["model"]), only="model").state
    assert np.array_equal(state["again"]["kernel"][...], init()["model"].first.kernel[...])
    assert set(c.restore(0, only="model").state["model"]) == {"again", "drop", "last", "more", "norm"}  # no inner nodes
    part = c.restore(0, like=init(), only="model/again").state
    assert np.array_equal(part["model"]["again"].kernel[...], init()["model"].first.kernel[...])


def test_a_module_that_two_objects_hold_is_one_again(tmp_path):
  def pair(seed):
    model = Tied(nnx.Rngs(seed))
    return (model, {"optimizer": nnx.ModelAndOptimizer(model, optax.sgd(0.1), wrt=nnx.Param), "ema": (model, 3)})

  with ckpt.Checkpointer(tmp_path) as c:
    c.save(0, pair(0))
    c.wait()
    model, rest = c.restore(like=pair(1)).state
  assert rest["optimizer"].model is model and rest["ema"] == (model, 3)
  assert np.array_equal(model.first.kernel[...], pair(0)[0].first.kernel[...])


def test_one_array_in_two_variables_does_not_tie_them(tmp_path, assert_same):
  array = jnp.arange(3.0)
  state = {"one": nnx.Param(array), "other": nnx.Param(array), "alike": (1, 1)}
  assert shared_nodes(state) == []
  with ckpt.Checkpointer(tmp_path) as c:
    c.save(0, state)
    c.wait()
    restored = c.restore(like=state).state
  assert_same(restored, state)
  assert restored["one"] is not restored["other"]


def test_names_of_nodes_shared_within_shared_nodes_are_followed_to_the_stored_one():
  shared = [("a", "b/a"), ("a/x", "c/x"), ("c", "d")]
  found = other_names(["a/x/value", "a/y", "b/a/x/value", "b/a/y", "c/x/value", "c/z", "d/x/value", "d/z", "e"], shared)
  assert found == {
    "b/a/x/value": "a/x/value",
    "b/a/y": "a/y",
    "c/x/value": "a/x/value",
    "d/x/value": "a/x/value",
    "d/z": "c/z",
  }
  assert reunited({"a": 1}, shared) == {"a": 1}
