"""What other programs left where a run is to begin: training starts at 0 only where nothing looks like a checkpoint."""

import json
import os
import pickle
import shutil

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax.training import checkpoints, train_state
from jobs import together
from typer.testing import CliRunner

import ckpt_jax as ckpt
from ckpt_jax.cli import app
from ckpt_jax.errors import ConfigError, CorruptCheckpointError, NoCheckpointError, NotARunError
from ckpt_jax.inference.convert import convert, read_flax
from ckpt_jax.run import foreign
from ckpt_jax.run.steps import run_directory


def state(value=0.0):
  return {"w": jnp.full(3, value, jnp.float32)}


def orbax_run(path, *steps, **options):
  with ocp.CheckpointManager(path, options=ocp.CheckpointManagerOptions(**options)) as manager:
    for step in steps:
      manager.save(step, args=ocp.args.StandardSave(state(step)))


def flax_files(path, target, *steps, **options):
  with flax.config.temp_flip_flag("use_orbax_checkpointing", False):
    for step in steps:
      checkpoints.save_checkpoint(path, target(step), step, keep=10, **options)


def command(*args, monkeypatch, capsys):
  """Exit code, stdout and stderr of a command, as a shell has them."""
  monkeypatch.setattr("sys.argv", ["ckpt-jax", *map(str, args)])
  with pytest.raises(SystemExit) as e:
    app.main()
  out = capsys.readouterr()
  return e.value.code, out.out, out.err


def everything_in(path):
  return sorted(str(p) for p in path.rglob("*"))


def assert_refused(path, *named):
  """Nothing opens it: one error names what is there and the way out, and no trace is left."""
  before = everything_in(path)
  with pytest.raises(NotARunError) as e:
    ckpt.Checkpointer(path)
  assert all(name in str(e.value) for name in named), str(e.value)
  for opened in (
    lambda: ckpt.verify(path),
    lambda: CliRunner().invoke(app.app, ["ls", str(path)], catch_exceptions=False),
  ):
    with pytest.raises(NotARunError) as again:
      opened()
    assert str(again.value) == str(e.value)
  assert everything_in(path) == before


def test_a_steps_own_directory_and_an_item_of_it_name_the_run(tmp_path):
  orbax_run(tmp_path / "run", 3)
  step = tmp_path / "run" / "3"
  assert_refused(step, f'Checkpointer("{tmp_path / "run"}").restore(3)')
  assert_refused(step / "default", f'Checkpointer("{tmp_path / "run"}").restore(3, item="default")')
  with ckpt.Checkpointer(tmp_path / "run") as c:
    assert c.restore(3, item="default").state["w"][0] == 3
  orbax_run(tmp_path / "padded", 3, step_prefix="ckpt", step_format_fixed_length=4)
  assert_refused(tmp_path / "padded" / "ckpt_0003", f'Checkpointer("{tmp_path / "padded"}").restore(3)')


def test_a_directory_of_runs_names_them(tmp_path):
  orbax_run(tmp_path / "exp_1", 3)
  with ckpt.Checkpointer(tmp_path / "exp_2") as c:
    c.save(7, state())
  (tmp_path / "notes").mkdir()
  assert_refused(tmp_path, "exp_1, exp_2", f'Checkpointer("{tmp_path / "exp_1"}")')
  flax_files(tmp_path / "deep" / "flax", state, 4)
  assert_refused(tmp_path / "deep", "flax")


def test_checkpoints_without_a_step_number_become_steps_by_convert(tmp_path, monkeypatch, capsys):
  with ocp.StandardCheckpointer() as c:
    c.save(tmp_path / "one", state(5))
  assert_refused(tmp_path / "one", "without a step number", "ckpt-jax convert", "--step 0")
  assert_refused(tmp_path, "one", "ckpt-jax convert")
  args = {"monkeypatch": monkeypatch, "capsys": capsys}
  code, _, err = command("convert", tmp_path / "one", tmp_path / "new", **args)
  assert code == 2 and "--step N" in err
  code, out, _ = command("convert", tmp_path / "one", tmp_path / "new", "--step", 9, **args)
  assert code == 0 and f"{tmp_path / 'one'} -> step 9" in out
  with ckpt.Checkpointer(tmp_path / "new") as c:
    restored = c.restore_or_init(state)
    assert (restored.next_step, restored.state["w"][0]) == (10, 5)
  code, _, err = command("convert", tmp_path / "one", tmp_path / "new", "--step", 9, **args)
  assert code == 1 and "has steps [9] already" in err


