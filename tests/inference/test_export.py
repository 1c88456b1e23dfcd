"""Exports of real runs: what is in them, what is refused, and what becomes of one that is interrupted."""

import json
import logging
import pathlib
import shutil
import signal
import subprocess
import sys

import flax.linen
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import safetensors
import safetensors.numpy
from commands import cli
from flax import nnx
from flax.training.train_state import TrainState

import ckpt_jax as ckpt
from ckpt_jax.inference.source import parameters

PROGRAM = pathlib.Path(__file__).parents[1] / "programs" / "exports.py"


def weights(seed=0):
  rng = np.random.default_rng(seed)

  def normal(*shape):
    return jnp.asarray(rng.standard_normal(shape, dtype=np.float32))

  layers = [{"kernel": normal(64, 96), "bias": normal(96), "norm": {"scale": normal(64)}} for _ in range(3)]
  return {"embed": {"embedding": normal(100, 64)}, "layers": layers, "head": normal(64, 50)}


def save(run, state, step=5, **config):
  with ckpt.Checkpointer(run, config or None) as c:
    c.save(step, state, force=True)
  return run


@pytest.fixture
def trained(tmp_path):
  """A run with one step, and its parameters."""
  params = weights()
  return save(tmp_path / "run", {"params": params, "opt": optax.adam(1e-3).init(params), "step": 5}), params


def direct(params, dtype):
  return jax.tree.map(lambda x: np.asarray(x).astype(dtype), params)


def data_bytes(directory):
  files = [f for f in directory.rglob("*") if f.is_file() and f.name.replace(".", "").isdecimal()]
  return sum(f.stat().st_size for f in files)


def contents(directory):
  return {str(f.relative_to(directory)): f.read_bytes() for f in directory.rglob("*") if f.is_file()}


# -- what an export holds


def test_bfloat16_is_the_direct_cast_for_plain_orbax_and_a_sixth_of_the_state(tmp_path, trained, assert_same):
  run, params = trained
  report = ckpt.export(run, 5, tmp_path / "out")
  want = direct(params, ml_dtypes.bfloat16)
  assert_same(ocp.PyTreeCheckpointer().restore(tmp_path / "out"), want)
  sharding = jax.sharding.NamedSharding(jax.make_mesh((2,), ("x",)), jax.sharding.PartitionSpec())
  like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), want)
  assert_same(ocp.StandardCheckpointer().restore(tmp_path / "out", like), jax.device_put(want, sharding))
  state = sum(x.nbytes for x in jax.tree.leaves((params, optax.adam(1e-3).init(params)[0].mu, params)))
  assert report.nbytes == data_bytes(tmp_path / "out") == state // 6
  assert report.source_nbytes == 2 * report.nbytes


def test_safetensors_load_with_the_library_by_the_logic_of_an_index(tmp_path, trained):
  run, params = trained
  ckpt.export(run, "latest", tmp_path / "out", format="safetensors", shard_size=30_000)
  index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
  found = {}
  for file in sorted(set(index["weight_map"].values())):
    with safetensors.safe_open(tmp_path / "out" / file, "np") as opened:
      assert opened.metadata() == {"format": "pt"}
    found |= safetensors.numpy.load_file(tmp_path / "out" / file)
  assert found.keys() == index["weight_map"].keys() and len(set(index["weight_map"].values())) > 2
  assert index["metadata"]["total_size"] == sum(x.nbytes for x in found.values())
  for keys, x in jax.tree_util.tree_leaves_with_path(direct(params, ml_dtypes.bfloat16)):
    name = ".".join(str(getattr(k, "key", getattr(k, "idx", None))) for k in keys)
    assert (found[name].shape, found[name].tobytes()) == (x.shape, x.tobytes())


def test_rules_give_names_and_lead_back(tmp_path, trained, assert_same):
  run, params = trained
  rules = {"layers/*/kernel": "model.layers.*.linear.weight:T", "layers/*/**": "model.layers.*.**"}
  ckpt.export(run, 5, tmp_path / "out", dtype=None, format="safetensors", rename=rules)
  found = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
  np.testing.assert_array_equal(found["model.layers.1.linear.weight"], np.asarray(params["layers"][1]["kernel"]).T)
  assert "model.layers.0.norm.scale" in found and "embed.embedding" in found
  assert_same(ckpt.load_safetensors(tmp_path / "out", like=params, rename=rules), params)
  assert_same(ckpt.load_quantized(tmp_path / "out"), params)


