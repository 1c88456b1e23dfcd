"""Ordinary use and mistakes, in real processes; `ckpt-jax bench people` writes the table of docs/faults.md."""

import pathlib
import re
import subprocess
import sys

import pytest

from ckpt_jax.bench.people import PEOPLE, campaign, one, render, table
from ckpt_jax.bench.people_states import STATES
from ckpt_jax.bench.people_worker import SCENARIOS
from ckpt_jax.errors import CheckpointError

DOCS = pathlib.Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("name", ["hydra_path", "unreadable", "preempted"])
def test_ends_well(name):
  try:
    found = one("ckpt_jax", name)
  except CheckpointError as e:
    pytest.skip(str(e))
  assert found["good"], found


def test_a_scenario_that_ends_badly_is_reported_with_what_was_seen():
  found = one("orbax", "began_anew")
  assert found == {"good": False, "seen": "5 of 5 saves were skipped without an error"}


def test_every_scenario_has_a_program():
  helpers = {"train_until_sigterm", "serve_until_sigterm", "train_and_keep_one"}
  assert {*SCENARIOS, *STATES} - helpers == {*PEOPLE} - {"preempted", "serving"}


def test_what_was_tried_is_not_tried_again_and_the_table_shows_both_sides():
  sides = {"ckpt_jax": {"good": True, "seen": "saved | restored"}, "orbax": {"good": False, "seen": "lost"}}
  results = campaign(["hydra_path"], 1.0, {"people": {"hydra_path": sides}}, print)
  assert results["people"] == {"hydra_path": sides}
  text = table(results)
  assert f"| {PEOPLE['hydra_path']} | saved \\| restored | **lost** |" in text
  assert "1 of 1 end well with ckpt_jax, 0 of 1 with plain Orbax" in text
  page = render(results, "before\n<!-- people -->\nold\n<!-- /people -->\nafter\n")
  assert page.startswith("before\n") and page.endswith("\nafter\n") and text in page and "old" not in page
  assert render(results, "no mark\n") == "no mark\n"


def test_the_page_shows_everything():
  page = (DOCS / "faults.md").read_text().partition("<!-- people -->")[2].partition("<!-- /people -->")[0]
  assert not [text for text in PEOPLE.values() if f"| {text} |" not in page]
  assert re.search(rf"{len(PEOPLE)} of {len(PEOPLE)} end well with ckpt_jax", page)


def test_unknown_names_are_refused_with_the_known_ones():
  done = subprocess.run(
    [sys.executable, "-m", "ckpt_jax", "bench", "people", "sleep"], capture_output=True, text=True, timeout=60
  )
  assert done.returncode == 2 and all(name in done.stderr for name in PEOPLE) and "Traceback" not in done.stderr