def test_flax_train_states_are_converted_bitwise_and_training_goes_on(tmp_path, assert_same):
  tx = optax.chain(optax.clip(1.0), optax.adam(1e-3))

  def make(step):
    params = {"dense": {"kernel": jax.random.normal(jax.random.key(step), (3, 4)), "bias": jnp.zeros(4, jnp.bfloat16)}}
    made = train_state.TrainState.create(apply_fn=None, params=params, tx=tx)
    with jax.numpy_dtype_promotion("standard"):  # optax needs it
      return made.apply_gradients(grads=params) if step else made

  flax_files(tmp_path / "old", make, 2, 9, 10)
  assert_refused(tmp_path / "old", "flax.training.checkpoints", "checkpoint_10", "ckpt-jax convert")
  assert_refused(tmp_path / "old" / "checkpoint_9", "flax", "ckpt-jax convert")
  assert [one.step for one in convert(tmp_path / "old", tmp_path / "new")] == [2, 9, 10]
  with ckpt.Checkpointer(tmp_path / "new") as c:
    restored = c.restore_or_init(lambda: make(0))
    assert restored.next_step == 11 and restored.report.verified == len(jax.tree.leaves(restored.state))
    assert_same(restored.state, make(10))
    assert c.save(11, restored.state)
  (one,) = convert(tmp_path / "old" / "checkpoint_9", tmp_path / "third")
  assert one.step == 9


def test_files_of_flax_that_cannot_be_read_are_an_error_that_names_the_file(tmp_path):
  flax_files(tmp_path / "old", state, 1)
  file = tmp_path / "old" / "checkpoint_1"
  whole = file.read_bytes()
  file.write_bytes(whole[:-5])
  with pytest.raises(CorruptCheckpointError, match="checkpoint_1"):
    list(convert(tmp_path / "old", tmp_path / "new"))
  file.write_bytes(flax.serialization.msgpack_serialize({"w": "//GDAPlaceholder:w"}))
  with pytest.raises(ckpt.CheckpointError, match=r"w is in checkpoint_1_gda"):
    read_flax(run_directory(file))
  with pytest.raises(NoCheckpointError, match="no checkpoint 7 to convert; there are \\[1\\]"):
    list(convert(tmp_path / "old", tmp_path / "new", step=7))
  flax_files(tmp_path / "half", state, 1.5)
  assert_refused(tmp_path / "half", "checkpoint_1.5", "ckpt-jax convert")
  with pytest.raises(ConfigError, match=r"convert .*checkpoint_1\.5 RUN --step N"):
    list(convert(tmp_path / "half", tmp_path / "new"))
  flax_files(tmp_path / "old", state, 1, prefix="best_")
  with pytest.raises(ckpt.CheckpointError, match=r"several kinds \(best_\*, checkpoint_\*\)"):
    list(convert(tmp_path / "old", tmp_path / "new"))


def test_large_arrays_that_flax_wrote_in_chunks_come_back_whole(tmp_path, monkeypatch):
  monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 64)
  value = np.arange(1000, dtype=np.float32).reshape(10, 100)
  flax_files(tmp_path / "old", lambda step: {"a": value, "b": {"c": value[:1]}}, 1)
  list(convert(tmp_path / "old", tmp_path / "new"))
  with ckpt.Checkpointer(tmp_path / "new") as c:
    found = c.restore().state
  assert found["a"].tobytes() == value.tobytes() and found["b"]["c"].tobytes() == value[:1].tobytes()


def test_a_run_of_flax_through_orbax_is_read_and_not_continued_by_steps_that_it_could_not_read(tmp_path):
  for step in (1, 12):
    checkpoints.save_checkpoint(tmp_path, state(step), step, keep=5, orbax_checkpointer=ocp.PyTreeCheckpointer())
  with ckpt.Checkpointer(tmp_path, {"item": "state"}) as c:  # there are no items: it says nothing here
    restored = c.restore_or_init(state)
    assert (restored.next_step, restored.state["w"][0]) == (13, 12)
    for due in (True, False):
      with pytest.raises(ckpt.CheckpointError, match="save into another directory"):
        c.save(13 if due else 14, state(), force=due)
  assert sorted(n for n in os.listdir(tmp_path) if n[0] != ".") == ["checkpoint_1", "checkpoint_12"]
  assert [one.step for one in convert(tmp_path, tmp_path / "new")] == [1, 12]


@pytest.mark.parametrize(
  "name", ["checkpoint_100.npz", "ckpt.pkl", "step-40.pt", "model_epoch3.msgpack", "last.ckpt", "weights.eqx"]
)
def test_checkpoints_of_programs_that_are_not_read_block_too(tmp_path, name):
  (tmp_path / name).write_bytes(pickle.dumps({"w": 1}))
  assert_refused(tmp_path, name, "another directory")


