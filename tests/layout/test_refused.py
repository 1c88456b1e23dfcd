"""What `save` refuses, by name and before a byte is written; leaves that TensorStore alone could not store."""

import collections
import contextlib
import enum
import functools
import gc
import re
import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from conftest import bits
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import ckpt_jax as ckpt
from ckpt_jax.layout import contents


class Color(enum.Enum):
  RED = 1


class Mode(enum.IntEnum):
  ON = 1


class Word(str):
  pass


class Special(np.ndarray):
  pass


def refused(tmp_path, state):
  """What `save` says of a state; nothing may have been written by then."""
  with warnings.catch_warnings(record=True) as seen, ckpt.Checkpointer(tmp_path) as c:
    warnings.simplefilter("always")
    with pytest.raises(ckpt.CheckpointError) as e:
      c.save(0, state)
    assert not isinstance(e.value, ckpt.SaveFailedError)
    assert c.save(1, {"w": jnp.ones(1)})  # and the next save is as if this one had not been
    c.wait()
    assert [s.step for s in c.steps()] == [1]
    gc.collect()
  assert not [w for w in seen if "never awaited" in str(w.message)]
  return str(e.value)


NAMES = {
  "joined with slashes": ({"a": {"b": 1}, "a/b": 2}, r"  a/b: is the name of \['a'\]\['b'\] and \['a/b'\]"),
  "joined with dots": ({"a": {"b": 1}, "a.b": 2}, r"is the name of \['a'\]\['b'\] and \['a.b'\]"),
  "text and number": ({"x": collections.OrderedDict([("0", 1), (0, 2)])}, r"  x/0: is the name of"),
  "leaf and node": ({"x": collections.OrderedDict([("0", 1), (0, {"y": 2})])}, r"  x/0: is the name of"),
  "node and node": ({"x": collections.OrderedDict([("0", {"z": 1}), (0, {"y": 2})])}, r"  x/0: is the name of"),
  "without order": ({"x": [{"0": 1, 0: 2}]}, r"  x/0: jax cannot order the keys .* int and str"),
  "up": ({"a": {"..": 1}}, r"  a/\.\.: the name '\.\.' leads out"),
  "nul": ({"a\0b": 1}, r"  a\\x00b: the name"),
  "no text": ({"\ud800": 1}, r"  \\ud800: the name '\\ud800' is no UTF-8 text"),
  "long": ({"k" * 60_001: 1}, r"  k+\.\.\.: its name has 60001 bytes"),
  "set": ({frozenset("ab"): 1}, "the text of the key frozenset.* is another one in each process"),
  "object": ({Color: 1, "s": {object(): 1}}, "jax cannot order"),
  "an object": ({"s": {(1, object()): 1}}, r"  s/\(1, <object .* is another one in each process"),
  "slab": ({"ckpt_jax": {"slab": [1]}}, r"  ckpt_jax/slab/0: .*what ckpt_jax calls the slabs"),
  "deep": (functools.reduce(lambda tree, _: [tree], range(201), 1), "nested 201 deep"),
  "nothing": ({}, "it is {}, without a leaf"),
  "none": (None, "it is None, without a leaf"),
  "no fields": (optax.EmptyState(), "without a leaf"),
}


@pytest.mark.parametrize("name", NAMES)
def test_names_that_no_checkpoint_can_hold_are_refused_before_a_byte_is_written(tmp_path, name):
  state, message = NAMES[name]
  assert re.search(message, refused(tmp_path, state), re.DOTALL)


# -- leaves


def donated():
  x = jnp.ones(3)
  jax.jit(lambda x: x + 1, donate_argnums=0)(x)
  return x


BAD = {
  "IntEnum": (lambda: Mode.ON, "a .*Mode, which would come back as int; save int"),
  "Enum": (lambda: Color.RED, "put it into extras="),
  "str subclass": (lambda: Word("a"), "would come back as str"),
  "numpy text": (lambda: np.str_("a"), "not numeric; put it into extras="),
  "surrogates": (lambda: "\udcff", "no Unicode"),
  "large int": (lambda: 2**64, "needs more than 64 bits"),
  "bytes": (lambda: b"a", "a builtins.bytes is no array or scalar"),
  "function": (lambda: jax.nn.relu, "a function .*eqx.filter"),
  "module": (lambda: eqx.nn.MLP(1, 1, 2, 1, key=jax.random.key(0)), "x/activation: a function .*eqx.filter"),
  "abstract": (lambda: jax.ShapeDtypeStruct((2,), "float32"), "ShapeDtypeStruct, which has no value"),
  "donated": (donated, "was donated or deleted. Save what the step function returned"),
  "longdouble": (lambda: np.zeros(2, np.longdouble), "save it as np.float64"),
  "complex longdouble": (lambda: np.clongdouble(1), "save it as np.complex128"),
  "complex of halves": (lambda: np.zeros(2, ml_dtypes.complex32), "dtype complex32 is none that"),
  "objects": (lambda: np.array([1, None]), "dtype object is not numeric"),
  "dates": (lambda: np.array(["2020"], "M8[s]"), "not numeric"),
  "records": (lambda: np.zeros(2, [("a", int)]), "not numeric"),
  "void": (lambda: np.zeros(2, "V1"), "not numeric; save np.frombuffer"),
  "float0": (lambda: np.zeros(2, jax.dtypes.float0), "not numeric; it has no values.*leave it out"),
  "strings": (lambda: np.array(["a"], np.dtypes.StringDType()), "not numeric"),
  "masked": (lambda: np.ma.masked_array([1.0, 2.0], [0, 1]), "save its .data and its .mask"),
  "subclass": (lambda: np.ones(2).view(Special), "a Special, which .*save np.asarray"),
  "swapped": (lambda: np.arange(3, dtype=">f4"), "the other byte order"),
}


