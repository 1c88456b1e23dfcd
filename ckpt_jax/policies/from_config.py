"""The schedule that a configuration's `schedule` section asks for."""

from __future__ import annotations

import logging
import statistics

import jax
from etils import epath

from ckpt_jax.config import ScheduleConfig
from ckpt_jax.config.units import count, duration_text
from ckpt_jax.policies.schedule import AllOf, AnyOf, AtSteps, EveryMinutes, EverySteps, Never, Schedule
from ckpt_jax.policies.youngdaly import YoungDaly, learned_mtti
from ckpt_jax.run.attempts import exposure, read_attempts

_log = logging.getLogger(__name__)


def make_schedule(config: ScheduleConfig, directory: epath.Path) -> Schedule:
  """The schedule in force for the run in `directory`, without preemption."""
  schedule = _made(config, directory)
  _log.info("%s: saves %s", directory, schedule.explain())
  return schedule


def _made(config: ScheduleConfig, directory: epath.Path) -> Schedule:
  rule: Schedule = EverySteps(config.every_steps or 1)
  if config.any is not None:
    rule = AnyOf([_made(part, directory) for part in config.any])
  elif config.all is not None:
    rule = AllOf([_made(part, directory) for part in config.all])
  elif config.never:
    rule = Never()
  elif config.at_steps is not None:
    rule = AtSteps(config.at_steps)
  elif config.every is not None:
    rule = EveryMinutes(config.every / 60)
  elif config.overhead is not None:
    rule = _young_daly(config, directory)
  return rule if config.last is None else AnyOf([rule, AtSteps([config.last])])


def _young_daly(config: ScheduleConfig, directory: epath.Path) -> YoungDaly:
  """The schedule with what the run remembers, which process 0 alone reads: its clock decides."""
  attempts = read_attempts(directory) if jax.process_index() == 0 else []
  if config.mtti == "learned":
    seconds, interruptions = exposure(attempts)
    source = f"learned: {count(interruptions, 'interruption')} in {duration_text(seconds)} of this run"
    schedule = YoungDaly(learned_mtti(seconds, interruptions), config.overhead, mtti_source=source)
  else:
    schedule = YoungDaly(config.mtti, config.overhead, node_mtti=config.node_mtti, nodes=jax.process_count())
  recent = [a for a in attempts if a.saves][-5:]
  if recent:
    saves = [a.saves for a in recent]
    blocking, background = [a.blocking_s for a in recent], [a.background_s for a in recent]
    schedule.seed(statistics.fmean(blocking, saves), statistics.fmean(background, saves))
  return schedule
