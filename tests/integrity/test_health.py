"""States with NaN or inf: refused, tagged or ignored, and told once."""

import json

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jobs import together

import ckpt_jax as ckpt
from ckpt_jax.integrity import health
from ckpt_jax.rewrite.thin import thin_step
from ckpt_jax.run.steps import run_directory

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


INF, NAN = np.inf, np.nan


def masked(infinite=5, nan=0, **more):
  mask = np.zeros(40, np.float32)
  mask[:infinite] = -INF
  mask[infinite : infinite + nan] = NAN
  return {"mask": mask, "best": jnp.float32(INF), "loss": INF, "w": jnp.ones(3)} | more


def saved(path, *states, **config):
  """What each save of a new job ended in, as far as the first letter of what it raised."""
  out = []
  with ckpt.Checkpointer(path, config) as c:
    newest = c.latest_step()
    first = 0 if newest is None else newest + 1
    for i, one in enumerate(states):
      try:
        c.save(first + i, one)
        c.wait()
        out.append("saved")
      except ckpt.UnhealthyStateError as e:
        out.append(str(e).partition("numbers (")[2].partition("). Go back")[0])
  return out


MEANT = "5 infinities and 0 NaNs are meant to be there"


def test_infinities_of_the_first_save_are_meant_to_be_there_and_no_more_than_those(tmp_path):
  assert saved(tmp_path, masked(), masked(3), masked(5), masked(6)) == ["saved"] * 3 + [f"mask: 6; {MEANT}"]
  assert saved(tmp_path, masked(4, nan=1)) == [f"mask: 5, 1 of them NaN; {MEANT}"]
  assert saved(tmp_path, masked(w=jnp.full(3, INF))) == ["w: 3"]
  # What was finite once and came back is what was noted; the note outlives the step that it was made for.
  finite = masked(0, best=jnp.float32(1), loss=1.0)
  assert saved(tmp_path, finite, finite, retention={"last": 1}) == ["saved"] * 2
  assert [s.step for s in ckpt.Checkpointer(tmp_path).steps()] == [4]
  tmp_path.rename(tmp_path.parent / "moved")
  assert saved(tmp_path.parent / "moved", masked(), masked(6)) == ["saved", f"mask: 6; {MEANT}"]
  (tmp_path.parent / "moved").rename(tmp_path)
  thin_step(run_directory(tmp_path), 5, ("mask",))
  assert saved(tmp_path, masked(), masked(6)) == ["saved", f"mask: 6; {MEANT}"]
  assert all(s.healthy for s in ckpt.Checkpointer(tmp_path).steps())


def test_a_leaf_that_comes_later_has_a_first_save_of_its_own_and_nan_is_never_meant(tmp_path):
  assert saved(tmp_path, GOOD, GOOD | {"schedule": {"best": INF}}, GOOD | {"schedule": {"best": NAN}}) == [
    "saved",
    "saved",
    "schedule/best: 1, 1 of them NaN; 1 infinities and 0 NaNs are meant to be there",
  ]
  assert saved(tmp_path, GOOD | {"new": jnp.float32(NAN)}) == ["new: 1, 1 of them NaN"]
  assert saved(tmp_path, {"params": np.full(3, INF, np.float32)}) == ["params: 3"], (
    "in place of leaves that were finite"
  )


def test_infinities_of_a_large_state_are_found_and_noted_behind_the_write(tmp_path):
  big = np.ones(BIG, np.float32)
  big[:7] = INF
  more = big.copy()
  more[9] = INF
  assert saved(tmp_path, {"x": big}) == ["saved"]
  assert saved(tmp_path, {"x": more}) == ["x: 8; 7 infinities and 0 NaNs are meant to be there"]


@pytest.mark.parametrize("how", ["plain Orbax", "ignore", "an older version"])
def test_an_old_run_goes_on_with_what_it_holds_and_no_more(tmp_path, how):
  old = {"a": {"mask": jnp.array([-INF, -INF, NAN, 1.0])}, "best": INF, "w": jnp.ones(2)}
  if how == "plain Orbax":
    with ocp.CheckpointManager(tmp_path) as manager:
      manager.save(0, args=ocp.args.StandardSave(old))
  else:
    assert saved(tmp_path, old, health={"nonfinite": "ignore" if how == "ignore" else "tag"}) == ["saved"]
  if how == "an older version":
    file = tmp_path / "0" / "default" / "ckpt_jax.json"
    record = json.loads(file.read_text())
    del record["health"]["meant"], record["seal"]
    file.write_text(json.dumps(record))
  more = old | {"a": {"mask": jnp.array([-INF, -INF, NAN, NAN])}}
  meant = "a/mask: 4, 2 of them NaN; 2 infinities and 1 NaNs are meant to be there"
  assert saved(tmp_path, more, old, more, old | {"w": jnp.full(2, INF)}) == [meant, "saved", meant, "w: 2"]
  assert saved(tmp_path, old, more) == ["saved", meant], "noted from then on"


def test_tagged_steps_are_no_excuse(tmp_path):
  tag = {"health": {"nonfinite": "tag"}}
  assert saved(tmp_path, masked(), masked(4, nan=1), **tag) == ["saved"] * 2
  assert [s.healthy for s in ckpt.Checkpointer(tmp_path).steps()] == [True, False]
  assert saved(tmp_path, masked(4, nan=1), masked()) == [f"mask: 5, 1 of them NaN; {MEANT}", "saved"]


def test_an_optimizer_that_begins_with_infinity_can_be_saved_and_restored(tmp_path):
  import optax

  tx = optax.chain(optax.adam(1e-3), optax.contrib.reduce_on_plateau(accumulation_size=100))
  params = {"w": jnp.ones(3)}
  for step in range(2):
    with ckpt.Checkpointer(tmp_path) as c:
      state = c.restore_or_init(lambda: {"params": params, "opt": tx.init(params)}).state
      assert c.save(step, state)


@pytest.mark.multiprocess
def test_a_job_agrees_on_what_is_meant_to_be_there(tmp_path):
  results = together("masks.py", tmp_path, processes=2)
  assert all("refused True" in r.log for r in results)


@pytest.mark.multiprocess
@pytest.mark.parametrize("when", ["before", "behind"])
def test_all_processes_refuse_what_one_of_them_holds(tmp_path, when):
  results = together("unhealthy.py", tmp_path, when, processes=2)
  assert all("refused w: 1" in r.log for r in results)
