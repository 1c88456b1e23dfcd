"""Names of directories, objects and leaves with anything in them work, or are refused before a byte is written."""

import os

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from typer.testing import CliRunner

import ckpt_jax as ckpt
from ckpt_jax.cli.app import app
from ckpt_jax.integrity.record import RecordingHandler
from ckpt_jax.layout import contents
from ckpt_jax.run import steps as run
from ckpt_jax.storage.paths import LiteralPath, literal

STATE = {"w": np.arange(8.0, dtype=np.float32), "n": 3, "name": "text"}
HYDRA = "layers=[64,64],lr=0.1 *?#%41 {}|;'\" ü\n-"


def state(seed=0):
  return {**STATE, "w": jnp.asarray(STATE["w"] + seed)}


def save_and_look(path):
  """A run's whole life in a directory."""
  with ckpt.Checkpointer(path, {"retention": {"last": 2}}) as c:
    for step in range(3):
      assert c.save(step, state(step))
      c.wait()
    restored = c.restore(like=state())
    assert restored.step == 2 and np.array_equal(restored.state["w"], state(2)["w"])
    assert restored.state["name"] == "text"
  assert [s.step for s in run.list_steps(path)] == [1, 2]
  assert ckpt.verify(path) == []


names = st.text(
  st.one_of(
    st.sampled_from("[]{}*?!\\%#~:|@-.,='\"$&;<>+ \n\t"), st.characters(exclude_characters="/\0", exclude_categories=())
  ),
  min_size=1,
  max_size=40,
)


@hypothesis.settings(max_examples=25)
@hypothesis.given(names)
@hypothesis.example("layers=[64,64],lr=0.1")
@hypothesis.example("**")
@hypothesis.example("$A")
@hypothesis.example("logs:")
@hypothesis.example("\udcff")
@hypothesis.example("back\\slash")
@hypothesis.example("x.__lock")
@hypothesis.example("n" * 255)
@hypothesis.example("n" * 256)
def test_every_directory_name_works_or_is_refused_before_anything_is_written(tmp_path_factory, name):
  base = tmp_path_factory.mktemp("names")
  path = os.path.join(base, name, "run")
  try:
    save_and_look(path)
  except (ckpt.StorageError, ckpt.ConfigError):  # ConfigError: a variable that is not set
    assert os.listdir(base) == []
  else:
    wanted = [] if name in (".", "..") else [name]
    assert [n for n in os.listdir(base) if n != "run"] == wanted
    assert os.path.isdir(os.path.join(path, "2", "default"))


def test_refusals_name_what_is_wrong_with_a_path(tmp_path):
  for name, why in {
    "a\\b": "backslash",
    "x.__lock": "__lock",
    "\udcff": "no UTF-8",
    "configs:/run": "gs:/",
    "a\0b": "null",
    "/".join(["n" * 200] * 21): "too long",
  }.items():
    with pytest.raises(ckpt.StorageError, match=why):
      ckpt.Checkpointer(os.path.join(tmp_path, name))
  for url, why in {"gs://b/x/../y": "names", "s3://b/new\nline": "control", "s3://b/a?versionId=1": "version"}.items():
    with pytest.raises(ckpt.StorageError, match=why):
      literal(url)
  with pytest.raises(ckpt.StorageError, match="only local paths"):
    ckpt.Checkpointer("hdfs://b/x")
  assert os.listdir(tmp_path) == []


def test_every_command_works_in_a_directory_that_looks_like_a_pattern(tmp_path):
  path = tmp_path / HYDRA / "run"
  decoy = tmp_path / HYDRA.replace("[64,64]", "6") / "run"
  for directory in (path, decoy):
    with ckpt.Checkpointer(directory, {"retention": {"last": None}}) as c:
      for step in range(8):
        c.save(step, {"params": state(step), "opt": jnp.ones(3)}, metrics={"loss": 1.0})
        c.wait()
      c.pin(3)

  def cli(*arguments, code=0):
    done = CliRunner().invoke(app, list(map(str, arguments)))
    assert done.exit_code == code, (arguments, done.output, done.exception)
    return done.output

  assert "loss=1" in cli("ls", path)
  assert "params" in cli("show", path, 7)
  assert cli("verify", path, 7).count("sound") == 1
  assert cli("who", path, 7)
  cli("repack", path, 7, "--pack", "on")
  cli("prune", path, "--keep-last", 5, "-y")
  cli("rollback", path, 6)
  with ckpt.Checkpointer(path, {"retention": {"last": None, "thin": {"after": 1, "keep": ["params"]}}}) as c:
    assert c.latest_step() == 6
    (path / "6" / "default" / "manifest.ocdbt").write_bytes(b"damaged")
    assert c.restore(like={"params": state(), "opt": jnp.ones(3)}).step == 5
    assert c.save(7, {"params": state(7), "opt": jnp.ones(3)})
  assert [s.step for s in run.list_steps(path)] == [3, 4, 5, 7]
  assert (path / ".ckpt_jax" / "quarantine").is_dir()
  assert ckpt.verify(path) == []
  assert [s.step for s in run.list_steps(decoy)] == list(range(8))


