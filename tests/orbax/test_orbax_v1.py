"""Orbax v1 (`orbax.checkpoint.v1`) and ckpt_jax read each other's runs: its Checkpointer calls the state `state`."""

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from orbax.checkpoint import v1
from typer.testing import CliRunner

import ckpt_jax as ckpt
from ckpt_jax.cli.app import app
from ckpt_jax.errors import NotARunError
from ckpt_jax.inference.convert import convert


def state(value=0):
  return {
    "w": jnp.arange(6.0).reshape(2, 3) + value,
    "layers": [jnp.full(3, value, jnp.bfloat16), {"n": jnp.int32(value)}],
    "mask": jnp.array([True, False]),
  }


LIKE = jax.eval_shape(state)


def assert_bitwise(found, want):
  assert jax.tree.structure(found) == jax.tree.structure(want)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
    assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_v1_reads_our_steps_by_path_and_through_its_checkpointer_by_the_items_name(tmp_path):
  with ckpt.Checkpointer(tmp_path) as c:
    c.save(3, state(3), metrics={"loss": 0.5})
  assert_bitwise(v1.load(tmp_path / "3", LIKE), state(3))
  with v1.training.Checkpointer(tmp_path) as theirs:
    assert theirs.latest.step == 3 and theirs.latest.metrics == {"loss": 0.5}
    assert_bitwise(theirs.load(3, LIKE, checkpointable_name="default"), state(3))
    with pytest.raises(KeyError, match="state"):  # why README names `checkpointable_name` and `item`
      theirs.load(3, LIKE)
  with ocp.CheckpointManager(tmp_path) as manager:
    assert_bitwise(manager.restore(3, args=ocp.args.PyTreeRestore(state())), state(3))


def test_steps_saved_as_item_state_are_what_v1s_checkpointer_asks_for(tmp_path):
  with ckpt.Checkpointer(tmp_path, {"item": "state"}) as c:
    c.save(3, state(3), metrics={"loss": 0.5})
  with v1.training.Checkpointer(tmp_path) as theirs:
    assert_bitwise(theirs.load(abstract_state=LIKE), state(3))
    theirs.save(4, state(4))
  with ckpt.Checkpointer(tmp_path) as c:
    assert_bitwise(c.restore(3, like=LIKE).state, state(3))
    assert c.restore_or_init(state).next_step == 5
  assert ckpt.verify(tmp_path) == []
  with ocp.CheckpointManager(tmp_path) as manager:
    found = manager.restore(3, args=ocp.args.Composite(state=ocp.args.PyTreeRestore(state())))
  assert_bitwise(found["state"], state(3))


def test_a_run_of_v1_is_resumed_and_goes_on_so_that_v1_reads_all_of_it(tmp_path):
  with v1.training.Checkpointer(tmp_path) as theirs:
    theirs.save(3, state(3), metrics={"loss": 0.5})
  with ckpt.Checkpointer(tmp_path) as c:
    assert c.steps()[0].metrics == {"loss": 0.5}
    restored = c.restore_or_init(state)
    assert_bitwise(restored.state, state(3))
    assert c.save(restored.next_step, state(4))
    c.wait()
    assert c.restore(4).report.verified == len(jax.tree.leaves(LIKE))
  with v1.training.Checkpointer(tmp_path) as theirs:
    assert_bitwise(theirs.load(abstract_state=LIKE), state(4))
    theirs.save_checkpointables(5, {"model": state(5), "opt": {"m": jnp.ones(2)}})
  assert ckpt.verify(tmp_path) == []
  with ckpt.Checkpointer(tmp_path) as c:
    assert_bitwise(c.restore(5, item="model", like=LIKE).state, state(5))
    assert_bitwise(c.restore_or_init(state).state, state(5))  # only model has these leaves
  code = CliRunner().invoke(app, ["show", str(tmp_path), "5", "--item", "opt"])
  assert code.exit_code == 0 and "opt" in code.stdout


def test_what_v1_saves_without_a_step_number_is_named_and_converted(tmp_path):
  v1.save(tmp_path / "one", state(3))
  with pytest.raises(NotARunError, match="ckpt-jax convert"):
    ckpt.Checkpointer(tmp_path / "one")
  assert [one.step for one in convert(tmp_path / "one", tmp_path / "run", step=7)] == [7]
  with ckpt.Checkpointer(tmp_path / "run") as c:
    assert_bitwise(c.restore_or_init(state).state, state(3))
