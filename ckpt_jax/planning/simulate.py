"""What a schedule and a retention do to a job: goodput, lost work, storage over time, without running it.

The model: work runs in periods of `interval` seconds, each followed by a save that blocks for `blocking_s` and commits
`background_s` later. Interruptions come at random (exponential with mean `mtti`, or as given). After one, the job takes
`restart_s` to be started and `restore_s` to read its state, and continues from the last commit; it may be interrupted
again on the way there. Goodput is the share of the time that ends up in committed work.
"""

from __future__ import annotations

import dataclasses
import datetime
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ckpt_jax.config import Config
from ckpt_jax.config.units import count
from ckpt_jax.errors import ConfigError
from ckpt_jax.policies.retention import Retention
from ckpt_jax.policies.youngdaly import learned_mtti
from ckpt_jax.run.attempts import exposure, recorded
from ckpt_jax.run.events import Restore
from ckpt_jax.run.journal import read_records
from ckpt_jax.run.steps import StepInfo, newest_step, our_metadata, run_directory, step_path


@dataclasses.dataclass(frozen=True)
class Job:
  """What the goodput of a job depends on, in seconds.

  Attributes:
    mtti: mean time to interruption of the whole job.
    blocking_s: time that one save takes from training: blocking time plus slowdown of steps.
    background_s: time from the end of the blocking part to the commit.
    restart_s: time from an interruption until the state can be read: scheduling, imports, compilation.
    restore_s: time to read the state.
  """

  mtti: float
  blocking_s: float
  background_s: float = 0.0
  restart_s: float = 0.0
  restore_s: float = 0.0

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if not math.isfinite(value) or value < 0 or (value == 0 and field.name in ("mtti", "blocking_s")):
        raise ConfigError(f"Job({field.name}={value}): must be finite and above zero")

  @property
  def down_s(self) -> float:
    """Seconds from an interruption until training continues."""
    return self.restart_s + self.restore_s


@dataclasses.dataclass(frozen=True)
class Goodput:
  """The result of a simulation.

  Attributes:
    interval: seconds of work between saves.
    goodput: share of the time that became committed work, 0 to 1.
    low, high: goodput of the middle 90% of the trials.
    saving, rework, down: shares of the time spent on saving, on work done again, and on restarts.
    lost_s: mean seconds of work lost at an interruption.
  """

  interval: float
  goodput: float
  low: float
  high: float
  saving: float
  rework: float
  down: float
  lost_s: float


def closed_form(job: Job, interval: float) -> float:
  """Expected goodput for exponential interruptions.

  Without a background write it is Daly's complete model, wall time = M e^(R/M) (e^((tau + delta)/M) - 1) Ts / tau
  (Daly 2006, eq. 20). A background write of w seconds delays each commit, and so counts like R.
  """
  x = (interval + job.blocking_s) / job.mtti
  if x > 700:
    return 0.0
  return interval / job.mtti * math.exp(-(job.down_s + job.background_s) / job.mtti) / math.expm1(x)


def best_interval(job: Job) -> float:
  """Seconds of work between saves at which `closed_form` is highest, at least as long as the background write.

  Its exact optimum is M (1 + W(-e^(-delta/M - 1))) with Lambert's W. It does not depend on restarts or the background
  write.
  """
  from scipy.special import lambertw

  best = job.mtti * (1 + lambertw(-math.exp(-job.blocking_s / job.mtti - 1)).real)
  return max(float(best), job.background_s)


def simulate(
  job: Job,
  interval: float,
  *,
  interruptions: int = 200,
  trials: int = 200,
  seed: int = 0,
  lifetimes: Sequence[float] | None = None,
) -> Goodput:
  """Monte Carlo of the model above; a trial is `interruptions` lives of the job.

  Args:
    job: costs and MTTI.
    interval: seconds of work between the end of a save and the start of the next.
    interruptions: number of interruptions in a trial.
    trials: number of trials.
    seed: of the random numbers; the same seed gives the same answer.
    lifetimes: seconds from each start of the job to its interruption, in place of random ones.
  """
  if interval <= 0:
    raise ConfigError(f"interval {interval}: must be above zero")
  if lifetimes is None:
    lives = np.random.default_rng(seed).exponential(job.mtti, (trials, interruptions))
  else:
    lives = np.asarray(lifetimes, float)[None]
  period = interval + job.blocking_s
  # The k-th commit of a life comes at down + k * period + background and holds k * interval of work.
  up = np.maximum(lives - job.down_s, 0.0)
  commits = np.floor(np.maximum(up - job.background_s, 0.0) / period)
  begun = np.floor(up / period)
  worked = begun * interval + np.minimum(up - begun * period, interval)
  committed = commits * interval
  total = lives.sum(axis=1)
  good = committed.sum(axis=1) / total
  low, high = np.quantile(good, [0.05, 0.95])
  time = float(total.sum())
  return Goodput(
    interval,
    float(committed.sum()) / time,
    float(low),
    float(high),
    float((up - worked).sum()) / time,
    float((worked - committed).sum()) / time,
    float(np.minimum(lives, job.down_s).sum()) / time,
    float((worked - committed).mean()),
  )


