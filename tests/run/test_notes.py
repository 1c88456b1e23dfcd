"""Notes beside the steps of a run: small files, of which a damaged one is an empty one."""

import pytest
from etils import epath

from ckpt_jax.run.notes import PINS, note_of, noted_steps, read_note, write_note


def test_a_note_reads_back_and_names_its_step(tmp_path):
  run = epath.Path(tmp_path)
  assert noted_steps(run, PINS) == set()
  write_note(note_of(run, PINS, 7), {"pinned": "today"})
  (tmp_path / ".ckpt_jax" / "pins" / "README").write_text("no step")
  assert noted_steps(run, PINS) == {7} and read_note(note_of(run, PINS, 7)) == {"pinned": "today"}


@pytest.mark.parametrize("content", [b"", b'{"a"', b"[1]", b"\xff"])
def test_a_note_that_is_missing_or_cut_short_is_empty(tmp_path, content):
  file = epath.Path(tmp_path / "note")
  assert read_note(file) == {}
  file.write_bytes(content)
  assert read_note(file) == {}
