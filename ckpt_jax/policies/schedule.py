"""When to save: Orbax `SaveDecisionPolicy`s. Every process gives the same answer at the same step."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers as ocp_policies

from ckpt_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class EverySteps(ocp_policies.SaveDecisionPolicy):
  """Saves at each step that is a multiple of `n`.

  Raises:
    ConfigError: if `n` is not positive.
  """

  n: int

  def __post_init__(self):
    if self.n <= 0:
      raise ConfigError(f"EverySteps(n={self.n}): n must be above zero")

  def should_save(self, step: Any, previous_steps: Sequence[Any], *, context: Any) -> bool:
    return step.step % self.n == 0


class EveryMinutes(ocp_policies.SaveDecisionPolicy):
  """Saves when `minutes` have passed since the last save, by process 0's clock.

  Process 0 decides and tells the others, so clocks need not agree. To spare a broadcast on steps that cannot be due,
  each answer also names the next step worth asking about: half of the remaining time at the speed seen so far.

  Attributes:
    minutes: time between the starts of two saves.
    clock: seconds, monotonic; replaced in tests.

  Raises:
    ConfigError: if `minutes` is not positive.
  """

  def __init__(self, minutes: float, *, clock: Callable[[], float] = time.monotonic):
    if minutes <= 0:
      raise ConfigError(f"EveryMinutes(minutes={minutes}): minutes must be above zero")
    self.minutes = minutes
    self._clock = clock
    self._last_save = clock()
    self._start: tuple[int, float] | None = None
    self._ask_at = -1

  def should_save(self, step: Any, previous_steps: Sequence[Any], *, context: Any) -> bool:
    number = step.step
    if self._start is None:
      self._start = (number, self._clock())
    if number < self._ask_at:
      return False
    due, wait = self._decide(number)
    if jax.process_count() > 1:
      due, wait = (int(x) for x in multihost_utils.broadcast_one_to_all(np.array([due, wait], np.int32)))
    self._ask_at = number + wait
    if due:
      self._last_save = self._clock()
    return bool(due)

  def _decide(self, number: int) -> tuple[int, int]:
    now = self._clock()
    left = self.minutes * 60 - (now - self._last_save)
    if left <= 0:
      return 1, 1
    assert self._start is not None
    first, since = self._start
    seconds_a_step = (now - since) / (number - first) if number > first else None
    steps_left = int(left / seconds_a_step / 2) if seconds_a_step else 1
    return 0, min(max(1, steps_left), 1000)


@dataclasses.dataclass(frozen=True)
class OnPreemption(ocp_policies.SaveDecisionPolicy):
  """Saves when the job has been told to end (SIGTERM).

  Attributes:
    noticed: an extra source of notices for jobs that run without `jax.distributed`, whose processes Orbax's own
      detection does not cover.
  """

  noticed: Callable[[], bool] = lambda: False

  def should_save(self, step: Any, previous_steps: Sequence[Any], *, context: Any) -> bool:
    return bool(context.reached_preemption) or self.noticed()


@dataclasses.dataclass(frozen=True)
class AnyOf(ocp_policies.SaveDecisionPolicy):
  """Saves if any of `policies` says so. All are asked, so that each keeps its own count."""

  policies: Sequence[ocp_policies.SaveDecisionPolicy]

  def should_save(self, step: Any, previous_steps: Sequence[Any], *, context: Any) -> bool:
    return any([p.should_save(step, previous_steps, context=context) for p in self.policies])
