"""Checkpointer in one process: restored states equal saved ones, and no step is lost or half written."""

import json
import logging
import os
import pathlib
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import ckpt_jax as ckpt

ODD_FLOATS = np.array([0x80000000, 0x7FC00123, 0xFFC00001, 0x7F800000, 0x00000001], np.uint32).view(np.float32)


def odd_state():
  return {
    "key": jax.random.key(3),
    "keys": jax.random.split(jax.random.key(1, impl="rbg"), 3),
    "int4": jnp.arange(-8, 8, dtype=jnp.int4),
    "uint4": jnp.arange(16, dtype=jnp.uint4),
    "fp8": jnp.arange(8).astype(jnp.float8_e4m3fn),
    "bf16": jnp.array([-0.0, jnp.nan, 1], jnp.bfloat16),
    "odd": jnp.asarray(ODD_FLOATS),
    "empty": jnp.zeros((0, 3)),
    "numpy_empty": np.zeros((0, 3), np.float16),
    "zero_d": jnp.float32(2),
    "none": None,
    "int": 3,
    "float": 2.5,
    "bool": True,
    "text": "hello",
    "complex": 1 - 2j,
    "complex64": jnp.array([1j], jnp.complex64),
    "numpy_scalar": np.int32(4),
    "numpy_bf16": ml_dtypes.bfloat16(2),
    "numpy": np.arange(5),
    "uint64": np.array([1 << 63], np.uint64),
    "tuple": (1, jnp.ones(2)),
    "list": [jnp.ones(2), {}],
    "nothing": (),
  }


def nnx_state():
  model = nnx.Sequential(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), nnx.BatchNorm(4, rngs=nnx.Rngs(0)))
  _, state = nnx.split(model)
  return {"model": state, "opt": optax.adamw(1e-3).init(state)}


def train_state():
  net = nn.Dense(3)
  params = net.init(jax.random.key(0), jnp.ones((1, 2)))
  return TrainState.create(apply_fn=net.apply, params=params, tx=optax.adam(1e-3))


@pytest.mark.parametrize("make", [odd_state, nnx_state, train_state])
def test_restored_state_has_the_types_and_bits_of_the_saved_one(make, tmp_path, assert_same):
  state = make()
  with ckpt.Checkpointer(tmp_path, {"health": {"nonfinite": "tag"}}) as c:  # there are NaNs among its bits
    c.save(0, state)
    assert_same(c.restore(like=state).state, state)


def test_sharded_state_comes_back_with_its_sharding(tmp_path, assert_same):
  mesh = jax.make_mesh((2,), ("fsdp",))
  spread = NamedSharding(mesh, P("fsdp"))
  state = {
    "w": jax.device_put(jnp.arange(8.0), spread),
    "key": jax.device_put(jax.random.split(jax.random.key(0), 4), spread),
    "uint4": jax.device_put(jnp.arange(4, dtype=jnp.uint4), spread),
    "step": jax.device_put(jnp.int32(1), NamedSharding(mesh, P())),
  }
  with ckpt.Checkpointer(tmp_path) as c:
    c.save(0, state)
    got = c.restore(like=jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state))
  assert_same(got.state, state)
  assert jax.tree.all(jax.tree.map(lambda a, b: a.sharding == b.sharding, got.state, state))


def test_uncommitted_arrays_stay_uncommitted(tmp_path):
  state = {"step": jnp.int32(3)}
  with ckpt.Checkpointer(tmp_path) as c:
    c.save(0, state)
    got = c.restore(like=state).state["step"]
  mesh = jax.make_mesh((2,), ("x",))
  jax.jit(lambda a, b: a * b)(got, jax.device_put(jnp.ones((), jnp.int32), NamedSharding(mesh, P())))


def test_checkpoint_opens_without_its_model_code(tmp_path):
  with ckpt.Checkpointer(tmp_path) as c:
    c.save(0, train_state())
  with ckpt.Checkpointer(tmp_path) as c:
    state = c.restore().state
  assert isinstance(state["params"]["params"]["kernel"], np.ndarray)
  assert state["params"]["params"]["kernel"].shape == (2, 3)
  assert state["step"] == 0


def test_odd_leaves_come_back_without_like(tmp_path):
  want = odd_state()
  with ckpt.Checkpointer(tmp_path, {"health": {"nonfinite": "tag"}}) as c:
    c.save(0, want)
    got = c.restore().state
  assert got["empty"].shape == (0, 3) and got["complex"] == 1 - 2j and got["none"] is None
  assert got["uint4"].dtype == jnp.uint4 and got["text"] == "hello" and got["numpy_scalar"].dtype == np.int32
  assert got["odd"].tobytes() == ODD_FLOATS.tobytes()
  assert jax.random.key_data(got["key"]).tolist() == jax.random.key_data(want["key"]).tolist()


