"""What is said of a save that was not committed."""

from __future__ import annotations

from etils import epath

from ckpt_jax.errors import CheckpointError, SaveFailedError, SaveOutOfSpaceError, SaveStorageError, UnhealthyStateError
from ckpt_jax.failures import is_out_of_space, is_read_only, root_cause
from ckpt_jax.integrity.record import is_unhealthy
from ckpt_jax.run.steps import committed_steps


def not_saved(directory: epath.Path, step: int, error: BaseException, *, committed: bool) -> CheckpointError:
  """The error to raise for a save that has failed.

  Args:
    directory: the run, whose steps are named as storage has them now.
    step: what was to be saved.
    error: what its write died of.
    committed: storage has the step all the same, which other processes of the job do not know.
  """
  unhealthy = is_unhealthy(error)
  if unhealthy is not None:
    return UnhealthyStateError(str(unhealthy))
  cause = root_cause(error)
  if committed:
    return SaveFailedError(
      f"{directory}: step {step} is committed, but not all processes have learned of it: {cause}", step
    )
  steps = committed_steps(directory)
  newest = steps[-1] if steps else None
  kept = f"the newest committed step is {newest}" if newest is not None else "no step is committed"
  message = f"{directory}: step {step} was not saved: {cause}; {kept}"
  if is_out_of_space(error):
    hint = "The storage is full: free space, or keep fewer steps (retention)"
    return SaveOutOfSpaceError(f"{message}. {hint}", step)
  if is_read_only(error):
    return SaveStorageError(message, step)
  return SaveFailedError(message, step)


def left_hanging(directory: epath.Path, step: int, timeout: float, *, uncommitted: bool) -> SaveFailedError:
  """The error to raise for a save that did not end within `timeout` seconds and was given up.

  Args:
    directory, step: what was to be saved.
    timeout: `timeouts.save`.
    uncommitted: whether its commit had not begun, so that it will not be committed any more.
  """
  late = f"did not end within {timeout:.0f} s (timeouts.save) and still hangs"
  if uncommitted:
    return SaveFailedError(
      f"{directory}: step {step} was not saved: its background write {late}; the storage does not answer. Earlier "
      "steps are untouched, and this step will not be committed any more",
      step,
    )
  return SaveFailedError(
    f"{directory}: it is not known whether step {step} is saved: its commit {late}; the storage does not answer. "
    "Earlier steps are untouched; steps() will say whether this one is there",
    step,
  )