def test_logs_and_settings_do_not_keep_a_run_from_starting(tmp_path):
  for name in ("logs", "wandb/run-1", ".hydra", "tensorboard", "4", "plots_2026"):
    (tmp_path / name).mkdir(parents=True)
  files = {
    "config.yaml": b"a: 1",
    "events.out.tfevents.1690000000.host.12.0": b"\x18\0\0\0\0\0\0\0\xa3\x7fK",
    "train.log": b"step 1",
    "vocab.npy": b"\x93NUMPY",
    "literature.bin": b"",
    "metrics_2": b"",
    "core.1234": b"\x7fELF",
    "state_7": pickle.dumps({"a": 1}),
    "checkpoint": b'model_checkpoint_path: "ckpt-1"',
    "image_1": b"\x89PNG\r\n",
  }
  for name, content in files.items():
    (tmp_path / name).write_bytes(content)
  shutil.copytree(tmp_path, tmp_path / "7.orbax-checkpoint-tmp-1234")
  with ckpt.Checkpointer(tmp_path) as c:
    assert c.restore_or_init(state).next_step == 0
    c.save(0, state(1))
  with ckpt.Checkpointer(tmp_path) as c:
    assert c.restore_or_init(state).next_step == 1


def test_a_run_that_holds_another_run_begins_afresh_once_it_was_opened(tmp_path):
  ckpt.Checkpointer(tmp_path).close()
  with ckpt.Checkpointer(tmp_path) as c, ckpt.Checkpointer(tmp_path / "best") as best:
    assert c.save(1, state(1)) and best.save(1, state(1))
  shutil.rmtree(tmp_path / "1")
  with ckpt.Checkpointer(tmp_path) as c:
    assert c.restore_or_init(state).next_step == 0


def test_checkpoints_beside_the_steps_that_an_earlier_job_overlooked_are_a_warning(tmp_path, caplog):
  orbax_run(tmp_path / "ahead", 12, step_prefix="ckpt")
  orbax_run(tmp_path, 3)
  with ckpt.Checkpointer(tmp_path) as c:
    assert c.latest_step() == 3 and not caplog.records
  (tmp_path / "ahead" / "ckpt_12").rename(tmp_path / "ckpt_12")
  flax_files(tmp_path, state, 7)
  with ckpt.Checkpointer(tmp_path) as c:
    assert c.restore_or_init(state).next_step == 4
  (warning,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
  assert "checkpoint_7, ckpt_12" in warning


@pytest.mark.parametrize(
  "path", ["", "  ", None, 7, "$CKPT_JAX_NO_SUCH_VARIABLE/run", "gs://${CKPT_JAX_EMPTY}/run", "s3:/one"]
)
def test_a_directory_that_is_none_is_refused_before_anything_is_written(path, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv("CKPT_JAX_EMPTY", " ")
  for opened in (ckpt.Checkpointer, ckpt.verify):
    with pytest.raises(ConfigError) as e:
      opened(path)
    assert (
      (path or "").strip().split("/")[0].strip("${}") in str(e.value) if isinstance(path, str) else str(path) in str(e)
    )
  assert everything_in(tmp_path) == []
  if isinstance(path, str):
    for args in (["ls", path], ["verify", path], ["show", path], ["convert", str(tmp_path), path]):
      assert isinstance(CliRunner().invoke(app.app, args).exception, (ConfigError, NoCheckpointError))


def test_a_variable_in_the_directory_is_its_value_unless_a_directory_is_called_so(tmp_path, monkeypatch):
  monkeypatch.setenv("CKPT_JAX_HERE", str(tmp_path))
  assert str(run_directory("$CKPT_JAX_HERE/a")) == str(run_directory("${CKPT_JAX_HERE}/a")) == f"{tmp_path}/a"
  (tmp_path / "$CKPT_JAX_HERE").mkdir()
  monkeypatch.chdir(tmp_path)
  assert str(run_directory("$CKPT_JAX_HERE")) == f"{tmp_path}/$CKPT_JAX_HERE"


def test_several_kinds_of_checkpoints_are_told_apart(tmp_path):
  for name in ("model_10", "opt_10"):
    with ocp.StandardCheckpointer() as c:
      c.save(tmp_path / name, state(5))
  with pytest.raises(NotARunError, match=r"model_\*, opt_\*"):
    ckpt.Checkpointer(tmp_path)
  assert json.dumps([p.name for p in foreign.flax_files(run_directory(tmp_path))]) == "[]"


@pytest.mark.multiprocess
def test_a_job_of_several_processes_decides_alike_what_a_directory_is(tmp_path):
  from orbax.checkpoint import v1

  held = {"w": jnp.full(8, 12, jnp.float32)}
  with ocp.CheckpointManager(
    tmp_path / "prefixed", options=ocp.CheckpointManagerOptions(step_prefix="c", step_format_fixed_length=4)
  ) as manager:
    manager.save(12, args=ocp.args.StandardSave(held))
  with v1.training.Checkpointer(tmp_path / "v1") as theirs:
    theirs.save(12, held)
  together("foreign.py", *(tmp_path / name for name in ("prefixed", ".", "v1")), processes=2)
  assert sorted(n for n in os.listdir(tmp_path / "prefixed") if n[0] != ".") == ["c_0012", "c_0013"]
  with v1.training.Checkpointer(tmp_path / "v1") as theirs:
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])  # saved by devices that this process does not have
    assert theirs.load(abstract_state={"w": jax.ShapeDtypeStruct((8,), jnp.float32, sharding=here)})["w"][0] == 13