@dataclasses.dataclass(frozen=True)
class StorageUse:
  """Storage used over a simulated time.

  Attributes:
    days: points in time.
    nbytes: bytes of all steps at each of them.
    steps: number of steps at each of them.
  """

  days: list[float]
  nbytes: list[int]
  steps: list[int]

  @property
  def mean_nbytes(self) -> float:
    """Bytes on average over time."""
    return float(np.mean(self.nbytes)) if self.nbytes else 0.0

  @property
  def peak_nbytes(self) -> int:
    """The most bytes at any time."""
    return max(self.nbytes, default=0)


def storage_use(
  retention: Retention, period: float, nbytes: int, days: float = 30.0, most: int = 5000, thin_share: float = 1 / 3
) -> StorageUse:
  """Applies `retention` after each save of a run that saves every `period` seconds for `days`.

  At most `most` saves are simulated: if there are more, a multiple of the period stands for it, and `last` and
  `every_steps` then count those saves. A thinned step keeps `thin_share` of its bytes: a third, if they are parameters
  and Adam's two moments of the same type.
  """
  if not 0 < thin_share <= 1:
    raise ConfigError(f"thin_share {thin_share}: must be above 0 and at most 1")
  period *= max(1, math.ceil(days * 86400 / period / most))
  count = int(days * 86400 / period)
  start = datetime.datetime(2026, 1, 1, tzinfo=datetime.timezone.utc)
  steps: list[StepInfo] = []
  use = StorageUse([], [], [])
  plain = retention.keeps_all and retention.thin is None
  every = max(1, count // 1000) if plain else 1
  for i in range(1, count + 1):
    steps.append(StepInfo(i, start + datetime.timedelta(seconds=i * period), nbytes, {}))
    if i % every:
      continue
    if not plain:
      decided = retention.decide(steps)
      steps = [
        dataclasses.replace(s, nbytes=round(s.nbytes * thin_share), resumable=False) if s.step in decided.thinned else s
        for s in steps
        if decided.reasons[s.step]
      ]
    use.days.append(i * period / 86400)
    use.nbytes.append(sum(s.nbytes for s in steps))
    use.steps.append(len(steps))
  return use


def retention_of(path: Any) -> Retention:
  """The retention that a run's newest step was saved with; all steps stay if it has none."""
  directory = run_directory(path)
  newest = newest_step(directory)
  saved = {} if newest is None else our_metadata(step_path(directory, newest)).get("config", {})
  return Retention.from_config(Config(retention=saved.get("retention") or {}).retention)


def calibrated(path: Any, restart_s: float = 60.0) -> tuple[Job, int, str]:
  """A Job and the bytes of its state, from the records that a run keeps of its saves and restarts, and their source.

  Raises:
    NoCheckpointError: if the run has no such records.
  """
  directory = run_directory(path)
  records = read_records(directory)
  attempts = recorded(directory, records)
  seconds, interruptions = exposure(attempts)
  blocking, background = (float(np.median([getattr(a, f) for a in attempts])) for f in ("blocking_s", "background_s"))
  restores = [e.seconds for e in records.events if isinstance(e, Restore)]
  restore_s = float(np.median(restores)) if restores else 0.0
  job = Job(learned_mtti(seconds, interruptions), max(blocking, 1e-6), background, restart_s, restore_s)
  counts = (count(n, noun) for n, noun in ((sum(a.saves for a in attempts), "save"), (len(attempts), "attempt")))
  how = f"{' in '.join(counts)}, {count(interruptions, 'interruption')} in {seconds:.0f} s"
  return job, attempts[-1].nbytes, how
