"""What is installed: the public names, and what a wheel holds beside the modules."""

import inspect
import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest

import ckpt_jax as ckpt
from ckpt_jax import errors

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.parametrize("name", ckpt.__all__)
def test_public_name_is_there(name):
  assert getattr(ckpt, name) is not None


def test_every_error_that_a_trainer_may_catch_is_exported():
  raised = {name for name, value in vars(errors).items() if inspect.isclass(value) and issubclass(value, Exception)}
  # Caught as SaveFailedError, OutOfSpaceError, StorageError; StructureMismatchError, ConfigError.
  refinements = {"SaveOutOfSpaceError", "SaveStorageError", "UnknownLeafError"}
  assert raised - set(ckpt.__all__) == refinements


def test_wheel_holds_every_module_the_type_marker_and_the_configurations(tmp_path):
  pytest.importorskip("setuptools", minversion="77")  # older ones do not know the license field of pyproject.toml
  source = tmp_path / "source"
  source.mkdir()
  for name in ("pyproject.toml", "README.md", "LICENSE"):
    shutil.copy(ROOT / name, source)
  for name in ("ckpt_jax", "configs"):  # whose links become what they lead to
    shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
  build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
  done = subprocess.run([*build, "-w", tmp_path, source], capture_output=True, text=True, timeout=120)
  assert done.returncode == 0, done.stderr
  (wheel,) = tmp_path.glob("ckpt_jax-*.whl")
  held = set(zipfile.ZipFile(wheel).namelist())
  modules = {str(p.relative_to(ROOT)) for p in ROOT.glob("ckpt_jax/**/*.py")}
  configs = {f"ckpt_jax/{p.relative_to(ROOT)}" for p in (ROOT / "configs").rglob("*.*")}
  assert len(configs) >= 10 and modules | configs | {"ckpt_jax/py.typed", "ckpt_jax/troubleshooting.md"} <= held
  # From the wheel alone, a configuration is found by its name.
  installed = tmp_path / "installed"
  zipfile.ZipFile(wheel).extractall(installed)
  code = "import ckpt_jax; print(ckpt_jax.__file__, ckpt_jax.load_config('s3').storage.kind)"
  found = subprocess.run(
    [sys.executable, "-c", code], cwd=installed, env={**os.environ, "PYTHONPATH": ""}, capture_output=True, text=True
  )
  assert found.stdout.split() == [str(installed / "ckpt_jax" / "__init__.py"), "s3"], found.stderr
