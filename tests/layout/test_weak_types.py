"""What comes back promotes as what was saved did, and no program is compiled anew for it."""

import contextlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import ckpt_jax as ckpt
from ckpt_jax.orbax import private
from ckpt_jax.run.checksums import with_digest

ADAM = optax.inject_hyperparams(optax.adam)(learning_rate=1e-3)
ADAMW = optax.adamw(1e-3)
WEIGHTS = {"w": np.arange(16.0, dtype=np.float32).reshape(4, 4), "b": np.ones(4, jnp.bfloat16)}


@pytest.fixture(autouse=True)
def types_promoted_as_jax_does_by_default():
  """Weak types are about nothing else; the tests around are strict."""
  with jax.numpy_dtype_promotion("standard"):
    yield


def init():
  params = jax.tree.map(jnp.asarray, WEIGHTS)
  scalars = {"step": 0, "lr": jnp.asarray(0.1), "n": jnp.int32(3), "flag": jnp.asarray(True), "half": 0.5}
  return {"params": params, "opt": ADAM.init(params), "key": jax.random.key(1), **scalars}


def train(state):
  gradients = jax.tree.map(lambda x: x * 0.1, state["params"])
  updates, opt = ADAM.update(gradients, state["opt"], state["params"])
  return {
    "params": jax.tree.map(lambda p, u: (p - u * state["lr"]).astype(p.dtype), state["params"], updates),
    "opt": jax.tree.map(lambda new, old: new.astype(old.dtype), opt, state["opt"]),
    "key": jax.random.split(state["key"])[0],
    **{name: state[name] * 2 for name in ("step", "lr", "n", "half")},
    "flag": ~state["flag"],
  }


def flax_init():
  return TrainState.create(apply_fn=len, params=jax.tree.map(jnp.asarray, WEIGHTS), tx=ADAMW)


def flax_train(state):
  return state.apply_gradients(grads=jax.tree.map(lambda x: x * 0.1, state.params))


def spread(mesh):
  return lambda: jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, P("x") if np.ndim(x) else P())), init())


def explicit():
  return jax.make_mesh((2,), ("x",), axis_types=(AxisType.Explicit,))


CASES = {
  "eager": (init, train, None),
  "jit": (lambda: jax.jit(init)(), train, None),
  "flax": (flax_init, flax_train, None),
  "on a mesh": (spread(jax.make_mesh((2,), ("x",))), train, None),
  "on another device": (lambda: jax.device_put(init(), jax.devices()[1]), train, None),
  "under a mesh": (init, train, explicit),
}


@contextlib.contextmanager
def compilations():
  """Counts the programs that are compiled meanwhile."""
  found = []

  def listen(event, seconds, **_):
    if event == "/jax/core/compile/backend_compile_duration":
      found.append(seconds)

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    yield found
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize("pack", ["on", "off"])
@pytest.mark.parametrize("case", CASES)
def test_step_goes_on_after_a_restore_without_being_compiled_again(case, pack, tmp_path, assert_same):
  make, function, mesh = CASES[case]
  with jax.set_mesh(mesh()) if mesh else contextlib.nullcontext():
    step = jax.jit(lambda state: function(state))
    for steps in (0, 1):
      saved = make()
      for _ in range(steps):
        saved = step(saved)
      on = step(step(saved))
      with ckpt.Checkpointer(tmp_path / str(steps), {"layout": {"pack": pack}}) as c:
        c.save(0, saved)
        for restored in (c.restore_or_init(make).state, c.restore(like=saved).state):
          with compilations() as found:
            got = step(step(restored))
          assert not found
          assert_same(got, on)


def test_compilations_are_counted():
  with compilations() as found:
    jax.jit(lambda x: x * 3 - 1)(jnp.ones(7))
  assert found


def described(state):
  return jax.tree.map(lambda x: (str(x.dtype), x.weak_type, x.tolist()), state)


def test_weak_types_are_what_was_saved_whatever_like_says(tmp_path):
  saved = {"weak": jnp.asarray(0.1), "strong": jnp.float32(0.1), "array": jnp.full((3,), 2.0) * jnp.asarray(1j).real}
  saved["array"] = jnp.broadcast_to(jnp.asarray(0.25), (3,))
  assert [x.weak_type for x in saved.values()] == [True, False, True]
  turned = {n: jax.ShapeDtypeStruct(x.shape, x.dtype, weak_type=not x.weak_type) for n, x in saved.items()}
  mesh = NamedSharding(jax.make_mesh((2,), ("x",)), P())
  placed = {n: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=mesh) for n, x in saved.items()}
  with ckpt.Checkpointer(tmp_path) as c:
    c.save(0, saved)
    for like in (saved, turned, placed):
      assert described(c.restore(like=like).state) == described(saved)
    assert c.restore(like=placed).state["weak"].sharding == mesh
    assert all(type(x) is np.ndarray for x in c.restore().state.values())


def test_a_weakly_typed_array_keeps_every_bit(tmp_path):
  odd = np.array([0x7FC00123, 0x7F800001, 0x80000000, 1], np.uint32).view(np.float32)
  weak = private.array_as(jax.device_put(odd), weak=True, committed=False)
  assert weak.weak_type and (weak * jnp.bfloat16(1)).dtype == jnp.bfloat16
  with ckpt.Checkpointer(tmp_path, ckpt.Config(health={"nonfinite": "ignore"})) as c:
    c.save(0, {"x": weak})
    got = c.restore_or_init(lambda: {"x": weak}).state["x"]
  assert got.weak_type and np.asarray(got).tobytes() == odd.tobytes()


def test_steps_that_say_nothing_of_weak_types_are_restored_as_like_says(tmp_path):
  saved = {"weak": jnp.asarray(0.1), "strong": jnp.float32(0.1), "number": 0.5}
  with ocp.CheckpointManager(tmp_path / "orbax") as plain:
    plain.save(0, args=ocp.args.PyTreeSave(saved))
  with ckpt.Checkpointer(tmp_path / "older") as c:
    c.save(0, saved)
  file = tmp_path / "older" / "0" / "_CHECKPOINT_METADATA"
  metadata = json.loads(file.read_text())
  ours = metadata["custom_metadata"]["ckpt_jax"]
  assert ours.pop("weak") == ["weak"]  # as versions before this wrote it
  metadata["custom_metadata"]["ckpt_jax"] = with_digest(ours)
  file.write_text(json.dumps(metadata))
  weak = {"weak": True, "strong": False, "number": False}
  like = {name: jax.ShapeDtypeStruct((), jnp.float32, weak_type=is_weak) for name, is_weak in weak.items()}
  for run in ("orbax", "older"):
    with ckpt.Checkpointer(tmp_path / run) as c:
      got = c.restore(like=like).state
    assert {name: x.weak_type for name, x in got.items()} == weak


def test_plain_orbax_reads_a_step_with_weak_types(tmp_path, assert_same):
  with ckpt.Checkpointer(tmp_path) as c:
    c.save(0, {"weak": jnp.asarray(0.1)})
  with ocp.CheckpointManager(tmp_path, item_handlers=ocp.PyTreeCheckpointHandler()) as plain:
    got = plain.restore(0)
  assert np.asarray(got["weak"]) == np.float32(0.1)
