"""When to save: Orbax `SaveDecisionPolicy`s. Every process gives the same answer at the same step."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers as ocp_policies

from ckpt_jax.config.arguments import check_schedule, whole_number
from ckpt_jax.errors import ConfigError


class Schedule(ocp_policies.SaveDecisionPolicy):
  """A SaveDecisionPolicy that can say what it does, and may learn from what saves cost.

  A plain Orbax manager calls `should_save` alone. The Checkpointer also calls `begun` when any save starts, forced ones
  included, and `finished` when it has committed.

  Attributes:
    needs_times: whether it looks at when earlier steps were saved, which takes seconds to read of thousands.
  """

  needs_times = False

  def explain(self) -> str:
    """What decides, in one or a few lines."""
    return repr(self)

  def begun(self, step: int) -> None:
    """A save of `step` starts."""

  def finished(self, blocking_s: float, background_s: float) -> None:
    """The save has committed: seconds that it kept the training loop, and seconds of the write behind it."""


@dataclasses.dataclass(frozen=True)
class EverySteps(Schedule):
  """Saves at each step that is a multiple of `n`.

  Raises:
    ConfigError: if `n` is no positive whole number.
  """

  n: int

  def __post_init__(self):
    if (whole_number(self.n) or 0) <= 0:
      raise ConfigError(f"EverySteps(n={self.n!r:.80}): n must be a whole number above zero")

  def should_save(self, step: Any, previous_steps: Sequence[Any], *, context: Any) -> bool:
    return step.step % self.n == 0

  def explain(self) -> str:
    return "every step" if self.n == 1 else f"every {self.n} steps"


@dataclasses.dataclass(frozen=True)
class AtSteps(Schedule):
  """Saves at these steps.

  Raises:
    ConfigError: if one is no whole number.
  """

  steps: Collection[int]

  def __post_init__(self):
    steps = self.steps if isinstance(self.steps, Iterable) else [None]
    numbers = frozenset(whole_number(s) for s in steps)
    if None in numbers:
      raise ConfigError(f"AtSteps({self.steps!r:.80}): expected whole numbers, such as AtSteps([1, 10, 100])")
    object.__setattr__(self, "steps", numbers)

  def should_save(self, step: Any, previous_steps: Sequence[Any], *, context: Any) -> bool:
    return step.step in self.steps

  def explain(self) -> str:
    return f"at {'step' if len(self.steps) == 1 else 'steps'} {', '.join(str(s) for s in sorted(self.steps))}"


@dataclasses.dataclass(frozen=True)
class Never(Schedule):
  """Saves only what `force=True`, or a preemption notice, asks for."""

  def should_save(self, step: Any, previous_steps: Sequence[Any], *, context: Any) -> bool:
    return False

  def explain(self) -> str:
    return "never, but when forced or preempted"


class ByClock(Schedule):
  """Saves when `interval()` seconds have passed since the last save began, by process 0's clock.

  The first interval, and that after the job went back, count from the first step trained: what lies before it (imports,
  the restore, compilation) is no work that an interruption could lose.

  Process 0 decides and tells the others, so clocks need not agree. To spare a broadcast on steps that cannot be due,
  each answer also names the next step worth asking about: half of the remaining time at the speed seen so far.
  """

  def __init__(self, clock: Callable[[], float] = time.monotonic):
    self._clock = clock
    self._last_save = clock()
    self._start: tuple[int, float] | None = None
    self._asked = -1
    self._ask_at = -1

  def interval(self) -> float:
    """Seconds between the starts of two saves; 0 is now. Asked of process 0 only."""
    raise NotImplementedError

  def begun(self, step: int) -> None:
    self._last_save = self._clock()

  def should_save(self, step: Any, previous_steps: Sequence[Any], *, context: Any) -> bool:
    number = step.step
    if self._start is None or number < self._asked:  # the first step, or the job has gone back
      self._start = (number, self._clock())
      self._last_save = self._start[1]
      self._ask_at = number
    self._asked = number
    if number < self._ask_at:
      return False
    due, wait = self._decide(number) if jax.process_index() == 0 else (0, 0)
    if jax.process_count() > 1:
      due, wait = (int(x) for x in multihost_utils.broadcast_one_to_all(np.array([due, wait], np.int32)))
    self._ask_at = number + wait
    if due:
      self._last_save = self._clock()
    return bool(due)

  def _decide(self, number: int) -> tuple[int, int]:
    now = self._clock()
    left = self.interval() - (now - self._last_save)
    if left <= 0:
      return 1, 1
    assert self._start is not None
    first, since = self._start
    seconds_a_step = (now - since) / (number - first) if number > first else None
    # Without end: a save whose cost is not known yet is being written.
    most = 1000 if math.isfinite(left) else 8
    steps_left = int(min(left / seconds_a_step / 2, most)) if seconds_a_step else 1
    return 0, max(1, steps_left)


class EveryMinutes(ByClock):
  """Saves when `minutes` have passed since the last save, by process 0's clock.

  Attributes:
    minutes: time between the starts of two saves.

  Raises:
    ConfigError: if `minutes` is not positive.
  """

  def __init__(self, minutes: float, *, clock: Callable[[], float] = time.monotonic):
    if isinstance(minutes, bool) or not isinstance(minutes, (int, float)) or not 0 < minutes < math.inf:
      raise ConfigError(f"EveryMinutes(minutes={minutes!r:.80}): minutes must be a number above zero")
    super().__init__(clock)
    self.minutes = minutes

  def interval(self) -> float:
    return self.minutes * 60

  def explain(self) -> str:
    return f"every {self.minutes:g} minutes, by process 0's clock"


@dataclasses.dataclass(frozen=True)
class OnPreemption(Schedule):
  """Saves when the job has been told to end (SIGTERM).

  Attributes:
    noticed: an extra source of notices for jobs that run without `jax.distributed`, whose processes Orbax's own
      detection does not cover.
  """

  noticed: Callable[[], bool] = lambda: False

  def should_save(self, step: Any, previous_steps: Sequence[Any], *, context: Any) -> bool:
    return bool(context.reached_preemption) or self.noticed()

  def explain(self) -> str:
    return "on preemption"


@dataclasses.dataclass(frozen=True)
class _Several(Schedule):
  """All of `policies` are asked at each step, so that each keeps its own count and all processes broadcast alike."""

  policies: Sequence[ocp_policies.SaveDecisionPolicy]

  def __post_init__(self):
    name = type(self).__name__
    if not isinstance(self.policies, Sequence) or isinstance(self.policies, str):
      raise ConfigError(f"{name}({self.policies!r:.80}): expected a list of schedules")
    for policy in self.policies:
      check_schedule(policy, name)

  @property
  def needs_times(self) -> bool:  # type: ignore[override]
    return any(p.needs_times if isinstance(p, Schedule) else True for p in self.policies)

  def begun(self, step: int) -> None:
    for p in self.policies:
      if isinstance(p, Schedule):
        p.begun(step)

  def finished(self, blocking_s: float, background_s: float) -> None:
    for p in self.policies:
      if isinstance(p, Schedule):
        p.finished(blocking_s, background_s)

  def _ask(self, step: Any, previous_steps: Sequence[Any], context: Any) -> list[bool]:
    return [bool(p.should_save(step, previous_steps, context=context)) for p in self.policies]

  def _parts(self, word: str) -> str:
    return f" {word} ".join(p.explain() if isinstance(p, Schedule) else repr(p) for p in self.policies)


class AnyOf(_Several):
  """Saves if any of `policies` says so."""

  def should_save(self, step: Any, previous_steps: Sequence[Any], *, context: Any) -> bool:
    return any(self._ask(step, previous_steps, context))

  def explain(self) -> str:
    return self._parts("or")


class AllOf(_Several):
  """Saves if all of `policies` say so; never without any."""

  def should_save(self, step: Any, previous_steps: Sequence[Any], *, context: Any) -> bool:
    return all(self._ask(step, previous_steps, context)) and bool(self.policies)

  def explain(self) -> str:
    return self._parts("and")
