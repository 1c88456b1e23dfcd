"""Flipped bits, a few of them; `ckpt-jax bench flips` runs the campaign behind docs/integrity.md."""

import json
import pathlib
import random

import pytest

from ckpt_jax.bench import flips
from ckpt_jax.bench.flips import OUTCOMES, cases, render, replicate, rot, tried
from ckpt_jax.errors import CheckpointError
from ckpt_jax.run.steps import committed_steps, run_directory

DOCS = pathlib.Path(__file__).parents[2] / "docs"


def case_named(name):
  return next(case for case in cases() if case.name == name)


@pytest.mark.multiprocess
def test_bit_that_flips_in_a_file_of_several_steps_is_found_in_all_of_them_and_is_not_taken_over(tmp_path):
  case = case_named("local, 1 process, shuffled, linked")
  original, run = tmp_path / "original", tmp_path / "run"
  flips.save(case, "ckpt_jax", str(original))
  linked = [p for p in (original / str(case.newest)).rglob("*") if p.is_file() and p.stat().st_nlink > 1]
  file = max(linked, key=lambda p: p.stat().st_size).relative_to(original)
  for number, left in enumerate(([0, 1, 5], [0, 1])):  # a step is saved after the restore, or before it
    replicate(original, run)
    data = bytearray((run / file).read_bytes())
    data[len(data) // 2] ^= 1
    rot(run / file, bytes(data))
    assert tried(str(run), case, number) == {"verify": True, "outcome": "fell back"}
    assert committed_steps(run_directory(run)) == left


@pytest.mark.multiprocess
def test_campaign_of_shared_files_refuses_a_case_that_shares_none(tmp_path):
  case = case_named("local, 1 process, raw")
  with pytest.raises(CheckpointError, match="nothing is linked"):
    flips._local_campaign(flips.Case("local", 1, "off", "on", True), "ckpt_jax", tmp_path / "a", 1, random.Random(0))
  found = flips._local_campaign(case, "ckpt_jax", tmp_path / "b", 2, random.Random(0))
  assert sum(found["outcomes"].values()) == 2 and not found["outcomes"]["silently wrong"]


def test_table_counts_outcomes_and_what_verify_has_missed():
  found = flips._campaign(
    [{"outcome": "fell back", "verify": False}, {"outcome": "harmless", "verify": False}, {"outcome": "detected"}]
  )
  rows = [{"case": "a", "ckpt_jax": found, "orbax": None}]
  results = {"cases": rows, "totals": flips._totals(rows)}
  page = render(results, "before\n<!-- flips -->\nold\n<!-- /flips -->\nafter\n")
  assert "| a | 1 harmless; 1 fell back; 1 detected | does not write so |" in page
  assert "0 of 3 silently wrong with ckpt_jax" in page and "`verify` missed 1 of" in page and "old" not in page


def test_docs_quote_the_campaign():
  results, page = json.loads((DOCS / "flips.json").read_text()), (DOCS / "integrity.md").read_text()
  assert render(results, page) == page
  assert set(results["totals"]["ckpt_jax"]) == {*OUTCOMES, "missed by verify"}
