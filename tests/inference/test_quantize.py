"""Casts and quantisation: every element is what arithmetic says it must be."""

import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import ckpt_jax as ckpt
from ckpt_jax.inference.cast import cast
from ckpt_jax.inference.quantize import Magnitudes, QuantizedArray, Scheme, packed, quantized, scheme_of, unpacked_int4
from ckpt_jax.layout.sharding import whole_box, within

finite = (
  st.floats(width=32, allow_nan=False, allow_infinity=False)
  | st.floats(-4, 4, width=32)
  | st.floats(-(2.0**-130), 2.0**-130, width=32)
)


@given(arrays.arrays(np.uint32, arrays.array_shapes(max_dims=2, max_side=40)), st.sampled_from(["bfloat16", "float16"]))
def test_a_cast_is_numpys_for_all_bit_patterns_and_what_it_lost_is_exact(words, dtype):
  values = words.view(np.float32)
  with np.errstate(over="ignore", invalid="ignore"):
    want = values.astype(jnp.dtype(dtype))
  got, loss = cast(values, jnp.dtype(dtype))
  assert got.tobytes() == want.tobytes()
  held = np.isfinite(values) & np.isfinite(want)
  exact = np.abs(values.astype(np.float64) - want.astype(np.float64))
  assert loss.largest == pytest.approx(exact.max(initial=0.0, where=held), rel=1e-6)
  assert loss.overflowed == np.count_nonzero(np.isfinite(values) & np.isinf(want))
  assert loss.nonfinite == np.count_nonzero(~np.isfinite(values))


@st.composite
def matrices(draw):
  """A matrix or a stack of them, a scheme that fits, and a cut into boxes."""
  axis_length = draw(st.sampled_from([32, 96]))
  rest = draw(st.sampled_from([1, 5]))
  shape = draw(st.sampled_from([(axis_length, rest), (2, axis_length, rest), (axis_length, 2, rest)]))
  axis = shape.index(axis_length)
  scheme = Scheme(8, axis, axis_length) if draw(st.booleans()) else Scheme(4, axis, draw(st.sampled_from([32, 16])))
  values = draw(arrays.arrays(np.float32, shape, elements=finite))
  cuts = [sorted({0, n, *draw(st.lists(st.integers(0, n), max_size=2))}) for n in shape]
  boxes = [()]
  for edges in cuts:
    boxes = [(*box, span) for box in boxes for span in itertools.pairwise(edges)]
  return values, scheme, boxes


@given(matrices())
@settings(max_examples=60)
def test_each_element_is_within_half_a_step_however_the_matrix_arrives(case):
  values, scheme, boxes = case
  whole = whole_box(values.shape)
  seen = Magnitudes(scheme, values.shape)
  for box in boxes:
    seen.see(values[within(box, whole)], box)
  scales = seen.scales()
  integers = np.empty(values.shape, np.int8)
  for box in boxes:
    integers[within(box, whole)], _ = quantized(values[within(box, whole)], box, scheme, scales)
  assert np.abs(integers).max() <= (127 if scheme.bits == 8 else 7)
  steps = np.repeat(scales.astype(np.float64), scheme.group, scheme.axis)
  exact = np.abs(values.astype(np.float64) - integers * steps)
  # The quotient is rounded to float32 before it is rounded to an integer: 2**-24 of at most 127.
  assert (exact <= steps * (0.5 + 127 * 2.0**-23)).all()
  again = Magnitudes(scheme, values.shape)
  again.see(values, whole)
  assert again.scales().tobytes() == scales.tobytes()
  array = QuantizedArray(jnp.asarray(integers), jnp.asarray(scales), scheme.axis)
  np.testing.assert_allclose(array.dequantize(), (integers * steps).astype(np.float32), rtol=1e-6, atol=1e-37)


@pytest.mark.parametrize("shape", [(4, 8), (3, 7), (2, 3, 5), (1, 1)])
def test_packing_of_int4_is_undone(shape):
  integers = np.resize(np.arange(-8, 8, dtype=np.int8), shape)
  assert (
    np.asarray(unpacked_int4(jnp.asarray(packed(integers)), shape[-1])).astype(np.int8).tolist() == integers.tolist()
  )


@pytest.mark.parametrize(
  ("path", "shape", "quantize", "want"),
  [
    ("layers/0/kernel", (256, 1024), "int8", Scheme(8, 0, 256)),
    ("layers/0/kernel", (256, 1024), "int4", Scheme(4, 0, 64)),
    ("layers/kernel", (12, 256, 1024), "int4", Scheme(4, 1, 64)),
    ("attention/query/kernel", (256, 8, 32), "int8", Scheme(8, 0, 256)),
    ("attention/out/kernel", (8, 32, 256), "int8", Scheme(8, 1, 32)),
    ("conv/kernel", (3, 3, 64, 128), "int8", Scheme(8, 2, 64)),
    ("mlp/kernel", (80, 10), "int4", Scheme(4, 0, 40)),
    ("mlp/kernel", (61, 10), "int4", Scheme(4, 0, 61)),
    ("mlp/kernel", (127, 10), "int4", Scheme(8, 0, 127)),
    ("embed/embedding", (1000, 64), "int8", None),
    ("layers/norm/scale", (12, 256), "int8", None),
    ("layers/bias", (12, 256), "int8", None),
    ("layers/0/bias", (256,), "int8", None),
    ("ln_1/weight", (4, 4), "int8", None),
    ("final/weight", (4, 1), "int8", None),
  ],
)
def test_matrices_alone_are_quantised_along_their_inputs(path, shape, quantize, want):
  assert scheme_of(path, shape, quantize, 64) == want


def test_unknown_quantisation_is_refused(tmp_path):
  for more, match in [
    ({"quantize": "int2"}, "quantize: 'int2' is not one of int8, int4; did you mean int4?"),
    ({"group": 48}, "group: 48 is not one of 32, 64 or 128"),
  ]:
    with pytest.raises(ckpt.ConfigError, match=match):
      ckpt.export(tmp_path, 0, tmp_path / "out", **more)


def test_quantised_matrices_go_through_jit_and_keep_their_axis():
  array = QuantizedArray(jnp.ones((4, 3), jnp.int8), jnp.full((1, 3), 0.5), 0)
  doubled = jax.jit(lambda a: jax.tree.map(lambda x: x + x, a))(array)
  assert doubled.axis == 0 and np.asarray(doubled.dequantize()).tolist() == [[2.0] * 3] * 4
  assert ckpt.dequantize({"a": array, "b": jnp.int32(1)}, jnp.bfloat16)["a"].dtype == ml_dtypes.bfloat16