@pytest.mark.parametrize("name", BAD)
def test_leaves_that_cannot_come_back_are_refused_by_name_with_the_way_out(tmp_path, name):
  leaf, message = BAD[name]
  said = refused(tmp_path, {"w": jnp.ones(1), "x": leaf()})
  assert re.search(message, said) and "\n  x" in said and "  w" not in said


def test_what_a_refusal_of_arrays_without_numbers_advises_works(tmp_path):
  records = np.array([(1.5, 2), (-0.0, 3)], [("a", "f4"), ("b", "i8")])
  dates = np.array(["2020-01-01", "NaT"], "M8[s]")
  raw, names = np.array([b"a", b"bcd"]), np.array(["é", "bc"])
  state = {
    "records": {name: records[name] for name in records.dtype.names},
    "dates": dates.view(np.int64),
    "raw": np.frombuffer(raw.tobytes(), np.uint8),
  }
  said = [refused(tmp_path / str(i), {"x": x}) for i, x in enumerate((records, dates, raw, names))]
  advised = ["{name: x[name] for name in x.dtype.names}", "x.view(np.int64)", "np.frombuffer(x.tobytes(), np.uint8)"]
  assert all(text in found for text, found in zip([*advised, "extras= as x.tolist()"], said, strict=True))
  assert ".view('<M8[s]') of" in said[1] and ".view('|S3') of" in said[2]
  with ckpt.Checkpointer(tmp_path / "run") as c:
    c.save(0, state, extras={"names": names.tolist()})
    c.wait()
    back = c.restore()
  assert all(back.state["records"][name].tobytes() == records[name].tobytes() for name in records.dtype.names)
  assert back.state["dates"].view("<M8[s]").tobytes() == dates.tobytes()
  assert (back.state["raw"].view("|S3") == raw).all() and (np.array(back.extras["names"]) == names).all()


def test_values_of_a_trace_are_refused_by_name(tmp_path):
  with ckpt.Checkpointer(tmp_path) as c:
    with pytest.raises(ckpt.CheckpointError, match=r"  x: a value that jax is tracing: save was called inside jit"):
      jax.jit(lambda x: c.save(0, {"w": 1, "x": x}))(jnp.ones(2))
    with pytest.raises(ckpt.CheckpointError, match=r"metrics\['loss'\] has no value"):
      jax.jit(lambda x: c.save(0, {"w": 1}, metrics={"loss": x}))(1.0)
    with pytest.raises(ckpt.CheckpointError, match=r"metrics\['loss'\] has no value"):
      c.save(0, {"w": 1}, metrics={"loss": _gone_number()})
    assert c.save(0, {"w": 1})


def _gone_number():
  x = jnp.ones(())
  x.delete()
  return x


def test_a_like_that_cannot_be_read_into_is_refused_by_name_and_a_donated_one_can(tmp_path):
  mlp = eqx.nn.MLP(1, 1, 2, 1, key=jax.random.key(0))
  with ckpt.Checkpointer(tmp_path) as c:
    c.save(0, eqx.filter(mlp, eqx.is_array))
    c.save(1, {"x": jnp.ones(3), "n": 1})
    c.wait()
    assert np.array_equal(c.restore(1, like={"x": donated(), "n": 0}).state["x"], jnp.ones(3))
    for like, message in (
      ({"x": jnp.ones(3), "n": Mode.ON}, "n: like has a Mode; pass"),
      ({"x": [{"0": 1, 0: 2}]}, "x/0: jax cannot order the keys of this dict"),
    ):
      with pytest.raises(ckpt.StructureMismatchError, match=message):
        c.restore(1, like=like)
      with pytest.raises(ckpt.StructureMismatchError, match=message):
        c.restore_or_init(lambda like=like: like)
    with pytest.raises(
      ckpt.StructureMismatchError, match="x: like has a value that jax is tracing: restore was called"
    ):
      jax.jit(lambda x: c.restore(1, like={"x": x, "n": 1}).state["x"])(jnp.ones(3))
    with pytest.raises(ckpt.StructureMismatchError, match=r"\n  activation: like has a function; .*eqx.filter"):
      c.restore(0, like=mlp)
    again = eqx.nn.MLP(1, 1, 2, 1, key=jax.random.key(1))
    for kept in (
      eqx.combine(c.restore(0, like=eqx.filter(again, eqx.is_array)).state, again),
      c.restore(0, like=again, init_missing=["activation", "final_activation"]).state,
    ):
      assert np.array_equal(kept(jnp.ones(1)), mlp(jnp.ones(1)))


