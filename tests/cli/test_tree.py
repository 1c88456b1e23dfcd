"""`ckpt-jax show`: the tree of a step, and how it is stored."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import yaml
from commands import cli
from etils import epath
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from test_checkpointer import odd_state

import ckpt_jax as ckpt
from ckpt_jax.layout import contents
from ckpt_jax.layout.description import describe_item
from ckpt_jax.layout.stored import stored_leaves


def save(run, state, **config):
  with ckpt.Checkpointer(run, ckpt.Config(health={"nonfinite": "ignore"}, **config)) as c:
    c.save(0, state, metrics={"loss": 0.5}, extras={"at": 3})
  return run


@pytest.fixture
def model(tmp_path):
  layers = {f"layer_{i}": {"kernel": jnp.ones((8, 4)), "bias": jnp.ones(4)} for i in range(30)}
  return save(tmp_path, {"params": layers, "opt": [jnp.ones((8, 4), jnp.bfloat16)] * 12, "step": 3})


def test_the_tree_is_as_deep_as_fits_and_says_how_to_see_more(model):
  out = cli("show", model).stdout
  assert "2 levels of 3" in out and "layer_29" in out and "kernel" not in out.split("largest:")[0] and "2 leaves" in out
  assert "73 leaves" in out and "by dtype: float32 4.2 KiB, bfloat16 768 B, int 8 B" in out and "largest: " in out
  lines = cli("show", model, "--depth", 3).stdout
  assert lines.count("kernel") == 30 + lines.split("largest:")[1].count("kernel")
  assert "layer" not in cli("show", model, "--depth", 1).stdout.split("largest:")[0]


def test_numbered_leaves_come_in_the_order_of_numbers(model):
  shown = json.loads(cli("show", model, "--json").stdout)
  assert [leaf["path"] for leaf in shown["leaves"]][:12] == [f"opt/{i}" for i in range(12)]


def test_only_some_leaves(model):
  out = cli("show", model, "--only", "params/layer_3", "--only", "step").stdout
  assert "3 leaves" in out and "kernel" in out and "─ opt" not in out
  done = cli("show", model, "--only", "parms")
  assert done.returncode == 2 and "did you mean 'params'" in done.stderr


def test_config_is_printed_when_asked_for_and_without_nulls(model):
  assert "replica_parallel" not in cli("show", model).stdout
  out = cli("show", model, "--config").stdout
  assert "null" not in out and yaml.safe_load(out[out.index("layout:") : out.index("timeouts:")])["health"]


def test_how_a_leaf_is_stored(tmp_path):
  mesh = jax.make_mesh((2,), ("data",))
  x = jax.device_put(np.ones((64, 32), np.float32), NamedSharding(mesh, P(None, "data")))
  save(tmp_path / "a", {"x": x, "n": 3}, layout={"compression": "on", "chunk_size": 1024})
  out = cli("show", tmp_path / "a", "--stored").stdout
  assert "P(None, data) on data=2" in out and "zstd" in out
  shown = json.loads(cli("show", tmp_path / "a", "--stored", "--json").stdout)
  assert shown["writers"] == {"n": [0], "x": [0]} and np.prod(shown["stored"]["x"]["chunks"]) * 4 <= 1024
  assert shown["stored"]["x"]["codec"] == "shuffled zstd" and 0 < shown["stored_nbytes"]["x"] < x.nbytes / 4
  assert f" {shown['stored_nbytes']['x'] / x.nbytes:.0%} " in out
  assert "compressed to " in cli("ls", tmp_path / "a").stdout
  save(tmp_path / "b", {"a": x, "x": x, "n": 3}, layout={"pack": "on"})
  shown = json.loads(cli("show", tmp_path / "b", "--stored", "--json").stdout)
  assert shown["stored"]["x"]["codec"] == "packed" and shown["writers"] == {"n": [0], "a": [0], "x": [0]}


@pytest.mark.parametrize("pack", ["on", "off"])
def test_leaves_are_those_of_the_full_description(tmp_path, pack):
  save(tmp_path, odd_state(), layout={"pack": pack})
  item = epath.Path(tmp_path) / "0" / "default"
  ours = contents.our_metadata(item.parent)
  full = contents.leaf_infos(describe_item(item).tree, contents.encoded_leaves(ours, "default"))
  assert stored_leaves(item).keys() == {leaf.path for leaf in full}
  assert {leaf.path: leaf for leaf in contents.saved_leaves(item.parent)} == {leaf.path: leaf for leaf in full}


@pytest.mark.parametrize(("ocdbt", "zarr3"), [(True, False), (True, True), (False, False), (False, True)])
def test_every_format_of_plain_orbax(tmp_path, ocdbt, zarr3):
  handler = ocp.PyTreeCheckpointHandler(use_ocdbt=ocdbt, use_zarr3=zarr3)
  with ocp.CheckpointManager(tmp_path, item_handlers=handler) as manager:
    manager.save(4, args=ocp.args.PyTreeSave({"a": jnp.ones((3, 5), jnp.bfloat16), "b": {"c": 2.5, "none": None}}))
  shown = json.loads(cli("show", tmp_path, "--json").stdout)
  found = {leaf["path"]: (leaf["shape"], leaf["dtype"], leaf["nbytes"]) for leaf in shown["leaves"]}
  assert found == {"a": ([3, 5], "bfloat16", 30), "b/c": ([], "float", 8)}
  assert shown["stored"]["a"]["chunks"] == [3, 5] and shown["stored"]["a"]["codec"] == "zstd"


def test_buckets_and_damage(s3):
  run = save(f"{s3.url}/r", {"w": jnp.ones((3, 4)), "key": jax.random.key(0)})
  shown = json.loads(cli("show", run, "--stored", "--json").stdout)
  assert {leaf["dtype"] for leaf in shown["leaves"]} == {"float32", "key<fry>"} and shown["writers"]["w"] == [0]
  (epath.Path(run) / "0" / "default" / "manifest.ocdbt").unlink()
  done = cli("show", run)
  assert done.returncode == 1 and "error: " in done.stderr


@pytest.mark.parametrize("command", ["--help", "ls RUN", "show RUN", "show RUN --stored --only step", "pin RUN 0"])
def test_commands_that_read_metadata_start_without_jax(model, command):
  program = (
    "import sys\n"
    "from ckpt_jax.cli.app import main\n"
    f"sys.argv = ['ckpt-jax', *{command.replace('RUN', str(model)).split()!r}]\n"
    "try: main()\n"
    "except SystemExit as e: assert not e.code, e.code\n"
    "assert not {'jax', 'orbax.checkpoint'} & set(sys.modules)\n"
  )
  done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
  assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", [["who", "RUN", 0], ["show", "RUN", 0, "--stored"]])
def test_database_of_a_process_that_is_damaged_is_named(command, tmp_path):
  database = save(tmp_path, {"w": jnp.ones(3)}) / "0" / "default" / "ocdbt.process_0"
  (database / "manifest.ocdbt").write_bytes(b"junk")
  done = cli(*[tmp_path if word == "RUN" else word for word in command])
  assert done.returncode == 1 and "explain damaged-step" in done.stderr
  assert f"{database}: its keys cannot be listed: " in " ".join(done.stderr.split()).replace("- ", "-")