def test_train_state_step_as_int_or_array_is_the_same_number(tmp_path):
  fresh = train_state()
  with ckpt.Checkpointer(tmp_path) as c:
    c.save(0, fresh.replace(step=jnp.int32(7)))
    assert c.restore(like=fresh).state.step == 7
    c.save(1, fresh.replace(step=8))
    assert c.restore(like=fresh.replace(step=jnp.int32(0))).state.step.dtype == jnp.int32


def test_donating_right_after_save_does_not_change_what_is_written(tmp_path):
  overwrite = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
  x = jnp.arange(1 << 20, dtype=jnp.float32)
  host = np.arange(1 << 20, dtype=np.float32)
  want = host.copy()
  with ckpt.Checkpointer(tmp_path) as c:
    for step in range(3):
      x = jnp.asarray(want)
      host[:] = want
      c.save(step, {"x": x, "host": host})
      for _ in range(4):
        x = overwrite(x)
      host[:] = -1
      x.block_until_ready()
    for step in range(3):
      got = c.restore(step).state
      assert got["x"].tobytes() == want.tobytes()
      assert got["host"].tobytes() == want.tobytes()


def test_state_metrics_and_extras_are_one_step(tmp_path):
  with ckpt.Checkpointer(tmp_path) as c:
    c.save(5, {"x": jnp.ones(2)}, metrics={"loss": jnp.float32(0.5)}, extras={"data": {"epoch": 1, "seen": [1, 2]}})
    got = c.restore()
  assert (got.step, got.next_step) == (5, 6)
  assert got.metrics == {"loss": 0.5}
  assert got.extras == {"data": {"epoch": 1, "seen": [1, 2]}}


def test_run_metadata_is_readable_json(tmp_path):
  with ckpt.Checkpointer(tmp_path) as c:
    c.save(0, {"x": jnp.ones(2)})
  ours = json.loads((tmp_path / "0" / "_CHECKPOINT_METADATA").read_text())["custom_metadata"]["ckpt_jax"]
  assert ours["versions"]["jax"] == jax.__version__
  assert ours["nbytes"] == 8 and ours["processes"] == 1 and "config" in ours


@pytest.mark.parametrize(
  ("extras", "names"), [({"a": {"b": np.int64(1)}}, "['a']['b']"), ({1: 2}, "key 1"), ([float("nan")], "[0]")]
)
def test_extras_that_json_would_change_are_refused_by_name(extras, names, tmp_path):
  with ckpt.Checkpointer(tmp_path) as c:
    with pytest.raises(ckpt.CheckpointError) as e:
      c.save(0, {"x": jnp.ones(2)}, extras=extras)
    assert names in str(e.value)
    assert c.steps() == []


def test_unsavable_leaves_are_refused_by_name_before_anything_is_written(tmp_path):
  with ckpt.Checkpointer(tmp_path) as c:
    with pytest.raises(ckpt.CheckpointError, match=r"a/f: a builtins.object"):
      c.save(0, {"a": {"f": object()}, "big": 1 << 70})
    assert c.latest_step() is None
  assert not any(p.name.startswith("0") for p in tmp_path.iterdir())


def test_every_difference_is_reported_at_once_by_path(tmp_path):
  with ckpt.Checkpointer(tmp_path) as c:
    c.save(0, {"w": jnp.ones((2, 3)), "b": jnp.ones(2), "only_saved": 1})
    with pytest.raises(ckpt.StructureMismatchError) as e:
      c.restore(like={"w": jnp.ones((3, 2)), "b": jnp.ones(2, jnp.bfloat16), "only_like": 1})
  text = str(e.value)
  assert "w: saved as float32[2, 3], asked for float32[3, 2] (transposed?)" in text
  assert "b: saved as float32[2], asked for bfloat16[2]" in text
  assert "only_saved: in the checkpoint, not in like" in text
  assert "only_like: not in the checkpoint; the checkpoint has only_saved" in text


def test_plain_orbax_restores_ours_bitwise(tmp_path, assert_same):
  with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an integer count
    state = train_state().apply_gradients(grads=train_state().params)
  with ckpt.Checkpointer(tmp_path) as c:
    c.save(4, state, metrics={"loss": 1.0})
  for args in (ocp.args.PyTreeRestore(state), ocp.args.StandardRestore(state)):
    with ocp.CheckpointManager(tmp_path) as plain:
      assert plain.latest_step() == 4
      assert_same(plain.restore(4, args=args), state)