def test_names_that_two_leaves_would_share_are_refused_before_anything_is_written(tmp_path, trained):
  with pytest.raises(ckpt.ConfigError, match=r"layers/0/bias and layers/1/bias would both be called bias"):
    ckpt.export(
      trained[0], 5, tmp_path / "out", format="safetensors", rename=["layers/0/bias=bias", "layers/1/bias=bias"]
    )
  assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("format", ["orbax", "safetensors"])
@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_matrices_are_quantised_and_the_rest_is_cast(tmp_path, trained, format, quantize):
  run, params = trained
  report = ckpt.export(run, 5, tmp_path / "out", quantize=quantize, group=32, format=format, keep=["layers/2"])
  assert report.quantized == ("head", "layers/0/kernel", "layers/1/kernel")
  got = ckpt.load_quantized(tmp_path / "out")
  assert got["embed"]["embedding"].dtype == got["layers"][2]["kernel"].dtype == jnp.bfloat16
  weight, true = got["layers"][0]["kernel"], params["layers"][0]["kernel"]
  assert isinstance(weight, ckpt.QuantizedArray) and weight.values.dtype.name == quantize
  assert weight.scale.shape == ((1, 96) if quantize == "int8" else (2, 96))
  step = jnp.repeat(weight.scale, 64 // weight.scale.shape[0], 0)
  assert bool(jnp.all(jnp.abs(weight.dequantize() - true) <= step * 0.50001))
  x = jnp.asarray(np.random.default_rng(1).standard_normal((4, 64), dtype=np.float32))
  np.testing.assert_allclose(jax.jit(lambda x, w: x @ w)(x, weight), x @ weight.dequantize(), rtol=1e-4, atol=1e-4)
  plain = ckpt.dequantize(got, jnp.float32)
  assert plain["layers"][0]["kernel"].shape == (64, 96) and plain["embed"]["embedding"].dtype == jnp.bfloat16


def test_leaves_that_are_no_floats_stay_and_keys_are_left_out_and_said(tmp_path):
  tree = {"w": jnp.ones((4, 4)), "n": jnp.arange(3), "rng": jax.random.key(0), "empty": np.zeros((0, 3), np.float32)}
  run = save(tmp_path / "run", {"params": tree | {"flag": True, "x": 0.5}})
  report = ckpt.export(run, 5, tmp_path / "out", format="safetensors")
  assert report.left_out == {"rng": "key<fry>"}
  found = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
  assert {n: (str(x.dtype), x.shape) for n, x in found.items()} == {
    "w": ("bfloat16", (4, 4)),
    "n": ("int32", (3,)),
    "empty": ("bfloat16", (0, 3)),
    "flag": ("bool", ()),
    "x": ("bfloat16", ()),
  }


def test_large_leaves_go_through_in_boxes_whatever_their_chunks(tmp_path, assert_same):
  mesh = jax.make_mesh((2,), ("x",))
  rng = np.random.default_rng(0)
  specs = {"rows": ("x", None), "columns": (None, "x"), "whole": ()}
  params = {
    name: jax.device_put(
      rng.standard_normal((512, 384), dtype=np.float32),
      jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*s)),
    )
    for name, s in specs.items()
  }
  run = save(tmp_path / "run", {"params": params}, layout={"chunk_size": 1 << 16})
  ckpt.export(run, 5, tmp_path / "small", memory=1 << 18)
  assert_same(ocp.PyTreeCheckpointer().restore(tmp_path / "small"), direct(params, ml_dtypes.bfloat16))
  for quantize in ("int8", "int4"):
    ckpt.export(run, 5, tmp_path / f"{quantize}-small", quantize=quantize, memory=1 << 18)
    ckpt.export(run, 5, tmp_path / f"{quantize}-large", quantize=quantize)
    assert contents(tmp_path / f"{quantize}-small") == contents(tmp_path / f"{quantize}-large")


@pytest.mark.parametrize("format", ["orbax", "safetensors"])
def test_keys_with_dots_and_single_arrays_load_again(tmp_path, format):
  run = save(tmp_path / "run", {"params": {"layer.0": {"w.x": jnp.ones((32, 32))}}, "step": jnp.int32(7)})
  for quantize in (None, "int8"):
    ckpt.export(run, 5, tmp_path / f"{quantize}", quantize=quantize, format=format)
    got = ckpt.dequantize(ckpt.load_quantized(tmp_path / f"{quantize}"))
    assert np.allclose(got["layer.0"]["w.x"].astype(jnp.float32), 1)
  ckpt.export(run, 5, tmp_path / "one", subtree="step", format=format)
  assert ckpt.load_quantized(tmp_path / "one") == 7


