"""Steps of several items: all are listed, read and verified; the one that holds the state is found or asked for."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from typer.testing import CliRunner

import ckpt_jax as ckpt
from ckpt_jax.cli.app import app
from ckpt_jax.errors import ConfigError, CorruptCheckpointError

a = ocp.args


def tree(value, *names):
  return {name: jnp.full((4, 3), value, jnp.float32) for name in names or ("w",)}


def save(path, step=5, **items):
  with ocp.CheckpointManager(path) as manager:
    manager.save(step, args=a.Composite(**items))


def shell(*args):
  """Exit code and stdout."""
  result = CliRunner().invoke(app, list(map(str, args)))
  assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
  return result.exit_code, result.stdout


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """A step with items of every handler that Orbax has, to be copied."""
  path = tmp_path_factory.mktemp("every")
  save(
    path,
    state=a.StandardSave(tree(1.0)),
    params=a.PyTreeSave(tree(2.0, "k", "b")),
    data=a.JsonSave({"position": 3}),
    array=a.ArraySave(np.arange(5)),
    key=a.JaxRandomKeySave(jax.random.key(3)),
    numpy_key=a.NumpyRandomKeySave(np.random.RandomState(7).get_state()),
  )
  (path / "5" / "iter").mkdir()  # as grain's handler writes it
  (path / "5" / "iter" / "process_0-of-1.json").write_text('{"next_index": 12}')
  return path


@pytest.fixture
def run(made, tmp_path):
  return shutil.copytree(made, tmp_path / "run")


def test_items_of_every_handler_are_listed_shown_read_and_verified(run):
  _, out = shell("show", run, "5", "--json")
  found = json.loads(out)
  kinds = {item["name"]: item["kind"] for item in found["items"]}
  assert kinds == {
    "array": "array",
    "data": "json",
    "iter": "other",
    "key/jax_random_key": "array",
    "key/jax_random_key_metadata": "json",
    "numpy_key/np_random_key": "tree",
    "numpy_key/np_random_key_metadata": "json",
    "params": "tree",
    "state": "tree",
  }
  assert found["item"] == "state" and [leaf["path"] for leaf in found["leaves"]] == ["w"]
  _, out = shell("show", run, "5", "--item", "params", "--json")
  assert [leaf["path"] for leaf in json.loads(out)["leaves"]] == ["b", "k"]
  assert '"position": 3' in shell("show", run, "--item", "data")[1]
  code, out = shell("verify", run, "--json")
  (verdict,) = json.loads(out)
  assert code == 0 and set(verdict["items"]) == set(kinds) and verdict["leaves"] == 1 + 2 + 1 + 1 + 5
  assert "no fingerprints" in verdict["items"]["params"] and "only its handler" in verdict["items"]["iter"]
  with ckpt.Checkpointer(run) as c:
    assert c.restore_or_init(lambda: tree(0.0)).state["w"][0, 0] == 1
    assert c.restore(item="params").state["b"][0, 0] == 2
    assert c.restore(5, None, "k", None, "params").state["k"].shape == (4, 3)  # item is the fifth argument
    assert c.restore(item="array").state["checkpoint"].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
  ("damage", "item"),
  [
    ("invert params/d", "params"),
    ("invert params/ocdbt.process_0/d", "params"),
    ("cut params/manifest.ocdbt", "params"),
    ("remove params/_METADATA", "params"),
    ("remove params", "params"),
    ("invert state/d", "state"),
    ("cut data/metadata", "data"),
    ("invert array/checkpoint", "array"),
    ("remove array/checkpoint/0", "array"),
    ("invert numpy_key/np_random_key/d", "numpy_key"),
    ("invert key/jax_random_key/checkpoint/.zarray", "key"),
    ("cut iter/process_0-of-1.json", "iter"),
  ],
)
def test_a_destroyed_item_is_a_finding_whichever_it_is(run, damage, item):
  what, place = damage.split()
  path = run / "5" / place
  files = [path] if path.is_file() else [p for p in sorted(path.rglob("*")) if p.is_file()]
  for file in files:
    if what == "invert":
      file.write_bytes(bytes(255 - b for b in file.read_bytes()))
    elif what == "cut":
      file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    else:
      file.unlink()
  if what == "remove" and path.is_dir():
    shutil.rmtree(path)
  found = ckpt.verify(run, 5)
  assert found and all(f.step == 5 for f in found), found
  assert any(item in f.file or item in f.message for f in found), found
  assert shell("verify", run)[0] == 1


def test_changed_values_of_an_item_without_checksums_are_not_called_compared(tmp_path):
  with ocp.CheckpointManager(
    tmp_path, item_handlers={"model": ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_compression=False)}
  ) as manager:
    manager.save(5, args=a.Composite(model=a.PyTreeSave({"w": np.zeros(8, np.float32)})))
  chunk = tmp_path / "5" / "model" / "w" / "0"
  chunk.write_bytes(bytes(255 - b for b in chunk.read_bytes()))
  code, out = shell("verify", tmp_path, "--json")
  assert code == 0 and "no fingerprints to detect changed values with" in json.loads(out)[0]["how_far"]
  assert json.loads(out)[0]["fingerprints"] == 0


def test_of_several_trees_the_one_asked_for_is_restored_or_the_only_one_that_fits(tmp_path):
  save(tmp_path, model=a.StandardSave(tree(1.0, "w")), opt=a.StandardSave(tree(2.0, "m", "v")))
  with ckpt.Checkpointer(tmp_path) as c:
    assert c.restore_or_init(lambda: tree(0.0, "w")).state["w"][0, 0] == 1  # only model has these leaves
    assert c.restore(like=tree(0.0, "m", "v")).state["v"][0, 0] == 2
    for like in (None, tree(0.0, "x")):
      with pytest.raises(ckpt.CheckpointError, match=r"several items \(model, opt\).*item=\"model\""):
        c.restore(like=like)
    with pytest.raises(ConfigError, match=r"no item 'modle'; the step has model .*did you mean model"):
      c.restore(item="modle")
  with ckpt.Checkpointer(tmp_path, {"item": "opt"}) as c:
    assert c.restore_or_init(lambda: tree(0.0, "m", "v")).next_step == 6
    assert set(c.restore().state) == {"m", "v"}
  code, out = shell("show", tmp_path)
  assert code == 0 and "--item model" in out and "--item opt" in out


def test_runs_of_maxtext_are_resumed_and_go_on_under_their_own_name(tmp_path):
  save(tmp_path, items=a.PyTreeSave(tree(1.0)), iter=a.JsonSave({"next_index": 4}))
  with ckpt.Checkpointer(tmp_path) as c:
    restored = c.restore_or_init(lambda: tree(0.0))
    assert (restored.next_step, restored.state["w"][0, 0]) == (6, 1)
    assert c.save(6, tree(3.0), metrics={"loss": 0.5})
    c.wait()
    assert c.restore().report.verified == 1
  assert ckpt.verify(tmp_path) == []
  with ocp.CheckpointManager(tmp_path) as manager:
    found = manager.restore(6, args=a.Composite(items=a.PyTreeRestore(tree(0.0))))
  assert found["items"]["w"][0, 0] == 3


def test_a_state_saved_under_a_name_is_read_verified_and_found_again_under_another_configuration(tmp_path):
  with ckpt.Checkpointer(tmp_path, ckpt.Config(item="model")) as c:
    c.save(1, tree(1.0))
  assert (tmp_path / "1" / "model").is_dir() and ckpt.verify(tmp_path) == []
  for item in (None, "other"):
    with ckpt.Checkpointer(tmp_path, ckpt.Config(item=item)) as c:
      restored = c.restore_or_init(lambda: tree(0.0))
      assert restored.state["w"][0, 0] == 1 and restored.report.verified == 1
  shutil.rmtree(tmp_path / "1" / "model")
  with ckpt.Checkpointer(tmp_path) as c, pytest.raises(CorruptCheckpointError, match="1/model"):
    c.restore()


@pytest.mark.parametrize("name", ["metrics", "", "a/b", "..", "_METADATA"])
def test_a_name_that_is_none_for_an_item_is_refused(name):
  with pytest.raises(ConfigError, match="item"):
    ckpt.Config(item=name)
