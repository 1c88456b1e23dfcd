"""Faults as real processes, a few tries of each; `ckpt-jax bench faults` runs the campaign behind docs/faults.md."""

import json
import os
import pathlib

import pytest
from commands import cli

from ckpt_jax.bench.faults import FAULTS, Fault, campaign, kills, one_fault, render, table
from ckpt_jax.errors import CheckpointError

DOCS = pathlib.Path(__file__).parents[2] / "docs"
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounting a file system needs root")


def survives(name, seed=1):
  try:
    found = one_fault("ckpt_jax", name, seed)
  except CheckpointError as e:
    if "cannot mount here" in str(e):
      pytest.skip(str(e))
    raise
  assert found["good"], json.dumps(found, indent=1)
  return found


@pytest.mark.multiprocess
@pytest.mark.parametrize(("name", "seeds"), [("kill_1", [101, 102]), ("kill_linked", [101, 102]), ("kill_gs", [101])])
def test_job_killed_at_random_moments_goes_on_from_its_last_commit(name, seeds):
  for found in kills("ckpt_jax", FAULTS[name], seeds):
    assert found["good"], found


@pytest.mark.multiprocess
def test_job_of_several_processes_resumes_from_its_last_commit_after_one_is_killed():
  for found in kills("ckpt_jax", Fault("", processes=2, options={"megabytes": 4}), [103]):
    assert found["good"], found


@pytest.mark.multiprocess
def test_kill_is_no_good_try_of_linked_leaves_if_nothing_was_linked():
  nothing_frozen = {"megabytes": 4, "frozen": 0}
  for found in kills("ckpt_jax", Fault("", processes=1, options=nothing_frozen), [104]):
    assert found["kept"] and found["next"] and not found["shared"] and not found["good"], found


@needs_root
@pytest.mark.multiprocess
@pytest.mark.parametrize("name", ["full_disk_linked", "too_large_linked"])
def test_step_of_linked_leaves_that_finds_no_room_raises_and_costs_nothing_else(name):
  assert survives(name)["shared"]


@pytest.mark.multiprocess
def test_server_of_a_bucket_that_stops_answering_raises_within_the_timeout_and_nothing_late_is_taken_for_a_step():
  assert survives("hang_s3")["waited_s"] < 60, "the timeout is 5 s, that of storage none"


@needs_root
@pytest.mark.multiprocess
def test_disk_that_turns_read_only_costs_one_step_and_raises_once():
  survives("read_only")


@needs_root
@pytest.mark.multiprocess
def test_storage_that_stops_answering_raises_within_the_timeout_and_the_process_can_end():
  assert survives("hang")["waited_s"] < 60, "the timeout is 5 s, that of storage none"


@pytest.mark.multiprocess
@pytest.mark.parametrize("name", ["sigterm", "directory_deleted", "clock_back"])
def test_nothing_is_lost_by(name):
  survives(name)


def test_what_was_tried_already_is_not_tried_again_and_the_table_counts_it():
  tries = [{"seed": s, "good": s < 2, "kept": s < 2, "leftovers": 0} for s in range(3)]
  sides = {"ckpt_jax": tries[:2], "orbax": tries}
  results = campaign(["sigterm"], 2, 0, 0.0, {"faults": {"sigterm": sides}}, print)
  assert results["faults"]["sigterm"]["ckpt_jax"] == tries[:2]
  text = table(results)
  assert "| 2 of 2 | 2 of 3 | a step was lost, or is listed and cannot be restored (1) |" in text
  page = render(results, "before\n<!-- faults -->\nold\n<!-- /faults -->\nafter\n")
  assert page.startswith("before\n") and page.endswith("\nafter\n") and text in page and "old" not in page


def test_page_has_the_table_of_the_campaign():
  results, page = json.loads((DOCS / "faults.json").read_text()), (DOCS / "faults.md").read_text()
  assert render(results, page) == page
  assert results["faults"].keys() == FAULTS.keys()


def test_unknown_fault_names_the_known_ones():
  done = cli("bench", "faults", "earthquake")
  assert done.returncode == 2 and all(name in done.stderr for name in FAULTS)
