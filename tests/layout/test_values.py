"""Values that `like` asks for in another form: 64 bits, Python numbers, PRNG keys. Never another value, nor damage."""

import contextlib
import random

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import ckpt_jax as ckpt
from ckpt_jax.storage import look

# -- 64 bits

WIDE = {
  "i": np.array([2**40 + 5, -1]),
  "u": np.array([2**64 - 1], np.uint64),
  "f": np.array([1e300, 1 / 3]),
  "c": np.array([1e300j]),
}


@pytest.fixture(scope="module", params=["off", "on"])
def wide(request, tmp_path_factory):
  """A run that was saved with x64 on, packed or not."""
  run = tmp_path_factory.mktemp("wide")
  with jax.enable_x64(True), ckpt.Checkpointer(run, {"layout": {"pack": request.param}}) as c:
    for step in range(2):
      c.save(step, {name: jnp.asarray(x) for name, x in WIDE.items()})
  return run


def shapes(dtypes=None, sharding=None):
  return {n: jax.ShapeDtypeStruct(x.shape, (dtypes or {}).get(n, x.dtype), sharding=sharding) for n, x in WIDE.items()}


@pytest.mark.parametrize("place", ["nowhere", "a device", "a mesh"])
def test_64_bits_are_never_cut_to_32_without_a_word(place, wide):
  sharding = {
    "nowhere": None,
    "a device": jax.sharding.SingleDeviceSharding(jax.devices()[1]),
    "a mesh": NamedSharding(jax.make_mesh((2,), ("x",)), P()),
  }[place]
  with ckpt.Checkpointer(wide) as c:
    for options in ({}, {"strategy": "gather"}, {"cast": True}):
      with pytest.raises(ckpt.StructureMismatchError, match=r"i: like has int64\[2\], .*jax_enable_x64") as e:
        c.restore(like=shapes(sharding=sharding), **options)
      assert all(f"  {name}: " in str(e.value) for name in WIDE)
    half = {"f": jax.ShapeDtypeStruct((2,), jnp.float32, sharding=sharding)}
    with pytest.raises(ckpt.StructureMismatchError, match="f: saved as float64"):
      c.restore(like=half, only="f")
    with pytest.raises(ckpt.CheckpointError, match="f: holds values that float32 cannot"):
      c.restore(like=half, only="f", cast=True)
    with pytest.raises(ckpt.CheckpointError, match="i: holds values that int32 cannot"):
      c.restore(like={"i": jax.ShapeDtypeStruct((2,), jnp.int32, sharding=sharding)}, only="i", cast=True)
    with pytest.raises(ckpt.StructureMismatchError, match=r"new: like has float64\[3\]"):
      more = WIDE | {"new": jax.ShapeDtypeStruct((3,), np.float64, sharding=sharding)}
      c.restore(like=more, init_missing={"new": lambda path, leaf: np.zeros(3)})
    assert [s.step for s in c.steps()] == [0, 1]


def test_numpy_and_jax_with_x64_hold_all_64_bits(wide, assert_same):
  with ckpt.Checkpointer(wide) as c:
    assert_same(c.restore().state, WIDE)
    assert_same(c.restore(like=WIDE).state, WIDE)
    with jax.enable_x64(True):
      mesh = jax.make_mesh((2,), ("x",))
      for sharding in (None, jax.sharding.SingleDeviceSharding(jax.devices()[1]), NamedSharding(mesh, P())):
        restored = c.restore(like=shapes(sharding=sharding))
        assert_same(restored.state, {name: jnp.asarray(x) for name, x in WIDE.items()})
        assert restored.step == 1 and restored.report.verified == len(WIDE)


def test_cast_to_32_bits_where_the_values_allow_it(tmp_path):
  spread = NamedSharding(jax.make_mesh((2,), ("x",)), P("x"))
  values = {"i": np.array([2**31 - 1, -5]), "f": np.array([1 / 3, -0.0])}
  with jax.enable_x64(True), ckpt.Checkpointer(tmp_path) as c:
    c.save(0, {name: jax.device_put(jnp.asarray(x), spread) for name, x in values.items()})
  like = {n: jax.ShapeDtypeStruct((2,), d, sharding=spread) for n, d in (("i", jnp.int32), ("f", jnp.float32))}
  with ckpt.Checkpointer(tmp_path) as c:
    restored = c.restore(like=like, cast=True)
  assert restored.report.verified == 2
  for name, x in values.items():
    got = restored.state[name]
    assert got.sharding == spread and np.asarray(got).tobytes() == x.astype(like[name].dtype).tobytes()