@pytest.mark.parametrize("format", ["orbax", "safetensors"])
def test_quantised_matrices_load_onto_a_mesh(tmp_path, trained, assert_same, format):
  run, params = trained
  ckpt.export(run, 5, tmp_path / "out", quantize="int4", group=32, format=format)
  mesh = jax.make_mesh((2,), ("x",))

  def place(leaf):
    spec = jax.sharding.PartitionSpec(*[None] * (leaf.ndim - 1), "x")
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=jax.sharding.NamedSharding(mesh, spec))

  like = jax.tree.map(place, params)
  got = ckpt.load_quantized(tmp_path / "out", like)
  assert_same(jax.tree.map(np.asarray, got), jax.tree.map(np.asarray, ckpt.load_quantized(tmp_path / "out")))
  weight = got["layers"][0]["kernel"]
  assert weight.values.sharding == like["layers"][0]["kernel"].sharding
  assert weight.scale.sharding.shard_shape(weight.scale.shape) == (2, 48)
  del like["head"]
  with pytest.raises(ckpt.StructureMismatchError, match=r"head: exported \(64, 50\), asked for not at all"):
    ckpt.load_quantized(tmp_path / "out", like)


# -- where the parameters are


def test_parameters_of_flax_and_nnx_states_are_found():
  model = flax.linen.Dense(3)
  variables = model.init(jax.random.key(0), jnp.ones((1, 2)))
  state = TrainState.create(apply_fn=model.apply, params=variables["params"], tx=optax.adam(1e-3))
  module = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
  states = [state, {"state": state, "data": {"n": 1}}, {"model": module, "optimizer": module}, {"params": module}]
  want = ["params", "state/params", "model", "params"]
  for one, node in zip(states, want, strict=True):
    paths = [
      "/".join(str(getattr(k, "key", getattr(k, "name", k))) for k in p)
      for p, _ in jax.tree_util.tree_leaves_with_path(one)
    ]
    assert parameters(paths, None, ema=False, where="here") == node


def test_unclear_parameters_are_an_error_that_names_what_there_is():
  with pytest.raises(
    ckpt.ConfigError, match=r"no node is called like parameters; at the top there are a, b\. Say which"
  ):
    parameters(["a/w", "b/w"], None, ema=False, where="here")
  with pytest.raises(
    ckpt.ConfigError, match=r"may be critic/params or actor/params|may be actor/params or critic/params"
  ):
    parameters(["actor/params/w", "critic/params/w"], None, ema=False, where="here")
  with pytest.raises(ckpt.ConfigError, match="no node is called like averaged parameters"):
    parameters(["params/w"], None, ema=True, where="here")
  assert parameters(["params/w", "ema_params/w"], None, ema=True, where="here") == "ema_params"
  assert parameters(["a/w", "b/w"], ".", ema=False, where="here") == ""


def test_best_and_latest_steps_are_found(tmp_path):
  with ckpt.Checkpointer(tmp_path / "run") as c:
    for step, loss in enumerate([3.0, 1.0, 2.0]):
      c.save(step, {"params": jnp.full((2,), loss)}, metrics={"loss": loss}, force=True)
  for number, (step, want) in enumerate([("best", 1), ("best:loss:max", 0), ("latest", 2), ("1", 1), (np.int64(2), 2)]):
    assert ckpt.export(tmp_path / "run", step, tmp_path / f"{number}").step == want
  with pytest.raises(ckpt.NoCheckpointError, match="no step has a metric 'accuracy'"):
    ckpt.export(tmp_path / "run", "best:accuracy", tmp_path / "out")


# -- what is refused


def test_numbers_too_large_for_float16_are_refused_unless_told(tmp_path):
  run = save(
    tmp_path / "run", {"params": {"a": jnp.asarray([1.0, 70000.0, -1e6, jnp.inf])}}, health={"nonfinite": "ignore"}
  )
  with pytest.raises(ckpt.CheckpointError, match=r"a: 2 numbers up to 1e\+06 are too large for float16"):
    ckpt.export(run, 5, tmp_path / "out", dtype="float16")
  assert not (tmp_path / "out").exists()
  report = ckpt.export(run, 5, tmp_path / "out", dtype="float16", overflow=True)
  assert (report.losses["a"].overflowed, report.losses["a"].nonfinite) == (2, 1)
  assert np.isinf(ocp.PyTreeCheckpointer().restore(tmp_path / "out")["a"]).tolist() == [False, True, True, True]