def test_a_leaf_that_is_donated_later_is_named_and_the_next_state_saved(tmp_path):
  state = {"a": jnp.ones(3), "u": jnp.ones(2, jnp.uint4), "k": jax.random.key(0)}
  with ckpt.Checkpointer(tmp_path) as c:
    c.save(0, state)
    c.wait()
    for name in ("a", "u"):
      whole = dict(state)
      whole[name] = state[name] + 1
      jax.jit(lambda x: x + 1, donate_argnums=0)(whole[name])
      with pytest.raises(ckpt.CheckpointError, match=f"nothing was written:\n  {name}: was donated or deleted"):
        c.save(1, whole)
    c.save(1, state)
    c.wait()
    assert [s.step for s in c.steps()] == [0, 1]


@pytest.mark.parametrize("pack", ["off", "on"])
def test_dtypes_that_tensorstore_lacks_come_back_bit_by_bit_wherever_they_are(tmp_path, pack, assert_same):
  mesh = jax.make_mesh((2,), ("x",))
  every = np.arange(256, dtype=np.uint8)
  state = {
    "sharded": jax.device_put(every.view("float8_e4m3"), NamedSharding(mesh, P("x"))),
    "replicated": jax.device_put(every.view("float8_e4m3").reshape(16, 16), NamedSharding(mesh, P())),
    "uint2": jax.device_put((every % 4).astype("uint2"), NamedSharding(mesh, P("x"))),
    "number": every.view("float8_e4m3")[7],
    **{name: (every % 64).view(name) for name in ("float6_e2m3fn", "float6_e3m2fn")},
    "int1": (every % 2 == 0).astype("int1"),
  }
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) if isinstance(x, jax.Array) else x, state
  )
  with ckpt.Checkpointer(tmp_path, {"layout": {"pack": pack}, "health": {"nonfinite": "ignore"}}) as c:
    c.save(0, state)
    c.wait()
    assert_same(c.restore(like=state).state, state)
    assert_same(c.restore(like=abstract).state, state)
    free = c.restore().state
    assert {k: bits(v)[1:] for k, v in free.items()} == {k: bits(v)[1:] for k, v in state.items()}
    wide = c.restore(cast={"sharded": "float32"}, only="sharded").state["sharded"]
    assert np.array_equal(wide, every.view("float8_e4m3").astype(np.float32), equal_nan=True)
  found = {leaf.path: leaf.dtype for leaf in contents.describe(tmp_path).leaves}
  assert found["sharded"] == "float8_e4m3" and found["int1"] == "int1"


@pytest.mark.parametrize("everywhere", [False, True], ids=["in this thread", "in all threads"])
def test_saving_and_restoring_are_transfers_that_a_guard_lets_through(tmp_path, everywhere, assert_same):
  mesh = jax.make_mesh((2,), ("x",))
  state = {"w": jax.device_put(jnp.arange(8.0), NamedSharding(mesh, P("x"))), "u": jnp.ones(3, jnp.uint4), "n": 1}
  state |= {"b": jnp.ones((600, 600), jnp.bfloat16), "f": jnp.ones(3, jnp.float8_e4m3), "k": jax.random.key(0)}
  loss = jnp.float32(1.0)
  with contextlib.ExitStack() as guarded:
    if everywhere:
      jax.config.update("jax_transfer_guard", "disallow")
      guarded.callback(jax.config.update, "jax_transfer_guard", "allow")
    else:
      guarded.enter_context(jax.transfer_guard("disallow"))
    for pack in ("off", "on"):
      with ckpt.Checkpointer(tmp_path / pack, {"layout": {"pack": pack}}) as c:
        c.save(0, state, metrics={"loss": loss})
        c.wait()
        same, free, again = c.restore(like=state), c.restore(), c.restore_or_init(lambda: state)
      assert ckpt.verify(tmp_path / pack) == [] and free.metrics == {"loss": 1.0}
    with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed"):
      _ = state["w"] + np.ones(8)  # what the guard is there for is still guarded
  assert_same(same.state, state)
  assert_same(again.state, state)
