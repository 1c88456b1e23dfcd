"""The measured codecs: what is committed agrees with itself, and its table with the page."""

import json
import pathlib

from ckpt_jax.bench.codec import FORMS, PARTS, render

ROOT = pathlib.Path(__file__).parents[2]


def measured():
  return json.loads((ROOT / "docs" / "codec.json").read_text())


def test_page_has_the_measured_table():
  page = (ROOT / "docs" / "format.md").read_text()
  assert render(measured(), page) == page, "run ckpt-jax bench codec -o docs/codec.json --fill docs/format.md"


def test_shuffled_is_smaller_than_zstd_on_all_trained_values_and_orbax_stores_what_our_zstd_does():
  found = measured()["results"]["disk"]
  assert found.keys() == {f"{part} {form}" for part in PARTS for form in FORMS}
  for entry in found.values():
    share = {side: e["share"] for side, e in entry["sides"].items()}
    assert share["shuffled"] < 0.95 * share["zstd"] and abs(share["zstd"] - share["orbax, zstd"]) < 0.02
    assert share["shuffled"] - 0.01 < share["auto"] < share["off"] + 0.01