@pytest.mark.parametrize("kind", ["pytree", "standard", "named"])
def test_ours_restores_plain_orbax_bitwise(kind, tmp_path, assert_same):
  state = nnx_state()
  args = {
    "pytree": ocp.args.PyTreeSave(state),
    "standard": ocp.args.StandardSave(state),
    "named": ocp.args.Composite(state=ocp.args.StandardSave(state)),
  }[kind]
  with ocp.CheckpointManager(tmp_path) as plain:
    plain.save(1, args=args)
  with ckpt.Checkpointer(tmp_path) as c:
    assert [s.step for s in c.steps()] == [1]
    assert_same(c.restore(like=state).state, state)


def test_restore_or_init_builds_only_in_an_empty_run(tmp_path, assert_same):
  built = []

  @jax.jit
  def init():
    jax.debug.callback(lambda: built.append(1))
    return {"w": jnp.ones(3)}

  with ckpt.Checkpointer(tmp_path) as c:
    first = c.restore_or_init(init)
    assert (first.step, first.next_step, first.extras) == (None, 0, None)
    jax.effects_barrier()
    assert built == [1]
    c.save(0, {"w": jnp.full(3, 2.0)})
  with ckpt.Checkpointer(tmp_path) as c:
    again = c.restore_or_init(init)
    jax.effects_barrier()
    assert built == [1]
    assert_same(again.state, {"w": jnp.full(3, 2.0)})
    assert again.next_step == 1


def test_restore_or_init_keeps_the_shardings_of_init(tmp_path):
  mesh = jax.make_mesh((2,), ("x",))
  spread = NamedSharding(mesh, P("x"))
  init = jax.jit(lambda: {"w": jnp.arange(4.0)}, out_shardings=spread)
  with ckpt.Checkpointer(tmp_path) as c:
    c.save(0, init())
    assert c.restore_or_init(init).state["w"].sharding == spread

    def eager():
      return {"w": jax.device_put(np.arange(4.0, dtype=np.float32), spread)}

    assert c.restore_or_init(eager).state["w"].sharding == spread


def test_relative_and_home_paths_work(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv("HOME", str(tmp_path))
  with ckpt.Checkpointer("runs/a") as c:
    c.save(0, {"x": 1})
  with ckpt.Checkpointer("~/runs/a") as c:
    assert c.latest_step() == 0
    assert str(c.directory) == str(tmp_path / "runs/a")


def test_empty_directory_is_not_a_step(tmp_path):
  (tmp_path / "4").mkdir()
  with ckpt.Checkpointer(tmp_path) as c:
    assert c.steps() == [] and c.latest_step() is None
    with pytest.raises(ckpt.NoCheckpointError):
      c.restore()


def test_missing_step_names_those_that_exist(tmp_path):
  with ckpt.Checkpointer(tmp_path) as c:
    c.save(3, {"x": 1})
    with pytest.raises(ckpt.NoCheckpointError, match="committed steps: 3"):
      c.restore(7)


def test_schedule_decides_and_force_overrides(tmp_path):
  with ckpt.Checkpointer(tmp_path, ckpt.Config(schedule={"every_steps": 3})) as c:
    saved = [c.save(step, {"x": step}) for step in range(7)]
    assert saved == [True, False, False, True, False, False, True]
    assert c.save(8, {"x": 8}, force=True)
    with pytest.raises(ckpt.CheckpointError, match="step 8 is saved already"):
      c.save(8, {"x": 9}, force=True)
    c.wait()
    assert c.restore(8).state["x"] == 8


def test_retention_keeps_last_and_best(tmp_path):
  config = ckpt.Config(retention={"last": 2, "best": {"metric": "loss", "mode": "min", "n": 1}})
  with ckpt.Checkpointer(tmp_path, config) as c:
    for step, loss in enumerate([3.0, 1.0, 2.0, 5.0, 4.0]):
      c.save(step, {"x": step}, metrics={"loss": loss})
    c.wait()
    assert c.best_step() == 1
  assert [s.step for s in ckpt.Checkpointer(tmp_path, config).steps()] == [1, 3, 4]


def test_older_step_saved_later_never_deletes_a_newer_one(tmp_path):
  with ckpt.Checkpointer(tmp_path, ckpt.Config(retention={"last": 1})) as c:
    c.save(5, {"x": 5})
    c.save(3, {"x": 3}, force=True)
    c.wait()
    assert 5 in [s.step for s in c.steps()]


SCRIPT = """
import jax.numpy as jnp, ckpt_jax as ckpt, sys
runs = [ckpt.Checkpointer(run) for run in sys.argv[1:]]
for run in runs:
  run.save(1, {"w": jnp.ones((256, 1024)), "b": [jnp.ones(10)] * 50})
"""


def test_script_that_ends_without_close_still_commits(tmp_path):
  runs = [tmp_path / str(i) for i in range(3)]
  done = subprocess.run([sys.executable, "-c", SCRIPT, *runs], capture_output=True, text=True, timeout=120)
  assert done.returncode == 0, done.stderr
  for run in runs:
    with ckpt.Checkpointer(run) as c:
      assert c.latest_step() == 1


def test_failed_background_save_is_raised_once_and_its_step_is_not_listed(tmp_path, monkeypatch):
  with ckpt.Checkpointer(tmp_path) as c:
    c.save(0, {"x": jnp.ones(4)})
    c.wait()
    # Any storage can fail in the last operation of a write.
    from orbax.checkpoint._src.path import atomicity

    def fail(*_, **__):
      raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomicity.AtomicRenameTemporaryPath, "finalize", fail)
    c.save(1, {"x": jnp.ones(4)})
    with pytest.raises(ckpt.SaveFailedError, match=r"step 1 was not saved.*newest committed step is 0") as e:
      c.wait()
    assert isinstance(e.value, ckpt.OutOfSpaceError) and e.value.step == 1
    monkeypatch.undo()
    c.wait()
    assert [s.step for s in c.steps()] == [0] and c.latest_step() == 0
    assert c.save(2, {"x": jnp.full(4, 2.0)})
    c.wait()
    assert c.latest_step() == 2
    assert c.restore().state["x"].tolist() == [2.0] * 4


