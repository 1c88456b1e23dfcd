"""One answer for all processes, and one error."""

import json

import pytest
from jobs import together

from ckpt_jax import errors
from ckpt_jax.job.agreement import decided_by_process_zero, error_from_json, error_to_json
from ckpt_jax.job.rendezvous import Rendezvous


def test_a_single_process_agrees_with_itself():
  assert decided_by_process_zero(lambda: [1, 2**40], Rendezvous("alone"), 0.0) == [1, 2**40]
  refused = errors.StorageError("held")
  with pytest.raises(errors.StorageError) as e:
    decided_by_process_zero(lambda: raises(refused), Rendezvous("alone"), 0.0)
  assert e.value is refused


def raises(error):
  raise error


@pytest.mark.multiprocess
def test_all_processes_have_the_answers_and_errors_of_the_first_and_none_waits_for_a_bug_of_it():
  together("agreement.py", processes=4)


@pytest.mark.parametrize(
  "error",
  [
    errors.StorageError("held"),
    errors.SaveOutOfSpaceError("full", 7),
    errors.SaveFailedError("failed"),
    errors.StructureMismatchError("a\nb"),
  ],
)
def test_an_error_is_the_same_on_another_process(error):
  found = error_from_json(json.loads(json.dumps(error_to_json(error))))
  assert type(found) is type(error) and str(found) == str(error)
  assert getattr(found, "step", None) == getattr(error, "step", None)


@pytest.mark.parametrize("name", ["KeyError", "annotations", "Missing"])
def test_an_error_of_an_unknown_class_is_a_checkpoint_error(name):
  found = error_from_json({"error": name, "message": "a bug", "step": None, "topic": None})
  assert type(found) is errors.CheckpointError and str(found) == "a bug"
