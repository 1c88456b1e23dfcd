"""Answers of process 0 on every process, and its errors: agreement.py."""

import time

from ckpt_jax import multihost

multihost.initialize()

import jax

from ckpt_jax import errors
from ckpt_jax.job.agreement import decided_by_process_zero
from ckpt_jax.job.rendezvous import Rendezvous

first = jax.process_index() == 0
meeting = Rendezvous("agreement")


def decide(answer):
  def decided():
    assert first, "asked on another process than the first"
    if isinstance(answer, Exception):
      raise answer
    return answer

  return decided


def raised(error):
  try:
    decided_by_process_zero(decide(error), meeting, 60)
  except Exception as e:
    return e
  raise SystemExit(f"{error!r} was raised on process 0 alone")


for steps in ([], [5], [3, 1, 2**40, 2**63 - 1, -1], {"a": None}):
  assert decided_by_process_zero(decide(steps), meeting, 60) == steps
for error in (
  errors.StorageError("s3://b: held by another job"),
  errors.SaveOutOfSpaceError("step 2**40: “full”", 2**40),
  errors.SaveFailedError("step ?: it failed"),
  errors.CorruptCheckpointError("x" * 5000),
):
  found = raised(error)
  assert type(found) is type(error) and str(found) == str(error)
  assert getattr(found, "step", None) == getattr(error, "step", None)
assert decided_by_process_zero(decide([8]), meeting, 60) == [8], "errors leave the processes in step"

started = time.monotonic()
found = raised(KeyError("a bug on process 0"))
assert isinstance(found, KeyError if first else errors.CheckpointError) and "a bug on process 0" in str(found), found
assert time.monotonic() - started < 30, "nobody waits for the timeout"
print("agreed", flush=True)
