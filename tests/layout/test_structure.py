"""What is known of a state apart from its values is worked out once, and never for another state."""

import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import ckpt_jax as ckpt
from ckpt_jax.layout.sharding import global_nbytes, local_nbytes
from ckpt_jax.layout.structure import flatten


def state(value=0.0, shape=(4, 6), dtype=jnp.float32):
  return {"a": [jnp.full(shape, value, dtype), {"b": np.full(3, value)}], "key": jax.random.key(1), "n": 3}


def test_states_of_one_structure_share_it_and_others_do_not():
  flat = flatten(state())
  first, leaves = flat.structure, flat.leaves
  assert flatten(flat) is flat and flatten(state(7.0)).structure is first
  assert first.names == ["a/0", "a/1/b", "key", "n"] and leaves[-1] == 3
  mesh = jax.make_mesh((2,), ("x",))
  other = state()
  other["a"][0] = jax.device_put(other["a"][0], NamedSharding(mesh, P("x")))
  changed = [state(shape=(6, 4)), state(dtype=jnp.bfloat16), {**state(), "n": 3.0}, {**state(), "m": 1}, other]
  changed.append({**state(), "key": jax.random.key(1, impl="rbg")})
  changed.append(state() | {"a": tuple(state()["a"])})
  assert len({id(flatten(s).structure) for s in [state(), *changed]}) == 1 + len(changed)


def test_a_question_is_asked_once_and_an_error_is_no_answer():
  flat = flatten({"x": jnp.zeros(3)})
  structure, leaves = flat.structure, flat.leaves
  asked = []

  def count(values):
    asked.append(len(values))
    return len(values)

  assert structure.once(count, leaves) == structure.once(count, leaves) == 1 and asked == [1]

  def fails():
    asked.append("failed")
    raise ValueError

  for _ in range(2):
    with pytest.raises(ValueError):
      structure.once(fails)
  assert asked == [1, "failed", "failed"]


def test_a_remembered_structure_keeps_no_array_alive(tmp_path):
  x = jnp.arange(1000.0)
  with ckpt.Checkpointer(tmp_path, {"layout": {"pack": "on"}}) as c:
    c.save(0, {"x": x, "y": x + 1, "none": None, "nothing": {}})
    c.wait()
  ref = weakref.ref(x)
  del x
  gc.collect()
  assert ref() is None


def test_what_hangs_on_values_is_looked_at_in_every_save(tmp_path):
  with ckpt.Checkpointer(tmp_path) as c:
    for step, n in enumerate((1, 2**62)):
      c.save(step, {"n": n, "x": np.full(3, step), "text": "é" * step})
    with pytest.raises(ckpt.CheckpointError, match=r"n: the integer \S+ needs more than 64 bits"):
      c.save(2, {"n": 2**64, "x": np.zeros(3, np.int64), "text": ""})
    assert c.restore(0).state["n"] == 1
    found = c.restore(1).state
  assert found["n"] == 2**62 and found["text"] == "é" and found["x"].tolist() == [1, 1, 1]


def test_sizes_are_those_of_the_state_at_hand():
  mesh = jax.make_mesh((2,), ("x",))
  for n in (4, 8):
    x = jax.device_put(jnp.zeros((n, 3)), NamedSharding(mesh, P("x")))
    twice = jax.device_put(jnp.zeros(n), NamedSharding(mesh, P()))
    held = {"x": x, "twice": twice, "host": np.zeros(n), "step": 1}
    assert global_nbytes(held) == local_nbytes(held) == 12 * n + 4 * n + 8 * n


class Interrupting:
  """Static data during whose comparison Ctrl-C comes."""

  def __hash__(self):
    return 0

  def __eq__(self, other):
    raise KeyboardInterrupt


def test_an_interrupt_while_structures_are_compared_is_not_lost():
  @jax.tree_util.register_pytree_node_class
  class Node:
    def __init__(self, child, static):
      self.child, self.static = child, static

    def tree_flatten(self):
      return (self.child,), self.static

    @classmethod
    def tree_unflatten(cls, static, children):
      return cls(*children, static)

  flatten(Node(1, Interrupting()))
  with pytest.raises(KeyboardInterrupt):
    flatten(Node(1, Interrupting()))
