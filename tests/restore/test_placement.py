"""Where `like` wants leaves: meshes of jax.set_mesh, shardings that do not fit, dtypes that jax cannot hold."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import ckpt_jax as ckpt
from ckpt_jax.layout.sharding import abstract_state

KINDS = (AxisType.Auto, AxisType.Explicit)


def mesh_of(kind, shape=(2,), names=("x",)):
  return jax.make_mesh(shape, names, axis_types=(kind,) * len(shape))


def linear():
  init = nnx.with_partitioning(nnx.initializers.normal(), (None, "x"))
  return nnx.state(nnx.Linear(4, 6, rngs=nnx.Rngs(0), kernel_init=init))


def mapped():
  return {"w": jax.shard_map(lambda: jnp.ones((2, 3)), in_specs=(), out_specs=P("x"))(), "lr": jnp.asarray(0.5)}


def mixed():
  return {
    "w": jax.device_put(jnp.arange(8.0).reshape(4, 2), P("x")),
    "plain": jnp.ones((3, 3)),
    "key": jax.random.key(1),
    "count": jnp.int32(4),
    "lr": 0.5,
  }


def shardings(state):
  return [x.sharding for x in jax.tree.leaves(state) if isinstance(x, jax.Array)]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_shapes_taken_under_a_mesh_bring_every_leaf_back_where_they_say(kind, tmp_path, assert_same):
  mesh = mesh_of(kind)
  with jax.set_mesh(mesh):
    for i, make in enumerate((linear, mapped, mixed)):
      like = nnx.state(nnx.eval_shape(lambda: linear())) if make is linear else jax.eval_shape(make)
      with ckpt.Checkpointer(tmp_path / str(i)) as c:
        state = jax.jit(make)()
        c.save(0, state)
        got = c.restore(like=like).state
        assert_same(got, state)
        for wanted, leaf in zip(jax.tree.leaves(like), jax.tree.leaves(got), strict=True):
          spec = P() if wanted.sharding is None else wanted.sharding.spec
          assert leaf.sharding == NamedSharding(mesh, spec)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_restore_or_init_under_a_mesh_places_leaves_as_init_does(kind, tmp_path, assert_same):
  with jax.set_mesh(mesh_of(kind)):
    for i, make in enumerate((linear, mapped, mixed, jax.jit(mixed))):
      with ckpt.Checkpointer(tmp_path / str(i)) as c:
        state = make()
        c.save(0, state)
        got = c.restore_or_init(make).state
        assert_same(got, state)
        assert shardings(got) == shardings(state)


def test_abstract_state_knows_where_shard_map_puts_its_results():
  mesh = mesh_of(AxisType.Auto)
  make = jax.shard_map(lambda: jnp.ones((2, 3)), mesh=mesh, in_specs=(), out_specs=P("x"))
  built = []
  found = abstract_state(lambda: built.append(1) or {"w": make()})
  assert found["w"].sharding == make().sharding and built == [1]  # traced, and not run


def test_abstract_mesh_without_devices_is_an_error_that_says_what_to_do(tmp_path):
  with jax.set_mesh(mesh_of(AxisType.Explicit)):
    like = jax.eval_shape(mapped)
    state = mapped()
  with ckpt.Checkpointer(tmp_path) as c:
    c.save(0, state)
    with pytest.raises(ckpt.StructureMismatchError, match=r"^w: .*abstract mesh \{'x': 2\}, and no mesh.*jax.set_mesh"):
      c.restore(like=like)
    with (
      jax.set_mesh(mesh_of(AxisType.Explicit, (1, 2), ("a", "b"))),
      pytest.raises(ckpt.StructureMismatchError, match=r"^w: .*the mesh in force is \{'a': 1, 'b': 2\}"),
    ):
      c.restore(like=like)
    assert [s.step for s in c.steps()] == [0]


@pytest.mark.parametrize(
  ("shape", "spec", "message"),
  [
    ((7,), P("x"), r"w: like's sharding P\('x',\) over the mesh \{'x': 2\} cuts axis 0 of \[7\] into 2 parts"),
    ((4, 5), P(None, "x"), r"w: like's sharding .* cuts axis 1 of \[4, 5\] into 2 parts"),
    ((4,), P(None, "x"), r"w: like's sharding .* is for 2 axes, and the shape \[4\] has 1"),
    ((), P("x"), r"w: like's sharding .* is for 1 axes, and the shape \[\] has 0"),
  ],
)
@pytest.mark.parametrize("pack", ["on", "off"])
def test_sharding_that_does_not_fit_a_leaf_is_reported_and_nothing_is_moved(shape, spec, message, pack, tmp_path):
  sharding = NamedSharding(mesh_of(AxisType.Auto), spec)
  with ckpt.Checkpointer(tmp_path, {"layout": {"pack": pack}}) as c:
    for step in range(2):
      c.save(step, {"w": jnp.ones(shape), "number": 1.5})
    c.wait()
    for dtype, cast in ((jnp.float32, False), (jnp.bfloat16, True)):
      # jax's own ShapeDtypeStruct refuses a sharding with too many axes; other descriptions of arrays do not.
      described = types.SimpleNamespace(shape=shape, dtype=np.dtype(dtype), sharding=sharding)
      with pytest.raises(ckpt.StructureMismatchError, match=message):
        c.restore(like={"w": described, "number": 1.5}, cast=cast)
    assert [s.step for s in c.steps()] == [0, 1]


def test_sharding_of_a_leaf_that_only_leaves_out_does_not_matter(tmp_path):
  sharding = NamedSharding(mesh_of(AxisType.Auto), P("x"))
  with ckpt.Checkpointer(tmp_path) as c:
    c.save(0, {"a": jnp.ones(4), "b": jnp.ones(7)})
    like = {name: jax.ShapeDtypeStruct((n,), jnp.float32, sharding=sharding) for name, n in (("a", 4), ("b", 7))}
    assert c.restore(like=like, only="a").state["a"].sharding == sharding


def test_orbax_own_description_of_a_step_serves_as_like(tmp_path, assert_same):
  spread = NamedSharding(mesh_of(AxisType.Auto), P("x"))
  state = {"w": jax.device_put(jnp.arange(4.0), spread)}
  with ocp.CheckpointManager(tmp_path, item_handlers=ocp.PyTreeCheckpointHandler()) as plain:
    plain.save(0, args=ocp.args.PyTreeSave(state))
    plain.wait_until_finished()
    like = plain.item_metadata(0).tree
  with ckpt.Checkpointer(tmp_path) as c:
    got = c.restore(like=like).state
  assert_same(got, state)
  assert got["w"].sharding == spread


def test_mesh_of_a_concrete_sharding_is_left_alone(tmp_path):
  other = NamedSharding(Mesh(np.array(jax.devices())[::-1].reshape(1, 2), ("a", "b")), P(None, "b"))
  with ckpt.Checkpointer(tmp_path) as c, jax.set_mesh(mesh_of(AxisType.Auto)):
    c.save(0, {"w": jnp.ones((2, 4))})
    got = c.restore(like={"w": jax.ShapeDtypeStruct((2, 4), jnp.float32, sharding=other)}).state["w"]
  assert got.sharding == other
