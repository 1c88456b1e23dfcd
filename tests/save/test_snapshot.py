"""What the trainer puts beside its state: it comes back as it was, or is refused by name."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import ckpt_jax as ckpt
from ckpt_jax.save.snapshot import checked_json, plain_metrics, run_metadata

leaves = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False)
trees = st.recursive(
  leaves | st.text(max_size=8),
  lambda inner: st.lists(inner, max_size=3) | st.tuples(inner, inner) | st.dictionaries(st.text(max_size=5), inner),
  max_leaves=10,
)


def as_lists(value):
  """What JSON makes of tuples."""
  if isinstance(value, (list, tuple)):
    return [as_lists(v) for v in value]
  return {k: as_lists(v) for k, v in value.items()} if isinstance(value, dict) else value


@given(trees)
def test_extras_come_back_from_json_as_they_were_but_for_tuples(value):
  checked = checked_json(value, "extras")
  again = json.loads(json.dumps(checked))
  assert again == checked == as_lists(value)
  assert json.dumps(again) == json.dumps(value), "also 1, 1.0 and True apart"


@given(st.sampled_from([math.nan, math.inf, -math.inf, b"", {1}, 1j, np.float64(1), np.int8(1), np.ones(2), object()]))
def test_what_json_cannot_hold_is_refused_with_its_place(value):
  with pytest.raises(ckpt.CheckpointError, match=r"^extras\['a'\]\[1\]"):
    checked_json({"a": [0, value]}, "extras")


def test_keys_that_are_no_text_are_refused_and_numbers_of_arrays_get_a_hint():
  with pytest.raises(ckpt.CheckpointError, match="key 1 would come back as text"):
    checked_json({1: 2}, "extras")
  for value in (np.float32(1), np.ones(2), jnp.ones(2)):
    with pytest.raises(ckpt.CheckpointError, match=r"\.item\(\) or \.tolist\(\)"):
      checked_json([value], "extras")


numbers = st.integers(-(2**53), 2**53) | st.floats(width=32)


@given(numbers, st.sampled_from([float, np.float32, np.float64, jnp.float32, jnp.bfloat16, np.ones((1, 1)).__mul__]))
def test_metrics_of_any_numeric_type_are_that_number(number, kind):
  value = kind(number)
  (got,) = plain_metrics({"loss": value}).values()
  want = float(np.asarray(value, np.float64).reshape(()))
  assert type(got) is float and (got == want or (math.isnan(got) and math.isnan(want)))
  json.dumps(got)


def test_integer_metrics_stay_integers_and_no_metrics_are_an_empty_dict():
  got = plain_metrics({"a": 2**60, "b": np.int64(2**60), "c": jnp.int32(7), "d": np.uint8(255)})
  assert got == {"a": 2**60, "b": 2**60, "c": 7, "d": 255} and all(type(v) is int for v in got.values())
  assert plain_metrics(None) == plain_metrics({}) == {}


@pytest.mark.parametrize("value", [True, np.bool_(True), "0.5", None, np.ones(2), jnp.zeros(0), 1j, np.complex64(1)])
def test_metrics_that_are_no_number_are_refused_by_name(value):
  with pytest.raises(ckpt.CheckpointError, match=r"metrics\['acc'\] is .*; a metric is one number"):
    plain_metrics({"loss": 1.0, "acc": value})


def test_metrics_that_would_come_back_otherwise_or_could_not_be_compared_are_refused():
  for metrics, match in [({1: 2.0, "1": 3.0}, "the name 1 would"), ({"loss": -(10**5000)}, r"\['loss'\] is larger")]:
    with pytest.raises(ckpt.CheckpointError, match=match):
      plain_metrics(metrics)
  assert plain_metrics({"loss": 10**300, "other": math.inf}) == {"loss": 10**300, "other": math.inf}


def test_run_metadata_says_what_made_the_step_in_json():
  mesh = jax.make_mesh((2,), ("fsdp",))
  config = ckpt.Config(retention={"last": 7})
  spread = jax.device_put(jnp.ones(4), NamedSharding(mesh, P("fsdp")))
  state = {"w": spread, "b": spread, "n": 3, "x": np.ones(2)}
  made = json.loads(json.dumps(run_metadata(config, state, 52)))
  assert made["meshes"] == [{"fsdp": 2}] and made["leaves"] == 4 and made["nbytes"] == 52
  assert made["versions"]["jax"] == jax.__version__ and made["versions"].keys() >= {"python", "orbax-checkpoint"}
  assert (made["processes"], made["devices"], made["platform"]) == (1, 2, "cpu")
  assert ckpt.Config(**made["config"]) == config
