"""The command line as a user types it."""

import dataclasses
import json
import subprocess
import sys
from typing import Annotated

import jax.numpy as jnp
import pytest
import typer
from commands import cli
from typer.testing import CliRunner

import ckpt_jax as ckpt
from ckpt_jax.cli.app import app as whole_app
from ckpt_jax.cli.common import grouped, print_table


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  path = tmp_path_factory.mktemp("run")
  with ckpt.Checkpointer(path) as c:
    for step in range(3):
      c.save(
        step,
        {"params": {"w": jnp.ones((4, 8)), "e": jnp.zeros((0, 2))}},
        metrics={"loss": 3.0 - step},
        extras={"at": step},
      )
  return path


def test_ls_lists_steps(run):
  done = cli("ls", run)
  assert done.returncode == 0, done.stderr
  assert "loss=1" in done.stdout and "128 B" in done.stdout
  steps = json.loads(cli("ls", run, "--json").stdout)
  assert [s["step"] for s in steps] == [0, 1, 2] and steps[0]["nbytes"] == 128


def test_show_shows_leaves_and_metadata_of_the_newest_step(run):
  shown = json.loads(cli("show", run, "--json").stdout)
  assert shown["step"] == 2 and shown["extras"] == {"at": 2} and shown["metrics"] == {"loss": 1.0}
  leaves = {leaf["path"]: (leaf["shape"], leaf["dtype"]) for leaf in shown["leaves"]}
  assert leaves == {"params/w": ([4, 8], "float32"), "params/e": ([0, 2], "float32")}
  assert "[4, 8]" in cli("show", run, 1).stdout


def test_who_counts_chunks(run):
  report = json.loads(cli("who", run, 0, "--json").stdout)
  assert report["overlaps"] == {} and len(report["processes"]) == 1


@pytest.mark.parametrize(
  ("arguments", "code", "message"),
  [
    (["shwo", "x"], 2, "did you mean show?"),
    (["ls"], 2, "Missing argument"),
    (["ls", "x", "--jsno"], 2, "--json"),
    (["ls", "/nowhere/at/all"], 1, "/nowhere/at/all: no committed checkpoint"),
    (["show", "/nowhere"], 1, "no committed checkpoint"),
    (["show", "/nowhere", "three"], 2, "valid integer"),
  ],
)
def test_mistakes_get_a_message_and_no_traceback(arguments, code, message):
  done = cli(*arguments)
  assert done.returncode == code and message in done.stderr


def test_missing_step_names_those_that_exist(run):
  done = cli("show", run, 9)
  assert done.returncode == 1 and "committed steps: 0, 1, 2" in done.stderr


def test_damaged_metadata_is_a_message(tmp_path):
  with ckpt.Checkpointer(tmp_path) as c:
    c.save(0, {"x": jnp.ones(2)})
  (tmp_path / "0" / "_CHECKPOINT_METADATA").write_text("{")
  done = cli("ls", tmp_path)
  assert done.returncode == 1 and "not JSON" in done.stderr


def test_help_and_version():
  assert "ls" in cli("--help").stdout
  assert cli("--version").stdout.strip() == f"ckpt-jax {ckpt.__version__}"


def test_command_is_a_program_whose_reader_may_leave_early(run):
  command = f"{sys.executable} -m ckpt_jax ls {run} --json | head -c 1; echo ${{PIPESTATUS[0]}}"
  done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
  assert (done.stdout, done.stderr) == ("[0\n", "")


def test_one_damaged_step_does_not_hide_the_others(tmp_path):
  with ckpt.Checkpointer(tmp_path) as c:
    for step in (1, 2):
      c.save(step, {"w": jnp.ones(3)}, metrics={"loss[x]": 0.5})
  file = tmp_path / "2" / "_CHECKPOINT_METADATA"
  data = json.loads(file.read_text())
  del data["custom_metadata"]["ckpt_jax"]["nbytes"]
  file.write_text(json.dumps(data))
  listed = cli("ls", tmp_path)
  assert listed.returncode == 1 and "loss[x]=0.5" in listed.stdout and "damaged" in listed.stderr
  as_json = json.loads(cli("ls", tmp_path, "--json").stdout)
  assert [s["step"] for s in as_json] == [1, 2] and "damaged" in as_json[1]


def test_leaf_names_that_look_like_markup_are_shown(tmp_path):
  with ckpt.Checkpointer(tmp_path) as c:
    c.save(0, {"w": {"[bold]": jnp.ones(3)}})
  assert "[bold]" in cli("show", tmp_path).stdout


def test_who_reports_a_process_whose_database_is_empty(tmp_path):
  with ckpt.Checkpointer(tmp_path) as c:
    c.save(0, {"w": jnp.ones(3)})
  (tmp_path / "0" / "default" / "ocdbt.process_0" / "manifest.ocdbt").unlink()
  assert cli("who", tmp_path, "0").returncode == 1


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["prob", "x"], "did you mean probe"),
    (["probe", "/tmp", "--budget", "never"], "no duration"),
    (["probe", "gs:///x"], "expected gs://BUCKET/PATH"),
    (["bench", "buckett"], "did you mean bucket"),
  ],
)
def test_wrong_usage_exits_2_and_says_what_is_right(arguments, message):
  done = cli(*arguments)
  assert done.returncode == 2 and message in " ".join(done.stderr.split()), done.stderr


@dataclasses.dataclass(frozen=True)
class Box:
  width: Annotated[int, typer.Option("--wide", min=1)]
  name: Annotated[str, typer.Option()] = "box"


def test_options_of_a_group_arrive_as_its_dataclass():
  app = typer.Typer()

  @app.command()
  @grouped
  def show(path: str, box: Box, loud: Annotated[bool, typer.Option("--loud")] = False) -> None:
    """Shows a box."""
    typer.echo(f"{path} {box} {loud}")

  assert CliRunner().invoke(app, ["here", "--wide", "3", "--loud"]).output == "here Box(width=3, name='box') True\n"
  assert CliRunner().invoke(app, ["here"]).exit_code == 2
  assert CliRunner().invoke(app, ["here", "--wide", "0"]).exit_code == 2
  assert "Shows a box." in CliRunner().invoke(app, ["--help"]).output


def test_long_tables_hold_the_same_cells_as_short_ones(capsys):
  for rows in (3, 1000):
    print_table(["step", "metrics"], [[str(i), f"loss[x]={i}"] for i in range(rows)], title="a run")
    out = capsys.readouterr().out
    assert "a run" in out and "metrics" in out and all(f"loss[x]={i}" in out for i in range(rows))


def test_every_command_says_what_it_does():
  def check(command, path):
    assert command.help and command.help.strip()[0].isupper(), path
    for parameter in command.params:
      assert getattr(parameter, "help", None), f"{path} {parameter.name}"
    for name, inner in getattr(command, "commands", {}).items():
      check(inner, f"{path} {name}")

  check(typer.main.get_command(whole_app), "ckpt-jax")
