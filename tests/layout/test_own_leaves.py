"""Leaves that each process of a job has for itself: eager scalars and keys, numpy arrays, numbers, text."""

import pytest
from jobs import together

import ckpt_jax as ckpt

pytestmark = pytest.mark.multiprocess


def job(run, mode):
  return together("own_leaves.py", run, mode, processes=2)


def test_a_job_of_many_resumes_whatever_leaves_init_makes_where_it_stands(tmp_path):
  job(tmp_path, "resume")
  with ckpt.Checkpointer(tmp_path) as c:  # and so does a single process
    state = c.restore().state
  assert state["step"] == 3 and state["count"] == 5 and state["name"] == "adam" and state["w"].tolist()[0] == 3


def test_leaves_that_differ_between_processes_are_refused_by_name_and_the_next_save_works(tmp_path):
  results = job(tmp_path, "differ")
  for result in results:
    told = [line for line in result.log.splitlines() if line.startswith("told:")]
    assert len(told) == 4 and all("must be the same on all processes" in line for line in told), result.log
    for line, name in zip(told, ("table", "count", "name", "key"), strict=True):
      assert f"{name} (process 1)" in line