def test_too_little_memory_saves_in_chunks_and_says_so(tmp_path, monkeypatch, caplog):
  monkeypatch.setattr("ckpt_jax.save.host_memory.available_memory", lambda: 1_000_000)
  state = {"x": jnp.ones((1 << 20,))}
  with ckpt.Checkpointer(tmp_path) as c, caplog.at_level(logging.WARNING, "ckpt_jax"):
    c.save(0, state)
    assert c.latest_step() == 0, "the chunked save blocks until it is committed"
    assert c.restore().state["x"].sum() == 1 << 20
    assert c.saves[0].background_s == 0, "what training waits for counts as blocking time"
  assert "4.4 MiB" in caplog.text and "976.6 KiB" in caplog.text


def test_closed_checkpointer_raises_an_error(tmp_path):
  c = ckpt.Checkpointer(tmp_path)
  c.close()
  c.close()
  with pytest.raises(ckpt.CheckpointError, match="closed"):
    c.save(0, {"x": 1})


def test_import_loads_nothing_large_beyond_jax_and_orbax():
  code = "import sys, jax, orbax.checkpoint; before = set(sys.modules)\n"
  code += "import ckpt_jax; ckpt_jax.Checkpointer; print(*(set(sys.modules) - before))"
  out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
  loaded = {name.partition(".")[0] for name in out.stdout.split()}
  large = {"aiobotocore", "aiohttp", "botocore", "flax", "gcsfs", "google", "hypothesis", "matplotlib", "moto", "optax"}
  assert "ckpt_jax" in loaded and not loaded & (large | {"rich", "s3fs", "scipy", "tensorflow", "torch", "typer"})


def test_a_run_on_a_disk_loads_no_client_of_a_bucket(tmp_path):
  code = "import sys, numpy, ckpt_jax\nwith ckpt_jax.Checkpointer(sys.argv[1]) as c: c.save(0, {'x': numpy.ones(3)})\n"
  code += "print(*sys.modules)"
  command = [sys.executable, "-c", code, os.fspath(tmp_path / "run")]
  out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
  loaded = {name.partition(".")[0] for name in out.stdout.split()}
  assert "ckpt_jax" in loaded and not loaded & {"aiobotocore", "aiohttp", "boto3", "botocore", "gcsfs", "s3fs"}


def test_files_are_not_world_writable(tmp_path):
  with ckpt.Checkpointer(tmp_path / "run") as c:
    c.save(0, {"x": jnp.ones(3)})
  assert not [p for p in pathlib.Path(tmp_path / "run").rglob("*") if os.stat(p).st_mode & 0o002]
