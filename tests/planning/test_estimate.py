"""Estimates: the article's figures, against real checkpoints on disk, and against optax."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from commands import cli
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import ckpt_jax as ckpt
from ckpt_jax.planning.estimate import OPTIMIZERS, Storage, bits_of, host_nbytes, traffic
from ckpt_jax.planning.spread import spread
from ckpt_jax.storage.space import tree_nbytes

GIB = 2**30


def test_the_figures_of_the_article():
  seven, seventy = ckpt.estimate(params=7e9), ckpt.estimate(params="70B", optimizer="adam", param_dtype="float32")
  assert seven.bytes_per_param == 12 and seven.inference_nbytes == 2 * 7e9 and seven.inference_share == 1 / 6
  assert f"{seventy.training_nbytes / GIB:.0f}" == "782"
  assert f"{ckpt.estimate(params='7b', inference_dtype='float16').inference_nbytes / GIB:.0f}" == "13"
  assert f"{seven.training_nbytes / GIB:.1f}" == "78.2", "the article writes 69 GB, which its own formula does not give"
  assert traffic(100e9, 32, "direct", copies=32).read == 3.2e12
  assert traffic(100e9, 32, "gather", copies=32).read == traffic(100e9, 32, "broadcast", copies=32).read == 100e9
  assert [ckpt.estimate(params=8, inference_dtype=dtype).inference_nbytes for dtype in ("int8", "int4")] == [8, 4]


@pytest.mark.parametrize(
  ("recipe", "each"),
  [
    ({"optimizer": "sgd"}, 4),
    ({"optimizer": "lion", "param_dtype": "bfloat16"}, 4),
    ({"param_dtype": "bfloat16"}, 6),
    ({"param_dtype": "bfloat16", "moments_dtype": "float32"}, 10),
    ({"param_dtype": "bfloat16", "master_dtype": "float32"}, 14),
    ({"param_dtype": "bfloat16", "master_dtype": "float32", "ema": 1}, 18),
    ({"optimizer": "adam8bit"}, 6 + 8 / 256),
  ],
)
def test_bytes_of_a_parameter(recipe, each):
  assert ckpt.estimate(params=2**20, **recipe).bytes_per_param == pytest.approx(each)


# -- against disk


class Mlp(nn.Module):
  @nn.compact
  def __call__(self, x):
    for width in (1024, 512):
      x = nn.LayerNorm()(nn.gelu(nn.Dense(width)(x)))
    return nn.Dense(512)(x)


class Transformer(nn.Module):
  @nn.compact
  def __call__(self, tokens):
    x = nn.Embed(1000, 256)(tokens)
    for _ in range(2):
      x = x + nn.MultiHeadDotProductAttention(num_heads=4)(nn.LayerNorm()(x))
      x = x + nn.Dense(256)(nn.gelu(nn.Dense(1024)(nn.LayerNorm()(x))))
    return nn.Dense(1000)(x)


class Convolutions(nn.Module):
  @nn.compact
  def __call__(self, x):
    for width in (128, 256):
      x = nn.GroupNorm()(nn.relu(nn.Conv(width, (3, 3))(x)))
    return nn.Dense(100)(x.mean((1, 2)))


MODELS = {
  "mlp": (Mlp(), jax.ShapeDtypeStruct((1, 512), jnp.float32)),
  "transformer": (Transformer(), jax.ShapeDtypeStruct((1, 8), jnp.int32)),
  "convolutions": (Convolutions(), jax.ShapeDtypeStruct((1, 8, 8, 64), jnp.float32)),
}
OPTAX = {
  "sgd": optax.sgd(1e-3),
  "momentum": optax.sgd(1e-3, momentum=0.9),
  "lion": optax.lion(1e-3),
  "muon": optax.contrib.muon(1e-3),
  "adam": optax.adam(1e-3),
  "adamw": optax.adamw(1e-3),
  "adafactor": optax.adafactor(1e-3),
}


def eight_bits(params):
  """Adam's moments in 8 bits, with a scale for each 256 values."""
  scales = jax.tree.map(lambda p: np.ones((-(-p.size // 256),), np.float32), params)
  moments = jax.tree.map(lambda p: np.ones(p.shape, np.int8), params)
  return {"mu": moments, "nu": moments, "mu_scale": scales, "nu_scale": scales}


@pytest.mark.parametrize(
  ("model", "optimizer", "dtype", "more"),
  [
    ("mlp", "adam", "float32", {}),
    ("mlp", "sgd", "bfloat16", {}),
    ("mlp", "momentum", "float16", {}),
    ("mlp", "adam8bit", "float32", {}),
    ("mlp", "adamw", "bfloat16", {"master_dtype": "float32"}),
    ("transformer", "adamw", "float32", {}),
    ("transformer", "adam", "bfloat16", {"ema": 1}),
    ("transformer", "lion", "float32", {}),
    ("mlp", "muon", "float32", {}),
    ("mlp", "adafactor", "float32", {}),
    ("transformer", "muon", "float32", {"by_count": False}),
    ("transformer", "adafactor", "float32", {"by_count": False}),
    ("convolutions", "adam", "float32", {}),
    ("convolutions", "momentum", "bfloat16", {}),
    ("convolutions", "adafactor", "bfloat16", {"by_count": False}),
  ],
)
def test_estimates_agree_with_real_checkpoints_within_one_percent(tmp_path, model, optimizer, dtype, more):
  more = dict(more)
  matrices_only = more.pop("by_count", True)  # Muon and Adafactor treat other arrays than matrices as Adam does
  module, example = MODELS[model]
  abstract = jax.eval_shape(module.init, jax.random.key(0), example)["params"]
  rng = np.random.default_rng(0)
  state = {"params": jax.tree.map(lambda p: jnp.asarray(rng.standard_normal(p.shape), dtype), abstract)}
  updated = state["params"]
  if "master_dtype" in more:
    updated = state["master"] = jax.tree.map(lambda p: p.astype(jnp.float32), updated)
  state["optimizer"] = eight_bits(updated) if optimizer == "adam8bit" else OPTAX[optimizer].init(updated)
  if "ema" in more:
    state["ema"] = updated
  with ckpt.Checkpointer(tmp_path, ckpt.Config(layout={"compression": "off"})) as c:
    c.save(0, state)
  on_disk = tree_nbytes(str(tmp_path / "0"))
  by_tree = ckpt.estimate(params=abstract, optimizer=optimizer, param_dtype=dtype, **more)
  assert by_tree.training_nbytes == sum(x.nbytes for x in jax.tree.leaves(state))
  assert by_tree.step_nbytes == pytest.approx(on_disk, rel=0.01)
  assert ckpt.estimate(state=jax.eval_shape(lambda: state)).step_nbytes == pytest.approx(on_disk, rel=0.01)
  if not matrices_only:
    return
  by_count = ckpt.estimate(params=by_tree.params, optimizer=optimizer, param_dtype=dtype, **more)
  metadata = by_tree.step_nbytes - by_tree.training_nbytes  # of small arrays, whose number a count does not know
  assert by_count.training_nbytes + metadata == pytest.approx(on_disk, rel=0.01)


@given(st.sampled_from(sorted(OPTAX)), st.integers(1, 4))
def test_a_named_optimizer_is_that_of_optax(name, depth):
  params = {f"w{i}": jax.ShapeDtypeStruct((128 + i, 200), jnp.float32) for i in range(depth)}
  named, given_itself = ckpt.estimate(params, name), ckpt.estimate(params, OPTAX[name])
  assert named.groups == given_itself.groups and named.leaves == given_itself.leaves


def test_all_optimizers_have_a_size_and_none_is_negative():
  sizes = {name: ckpt.estimate(1000, name).bytes_per_param for name in OPTIMIZERS}
  assert sizes["sgd"] == sizes["adafactor"] == 4 < sizes["adam8bit"] < sizes["lion"] < sizes["adam"] == 12


@pytest.mark.parametrize(
  "wrong",
  [
    {},
    {"params": 1, "state": {}},
    {"params": 0},
    {"params": "7x"},
    {"params": 1, "optimizer": "adma"},
    {"params": 1, "optimizer": optax.adam(1)},
    {"params": 1, "param_dtype": "float33"},
    {"params": 1, "ema": -1},
    {"params": {"w": jnp.ones(3)}, "optimizer": optax.masked(optax.adam(1), {"other": True})},
  ],
)
def test_what_makes_no_sense_is_a_config_error(wrong):
  with pytest.raises(ckpt.ConfigError):
    ckpt.estimate(**wrong)


def test_parameters_that_are_no_float_arrays():
  params = {"w": jnp.ones((4, 4)), "table": jnp.arange(8), "key": jax.random.key(0), "rate": 0.5}
  assert ckpt.estimate(params, "sgd", param_dtype="bfloat16").groups == {"params": 32 + 32 + 8, "optimizer": 0}


def test_keys_scalars_and_names_at_the_top_of_a_state():
  state = {"params": {"w": jnp.ones((3, 4))}, "key": jax.random.key(0), "step": jnp.int32(3), "epoch": 2, "name": "x"}
  found = ckpt.estimate(state=state)
  assert found.groups == {"params": 48, "key": 8, "step": 4} and found.params == 12 and found.leaves == 3
  assert ckpt.estimate(state=jnp.ones(3)).training_nbytes == 12 and ckpt.estimate(state={}).bytes_per_param is None


def test_it_shows_itself():
  found = ckpt.estimate("7b")
  assert repr(found).startswith("SizeEstimate(7,000,000,000 parameters: parameters, float32 26.1 GiB")
  assert "78.2 GiB" in found._repr_html_() and json.dumps(found.to_dict())


def test_bits_and_host_memory():
  assert [bits_of(d) for d in ("float32", "bfloat16", "float8_e4m3fn", "int4", "bool", "uint2")] == [32, 16, 8, 4, 8, 2]
  assert host_nbytes(800) == 900 and host_nbytes(800, 10_000) == 1600
  assert Storage(bandwidth=1e9).seconds(5e9, 4) == 5


# -- the command


def test_estimate_prints_one_unit_system_a_line():
  job = "--params 70b --hosts 32 --copies 32 --bandwidth 10GB --every 1h --keep-last 3"
  done = cli("estimate", *job.split())
  assert done.returncode == 0 and "782.3 GiB" in done.stdout and "840 GB" in done.stdout and "1/6 of it" in done.stdout
  assert not [line for line in done.stdout.splitlines() if "iB" in line and any(f" {u}B" in line for u in "kMGT")]
  assert "3 steps at the end" in done.stdout and "2.5 TiB" not in done.stdout.splitlines()[0]


def test_estimate_gives_json():
  found = json.loads(cli("estimate", "--params", "70B", "--hosts", 32, "--bandwidth", "10GB", "--json").stdout)
  assert found["training_nbytes"] == 840e9 and found["bytes_per_param"] == 12
  assert found["job"]["held_nbytes"] == 840e9 / 32 and found["job"]["restore"]["direct"]["s"] == pytest.approx(84)


def test_estimate_takes_a_state_from_a_function_without_building_it(tmp_path, monkeypatch):
  (tmp_path / "huge_state.py").write_text(
    "import jax.numpy as jnp\n"
    "def make(): return {'params': jnp.zeros((2_000_000, 35_000)), 'opt_state': jnp.zeros((4_000_000, 35_000))}\n"
    "def fails(): return 1 / 0\n"
  )
  monkeypatch.chdir(tmp_path)
  found = json.loads(cli("estimate", "--state", "huge_state:make", "--json").stdout)
  assert found["training_nbytes"] == 840e9 and found["inference_share"] == 1 / 6
  assert "opt_state" in cli("estimate", "--state", "huge_state:make").stdout
  done = cli("estimate", "--state", "huge_state:fails")
  assert done.returncode == 1 and "ZeroDivisionError" in done.stderr


@pytest.mark.parametrize(
  "arguments",
  [
    [],
    ["--params", "7x"],
    ["--params", "7b", "--optimizer", "adma"],
    ["--state", "nowhere:f"],
    ["--params", "7b", "--state", "a:b"],
  ],
)
def test_wrong_usage_exits_with_2(arguments):
  done = cli("estimate", *arguments)
  assert done.returncode == 2 and done.stderr


# -- a mesh that is not there

STATE = """
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P

def sharded(mesh):
  def array(shape, *spec):
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P(*spec)))

  layer = {"kernel": array((8192, 28672), "fsdp", "model"), "bias": array((28672,), "model"), "scale": array((8192,))}
  return {"params": {f"layer_{i}": layer for i in range(10)}, "step": jax.ShapeDtypeStruct((), jnp.int32)}
"""


def test_704_processes_that_are_not_there(tmp_path, monkeypatch):
  (tmp_path / "of_mesh.py").write_text(STATE)
  monkeypatch.chdir(tmp_path)
  run = "estimate --state of_mesh:sharded --mesh data=88,fsdp=8,model=8 --bandwidth 1TB"
  job = json.loads(cli(*run.split(), "--json").stdout)["job"]
  kernel = 8192 * 28672 * 4
  assert job["hosts"] == 704 and job["devices_per_host"] == 8 and job["copies"] > 88
  assert job["device_nbytes"] == 10 * (kernel // 64 + 28672 * 4 // 8 + 8192 * 4) + 4
  written = job["spread"]["written"]
  assert written["mean"] * 704 == pytest.approx(10 * (kernel + 28672 * 4 + 8192 * 4) + 4)
  assert written["most"] < 1.05 * written["mean"] and job["blocking_s"] == pytest.approx(written["most"] / 5e9)
  assert "704 hosts with 8 devices" in cli(*run.split()).stdout


def test_replicas_on_two_hosts_are_written_in_even_shares():
  """The two devices of this process, as one host and as two."""
  mesh = jax.make_mesh((2,), ("data",))
  specs = {"a": P("data"), "b": P(), "c": P(None, "data")}
  state = {
    name: jax.device_put(np.ones((64, 32), np.float32), NamedSharding(mesh, spec)) for name, spec in specs.items()
  }
  alone, two = spread(state, mesh, [0, 0]), spread(state, mesh, [0, 1])
  assert alone.written.most == alone.held.most == 3 * 8192 and alone.copies == 1
  assert two.held.most == 4096 * 2 + 8192 and two.device_nbytes == two.held.most and two.copies == 4 / 3
  assert two.written.most == two.written.least == 3 * 8192 / 2


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ("--params 7b --mesh data=8", "--mesh needs --state"),
    ("--state of_mesh:sharded", "takes a mesh"),
    ("--state of_mesh:sharded --mesh data", "expected AXIS=SIZE"),
    ("--state of_mesh:sharded --mesh fsdp=8,model=3", "cannot be sharded"),
    ("--state of_mesh:sharded --mesh fsdp=2,model=2", "not a multiple of --devices-per-host 8"),
  ],
)
def test_meshes_that_make_no_sense(tmp_path, monkeypatch, arguments, message):
  (tmp_path / "of_mesh.py").write_text(STATE)
  monkeypatch.chdir(tmp_path)
  done = cli("estimate", *arguments.split())
  assert done.returncode == 2 and message in done.stderr
