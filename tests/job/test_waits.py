"""No process waits for another without a limit, nor for one that has failed."""

import pytest
from jobs import together


@pytest.mark.multiprocess
def test_whoever_waits_for_a_process_that_stays_away_or_fails_says_so_and_the_next_save_commits(tmp_path):
  (tmp_path / "notes").mkdir()
  results = together("late.py", tmp_path / "run", tmp_path / "notes", processes=2)
  assert all("nobody was waited for" in r.log for r in results)
