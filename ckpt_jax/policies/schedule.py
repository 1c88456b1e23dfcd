"""When to save: Orbax `SaveDecisionPolicy`s. Every process gives the same answer at the same step."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, ClassVar

from orbax.checkpoint import checkpoint_managers as ocp_policies

from ckpt_jax.config.arguments import check_schedule, check_type, whole_number
from ckpt_jax.errors import ConfigError
from ckpt_jax.job.agreement import decided_by_process_zero
from ckpt_jax.job.rendezvous import Rendezvous

_PATIENCE_S = 1200.0  # for the other processes to come to the same step


class Schedule(ocp_policies.SaveDecisionPolicy):
  """Decides when to save, says why, and may learn from what saves cost.

  To add one, subclass this: `should_save` answers for a step, the same on all processes, and `explain` says in words
  what it does. For example `AtSteps` looks at the step's number alone. A schedule by the clock subclasses `ByClock`,
  which makes the processes agree, and gives its `interval`; one that learns, such as `YoungDaly`, overrides `begun` and
  `finished`. For use from a file, add a key to `ScheduleConfig` and a case to `from_config.make_schedule`.

  A plain Orbax manager calls `should_save` alone. The Checkpointer also calls `begun` when any save starts, forced ones
  included, and `finished` when it has committed.

  Attributes:
    needs_times: whether it looks at when earlier steps were saved. Reading that takes seconds for thousands of steps.
  """

  needs_times = False

  def explain(self) -> str:
    """What decides, in one or a few lines."""
    return repr(self)

  def begun(self, step: int) -> None:
    """A save of `step` starts."""

  def finished(self, blocking_s: float, background_s: float) -> None:
    """A save has committed: seconds for which it blocked the training loop, and of the write in the background."""


@dataclasses.dataclass(frozen=True)
class EverySteps(Schedule):
  """Saves at each step that is a multiple of `n`.

  Raises:
    ConfigError: if `n` is not a positive whole number.
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
    ConfigError: if one of them is not a whole number.
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
  """Saves only with `force=True`, or on preemption."""

  def should_save(self, step: Any, previous_steps: Sequence[Any], *, context: Any) -> bool:
    return False

  def explain(self) -> str:
    return "never, unless forced or preempted"


class ByClock(Schedule):
  """Saves when `interval()` seconds have passed since the last save began, by process 0's clock.

  The first interval, and the first after the job went back, start at the first step trained: the imports, the restore
  and the compilation before it are no work that an interruption could lose.

  Process 0 decides and broadcasts the decision, so clocks need not agree. To spare a broadcast on steps that cannot be
  due, each answer also names the next step to ask about: half of the remaining time at the speed seen so far.
  """

  def __init__(self, clock: Callable[[], float] = time.monotonic):
    self._clock = clock
    self._last_save = clock()
    self._first = (0, self._last_save)  # the first step trained, and when
    self._meeting: Rendezvous | None = None  # made late: jax may not be initialized yet
    self._asked = -1
    self._ask_at = -1

  def interval(self) -> float:
    """Seconds between the starts of two saves; 0 means now. Called on process 0 only."""
    raise NotImplementedError

  def begun(self, step: int) -> None:
    self._last_save = self._clock()

  def should_save(self, step: Any, previous_steps: Sequence[Any], *, context: Any) -> bool:
    number = step.step
    if self._asked < 0 or number < self._asked:  # the first step, or the job has gone back
      self._last_save = self._clock()
      self._first = (number, self._last_save)
      self._ask_at = number
    self._asked = number
    if number < self._ask_at:
      return False
    self._meeting = self._meeting or Rendezvous("schedule")
    what = f"process 0 to say whether step {number} is due"
    due, wait = decided_by_process_zero(lambda: self._decide(number), self._meeting, _PATIENCE_S, what)
    self._ask_at = number + wait
    if due:
      self._last_save = self._clock()
    return bool(due)

  def _decide(self, number: int) -> tuple[int, int]:
    """Whether a save is due, and in how many steps to ask again."""
    now = self._clock()
    left = self.interval() - (now - self._last_save)
    first, since = self._first
    if left <= 0 or number == first or now == since:
      return int(left <= 0), 1
    # The interval is infinite while the cost of saving is unknown and a save is being written.
    most = 1000 if math.isfinite(left) else 8
    return 0, max(1, int(min(left / 2 * (number - first) / (now - since), most)))


