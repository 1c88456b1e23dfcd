"""What the benchmarks share: none of the events of a job is lost, and what fails is reported."""

import os

import pytest

from ckpt_jax.bench.common import answer, job_events, rotated
from ckpt_jax.errors import CheckpointError

PROGRAM = """
import os, sys
from ckpt_jax.bench.common import emit
for i in range(1000):
  emit(process=os.environ["CKPT_JAX_PROCESS_INDEX"], number=i)
sys.exit(int(sys.argv[1]))
"""


@pytest.fixture
def program(tmp_path, monkeypatch):
  (tmp_path / "thousand_events.py").write_text(PROGRAM)
  monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
  monkeypatch.setenv("CKPT_JAX_PROCESS_INDEX", "alone")
  return "thousand_events"


def test_each_event_of_a_job_arrives_in_order(program):
  events = job_events("many", [program, "0"], processes=2)
  assert events == [{"process": p, "number": i} for p in "01" for i in range(1000)]


def test_answer_is_the_last_line_and_a_failure_is_reported(program):
  assert answer("many", [program, "0"]) == {"process": "alone", "number": 999}
  with pytest.raises(CheckpointError, match="many: exit code 3"):
    answer("many", [program, "3"])


def test_each_side_begins_in_its_turn():
  assert [rotated("abc", turn) for turn in range(4)] == [[*"abc"], [*"bca"], [*"cab"], [*"abc"]]
  assert rotated([], 1) == []
