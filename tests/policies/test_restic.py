"""What restic's own `forget` decided on the same dates (tests/policies/restic_decisions.py recorded it)."""

import datetime
import json
import pathlib

import pytest

from ckpt_jax.policies import Retention
from ckpt_jax.run.steps import StepInfo

RECORDED = json.loads((pathlib.Path(__file__).parent / "restic_decisions.json").read_text())


@pytest.mark.parametrize("kind", RECORDED["runs"])
def test_retention_keeps_what_restic_keeps(kind):
  start = datetime.datetime.fromisoformat(RECORDED["start"])
  run = RECORDED["runs"][kind]
  steps = [StepInfo(i, start + datetime.timedelta(seconds=s), 1, {}) for i, s in enumerate(run["seconds"])]
  for rules, kept in run["decisions"]:
    assert Retention(**rules).decide(steps).kept == kept, rules
