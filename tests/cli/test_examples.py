"""Every example of `--help` runs as it stands."""

import shlex
import shutil

import jax.numpy as jnp
import pytest
import typer
from commands import cli
from flax import serialization

import ckpt_jax as ckpt
from ckpt_jax.cli.app import app

COMMANDS = typer.main.get_command(app).commands
DIFFERENT = ["diff"]  # a finding
BEFORE = {"restore-quarantined": "rollback", "unpin": "pin"}


def example(name):
  program, command, *arguments = shlex.split(COMMANDS[name].epilog.removeprefix("Example: "))
  assert (program, command) == ("ckpt-jax", name)
  return [command, *arguments]


@pytest.fixture(scope="module")
def template(tmp_path_factory):
  """A directory with the run and the files that the examples name."""
  home = tmp_path_factory.mktemp("home")
  state = {"params": {"kernel": jnp.ones((64, 64))}, "step": 0}
  with ckpt.Checkpointer(home / "runs" / "a") as c:
    for step in (100, 200, 300):
      c.save(step, {**state, "params": {"kernel": state["params"]["kernel"] * step}})
  (home / "flax_checkpoints").mkdir()
  (home / "flax_checkpoints" / "checkpoint_7").write_bytes(serialization.to_bytes(state))
  return home


@pytest.fixture
def home(template, tmp_path, monkeypatch):
  shutil.copytree(template, tmp_path, dirs_exist_ok=True)
  monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", COMMANDS)
def test_example_of_help_runs_as_it_stands(name, home):
  if name in BEFORE:
    assert cli(*example(BEFORE[name]), answer="y\n").returncode == 0
  done = cli(*example(name), answer="y\n")
  assert done.returncode == (name in DIFFERENT), done.stderr
  assert done.stdout