@pytest.mark.parametrize("pack", ["on", "off"])
def test_integers_of_less_than_a_byte_are_cast_among_each_other_and_the_rest(pack, tmp_path):
  dtypes = ("int4", "uint4", "int8", "uint8", "int32")
  with ckpt.Checkpointer(tmp_path, {"layout": {"pack": pack}}) as c:
    c.save(0, {d: jnp.arange(8).astype(d) for d in dtypes})
    for new in dtypes:
      got = c.restore(like={d: jax.ShapeDtypeStruct((8,), new) for d in dtypes}, cast=True).state
      assert all(x.dtype == new and x.astype(int).tolist() == list(range(8)) for x in got.values())


# -- numbers

NUMBERS = {"lr": 0.1, "huge": 1e300, "big": 2**40, "z": 1e300j, "flag": True}


@contextlib.contextmanager
def numbers(tmp_path, state, config=None):
  with ckpt.Checkpointer(tmp_path, config) as c:
    for step in range(2):
      c.save(step, state)
    c.wait()
    yield c
    assert [s.step for s in c.steps()] == [0, 1], "a step that is sound was put aside"


@pytest.mark.parametrize("pack", ["on", "off"])
def test_python_numbers_become_the_arrays_that_eval_shape_makes_of_them(pack, tmp_path):
  state = {"lr": 0.1, "n": 7, "flag": True, "z": 0.1 + 2j, "w": jnp.ones(3)}
  with ckpt.Checkpointer(tmp_path, {"layout": {"pack": pack}}) as c:
    c.save(0, state | {"lr": 0.5})
    c.save(1, state)
    restored = c.restore(like=jax.eval_shape(lambda: state))
    assert restored.step == 1 and restored.report.verified == 5 and not restored.report.quarantined
    for name, number in state.items():
      want = jnp.asarray(number)
      got = restored.state[name]
      assert (got.dtype, got.weak_type, got.tolist()) == (want.dtype, want.weak_type, want.tolist())


@pytest.mark.parametrize(
  ("name", "like"),
  [
    ("huge", jax.ShapeDtypeStruct((), jnp.float32)),
    ("huge", jnp.float32(0)),
    ("huge", np.float32(0)),
    ("huge", np.zeros((), np.float16)),
    ("huge", jax.ShapeDtypeStruct((), jnp.bfloat16, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]))),
    ("big", jax.ShapeDtypeStruct((), jnp.int32)),
    ("big", np.int32(0)),
    ("big", np.zeros((), np.uint8)),
    ("z", jax.ShapeDtypeStruct((), jnp.complex64)),
    ("z", np.complex64(0)),
  ],
  ids=lambda x: x if isinstance(x, str) else f"{type(x).__name__}-{x.dtype}",
)
def test_number_that_the_dtype_of_like_cannot_hold_is_an_error_by_leaf(name, like, tmp_path):
  with (
    numbers(tmp_path, NUMBERS) as c,
    pytest.raises(ckpt.StructureMismatchError, match=f"{name}: saved as the number"),
  ):
    c.restore(like=NUMBERS | {name: like})


def test_bool_is_no_complex_number(tmp_path):
  with numbers(tmp_path, NUMBERS) as c, pytest.raises(ckpt.StructureMismatchError, match="flag: saved as bool"):
    c.restore(like=NUMBERS | {"flag": jax.ShapeDtypeStruct((), jnp.complex64)})


def test_array_of_one_number_becomes_the_python_number_of_like(tmp_path):
  with numbers(tmp_path, {"lr": jnp.float32(0.1), "n": jnp.int32(5), "f": np.float64(0.1)}) as c:
    got = c.restore(like={"lr": 0.0, "n": 0, "f": 0.0})
    assert got.state == {"lr": float(np.float32(0.1)), "n": 5, "f": 0.1} and got.report.verified == 3


# -- PRNG keys


@pytest.mark.parametrize(
  ("impl", "shape"), [("threefry2x32", ()), ("threefry2x32", (3,)), ("rbg", ()), ("unsafe_rbg", ())]
)
def test_raw_key_becomes_the_typed_key_of_like_with_the_same_bits(impl, shape, tmp_path):
  typed = jax.random.split(jax.random.key(3, impl=impl), 3) if shape else jax.random.key(3, impl=impl)
  with numbers(tmp_path, {"key": jax.random.key_data(typed)}) as c:
    for like in (typed, jax.ShapeDtypeStruct(typed.shape, typed.dtype)):
      restored = c.restore(like={"key": like})
      got = restored.state["key"]
      assert restored.step == 1 and restored.report.verified == 1 and got.dtype == typed.dtype
      assert jax.random.key_data(got).tolist() == jax.random.key_data(typed).tolist()


