"""Runs of early versions of Orbax, in all forms (tests/runs/make.py): read bitwise, as the newest Orbax does."""

import importlib.util
import pathlib
import tarfile

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

import ckpt_jax as ckpt
from ckpt_jax.errors import NotARunError
from ckpt_jax.inference.convert import convert

RUNS = pathlib.Path(__file__).parents[1] / "runs"
spec = importlib.util.spec_from_file_location("make", RUNS / "make.py")
make = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make)
VERSIONS = sorted(p.name.removeprefix("orbax-").removesuffix(".tar.xz") for p in RUNS.glob("*.tar.xz"))
# Which state the newest step of a form holds.
SEED = {"standard": 1, "flax-orbax": 12, "flax-msgpack": 12}
ITEMS = ("composite", "legacy-items")
NO_RUN = ("bare-standard", "bare-pytree", "flax-msgpack")


def unpacked(version, where):
  with tarfile.open(RUNS / f"orbax-{version}.tar.xz") as archive:
    archive.extractall(where, filter="data")
  return {path.name: path for path in sorted((where / version).iterdir())}


def assert_bitwise(found, want, where):
  """Equal in structure and bits; jax arrays as numpy."""
  names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(want)[0]]
  assert jax.tree.structure(found) == jax.tree.structure(want), where
  for name, a, b in zip(names, jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
    if isinstance(b, np.ndarray):
      a = np.asarray(a)
      assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes()), f"{where}{name}"
    else:
      assert type(a) is type(b) and a == b, f"{where}{name}"


def by_orbax(form, directory, like):
  """What the installed Orbax restores."""
  args = ocp.args.PyTreeRestore(like, restore_args=ocp.checkpoint_utils.construct_restore_args(like))
  if form == "flax-orbax":
    return ocp.PyTreeCheckpointer().restore(directory / "checkpoint_12", args=args)
  names = {"prefixed": {"step_prefix": "ckpt"}, "padded": {"step_format_fixed_length": 8}}
  options = ocp.CheckpointManagerOptions(read_only=True, **names.get(form, {}))
  with ocp.CheckpointManager(directory, options=options) as manager:
    if form in ITEMS:
      return manager.restore(manager.latest_step(), args=ocp.args.Composite(state=args))["state"]
    return manager.restore(manager.latest_step(), args=args)


@pytest.mark.parametrize("version", VERSIONS)
def test_every_form_is_restored_bitwise_as_the_newest_orbax_restores_it(version, tmp_path):
  runs = unpacked(version, tmp_path)
  assert set(NO_RUN[1:]) | {"legacy", "legacy-zarr", "legacy-items", "flax-orbax"} <= set(runs)
  for form, directory in runs.items():
    if form in NO_RUN:
      continue
    where, want, like = f"{version} {form} ", make.values(SEED.get(form, 0)), make.state(99)
    assert_bitwise(by_orbax(form, directory, like), want, where)
    with ckpt.Checkpointer(directory) as c:
      restored = c.restore_or_init(lambda: make.state(99))
      assert_bitwise(restored.state, want, where)
      assert (
        restored.next_step
        == c.latest_step() + 1
        == {"standard": 7, "padded": 13, "prefixed": 13}.get(form, 13 if form == "flax-orbax" else 6)
      ), where
      as_saved = c.restore().state
      if version.startswith(("0.2", "0.3")) and form != "flax-orbax":  # numbers were arrays then
        as_saved = {**as_saved, "lr": as_saved["lr"].item(), "step": as_saved["step"].item()}
      assert_bitwise(as_saved, want, where)
      if form == "composite":
        assert_bitwise(c.restore(item="params", like=like).state, make.values(2), where)
      if form == "pytree":
        assert c.steps()[0].metrics == {"loss": 0.5}
    assert ckpt.verify(directory) == [], where


@pytest.mark.parametrize("version", ["0.2.4", "0.5.3", "0.11.25"])
def test_checkpoints_that_are_no_run_are_named_and_converted_bitwise(version, tmp_path):
  for form, source in unpacked(version, tmp_path).items():
    if form not in NO_RUN:
      continue
    before = sorted(str(p) for p in source.rglob("*"))
    with pytest.raises(NotARunError, match=r"ckpt-jax convert .*NEW_RUN"):
      ckpt.Checkpointer(source)
    with pytest.raises(NotARunError, match=r"ckpt-jax convert .*NEW_RUN"):
      ckpt.verify(source)
    assert before == sorted(str(p) for p in source.rglob("*"))  # nothing was written there
    target = tmp_path / f"new-{form}"
    made = [one.step for one in convert(source, target, step=None if form == "flax-msgpack" else 40)]
    assert made == ([1, 12] if form == "flax-msgpack" else [40])
    with ckpt.Checkpointer(target) as c:
      restored = c.restore_or_init(lambda: make.state(99))
      assert_bitwise(restored.state, make.values(SEED.get(form, 0)), f"{version} {form} ")
      assert restored.step == made[-1] and restored.report.verified > 0
