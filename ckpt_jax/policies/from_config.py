"""From the configuration's `schedule` section to the policy, with what the run remembers."""

from __future__ import annotations

import functools
import logging
import statistics
from collections.abc import Callable

import jax
from etils import epath

from ckpt_jax.config import ScheduleConfig
from ckpt_jax.config.units import duration_text
from ckpt_jax.policies.schedule import AllOf, AnyOf, AtSteps, EveryMinutes, EverySteps, Never, Schedule
from ckpt_jax.policies.youngdaly import YoungDaly, learned_mtti
from ckpt_jax.run.attempts import Attempt, exposure, read_attempts

_log = logging.getLogger(__name__)


def make_schedule(config: ScheduleConfig, directory: epath.Path) -> Schedule:
  """The schedule in force, without preemption. Only process 0 reads the run's history: its clock decides."""
  schedule = _made(config, directory, functools.cache(lambda: read_attempts(directory)))
  _log.info("%s: saves %s", directory, schedule.explain())
  return schedule


def _made(config: ScheduleConfig, directory: epath.Path, attempts: Callable[[], list[Attempt]]) -> Schedule:
  rule = _rule(config, directory, attempts)
  return rule if config.last is None else AnyOf([rule, AtSteps([config.last])])


def _rule(config: ScheduleConfig, directory: epath.Path, attempts: Callable[[], list[Attempt]]) -> Schedule:
  if config.any is not None:
    return AnyOf([_made(part, directory, attempts) for part in config.any])
  if config.all is not None:
    return AllOf([_made(part, directory, attempts) for part in config.all])
  if config.never:
    return Never()
  if config.at_steps is not None:
    return AtSteps(config.at_steps)
  if config.every is not None:
    return EveryMinutes(config.every / 60)
  if config.overhead is not None:
    return _young_daly(config, attempts() if jax.process_index() == 0 else [])
  return EverySteps(config.every_steps or 1)


def _young_daly(config: ScheduleConfig, attempts: list[Attempt]) -> YoungDaly:
  mtti, source = config.mtti, "given"
  if config.node_mtti is not None:
    mtti = config.node_mtti / jax.process_count()
    source = f"{jax.process_count()} nodes of {duration_text(config.node_mtti)} each"
  if mtti == "learned":
    seconds, interruptions = exposure(attempts)
    mtti = learned_mtti(seconds, interruptions)
    source = f"learned: {interruptions} interruptions in {duration_text(seconds)} of this run"
  schedule = YoungDaly(mtti, config.overhead, mtti_source=source)
  recent = [a for a in attempts if a.saves][-5:]
  if recent:
    saves = [a.saves for a in recent]
    schedule.seed(
      statistics.fmean([a.blocking_s for a in recent], saves), statistics.fmean([a.background_s for a in recent], saves)
    )
  return schedule