def test_existing_output_is_not_touched_unless_told(tmp_path, trained):
  run, _ = trained
  (tmp_path / "out").mkdir()
  (tmp_path / "out" / "mine").write_text("x")
  with pytest.raises(ckpt.CheckpointError, match="exists and is not empty"):
    ckpt.export(run, 5, tmp_path / "out")
  assert contents(tmp_path / "out") == {"mine": b"x"}
  ckpt.export(run, 5, tmp_path / "out", overwrite=True)
  assert ckpt.verify(tmp_path / "out") == [] and not (tmp_path / "out" / "mine").exists()
  assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "run"]


def test_damaged_step_is_not_exported(tmp_path, trained):
  run, params = trained
  value = np.asarray(params["layers"][1]["kernel"]).tobytes()[:64]
  (file,) = [f for f in run.rglob("*") if f.is_file() and value in f.read_bytes()]
  data = bytearray(file.read_bytes())
  data[data.index(value) + 5] ^= 1
  file.write_bytes(data)
  with pytest.raises(ckpt.CorruptCheckpointError, match="params/layers/1/kernel is not what was saved"):
    ckpt.export(run, 5, tmp_path / "out")
  assert not (tmp_path / "out").exists()


def test_step_that_is_deleted_meanwhile_is_said_to_be_gone(tmp_path, trained):
  run, _ = trained
  with pytest.raises(ckpt.NoCheckpointError, match="was deleted while it was exported; pin"):
    ckpt.export(run, 5, tmp_path / "out", memory=1 << 12, progress=lambda done, total: shutil.rmtree(run / "5", True))


def test_non_finite_matrix_is_not_quantised(tmp_path):
  run = save(tmp_path / "run", {"params": {"a": jnp.full((32, 32), jnp.nan)}}, health={"nonfinite": "ignore"})
  with pytest.raises(ckpt.CheckpointError, match=r"a: has numbers that are not finite.*keep='a'"):
    ckpt.export(run, 5, tmp_path / "out", quantize="int8")


# -- verify


@pytest.mark.parametrize("format", ["orbax", "safetensors"])
def test_flipped_bit_of_an_export_is_found_and_named(tmp_path, trained, format):
  run, params = trained
  out = tmp_path / "out"
  ckpt.export(run, 5, out, format=format)
  assert ckpt.verify(out) == [] and ckpt.verify(out, 5) == []
  value = direct(params, ml_dtypes.bfloat16)["layers"][1]["kernel"].tobytes()[:64]
  (file,) = [f for f in out.rglob("*") if f.is_file() and value in f.read_bytes()]
  data = bytearray(file.read_bytes())
  data[data.index(value) + 5] ^= 1
  file.write_bytes(data)
  (finding,) = ckpt.verify(out)
  assert (finding.step, finding.kind, finding.leaf) == (5, "data", "layers.1.kernel")
  assert finding.file == str(file.relative_to(out))
  file.write_bytes(data[:-1])
  assert "is cut short" in [f.message for f in ckpt.verify(out)]
  file.unlink()
  assert [f.message for f in ckpt.verify(out)] == ["missing"]
  assert cli("verify", out).returncode == 1


def test_a_record_that_lacks_something_is_damaged(tmp_path):
  (tmp_path / "ckpt_jax_export.json").write_text('{"about": {}, "leaves": {}, "files": {"f": [[1, "hash"]]}}')
  with pytest.raises(ckpt.CorruptCheckpointError, match=r"ckpt_jax_export.json: damaged \(tree: Field required\)"):
    ckpt.load_quantized(tmp_path)


def test_an_export_is_no_run(tmp_path, trained):
  ckpt.export(trained[0], 5, tmp_path / "out", format="safetensors")
  with pytest.raises(ckpt.NotARunError, match="is an export"):
    ckpt.Checkpointer(tmp_path / "out")
  with pytest.raises(ckpt.NoCheckpointError, match="is an export of step 5"):
    ckpt.verify(tmp_path / "out", 6)


# -- interruptions


def run_program(*arguments):
  return subprocess.run([sys.executable, PROGRAM, *map(str, arguments)], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("format", ["orbax", "safetensors"])
def test_killed_export_resumes_to_the_same_bytes(tmp_path, trained, format):
  run, _ = trained
  killed = run_program(run, tmp_path / "out", format, "kill")
  assert killed.returncode == -signal.SIGKILL, killed.stderr
  assert not (tmp_path / "out").exists()
  (place,) = tmp_path.glob(".out.exporting")
  notes = [f.name for f in (place / ".ckpt_jax-exporting").iterdir()]
  assert "plan" in notes and len(notes) > 1  # some units were finished
  read = []
  more = {"memory": 1 << 16, "shard_size": 30_000, "format": format}
  ckpt.export(run, 5, tmp_path / "out", progress=lambda done, total: read.append(total), **more)
  whole = []
  ckpt.export(run, 5, tmp_path / "again", progress=lambda done, total: whole.append(total), **more)
  assert contents(tmp_path / "out") == contents(tmp_path / "again")
  assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "out", "run"]
  assert read[0] < whole[0]


