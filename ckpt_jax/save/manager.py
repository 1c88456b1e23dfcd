"""Orbax's manager of a run, with our handlers, policies, paths and hooks; opened anew when one of them changes."""

from __future__ import annotations

import dataclasses
import datetime
import math
from collections.abc import Callable, Sequence
from typing import Any

import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import SaveDecisionPolicy

from ckpt_jax.config import Config
from ckpt_jax.errors import CheckpointError
from ckpt_jax.job.agreement import from_process_zero
from ckpt_jax.orbax.manager import ToldManager, forget_steps, use_deleter
from ckpt_jax.policies.schedule import Schedule
from ckpt_jax.run.deletion import StepDeleter
from ckpt_jax.run.steps import committed_steps, step_info
from ckpt_jax.save.admission import Gate
from ckpt_jax.save.retention import LiveRetention

_LONG_AGO = datetime.datetime.min.replace(tzinfo=datetime.timezone.utc)


@dataclasses.dataclass(frozen=True)
class Reports:
  """What the threads of a save call.

  Attributes:
    committing: on process 0 right before the commit, with the step; raises to stop it.
    committed: on process 0 once the commit is durable.
    ended: with the step and what its save died of, once nothing writes it any more.
    meet: Orbax's barrier_sync_fn; given anew each time that a manager is opened.
  """

  committing: Callable[[int], None]
  committed: Callable[[int], None]
  ended: Callable[[int, BaseException | None], None]
  meet: Callable[[], Callable[..., None]]


@dataclasses.dataclass(frozen=True)
class Managers:
  """Opens Orbax's manager of a run.

  Attributes:
    directory: the run.
    policy, schedule: what decides on saving, with preemption and without.
    retention, deleter: what stays, and who removes the rest.
    gate: between a save and the storage.
    reports: what the threads of a save call.
  """

  directory: epath.Path
  policy: SaveDecisionPolicy
  schedule: SaveDecisionPolicy
  retention: LiveRetention
  deleter: StepDeleter
  gate: Gate
  reports: Reports

  def open(self, handlers: Any, config: Config, known: Sequence[int] | None = None) -> ToldManager:
    """Opens one.

    Args:
      handlers: Orbax's item handlers.
      config: the settings, planned or not.
      known: the steps there are, if somebody has just looked.
    """
    best, found = config.retention.best, [known]
    with self.deleter.paused():
      self.deleter.resume()
      manager = ToldManager(
        self.directory,
        lambda: self._steps_there(found.pop() if found else None),
        self.reports.ended,
        item_handlers=handlers,
        options=ocp.CheckpointManagerOptions(
          save_decision_policy=self.policy,
          preservation_policy=self.retention,
          # Orbax writes metrics, and reads them back for the policies, only if it has a function that ranks by them.
          best_fn=lambda m: m.get(best.metric, float("nan")) if best else float("nan"),
          temporary_path_class=self.gate.path_class(self.reports.committing, self.reports.committed),
          step_name_format=self.gate.step_names(),
          async_options=ocp.options.AsyncOptions(
            timeout_secs=math.ceil(config.timeouts.save_s),
            barrier_sync_fn=self.gate.barrier(self.reports.meet()),
          ),
        ),
      )
      use_deleter(manager, self.deleter)
      forget_steps(manager, from_process_zero(sorted(self.deleter.pending)))
    self.retention.read_ahead(manager.all_steps())
    return manager

  def _steps_there(self, steps: Sequence[int] | None) -> list[tuple[int, datetime.datetime]]:
    if steps is None:
      steps = committed_steps(self.directory)
    if isinstance(self.schedule, Schedule) and not self.schedule.needs_times:
      return [(step, _LONG_AGO) for step in steps]
    return [(step, self._commit_time(step)) for step in steps]

  def _commit_time(self, step: int) -> datetime.datetime:
    try:
      return step_info(self.directory, step).time or _LONG_AGO
    except CheckpointError:  # damaged: that is told by whoever wants to restore it
      return _LONG_AGO
