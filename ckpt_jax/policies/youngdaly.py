"""The interval that loses the least work, from what saving costs and how often the job is interrupted."""

from __future__ import annotations

import collections
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

from ckpt_jax.config import parse_duration, parse_share
from ckpt_jax.config.units import count, duration_text
from ckpt_jax.errors import ConfigError
from ckpt_jax.policies.schedule import ByClock

_WINDOW = 9  # saves whose trimmed mean predicts the next one, so that one slow save does not move the interval
_DEFAULT_MTTI = 86400.0  # assumed for a job that was never interrupted, until it has run for longer


def young_interval(cost: float, mtti: float) -> float:
  """Seconds of work between saves that lose the least: sqrt(2 * cost * mtti) (Young 1974)."""
  return math.sqrt(2 * cost * mtti)


def daly_interval(cost: float, mtti: float) -> float:
  """Seconds of work between the end of a save and the start of the next (Daly 2006, eq. 37, to higher order)."""
  if cost >= 2 * mtti:
    return mtti
  x = cost / (2 * mtti)
  return young_interval(cost, mtti) * (1 + math.sqrt(x) / 3 + x / 9) - cost


def learned_mtti(seconds_run: float, interruptions: int, prior: float = _DEFAULT_MTTI) -> float:
  """Mean time to interruption from what a run has seen, in seconds.

  `prior` counts as one interruption seen in `prior` seconds. One bad hour of a young run then says little, and a run
  that was never interrupted gets a finite answer.
  """
  return (seconds_run + prior) / (interruptions + 1)


