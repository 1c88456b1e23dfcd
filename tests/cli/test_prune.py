"""`ckpt-jax prune`, `pin` and `unpin` as a user types them."""

import json

import jax.numpy as jnp
import pytest
from commands import cli

import ckpt_jax as ckpt
from ckpt_jax.run import steps as runs


def numbers(path):
  return [s.step for s in runs.list_steps(path)]


@pytest.fixture
def run(tmp_path):
  with ckpt.Checkpointer(tmp_path, ckpt.Config(retention={"last": None})) as c:
    for step in range(6):
      c.save(step, {"w": jnp.ones(8)}, metrics={"loss": abs(step - 1.0)})
  return tmp_path


def test_dry_run_names_the_rule_that_keeps_each_step_and_deletes_nothing(run):
  done = cli("prune", run, "--keep-last", 2, "--keep-best", "loss", "--dry-run")
  assert done.returncode == 0, done.stderr
  assert "newest, last" in done.stdout and "best" in done.stdout
  assert "3 of 6 steps would be removed, 96 B freed" in done.stdout
  assert numbers(run) == list(range(6))


def test_prune_asks_and_a_no_deletes_nothing(run):
  done = cli("prune", run, "--keep-last", 2, answer="n\n")
  assert done.returncode == 1 and "nothing deleted" in done.stderr
  assert numbers(run) == list(range(6))


def test_prune_with_yes_deletes_what_no_rule_keeps_but_not_what_is_pinned(run):
  assert cli("pin", run, 0).returncode == 0
  done = cli("prune", run, "--keep-every-steps", 4, "--yes", "--json")
  assert done.returncode == 0, done.stderr
  found = json.loads(done.stdout)
  assert found["kept"] == numbers(run) == [0, 4, 5] and found["removed"] == [1, 2, 3]
  assert found["nbytes_freed"] == 96 and found["steps"][0]["kept_by"] == ["pinned", "every_steps"]
  assert cli("unpin", run, 0).returncode == 0
  assert cli("unpin", run, 0).returncode == 1, "it is not pinned any more"


def test_prune_decides_as_the_live_policy_does(run, tmp_path_factory):
  found = json.loads(cli("prune", run, "--keep-last", 2, "--keep-best", "loss:max:2", "--json").stdout)
  with ckpt.Checkpointer(
    tmp_path_factory.mktemp("live"),
    ckpt.Config(retention={"last": 2, "best": {"metric": "loss", "mode": "max", "n": 2}}),
  ) as c:
    for step in range(6):
      c.save(step, {"w": jnp.ones(8)}, metrics={"loss": abs(step - 1.0)})
  assert found["kept"] == numbers(c.directory) and found["dry_run"]


@pytest.mark.parametrize(
  ("arguments", "word"),
  [
    ([], "no rule given"),
    (["--keep-last", "0"], "last"),
    (["--keep-within", "soon"], "soon"),
    (["--budget", "x"], "no size"),
  ],
)
def test_wrong_rules_are_wrong_usage(tmp_path, arguments, word):
  done = cli("prune", tmp_path, *arguments)
  assert done.returncode == 2 and word in done.stderr


def test_prune_and_pin_of_what_is_not_there_are_findings(run, tmp_path):
  assert cli("pin", run, 77).returncode == 1
  done = cli("prune", run / "nowhere", "--keep-last", "1", "--yes")
  assert done.returncode == 1 and "no committed checkpoint" in done.stderr
