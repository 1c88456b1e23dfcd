"""only=, init_missing= and cast=: a part of a checkpoint, or more than it holds, always by name."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState

import ckpt_jax as ckpt


def abstract(tree):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if isinstance(x, jax.Array) else x, tree)


def make_state():
  params = {
    "encoder": {"kernel": jnp.arange(6.0).reshape(2, 3), "bias": jnp.ones(3)},
    "decoder": {"layer_0": {"kernel": jnp.full((2, 2), 2.0)}, "layer_1": {"kernel": jnp.full((2, 2), 3.0)}},
  }
  return TrainState.create(apply_fn=len, params=params, tx=optax.adam(1e-3))


@pytest.fixture
def run(tmp_path):
  with ckpt.Checkpointer(tmp_path) as c:
    c.save(0, make_state())
    c.wait()
    yield c


def test_prefix_gives_the_subtree_in_its_place_as_numpy(run, assert_same):
  got = run.restore(only="params").state
  assert_same(got, {"params": jax.tree.map(np.asarray, make_state().params)})


def test_glob_picks_across_nodes(run):
  got = run.restore(only="params/*/layer_*/kernel").state
  assert got.keys() == {"params"} and got["params"].keys() == {"decoder"}
  assert got["params"]["decoder"]["layer_1"]["kernel"].tolist() == [[3.0, 3.0], [3.0, 3.0]]
  got = run.restore(only=["params/**/bias", "step"]).state
  assert got == {"params": {"encoder": {"bias": pytest.approx(np.ones(3))}}, "step": 0}


@pytest.mark.parametrize("shape", ["whole", "nested", "bare"])
def test_like_may_be_the_whole_state_or_just_the_part(shape, run, assert_same):
  want = make_state()
  like = {"whole": want, "nested": {"params": want.params}, "bare": want.params}[shape]
  got = run.restore(like=like, only="params").state
  assert_same(got, want.params if shape == "bare" else {"params": want.params})


def test_part_of_an_optimizer_state_keeps_its_type_below_the_pruned_nodes(run, assert_same):
  want = make_state()
  got = run.restore(like=want, only=["opt_state/0/mu", "opt_state/0/nu/encoder"]).state
  mu, nu = want.opt_state[0].mu, want.opt_state[0].nu
  assert_same(got, {"opt_state": {"0": {"mu": mu, "nu": {"encoder": nu["encoder"]}}}})


def test_only_that_names_nothing_says_what_there_is(run):
  with pytest.raises(ckpt.StructureMismatchError, match=r"only='param': names no leaf.*did you mean 'params'"):
    run.restore(only="param")
  with pytest.raises(ckpt.StructureMismatchError, match="names no leaf of like"):
    run.restore(only="params", like={"weights": jnp.ones(2)})


def test_selected_leaf_that_like_lacks_is_an_error(run):
  like = {"params": {"encoder": make_state().params["encoder"]}}
  with pytest.raises(
    ckpt.StructureMismatchError, match="params/decoder/layer_0/kernel: in the checkpoint, not in like"
  ):
    run.restore(like=like, only="params")


def lora_like():
  like = make_state().params
  like["encoder"]["lora_a"] = jnp.full((2, 1), 5.0)
  return like


def test_leaves_that_the_checkpoint_lacks_must_be_named(run):
  like = {"params": lora_like()}
  with pytest.raises(ckpt.StructureMismatchError, match="params/encoder/lora_a: not in the checkpoint"):
    run.restore(like=like, only="params")
  got = run.restore(like=like, only="params", init_missing="**/lora_*")
  assert got.state["params"]["encoder"]["lora_a"].tolist() == [[5.0], [5.0]]
  assert got.state["params"]["encoder"]["bias"].tolist() == [1, 1, 1]
  assert got.report.initialised == ("params/encoder/lora_a",)


def test_init_missing_may_be_a_function(run):
  like = abstract({"params": lora_like()})
  with pytest.raises(ckpt.StructureMismatchError, match="like has only a shape there"):
    run.restore(like=like, only="params", init_missing="**/lora_*")
  got = run.restore(
    like=like, only="params", init_missing={"**/lora_*": lambda path, leaf: jnp.zeros(leaf.shape)}
  ).state
  assert got["params"]["encoder"]["lora_a"].tolist() == [[0.0], [0.0]]
  with pytest.raises(ckpt.StructureMismatchError, match=r"lora_a: its init_missing function returned int32\[\]"):
    run.restore(like=like, only="params", init_missing={"**/lora_*": lambda path, leaf: jnp.int32(0)})


def test_params_with_a_new_optimizer_give_the_whole_state(run):
  fresh = TrainState.create(apply_fn=len, params=make_state().params, tx=optax.sgd(0.1, momentum=0.9))
  got = run.restore(like=fresh, only=["params", "step"], init_missing="opt_state").state
  assert isinstance(got, TrainState)
  assert got.opt_state == fresh.opt_state or jax.tree.structure(got.opt_state) == jax.tree.structure(fresh.opt_state)
  assert got.params["encoder"]["kernel"].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_init_missing_brings_nothing_back_that_only_leaves_out_and_nobody_asked_for(run, assert_same):
  """A new optimizer's moments of LoRA weights match the pattern as well."""
  params = lora_like()
  whole = TrainState.create(apply_fn=len, params=params, tx=optax.adam(1e-3))
  for like in (whole, jax.eval_shape(lambda: whole).replace(params=params)):
    got = run.restore(like=like, only="params", init_missing="**/lora_*")
    assert_same(got.state, {"params": params | {"encoder": params["encoder"] | {"lora_a": jnp.full((2, 1), 5.0)}}})
    assert got.report.initialised == ("params/encoder/lora_a",)
  # What lies outside of `only` comes back if a pattern names it, and nothing beside it.
  got = run.restore(like=whole, only="params", init_missing=["**/lora_*", "opt_state/0/count"])
  assert got.state.keys() == {"params", "opt_state"} and got.state["opt_state"] == {"0": {"count": 0}}
  got = run.restore(like=whole, only=["params", "step"], init_missing=["**/lora_*", "opt_state"])
  assert isinstance(got.state, TrainState)
  # A pattern about a part of `params` is not about another part of it.
  got = run.restore(like=whole, only="params/encoder", init_missing="params/*/lora_*").state
  assert got.keys() == {"params"} and got["params"].keys() == {"encoder"}


