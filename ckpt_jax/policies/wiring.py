"""From the configuration's `schedule` section to the policy, with what the run remembers."""

from __future__ import annotations

import logging
import statistics

import jax
from etils import epath

from ckpt_jax.config import ScheduleConfig
from ckpt_jax.policies.attempts import exposure, read_attempts
from ckpt_jax.policies.schedule import EveryMinutes, EverySteps, Schedule
from ckpt_jax.policies.youngdaly import YoungDaly, learned_mtti

_log = logging.getLogger(__name__)


def make_schedule(config: ScheduleConfig, directory: epath.Path) -> Schedule:
  """The schedule in force, without preemption. Only process 0 reads the run's history: its clock decides."""
  if config.every is not None:
    return EveryMinutes(config.every / 60)
  if config.overhead is None:
    return EverySteps(config.every_steps or 1)
  attempts = read_attempts(directory) if jax.process_index() == 0 else []
  mtti, source = config.mtti, "given"
  if config.node_mtti is not None:
    mtti = config.node_mtti / jax.process_count()
    source = f"{jax.process_count()} nodes of {config.node_mtti:g} s each"
  if mtti == "learned":
    seconds, interruptions = exposure(attempts)
    mtti = learned_mtti(seconds, interruptions)
    source = f"learned: {interruptions} interruptions in {seconds:.0f} s of this run"
  schedule = YoungDaly(mtti, config.overhead, mtti_source=source)
  recent = [a for a in attempts if a.saves][-5:]
  if recent:
    schedule.seed(statistics.median(a.blocking_s for a in recent), statistics.median(a.background_s for a in recent))
  _log.info("%s: saves %s", directory, schedule.explain())
  return schedule