def test_keys_of_another_kind_are_an_error_by_leaf(tmp_path):
  with numbers(tmp_path, {"key": jax.random.key(0), "raw": jax.random.PRNGKey(0)}) as c:
    for name, like in (
      ("key", jax.random.PRNGKey(0)),
      ("key", jax.random.key(0, impl="rbg")),
      ("raw", jax.random.key(0, impl="rbg")),
      ("raw", jax.random.split(jax.random.key(0))),
      ("key", jax.ShapeDtypeStruct((), jnp.uint32)),
    ):
      with pytest.raises(ckpt.StructureMismatchError, match=f"{name}: saved as .*, asked for"):
        c.restore(like={"key": jax.random.key(0), "raw": jax.random.PRNGKey(0)} | {name: like})


def test_typed_key_that_plain_orbax_saved_is_restored_by_its_kind_in_like(tmp_path):
  key = jax.random.key(3, impl="rbg")
  with ocp.CheckpointManager(tmp_path) as plain:
    plain.save(0, args=ocp.args.PyTreeSave({"key": key}))
  with ckpt.Checkpointer(tmp_path) as c:
    got = c.restore(like={"key": jax.ShapeDtypeStruct((), key.dtype)}).state["key"]
  assert got.dtype == key.dtype and jax.random.key_data(got).tolist() == jax.random.key_data(key).tolist()


# -- any leaf, asked for as any other

SAVED = {
  "bool": True,
  "int": 2**40,
  "float": 1e300,
  "complex": 1 + 2j,
  "text": "hi",
  "numpy_float": np.float64(0.1),
  "numpy_int": np.uint64(2**63 + 5),
  "numpy": np.arange(4),
  "numpy_0d": np.array(3),
  "array": jnp.arange(4.0),
  "words": jnp.arange(4),
  "scalar": jnp.int32(3),
  "weak": jnp.asarray(0.5),
  "half": jnp.ones(2, jnp.bfloat16),
  "nibbles": jnp.ones(4, jnp.uint4),
  "key": jax.random.key(0),
  "raw": jax.random.PRNGKey(0),
  "keys": jax.random.split(jax.random.key(0)),
  "empty": jnp.zeros((0, 3)),
}
ASKED = [
  *SAVED.values(),
  *(np.dtype(d).type(0) for d in ("float32", "int8", "complex64")),
  *(
    jax.ShapeDtypeStruct(shape, jnp.dtype(d), sharding=place)
    for d in ("bool", "int32", "int64", "float16", "float32", "float64", "complex64", "uint4")
    for shape in ((), (4,))
    for place in (None, NamedSharding(jax.make_mesh((2,), ("x",)), P()))
  ),
  *(jax.ShapeDtypeStruct(k.shape, k.dtype) for k in (jax.random.key(0), jax.random.key(0, impl="rbg"))),
]


@pytest.mark.parametrize("pack", ["on", "off"])
def test_any_leaf_comes_back_as_like_asks_or_is_refused_by_name_and_no_step_is_put_aside(pack, tmp_path, monkeypatch):
  monkeypatch.setattr(look, "_LOOKS", 1)  # an error is waited upon for a quarter of a second: the step may be vanishing
  pairs = [(name, like, cast) for name in SAVED for like in ASKED for cast in (None, True)]
  kinds = set()
  with numbers(tmp_path, SAVED, {"layout": {"pack": pack}}) as c:
    for name, like, cast in random.Random(pack).sample(pairs, 70):
      cast = cast if hasattr(like, "dtype") else None
      try:
        restored = c.restore(like={name: like}, only=name, cast=cast)
      except ckpt.CheckpointError as e:
        assert not isinstance(e, ckpt.CorruptCheckpointError) and name in str(e), (name, like, e)
        kinds.add(type(e))
        continue
      got = restored.state[name]
      kinds.add(None)
      assert restored.step == 1 and restored.report.verified == 1, (name, like)
      if isinstance(like, (jax.Array, jax.ShapeDtypeStruct)):
        assert isinstance(got, jax.Array) and (got.shape, got.dtype) == (like.shape, like.dtype), (name, like)
        if getattr(like, "committed", like.sharding is not None):
          assert got.sharding == like.sharding, (name, like)
      else:
        assert type(got) is type(like) and getattr(got, "dtype", 0) == getattr(like, "dtype", 0), (name, like)
      assert np.allclose(values(got), values(SAVED[name]), rtol=1e-2), (name, like, got)
  assert kinds >= {None, ckpt.StructureMismatchError}


def values(leaf):
  if isinstance(leaf, str):
    return [ord(letter) for letter in leaf]
  is_key = hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
  return np.asarray(jax.random.key_data(leaf) if is_key else leaf).astype(complex)