class YoungDaly(ByClock):
  """Saves at the interval that loses the least work.

  The interval, from the start of one save to that of the next, is sqrt(2 * cost * mtti) with Daly's terms of higher
  order, which matter where saving is expensive (Young 1974; Daly 2006, eq. 37). `cost` is what one save takes from
  training: the blocking time, and by how much the background write slows the steps down, not the write itself. With
  `max_overhead` the interval is at least cost / max_overhead, and without `mtti` exactly that. It is never shorter than
  a save takes from start to commit, since saves do not overlap.

  Costs are means of the last saves without the lowest and the highest. The first save of a process, which also compiles
  and connects, counts only until there is another one. While no cost is known, the first step is saved, to learn from.
  A plain Orbax manager reports no costs; there the blocking time is how much longer a step with a save takes.

  Attributes:
    mtti: mean time to interruption of the whole job, in seconds (node MTTI / number of nodes), or None.
    max_overhead: the largest share of training time that saving may take, 0 to 1.
    mtti_source: where `mtti` is from, for `explain`.

  Raises:
    ConfigError: if neither is given, or one is not positive.
  """

  def __init__(
    self,
    mtti: float | str | None = None,
    max_overhead: float | str | None = None,
    *,
    node_mtti: float | str | None = None,
    nodes: int = 1,
    shortest: float = 0.0,
    longest: float = 86400.0,
    mtti_source: str = "given",
    clock: Callable[[], float] = time.monotonic,
  ):
    """Durations are seconds or text such as `6h`, shares are numbers or text such as `1%`.

    Args:
      mtti, max_overhead: see above.
      node_mtti: mean time to interruption of one of the job's `nodes`, in place of `mtti`.
      nodes: how many nodes the job needs.
      shortest, longest: bounds of the interval in seconds. The save's own duration and `max_overhead` may exceed
        `longest`.
      mtti_source: where `mtti` is from, for `explain`.
      clock: seconds, monotonic; replaced in tests.
    """
    try:
      if node_mtti is not None:
        if mtti is not None or nodes < 1:
          raise ValueError("give mtti, or node_mtti with nodes of at least 1")
        mtti = parse_duration(node_mtti) / nodes
        mtti_source = f"{count(nodes, 'node')} of {duration_text(parse_duration(node_mtti))} each"
      self.mtti: float | None = None if mtti is None else parse_duration(mtti)
      self.max_overhead: float | None = None if max_overhead is None else parse_share(max_overhead)
    except ValueError as e:
      raise ConfigError(f"YoungDaly: {e}") from None
    if self.mtti is None and self.max_overhead is None:
      raise ConfigError("YoungDaly: give mtti, max_overhead, or both")
    super().__init__(clock)
    self.mtti_source = mtti_source
    self._shortest, self._longest = shortest, longest
    self._costs: collections.deque[tuple[float, float, float]] = collections.deque(maxlen=_WINDOW)
    self._first_counts = True
    self._calm_steps: collections.deque[float] = collections.deque(maxlen=64)
    self._busy_steps: list[float] = []
    self._writing = False
    self._last_step: tuple[int, float] | None = None
    self._unmeasured: float | None = None  # when this asked for a save that was not reported to `begun`

  def __repr__(self) -> str:
    given = {"mtti": self.mtti, "max_overhead": self.max_overhead}
    return f"YoungDaly({', '.join(f'{name}={value:g}' for name, value in given.items() if value is not None)})"

  def begun(self, step: int) -> None:
    super().begun(step)
    self._writing = True
    self._unmeasured = None
    self._busy_steps = []
    self._last_step = None  # the time of the save itself is no step time

  def finished(self, blocking_s: float, background_s: float) -> None:
    self._writing = False
    slowdown = 0.0
    if len(self._calm_steps) >= 3 and self._busy_steps:
      calm = statistics.median(self._calm_steps)
      slowdown = min(max(0.0, sum(self._busy_steps) - calm * len(self._busy_steps)), background_s)
    self._learn(max(blocking_s, 0.0), max(background_s, 0.0), slowdown)

  def seed(self, blocking_s: float, background_s: float) -> None:
    """Starts with what saves of an earlier process cost, until this process has saved."""
    if not self._costs:
      self._costs.append((blocking_s, background_s, 0.0))

  def _learn(self, blocking_s: float, background_s: float, slowdown_s: float) -> None:
    if self._first_counts and len(self._costs) == 1:
      self._costs.clear()
      self._first_counts = False
    self._costs.append((blocking_s, background_s, slowdown_s))

  def should_save(self, step: Any, previous_steps: Any, *, context: Any) -> bool:
    now = self._clock()
    if self._unmeasured is not None:
      # A plain Orbax manager: how much longer this step took than others is the blocking time.
      calm = statistics.median(self._calm_steps) if self._calm_steps else 0.0
      self._learn(max(now - self._unmeasured - calm, 0.0), 0.0, 0.0)
      self._unmeasured, self._last_step = None, None
    if self._last_step is not None and step.step == self._last_step[0] + 1:
      took = now - self._last_step[1]
      (self._busy_steps if self._writing else self._calm_steps).append(took)
    self._last_step = (step.step, now)
    due = super().should_save(step, previous_steps, context=context)
    self._unmeasured = now if due else None
    return due

  @property
  def cost(self) -> float | None:
    """Seconds that one save takes from training: blocking time and slowdown. None before the first save."""
    return _typical([b + s for b, _, s in self._costs]) if self._costs else None

  @property
  def duration(self) -> float:
    """Seconds from the start of a save to its commit."""
    return _typical([b + w for b, w, _ in self._costs]) if self._costs else 0.0

  def interval(self) -> float:
    if self.cost is None:
      return math.inf if self._writing else 0.0
    return self._bounded()[0]

  def _bounded(self) -> tuple[float, str]:
    """The interval in seconds and what sets it."""
    cost = self.cost
    assert cost is not None
    chosen, why = self._shortest, "the lower bound"
    if self.mtti is not None:
      best = min(max(daly_interval(cost, self.mtti) + cost, self._shortest), self._longest)
      if best > chosen:
        chosen, why = best, "cost and MTTI (Daly)" if best < self._longest else "the upper bound"
    if self.max_overhead is not None and cost / self.max_overhead > chosen:
      chosen, why = cost / self.max_overhead, f"the overhead of {self.max_overhead:.3g}"
    if self.duration > chosen:
      chosen, why = self.duration, "the time that a save takes to commit"
    return chosen, why

  def explain(self) -> str:
    asked = [] if self.mtti is None else [f"MTTI {duration_text(self.mtti)} ({self.mtti_source})"]
    if self.max_overhead is not None:
      asked.append(f"at most {self.max_overhead:.2%} of the time")
    if self.cost is None:
      return f"{', '.join(asked)}; no save has been measured yet, the first step is saved to learn from"
    interval, why = self._bounded()
    blocking = _typical([b for b, _, _ in self._costs])
    slowdown = max(self.cost - blocking, 0.0)
    expected = f"expected: {self.cost / max(interval, 1e-9):.2%} of the time goes into saving"
    if self.mtti is not None:
      expected += f", {(interval / 2 + self.duration) / self.mtti:.2%} into work lost at interruptions"
    return (
      f"every {duration_text(interval)}, set by {why}: {', '.join(asked)}\n"
      f"a save costs {duration_text(self.cost)} of training (blocking {duration_text(blocking)}, slowdown of steps "
      f"{duration_text(slowdown)}) and commits after {duration_text(self.duration)}\n{expected}"
    )


def _typical(values: list[float]) -> float:
  """The mean without the extremes, which may be accidents."""
  middle = sorted(values)[1:-1] if len(values) > 2 else values
  return statistics.fmean(middle)
