"""Leaves that Orbax cannot store: written as ones that it can, and back, with every bit."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from conftest import bits
from hypothesis import given
from hypothesis import strategies as st

import ckpt_jax as ckpt
from ckpt_jax.layout.encoding import decode_leaf, dtype_name, encode, is_prng_key

REAL = ["bool", "int4", "uint4", "int8", "uint8", "int32", "uint64", "float16", "bfloat16", "float8_e5m2", "float32"]
DTYPES = [*REAL, "int2", "uint2", "float64", "complex64", "complex128"]
STORABLE = (jax.Array, np.ndarray, bool, int, float, str)  # by Orbax 0.12, but for empty arrays and some dtypes


@st.composite
def arrays(draw, dtypes=DTYPES, shapes=((), (1,), (3,), (2, 3), (0,), (0, 3), (2, 0, 2))):
  """Arrays of any bits."""
  shape, dtype = draw(st.sampled_from(shapes)), jnp.dtype(draw(st.sampled_from(dtypes)))
  raw = np.random.default_rng(draw(st.integers(0, 2**32))).integers(0, 256, (*shape, dtype.itemsize), np.uint8)
  if dtype.name == "bool":
    return (raw[..., 0] & 1).astype(bool)
  if dtype.name in ("int2", "uint2", "int4", "uint4"):
    n = 2 ** int(dtype.name[-1])
    return ((raw[..., 0] & (n - 1)).astype(np.int8) - (0 if dtype.name[0] == "u" else n // 2)).astype(dtype)
  return raw.view(dtype).reshape(shape)


def on_device(array):
  return jax.device_put(array) if array.dtype.itemsize < 8 or array.dtype.name == "complex64" else array


python = st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats() | st.complex_numbers() | st.text()
keys = st.builds(
  lambda seed, impl, n: jax.random.split(jax.random.key(seed, impl=impl), n) if n else jax.random.key(seed, impl=impl),
  st.integers(0, 99),
  st.sampled_from(["threefry2x32", "rbg"]),
  st.integers(0, 2),
)
scalars = arrays([d for d in DTYPES if "int2" not in d and "int4" not in d], [()]).map(lambda x: x[()])
leaves = python | arrays() | arrays().map(on_device) | scalars | keys


@given(
  st.dictionaries(
    st.text("abc_0", min_size=1, max_size=3), leaves | st.lists(leaves, max_size=2), min_size=1, max_size=4
  )
)
def test_any_leaf_is_stored_as_one_that_orbax_takes_and_comes_back_with_type_and_bits(state):
  stored, notes = encode(state)
  assert jax.tree.structure(stored) == jax.tree.structure(state)
  notes = json.loads(json.dumps(notes))
  names = ["/".join(str(getattr(k, "key", getattr(k, "idx", k))) for k in p) for p, _ in tree(state)]
  assert notes.keys() <= set(names)
  for name, leaf, was in zip(names, jax.tree.leaves(stored), jax.tree.leaves(state), strict=True):
    assert isinstance(leaf, STORABLE) and getattr(leaf, "size", 1), name
    assert dtype_name(getattr(leaf, "dtype", np.float32)) not in ("uint2", "uint4")
    back = decode_leaf(leaf, notes.get(name))
    if getattr(was, "size", 1) == 0:  # empty arrays hold no bits, and come back as numpy's
      assert (np.shape(back), back.dtype) == (was.shape, was.dtype)
    else:
      assert bits(back) == bits(was), name


def tree(state):
  return jax.tree_util.tree_leaves_with_path(state)


def test_a_state_that_needs_nothing_is_handed_on_as_it_is():
  state = {"w": jnp.ones(3), "n": np.arange(3)}
  stored, notes = encode(state)
  assert stored is state and notes == {}


@pytest.mark.parametrize(
  ("leaf", "why"),
  [
    (object(), "is no array or scalar"),
    (b"bytes", "is no array or scalar"),
    (np.array(["a"]), "not numeric"),
    (np.array([None]), "not numeric"),
    (np.zeros(2, "M8[s]"), "not numeric"),
    (np.zeros(2, [("a", "f4")]), "not numeric"),
    (np.str_("a"), "not numeric|would come back as str"),
    (2**63, "more than 64 bits"),
    (-(2**63) - 1, "more than 64 bits"),
    (jax.random.split(jax.random.key(0), 1)[:0], "empty array of PRNG keys"),
  ],
)
def test_what_no_checkpoint_holds_is_refused_by_name_with_all_others_at_once(leaf, why):
  with pytest.raises(ckpt.CheckpointError, match=f"nothing was written:\n  a/b/0: .*({why})") as e:
    encode({"a": {"b": [leaf]}, "fine": jnp.ones(2), "z": object()})
  assert "\n  z: a" in str(e.value) and "fine" not in str(e.value)


@pytest.mark.parametrize("name", ["..", "/abs", "a/../../b", "a\0b"])
def test_names_that_would_lead_out_of_the_checkpoint_are_refused_whatever_they_name(name):
  for leaf in (jnp.ones(2), 3, np.zeros((0, 2))):
    with pytest.raises(ckpt.CheckpointError, match="leads out of the checkpoint"):
      encode({"x": {name: leaf}})


def test_keys_that_came_back_as_their_words_are_wrapped_again():
  for impl in ("threefry2x32", "rbg"):
    key = jax.random.key(3, impl=impl)
    _, notes = encode({"key": key})
    assert bits(decode_leaf(jax.random.key_data(key), notes["key"])) == bits(key)
  assert is_prng_key(jax.eval_shape(lambda: key)) and not is_prng_key(jax.random.key_data(key)) and not is_prng_key(3)


def test_names_of_dtypes_are_numpys_or_that_of_the_keys():
  assert dtype_name(jnp.float32) == dtype_name(np.dtype("float32")) == "float32"
  assert dtype_name(ml_dtypes.bfloat16) == "bfloat16"
  assert dtype_name(jax.random.key(0).dtype) == "key<fry>"
