"""Opens Orbax's manager of a run with our handlers, policies, paths and hooks; anew whenever one of them changes."""

from __future__ import annotations

import dataclasses
import datetime
import math
from collections.abc import Callable, Sequence
from typing import Any

import orbax.checkpoint as ocp
from etils import epath

from ckpt_jax.config import Config
from ckpt_jax.errors import CheckpointError
from ckpt_jax.orbax.manager import RunManager, forget_steps, use_deleter
from ckpt_jax.policies.schedule import Schedule
from ckpt_jax.run.steps import committed_steps, step_info
from ckpt_jax.save.opening import OpenRun
from ckpt_jax.storage.urls import is_object_store

_LONG_AGO = datetime.datetime.min.replace(tzinfo=datetime.timezone.utc)


@dataclasses.dataclass(frozen=True)
class Hooks:
  """Called by the threads that write a step.

  Attributes:
    committing: on process 0 right before the commit, with the step; raises to stop it.
    committed: on process 0 once the commit is durable, with the step.
    ended: on all processes once nothing writes the step any more, with the step and the error it ended with.
    meet: on all processes: Orbax's `barrier_sync_fn`.
  """

  committing: Callable[[int], None]
  committed: Callable[[int], None]
  ended: Callable[[int, BaseException | None], None]
  meet: Callable[..., None]


def open_manager(
  run: OpenRun, hooks: Hooks, handlers: Any, config: Config, known: Sequence[int] | None = None
) -> RunManager:
  """Opens Orbax's manager. All processes call it alike.

  `config` are the settings, planned or not, and `known` the committed steps, if they were listed a moment ago.
  """
  best, found = config.retention.best, [known]
  with run.deleter.paused():
    run.deleter.resume()
    manager = RunManager(
      run.directory,
      lambda: _steps(run, found.pop() if found else None),
      hooks.ended,
      run.meeting.wait,
      item_handlers=handlers,
      options=ocp.CheckpointManagerOptions(
        save_decision_policy=run.policy,
        preservation_policy=run.retention,
        # Orbax writes metrics, and reads them back for the policies, only if it has a function that ranks by them.
        best_fn=lambda m: m.get(best.metric, float("nan")) if best else float("nan"),
        temporary_path_class=run.admission.path_class(hooks.committing, hooks.committed),
        # The place of a step in a bucket is looked at behind training, by `Admission`.
        file_options=ocp.options.FileOptions(skip_sync_file_validations=is_object_store(run.directory)),
        step_name_format=run.admission.step_names(),
        async_options=ocp.options.AsyncOptions(
          timeout_secs=math.ceil(config.timeouts.save_s), barrier_sync_fn=run.admission.barrier(hooks.meet)
        ),
      ),
    )
    use_deleter(manager, run.deleter)
    forget_steps(manager, run.meeting.decided(lambda: sorted(run.deleter.pending)))
  run.retention.read_ahead(manager.all_steps())
  return manager


def _steps(run: OpenRun, steps: Sequence[int] | None) -> list[tuple[int, datetime.datetime]]:
  if steps is None:
    steps = committed_steps(run.directory)
  if isinstance(run.schedule, Schedule) and not run.schedule.needs_times:
    return [(step, _LONG_AGO) for step in steps]
  return [(step, _commit_time(run.directory, step)) for step in steps]


def _commit_time(directory: epath.Path, step: int) -> datetime.datetime:
  try:
    return step_info(directory, step).time or _LONG_AGO
  except CheckpointError:  # damaged, which a restore reports
    return _LONG_AGO
