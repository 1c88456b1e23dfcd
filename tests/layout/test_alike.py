"""Whether all processes of a job hold the same tree."""

import numpy as np
import pytest
from jobs import together

from ckpt_jax.job.agreement import who_differs
from ckpt_jax.layout import alike
from ckpt_jax.layout.structure import flatten


def found_by(first, other):
  """What process 1 of two finds, which holds `other`."""
  one, two = flatten(first), flatten(other)
  digests = [alike.digest_of(one), alike.digest_of(two)]
  sent = []

  def packed(of_process_zero):  # what process 0 sends
    who_differs(alike.kinds(one), digests, lambda pack: sent.append(pack()) or sent[0], lambda text: ["", text])
    return sent[0]

  return who_differs(alike.kinds(two), digests, packed, lambda text: ["", text])


@pytest.mark.parametrize(
  ("other", "said"),
  [
    ({"a": np.zeros(3), "b": 2}, ""),
    ({"a": np.zeros(4), "b": 1}, "process 1: a is ndarray float64[4], on process 0 ndarray float64[3]"),
    ({"a": np.zeros(3), "b": 1.0}, "process 1: b is float, on process 0 int"),
    ({"a": np.zeros(3)}, "process 1: b (int) is only on process 0"),
    ({"a": np.zeros(3), "b": 1, "c\n\td": "ü"}, "process 1: c d (str) is not on process 0"),
    ([np.zeros(3), 1], "process 1: 0 (ndarray float64[3]) is not on process 0, 1 (int) is not on process 0, a"),
  ],
)
def test_process_that_differs_is_named_with_its_leaves(other, said):
  assert found_by({"a": np.zeros(3), "b": 1}, other).startswith(said)
  assert bool(said) == bool(found_by({"a": np.zeros(3), "b": 1}, other))


@pytest.mark.multiprocess
def test_processes_that_do_not_do_the_same_get_one_error_each_and_go_on(tmp_path):
  for result in together("alike.py", tmp_path / "run", processes=4):
    assert "done" in result.log