def test_init_missing_that_names_only_what_nobody_asked_for_is_an_error(run):
  whole = TrainState.create(apply_fn=len, params=lora_like(), tx=optax.adam(1e-3))
  with pytest.raises(
    ckpt.StructureMismatchError, match=r"init_missing='\*\*/lora_\*': names no leaf of like that only="
  ):
    run.restore(like=whole, only="params/decoder", init_missing="**/lora_*")


def test_init_missing_that_names_nothing_is_an_error(run):
  with pytest.raises(ckpt.StructureMismatchError, match="init_missing='lorra': names no leaf of like"):
    run.restore(like={"params": make_state().params}, only="params", init_missing="lorra")
  with pytest.raises(ckpt.ConfigError, match="pass like= too"):
    run.restore(init_missing="params")


def test_dtype_changes_only_where_cast_says_so(run):
  half = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), make_state().params)
  with pytest.raises(ckpt.StructureMismatchError, match=r"saved as float32\[3\], asked for bfloat16\[3\]"):
    run.restore(like=half, only="params")
  with pytest.raises(ckpt.StructureMismatchError, match="decoder/layer_0/kernel: saved as float32"):
    run.restore(like=half, only="params", cast={"params/encoder": jnp.bfloat16})
  got = run.restore(like=half, only="params", cast=True)
  assert got.state["encoder"]["kernel"].dtype == jnp.bfloat16
  assert got.state["encoder"]["kernel"].tolist() == [[0, 1, 2], [3, 4, 5]]
  assert got.report.casts["params/encoder/bias"] == ("float32", "bfloat16")


def test_cast_without_like_gives_numpy_of_that_dtype(run):
  got = run.restore(only="params", cast={"params/encoder": "float16"}).state["params"]
  assert got["encoder"]["kernel"].dtype == np.float16 and got["decoder"]["layer_0"]["kernel"].dtype == np.float32
  with pytest.raises(ckpt.ConfigError, match="cast=True casts to the dtypes of like="):
    run.restore(cast=True)
  with pytest.raises(ckpt.StructureMismatchError, match="another kind of number"):
    run.restore(cast={"params": "int8"})


@pytest.mark.parametrize(
  ("value", "dtype"), [(np.float32(70000), jnp.float16), (np.int32(300), jnp.int8), (np.int32(-1), jnp.uint16)]
)
def test_cast_that_loses_a_value_is_an_error(value, dtype, tmp_path):
  with ckpt.Checkpointer(tmp_path) as c:
    c.save(0, {"x": jnp.full(3, value)})
    with pytest.raises(ckpt.CheckpointError, match=f"x: holds values that {jnp.dtype(dtype).name} cannot"):
      c.restore(like={"x": jax.ShapeDtypeStruct((3,), dtype)}, cast=True)


def test_cast_keeps_the_sharding(tmp_path):
  mesh = jax.make_mesh((2,), ("x",))
  spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
  with ckpt.Checkpointer(tmp_path) as c:
    c.save(0, {"x": jnp.arange(4.0)})
    got = c.restore(like={"x": jax.ShapeDtypeStruct((4,), jnp.bfloat16, sharding=spread)}, cast=True).state["x"]
  assert got.sharding == spread and got.dtype == jnp.bfloat16 and got.tolist() == [0, 1, 2, 3]


READ_PARAMS = """
import sys
for name in ("optax", "flax"):
  sys.modules[name] = None  # an import of it fails
import numpy as np, ckpt_jax as ckpt, os
def read(): return int(dict(l.split(": ") for l in open("/proc/self/io").read().splitlines())["rchar"])
with ckpt.Checkpointer(sys.argv[1]) as c:
  c.restore(only="small")  # imports, threads
  before = read()
  state = c.restore(only=sys.argv[2]).state
  print(read() - before)
assert list(state) == [sys.argv[2]] and all(isinstance(x, np.ndarray) for x in state[sys.argv[2]].values())
"""


def test_part_is_read_without_the_optimizers_code_and_only_its_bytes(tmp_path):
  params = {f"w{i}": jnp.ones((256, 1024)) for i in range(4)}
  state = {"params": params, "opt_state": optax.adam(1e-3).init(params), "small": {"x": jnp.ones(2)}}
  with ckpt.Checkpointer(tmp_path) as c:
    c.save(0, state)
  done = subprocess.run(
    [sys.executable, "-c", READ_PARAMS, str(tmp_path), "params"], capture_output=True, text=True, timeout=120
  )
  assert done.returncode == 0, done.stderr
  nbytes = 4 * 256 * 1024 * 4
  assert nbytes <= int(done.stdout) < 1.05 * nbytes
