"""States with NaN or inf: refused, tagged or ignored, and told once."""

import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

import ckpt_jax as ckpt
from ckpt_jax.integrity import health
from ckpt_jax.multihost import launch

GOOD = {"params": {"w": np.ones((4, 4), np.float32), "n": np.arange(3)}, "opt": {"mu": jnp.full(9, 2.0, jnp.bfloat16)}}
BIG = 20 << 20  # numbers, more than is looked at before a save


def bad(value=np.nan):
  w = np.ones((4, 4), np.float32)
  w[1, 2] = w[3, 3] = value
  return GOOD | {"params": {"w": w, "n": np.arange(3)}}


def names(run):
  return sorted(p.name for p in run.iterdir() if p.name != ".ckpt_jax")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_unhealthy_state_is_refused_by_name_before_anything_is_written(tmp_path, value):
  with ckpt.Checkpointer(tmp_path) as c:
    c.save(0, GOOD)
    with pytest.raises(ckpt.UnhealthyStateError, match=r"step 1 was not saved.*params/w: 2"):
      c.save(1, bad(value))
    assert names(tmp_path) == ["0"]
    assert c.save(1, GOOD)
  assert [s.step for s in c.steps()] == [0, 1] and all(s.healthy for s in c.steps())


def test_large_unhealthy_state_is_refused_behind_the_write_and_told_once(tmp_path):
  big = np.ones(BIG, np.float32)
  big[12345] = np.inf
  with ckpt.Checkpointer(tmp_path) as c:
    c.save(0, GOOD)
    assert c.save(1, {"params": big})
    with pytest.raises(ckpt.UnhealthyStateError, match="params: 1"):
      c.wait()
    c.wait()
    assert names(tmp_path) == ["0"] and c.latest_step() == 0
    assert c.save(1, GOOD)
  assert c.latest_step() == 1


def test_tagged_state_is_saved_and_shown_as_unhealthy(tmp_path):
  with ckpt.Checkpointer(tmp_path, {"health": {"nonfinite": "tag"}}) as c:
    c.save(0, GOOD)
    c.save(1, bad())
  assert [s.healthy for s in c.steps()] == [True, False]


def test_ignored_state_is_saved_and_nobody_knows(tmp_path):
  with ckpt.Checkpointer(tmp_path, {"health": {"nonfinite": "ignore"}}) as c:
    c.save(0, bad())
  assert [s.healthy for s in c.steps()] == [None]


def test_integers_keys_and_large_finite_numbers_are_no_health_matter(tmp_path):
  state = {"big": np.full(1000, 3e38, np.float32), "int": np.full(9, -1), "tiny": np.full(5, 1e-45, np.float32)}
  with ckpt.Checkpointer(tmp_path) as c:
    assert c.save(0, state)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float8_e5m2", "float64", "complex64"])
def test_every_float_dtype_is_looked_at(tmp_path, dtype):
  x = np.ones(1001).astype(jnp.dtype(dtype))
  x[1000] = np.nan
  with ckpt.Checkpointer(tmp_path) as c, pytest.raises(ckpt.UnhealthyStateError, match="x: 1"):
    c.save(0, {"x": x})


def test_norms_and_their_jumps_are_recorded_by_group(tmp_path, caplog):
  with ckpt.Checkpointer(tmp_path) as c:
    for step in range(3):
      c.save(step, GOOD)
    c.save(3, GOOD | {"opt": {"mu": jnp.full(9, 200.0, jnp.bfloat16)}})
  found = json.loads((tmp_path / "3" / "default" / "ckpt_jax.json").read_text())["health"]
  assert found["norms"] == pytest.approx({"params": 4.0, "opt": 600.0})
  assert found["jumps"] == pytest.approx({"params": 1.0, "opt": 100.0})
  assert "norm of opt is 100 times" in caplog.text


def test_jump_is_against_the_median_of_the_steps_before():
  assert health.jumps({"a": 6.0, "new": 1.0}, [{"a": 1.0}, {"a": 2.0}, {"a": 9.0}]) == {"a": 3.0}


@pytest.mark.multiprocess
def test_all_processes_refuse_what_one_of_them_holds(tmp_path):
  program = str(pathlib.Path(__file__).parent / "programs" / "unhealthy.py")
  results = launch([program, str(tmp_path)], processes=2, devices=2, timeout=180)
  assert [r.returncode for r in results] == [0, 0], results[0].log + results[1].log
  assert all("refused w: 1" in r.log for r in results)