def test_dots_links_and_slashes_go_where_the_system_goes(tmp_path, monkeypatch):
  (tmp_path / "far" / "away").mkdir(parents=True)
  (tmp_path / "link").symlink_to(tmp_path / "far" / "away")
  save_and_look(f"{tmp_path}/link/../run//")
  assert (tmp_path / "far" / "run" / "2").is_dir() and not (tmp_path / "run").exists()
  (tmp_path / "back\\slash").mkdir()
  (tmp_path / "plain").symlink_to(tmp_path / "back\\slash")
  with pytest.raises(ckpt.StorageError, match="link"):
    ckpt.Checkpointer(tmp_path / "back\\slash")
  monkeypatch.chdir(tmp_path)
  save_and_look("relative")
  save_and_look(f"{tmp_path}/a://b")
  monkeypatch.setenv("HOME", str(tmp_path / "home"))
  save_and_look("~/run")
  assert (tmp_path / "home" / "run" / "2").is_dir()
  with pytest.raises(ckpt.StorageError, match=r"as s3://.*by a link"):  # where buckets are mounted
    ckpt.Checkpointer("/s3/bucket/run")


def test_step_is_not_committed_if_its_files_are_not_where_they_belong(tmp_path, monkeypatch):
  with monkeypatch.context() as m:
    # What epath makes of brackets: Orbax finds no database to merge, and says nothing.
    m.setattr(LiteralPath, "glob", lambda self, pattern: iter(()))
    with ckpt.Checkpointer(tmp_path / "merge") as c:
      c.save(0, state())
      with pytest.raises(ckpt.SaveFailedError, match=r"manifest.ocdbt.*missing"):
        c.wait()
      assert c.steps() == [] and c.latest_step() is None
  finalize = RecordingHandler.finalize

  def lost(self, directory):
    (directory / "ocdbt.process_0").rename(tmp_path / "elsewhere")
    finalize(self, directory)

  with ckpt.Checkpointer(tmp_path / "write") as c:
    with monkeypatch.context() as m:
      m.setattr(RecordingHandler, "finalize", lost)
      c.save(0, state())
      with pytest.raises(ckpt.SaveFailedError, match="process_0 is not where"):
        c.wait()
    assert c.steps() == []
    assert c.save(1, {"text": "has no arrays, and no database"})
    assert c.save(2, state())
    c.wait()
    assert [s.step for s in c.steps()] == [1, 2]
    assert c.restore(1).state == {"text": "has no arrays, and no database"}


leaf_names = st.text(
  st.one_of(st.sampled_from("/.~[]%\\ #?*0a"), st.characters(exclude_categories=())), min_size=0, max_size=8
)


@hypothesis.settings(max_examples=20)
@hypothesis.given(st.lists(leaf_names, min_size=1, max_size=5, unique=True), st.booleans())
@hypothesis.example(["a", "a/", "a~b", "[0]", "ckpt_jax.slab.0"], True)
@hypothesis.example(["a/", "b~", "t~0"], False)
@hypothesis.example(["a", "a/b"], False)
def test_every_leaf_name_comes_back_or_is_refused_before_anything_is_written(tmp_path_factory, names, pack):
  path = tmp_path_factory.mktemp("leaves") / "run"
  saved = {
    "arrays": {name: jnp.full(3, i, jnp.float32) for i, name in enumerate(names)},
    "text": {name: f"text {i}" for i, name in enumerate(names)},
    "numbers": {name: i for i, name in enumerate(names)},
  }
  with ckpt.Checkpointer(path, {"layout": {"pack": pack}}) as c:
    try:
      c.save(0, saved)
    except ckpt.CheckpointError as e:
      str(e).encode()  # it can be logged
      assert not (path / "0").exists()
      return
    c.wait()
    restored = c.restore(like=saved).state
  assert jax.tree.structure(restored) == jax.tree.structure(saved)
  assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(saved), strict=True))
  assert ckpt.verify(path) == []
  if not pack and not any("~" in name for name in names):  # plain Orbax saves no text under such names
    with ocp.CheckpointManager(path) as manager:
      plain = manager.restore(0, args=ocp.args.PyTreeRestore(saved))
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(saved), strict=True))


def test_repacked_and_thinned_steps_keep_leaves_with_slashes_in_their_names(tmp_path):
  saved = {"params": {"a/b": jnp.ones(3), "t/x~": "text", "?>": jnp.zeros(2), "end/": jnp.ones(1)}, "opt": jnp.ones(2)}
  with ckpt.Checkpointer(tmp_path) as c:
    c.save(0, saved)
  for pack in ("on", "off"):
    assert CliRunner().invoke(app, ["repack", str(tmp_path), "0", "--pack", pack]).exit_code == 0
    with ckpt.Checkpointer(tmp_path) as c:
      restored = c.restore(like=saved).state
    assert restored["params"]["t/x~"] == "text" and np.array_equal(restored["params"]["end/"], np.ones(1))
  from ckpt_jax.rewrite.thin import thin_step

  thin_step(run.run_directory(tmp_path), 0, ["params/a", "params/t", "params/?>"], pause=lambda: None)
  assert sorted(leaf.path for leaf in contents.describe(tmp_path).leaves) == ["params/?>", "params/a/b", "params/t/x~"]