class EveryMinutes(ByClock):
  """Saves when `minutes` have passed since the last save, by process 0's clock.

  Attributes:
    minutes: time between the starts of two saves.

  Raises:
    ConfigError: if `minutes` is not positive.
  """

  def __init__(self, minutes: float, *, clock: Callable[[], float] = time.monotonic):
    if isinstance(minutes, bool) or not isinstance(minutes, (int, float)) or not 0 < minutes < 2**63:
      raise ConfigError(f"EveryMinutes(minutes={minutes!r:.80}): minutes must be a number above zero")
    super().__init__(clock)
    self.minutes = minutes

  def __repr__(self) -> str:
    return f"EveryMinutes(minutes={self.minutes:g})"

  def interval(self) -> float:
    return self.minutes * 60

  def explain(self) -> str:
    return f"every {self.minutes:g} minutes, by process 0's clock"


@dataclasses.dataclass(frozen=True)
class OnPreemption(Schedule):
  """Saves when the scheduler has asked the job to end (SIGTERM).

  Attributes:
    noticed: an extra source of notices, for jobs without `jax.distributed`, which Orbax's own detection does not cover.
  """

  noticed: Callable[[], bool] = dataclasses.field(default=lambda: False, repr=False)

  def __post_init__(self):
    check_type("OnPreemption: noticed", self.noticed, callable(self.noticed), "a function without arguments")

  def should_save(self, step: Any, previous_steps: Sequence[Any], *, context: Any) -> bool:
    return bool(context.reached_preemption) or self.noticed()

  def explain(self) -> str:
    return "on preemption"


@dataclasses.dataclass(frozen=True)
class _Several(Schedule):
  """Asks all `policies` at each step, so that each keeps its own count and all processes broadcast alike."""

  policies: Sequence[ocp_policies.SaveDecisionPolicy]
  _word: ClassVar[str]
  _combine: ClassVar[Callable[..., bool]]

  def __post_init__(self):
    name = type(self).__name__
    if not isinstance(self.policies, Sequence) or isinstance(self.policies, str):
      raise ConfigError(f"{name}({self.policies!r:.80}): expected a list of schedules")
    for policy in self.policies:
      check_schedule(policy, name)

  @property
  def _ours(self) -> list[Schedule]:
    return [p for p in self.policies if isinstance(p, Schedule)]

  @property
  def needs_times(self) -> bool:  # type: ignore[override]
    return len(self._ours) < len(self.policies) or any(p.needs_times for p in self._ours)

  def begun(self, step: int) -> None:
    for p in self._ours:
      p.begun(step)

  def finished(self, blocking_s: float, background_s: float) -> None:
    for p in self._ours:
      p.finished(blocking_s, background_s)

  def should_save(self, step: Any, previous_steps: Sequence[Any], *, context: Any) -> bool:
    return self._combine([bool(p.should_save(step, previous_steps, context=context)) for p in self.policies])

  def explain(self) -> str:
    return f" {self._word} ".join(p.explain() if isinstance(p, Schedule) else repr(p) for p in self.policies)


class AnyOf(_Several):
  """Saves if any of `policies` says so."""

  _word, _combine = "or", staticmethod(any)


class AllOf(_Several):
  """Saves if all of `policies` say so; never if there are none."""

  _word, _combine = "and", staticmethod(lambda answers: bool(answers) and all(answers))
