"""The commands as somebody types them who has not read the manual: one hand made them all."""

import json
import os
import subprocess
import sys

import jax.numpy as jnp
import pytest
import typer
from commands import cli

import ckpt_jax as ckpt
from ckpt_jax.cli.app import app
from ckpt_jax.storage import retry

NAMES = sorted(typer.main.get_command(app).commands)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  path = tmp_path_factory.mktemp("run")
  with ckpt.Checkpointer(path, {"health": {"nonfinite": "tag"}}) as c:
    for step in range(3):
      c.save(step, {"params": {"w": jnp.full((4, 8), jnp.nan if step == 2 else 1.0)}}, metrics={"loss": 3.0 - step})
    c.pin(0)
  return path


@pytest.mark.parametrize("name", ["", *NAMES])
def test_help_is_short_and_shows_flags_as_flags(name):
  short, long = (cli(*([name] if name else []), option) for option in ("-h", "--help"))
  assert short.returncode == 0 and short.stdout == long.stdout
  assert "<bool>" not in short.stdout and "--no-" not in short.stdout and "Usage:" in short.stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_complete_commands(shell):
  program = "import sys; from ckpt_jax.cli import main; sys.argv[0] = 'ckpt-jax'; main()"
  asked = {"bash": {"COMP_WORDS": "ckpt-jax ver", "COMP_CWORD": "1"}, "zsh": {"_TYPER_COMPLETE_ARGS": "ckpt-jax ver"}}
  fish = {"_TYPER_COMPLETE_ARGS": "ckpt-jax ver", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
  env = os.environ | {"_CKPT_JAX_COMPLETE": f"complete_{shell}"} | asked.get(shell, fish)
  done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=120)
  assert "verify" in done.stdout and "prune" not in done.stdout, done.stderr


def test_ls_shows_pinned_and_unhealthy_steps(run):
  lines = {line.split()[1]: line for line in cli("ls", run).stdout.splitlines() if line.startswith("│")}
  assert "pinned" in lines["0"] and "unhealthy" in lines["2"]
  assert "pinned" not in lines["1"] and "unhealthy" not in lines["1"]
  steps = json.loads(cli("ls", run, "--json").stdout)
  assert [(s["pinned"], s["healthy"]) for s in steps] == [(True, True), (False, True), (False, False)]


@pytest.mark.parametrize("command", [["ls"], ["show"], ["verify"], ["prune", "--keep-last", "1"], ["pin", "3"]])
def test_an_empty_directory_and_a_missing_one_are_different_messages(tmp_path, command):
  name, *rest = command
  (tmp_path / "empty").mkdir()
  missing, empty = (cli(name, tmp_path / which, *rest) for which in ("missing", "empty"))
  assert missing.returncode == empty.returncode == 1
  assert "there is no such directory" in missing.stderr
  assert "no such directory" not in empty.stderr and ("is empty" in empty.stderr or "no committed step" in empty.stderr)


@pytest.mark.parametrize("command", ["ls", "show"])
def test_a_reader_that_leaves_early_ends_the_command_well(run, command):
  text = f"{sys.executable} -m ckpt_jax {command} {run} | head -c 1 >/dev/null; echo ${{PIPESTATUS[0]}}"
  done = subprocess.run(["bash", "-c", text], capture_output=True, text=True, timeout=120)
  assert (done.stdout, done.stderr) == ("0\n", "")


def test_columns_is_the_width_of_a_table_in_a_pipe(run):
  for columns in (50, 90):
    env = os.environ | {"COLUMNS": str(columns)}
    done = subprocess.run([sys.executable, "-m", "ckpt_jax", "ls", run], env=env, capture_output=True, text=True)
    assert max(map(len, done.stdout.splitlines())) <= columns and "unhealthy" in done.stdout.replace("│", "")


def test_a_host_whose_name_is_unknown_is_an_error_within_seconds(monkeypatch):
  monkeypatch.setattr(retry, "_UNRESOLVED_S", 0.2)
  for name, value in (
    ("AWS_ENDPOINT_URL", "http://no-such-host.invalid:9000"),
    ("AWS_ACCESS_KEY_ID", "a"),
    ("AWS_SECRET_ACCESS_KEY", "b"),
    ("AWS_REGION", "us-east-1"),
  ):
    monkeypatch.setenv(name, value)
  done = cli("ls", "s3://bucket-of-nobody/run")
  assert done.returncode == 1 and "the name of its host, no-such-host.invalid, is not known here" in done.stderr
  spent = float(done.stderr.split(" tries in ")[1].split(" s")[0])
  assert spent < 30, "half of the deadline that any other failure has; on a quiet machine a fraction of a second"


def test_rollback_that_deletes_asks(run):
  refused = cli("rollback", run, 1, "--delete", answer="n\n")
  assert refused.returncode == 1 and "Delete step 2 for good?" in refused.stdout + refused.stderr
  assert ckpt.Checkpointer(run).latest_step() == 2


def test_commands_that_read_metadata_start_without_jax():
  program = (
    "import sys\nfrom ckpt_jax.cli import main\nsys.argv[1:] = ['ls', '/nowhere']\ntry:\n  main()\n"
    "except SystemExit:\n  pass\nprint({'jax', 'tensorstore', 'orbax'} & set(sys.modules))"
  )
  done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
  assert done.stdout == "set()\n", "each would take longer than the command"