def test_full_disk_leaves_nothing(tmp_path, trained, small_disk):
  run, _ = trained
  (small_disk / "other").write_bytes(bytes((12 << 20) - (40 << 10)))
  with pytest.raises(ckpt.OutOfSpaceError, match=r"needs 0\.\d+ MB and 0\.\d+ MB are free"):
    ckpt.export(run, 5, small_disk / "out")
  assert [p.name for p in small_disk.iterdir()] == ["other"]
  (small_disk / "other").unlink()

  def fill(done, total):
    with open(small_disk / "other", "ab") as file:
      file.truncate(0)
      try:
        while file.write(bytes(1 << 14)):
          file.flush()
      except OSError:
        pass

  with pytest.raises(ckpt.OutOfSpaceError, match="nothing was left there"):
    ckpt.export(run, 5, small_disk / "out", memory=1 << 16, format="safetensors", shard_size=30_000, progress=fill)
  assert [p.name for p in small_disk.iterdir()] == ["other"]


@pytest.mark.parametrize("format", ["orbax", "safetensors"])
def test_export_stays_within_its_memory(tmp_path, format):
  done = run_program(tmp_path / "run", tmp_path / "out", format, "memory")
  assert done.returncode == 0, done.stderr
  assert int(done.stdout) < 300e6  # of 403 MB


# -- losses


def test_change_of_the_loss_is_measured_and_said(tmp_path, trained, caplog):
  run, params = trained

  def loss(tree):
    return jnp.mean((tree["head"] - params["head"]) ** 2) + 1

  with caplog.at_level(logging.WARNING, "ckpt_jax"):
    report = ckpt.export(run, 5, tmp_path / "a", evaluate=loss)
    assert report.loss_before == 1 and 0 < report.change < 0.01 and not caplog.records
    report = ckpt.export(run, 5, tmp_path / "b", quantize="int4", evaluate=loss)
  assert report.change > 0.01 and "the loss changed by +" in caplog.text


def test_command_exports_and_prints_what_was_lost(tmp_path, trained):
  run, _ = trained
  done = cli("export", run, "5", tmp_path / "b", "--quantize", "int8", "--keep", "head")
  assert done.returncode == 0 and "3 matrices quantised" in done.stdout and "layers/*" in done.stdout
  data = json.loads(cli("export", run, "5", tmp_path / "c", "--json").stdout)
  assert data["step"] == 5 and data["losses"]["head"]["largest"] > 0
  assert cli("export", run, "5", tmp_path / "d", "--dtype", "int32").returncode == 2
  assert "expected a number, 'latest'" in cli("export", run, "newest", tmp_path / "d").stderr


# -- buckets


@pytest.mark.parametrize("kind", ["gcs", "s3"])
def test_runs_in_buckets_export_to_buckets_and_disks(tmp_path, kind, request, assert_same):
  url = request.getfixturevalue(kind).url
  params = weights()
  run = save(f"{url}/run", {"params": params})
  want = direct(params, ml_dtypes.bfloat16)
  ckpt.export(run, 5, tmp_path / "disk")
  assert_same(ocp.PyTreeCheckpointer().restore(tmp_path / "disk"), want)
  ckpt.export(run, 5, f"{url}/orbax")
  assert_same(jax.tree.map(np.asarray, ckpt.load_quantized(f"{url}/orbax")), want)

  def stop(done, total):
    if done > total / 2:
      raise KeyboardInterrupt

  more = {"format": "safetensors", "shard_size": 30_000, "memory": 1 << 16}
  with pytest.raises(KeyboardInterrupt):
    ckpt.export(run, 5, f"{url}/st", progress=stop, **more)
  with pytest.raises(ckpt.NoCheckpointError, match="no export"):
    ckpt.load_quantized(f"{url}/st")
  ckpt.export(run, 5, f"{url}/st", **more)
  assert ckpt.verify(f"{url}/st") == []
  like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), params)
  assert_same(jax.tree.map(np.asarray, ckpt.load_safetensors(f"{url}/st", like=like)), want)
