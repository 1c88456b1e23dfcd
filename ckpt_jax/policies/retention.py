"""What to keep: an Orbax `PreservationPolicy` in the words, and with the semantics, of restic's `forget`.

`Retention.decide` is the one implementation: the live policy, `ckpt-jax prune` and the simulator all ask it. It is a
pure function of what is known about each step and never touches storage.

Steps are ordered by number, not by time. In a run that never goes back both orders agree, and so do the decisions with
restic's. After a rollback a low number is saved late; every rule below then looks only at steps with higher numbers, or
saved earlier, than the one it judges, so that such a save never costs a step with a higher number.
"""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
from orbax.checkpoint import checkpoint_managers as ocp_policies

from ckpt_jax.config import BestConfig, RetentionConfig, ThinConfig, parse_bytes, parse_duration
from ckpt_jax.config.arguments import whole_number
from ckpt_jax.config.units import duration_text, size_text
from ckpt_jax.errors import ConfigError

# restic's buckets; weeks are ISO 8601 weeks. All in UTC.
_PERIODS: dict[str, Callable[[datetime.datetime], Any]] = {
  "hourly": lambda t: (t.year, t.month, t.day, t.hour),
  "daily": lambda t: (t.year, t.month, t.day),
  "weekly": lambda t: t.isocalendar()[:2],
  "monthly": lambda t: (t.year, t.month),
}
_COUNTS = ("last", *_PERIODS, "every_steps")
# Reasons that no budget overrides.
NEWEST, SAVED_LAST, NEWEST_HEALTHY, NEWEST_RESUMABLE, PINNED, RESTORING = (
  "newest",
  "saved last",
  "newest healthy",
  "newest that training can go on from",
  "pinned",
  "being restored",
)
PROMISES = (NEWEST, SAVED_LAST, NEWEST_HEALTHY, NEWEST_RESUMABLE, PINNED, RESTORING)


@dataclasses.dataclass(frozen=True)
class RetentionContext:
  """What is known beside the steps themselves.

  Attributes:
    pinned: step numbers that every rule must leave alone.
    restoring: steps that somebody is reading right now.
  """

  pinned: Collection[int] = ()
  restoring: Collection[int] = ()


@dataclasses.dataclass(frozen=True)
class Decisions:
  """Which steps stay, and why.

  Attributes:
    reasons: step -> the rules that keep it, in ascending order of step; empty for a step that goes.
    over_budget: the steps that a rule would keep, but for which the budget has no room.
    notes: what the reader should know, e.g. a budget that cannot be held.
    thinned: steps that stay, but lose what `thin` does not keep.
  """

  reasons: dict[int, tuple[str, ...]]
  over_budget: frozenset[int] = frozenset()
  notes: tuple[str, ...] = ()
  thinned: frozenset[int] = frozenset()

  @property
  def kept(self) -> list[int]:
    return [step for step, why in self.reasons.items() if why]

  @property
  def removed(self) -> list[int]:
    return [step for step, why in self.reasons.items() if not why]


@dataclasses.dataclass(frozen=True)
class Retention(ocp_policies.PreservationPolicy):
  """Keeps a step if any rule keeps it; without any rule, keeps every step.

  Whatever the rules say, these stay, whole: the newest step; the newest that is not known to be unhealthy; the newest
  healthy one that was not thinned; a step saved after all those with higher numbers (the job has gone back); pinned
  steps; a step being restored.

  Attributes:
    last: the newest steps, this many.
    hourly, daily, weekly, monthly: the newest step of each of the last so many hours (days, ISO weeks, months) that
      have one, in UTC. As in restic the oldest step of all stays too while the rule has not used up its count.
    within: every step younger than this, measured from the newest step: seconds, or text such as `2d6h`.
    every_steps: every step that is a multiple of this.
    best: the `n` best by a metric; steps without it, or with NaN, are not kept by this rule unless `keep_missing`.
    budget: bytes (or text such as `2TiB`) that all steps may take together. The least valuable go first: of two steps
      the one that `best` does not keep, else the older one. Steps of unknown size count as nothing.
    thin: what kept steps lose when they are older than its `after`, measured as in `within`. Only the Checkpointer and
      `ckpt-jax prune` thin; a plain Orbax manager does not know how.

  Raises:
    ConfigError: if a value is not positive, or is no whole number, duration or size.
  """

  last: int | None = None
  hourly: int | None = None
  daily: int | None = None
  weekly: int | None = None
  monthly: int | None = None
  within: float | str | None = None
  every_steps: int | None = None
  best: BestConfig | Mapping[str, Any] | None = None
  budget: int | str | None = None
  thin: ThinConfig | Mapping[str, Any] | None = None

  def __post_init__(self):
    for name in _COUNTS:
      value = getattr(self, name)
      if value is not None and (whole_number(value) or 0) <= 0:
        raise ConfigError(f"Retention({name}={value!r:.80}): must be a whole number above zero")
    parsers: dict[str, Callable[[Any], Any]] = {"within": parse_duration, "budget": parse_bytes}
    for name, parse in parsers.items():
      value = getattr(self, name)
      if value is None:
        continue
      try:
        object.__setattr__(self, name, parse(value.total_seconds() if hasattr(value, "total_seconds") else value))
      except ValueError as e:
        raise ConfigError(f"Retention({name}={value!r}): {e}") from None
    for name, section in (("best", BestConfig), ("thin", ThinConfig)):
      value = getattr(self, name)
      if isinstance(value, Mapping):
        object.__setattr__(self, name, section(**value))
      elif value is not None and not isinstance(value, section):
        raise ConfigError(f"Retention({name}={value!r:.80}): expected a {section.__name__} or a dict of its keys")

  @classmethod
  def from_config(cls, config: RetentionConfig) -> Retention:
    """The policy that a configuration's `retention` section asks for."""
    return cls(**{field.name: getattr(config, field.name) for field in dataclasses.fields(cls)})

  @property
  def keeps_all(self) -> bool:
    """Whether no rule is set that decides on which steps stay."""
    return all(getattr(self, field.name) is None for field in dataclasses.fields(self) if field.name != "thin")

  def explain(self) -> str:
    """The rules that are set: `last=3, every_steps=1000`."""
    values = ((field.name, getattr(self, field.name)) for field in dataclasses.fields(self))
    return ", ".join(f"{name}={_rule_text(value)}" for name, value in values if value is not None)

  def why_removed(self, step: int, over_budget: Collection[int]) -> str:
    """Why these rules remove a step; `over_budget` as in Decisions."""
    if step in over_budget:
      return f"the budget of {size_text(float(self.budget or 0))} has no room for it"
    return f"no retention rule keeps it ({self.explain()})"

  def should_preserve(self, checkpoints: Sequence[Any], *, context: Any = None) -> Sequence[bool]:
    """One bool for each of `checkpoints` (see `decide`): whether it stays."""
    reasons = self.decide(checkpoints, context=context).reasons
    return [bool(reasons[c.step]) for c in checkpoints]

  def decide(self, checkpoints: Sequence[Any], *, context: Any = None) -> Decisions:
    """Which of `checkpoints` stay, and by which rules.

    Args:
      checkpoints: Orbax's PolicyCheckpointInfo or this package's StepInfo, in any order: objects with `step`, `time`
        and `metrics`, and, where known, `nbytes`, `healthy`, `pinned` and `resumable`. A naive `time` is taken for UTC.
      context: a RetentionContext, or Orbax's, which says nothing.
    """
    steps = sorted(checkpoints, key=lambda c: c.step, reverse=True)
    if self.keeps_all and self.thin is None:
      return Decisions({c.step: ("no rule is set",) for c in reversed(steps)})
    reasons: dict[int, list[str]] = {c.step: [] for c in steps}
    times = [_utc(c.time) for c in steps]
    self._add_promises(steps, times, reasons, context)
    if self.keeps_all:
      for why in reasons.values():
        why.append("no rule is set")
    else:
      self._add_rules(steps, times, reasons)
    over_budget: frozenset[int] = frozenset()
    notes: tuple[str, ...] = ()
    if self.budget is not None:
      over_budget, notes = self._hold_budget(steps, times, reasons)
    told = {c.step: tuple(reasons[c.step]) for c in reversed(steps)}
    return Decisions(told, over_budget, notes, self._to_thin(steps, times, reasons))

  def _add_promises(self, steps: list[Any], times: list[Any], reasons: dict[int, list[str]], context: Any) -> None:
    if not steps:
      return
    reasons[steps[0].step].append(NEWEST)
    healthy = next((c for c in steps if _healthy(c)), None)
    if healthy is not None and healthy is not steps[0]:
      reasons[healthy.step].append(NEWEST_HEALTHY)
    whole = next((c for c in steps if _healthy(c) and getattr(c, "resumable", True)), None)
    if whole is not None and whole is not healthy:
      reasons[whole.step].append(NEWEST_RESUMABLE)
    latest = times[0]
    for c, time in zip(steps[1:], times[1:], strict=True):
      # Where the newest does not say when it was saved, the next one that does may have been saved after it.
      if time is not None and (latest is None or time > latest):
        reasons[c.step].append(SAVED_LAST)
        latest = time
    pinned = set(getattr(context, "pinned", ()))
    restoring = set(getattr(context, "restoring", ()))
    for c in steps:
      if c.step in pinned or getattr(c, "pinned", False):
        reasons[c.step].append(PINNED)
      if c.step in restoring:
        reasons[c.step].append(RESTORING)

  def _add_rules(self, steps: list[Any], times: list[Any], reasons: dict[int, list[str]]) -> None:
    for c in steps[: self.last or 0]:
      reasons[c.step].append("last")
    if self.within is not None:
      for c, age in zip(steps, _ages(times), strict=True):
        if age is not None and age < float(self.within):
          reasons[c.step].append("within")
    # The oldest in time, not in number: a low number saved late must not take this place from a higher one.
    known = [(time, c.step) for c, time in zip(steps, times, strict=True) if time is not None]
    oldest = min(known)[1] if known else None
    timed = self.within is not None
    for name, period in _PERIODS.items():
      count = getattr(self, name)
      if count is None:
        continue
      timed = True
      seen: set[Any] = set()
      for c, time in zip(steps, times, strict=True):
        if len(seen) >= count:
          break
        if time is None:
          continue
        key = period(time)
        if key not in seen:
          seen.add(key)
          reasons[c.step].append(name)
        elif c.step == oldest:
          # Steps with lower numbers may have been saved later: the periods left are theirs.
          reasons[c.step].append(f"oldest {name}")
    if timed:
      for c, time in zip(steps, times, strict=True):
        if time is None:
          reasons[c.step].append("age unknown")
    if self.every_steps is not None:
      for c in steps:
        if c.step % self.every_steps == 0:
          reasons[c.step].append("every_steps")
    if isinstance(self.best, BestConfig):
      self._add_best(self.best, steps, times, reasons)

  def _add_best(self, best: BestConfig, steps: list[Any], times: list[Any], reasons: dict[int, list[str]]) -> None:
    time_of = {c.step: time for c, time in zip(steps, times, strict=True)}
    ranked = [c.step for c in _ranked(steps, best)]
    for i, step in enumerate(ranked[: best.n] if _in_order(times) else ranked):
      # Counting stops at n: with 5,000 steps a full count for each of them would take a second.
      rivals = (s for s in itertools.islice(ranked, i) if not _saved_later_than(s, step, time_of))
      if i < best.n or sum(1 for _ in itertools.islice(rivals, best.n)) < best.n:
        reasons[step].append("best")
    if best.keep_missing:
      scored = set(ranked)
      for c in steps:
        if c.step not in scored and _score(c, best) is None:
          reasons[c.step].append("metric missing")

  def _to_thin(self, steps: list[Any], times: list[Any], reasons: dict[int, list[str]]) -> frozenset[int]:
    if not isinstance(self.thin, ThinConfig):
      return frozenset()
    return frozenset(
      c.step
      for c, age in zip(steps, _ages(times), strict=True)
      if age is not None
      and age > self.thin.after
      and getattr(c, "resumable", True)
      and reasons[c.step]
      and not any(why in PROMISES for why in reasons[c.step])
    )

  def _hold_budget(
    self, steps: list[Any], times: list[Any], reasons: dict[int, list[str]]
  ) -> tuple[frozenset[int], tuple[str, ...]]:
    assert isinstance(self.budget, int)
    sizes = {c.step: getattr(c, "nbytes", None) or 0 for c in steps}
    only_budget = dataclasses.replace(self, budget=None).keeps_all
    if only_budget:
      for c in steps:
        reasons[c.step].append("budget")
    rivals = None if _in_order(times) else _Rivals(steps, times, sizes, reasons)
    kept = {step for step, why in reasons.items() if why}
    total = sum(sizes[s] for s in kept)
    dropped = set()
    for step in sorted(kept, key=lambda s: ("best" in reasons[s], s)):
      if total <= self.budget:
        break
      if any(why in PROMISES for why in reasons[step]):
        continue
      if rivals is not None and total - rivals.nbytes(step) <= self.budget:
        continue
      dropped.add(step)
      total -= sizes[step]
      if rivals is not None:
        rivals.drop(step)
    for step in dropped:
      reasons[step].clear()
    if total <= self.budget:
      return frozenset(dropped), ()
    left = sorted(kept - dropped)
    shown = ", ".join(str(s) for s in left[-5:])
    note = (
      f"budget: {total} bytes stay and {self.budget} are allowed: the {len(left)} steps left ({shown}) are kept by "
      "promises that no budget overrides (newest, newest healthy, pinned, saved after going back); unpin steps, or "
      "raise the budget"
    )
    return frozenset(dropped), (note,)


class _Rivals:
  """Bytes of the kept steps with lower numbers that were saved later than a step: they must not push it out."""

  def __init__(self, steps: list[Any], times: list[Any], sizes: dict[int, int], reasons: dict[int, list[str]]):
    self._row = {c.step: i for i, c in enumerate(steps)}
    self._steps = np.array([c.step for c in steps])
    self._times = np.array([np.nan if t is None else t.timestamp() for t in times])
    self._sizes = np.array([sizes[c.step] if reasons[c.step] else 0 for c in steps], np.float64)

  def nbytes(self, step: int) -> float:
    later = (self._steps < step) & (self._times > self._times[self._row[step]])
    return float(self._sizes[later].sum())

  def drop(self, step: int) -> None:
    self._sizes[self._row[step]] = 0


def best_steps(checkpoints: Sequence[Any], best: BestConfig) -> list[int]:
  """Up to `best.n` step numbers, best first; of equals, the newer one. NaN, missing metrics, sick steps never win."""
  return [c.step for c in _ranked(checkpoints, best)[: best.n]]


def _rule_text(value: Any) -> str:
  if isinstance(value, BestConfig):
    return f"{{{value.mode} {value.metric}, n={value.n}}}"
  if isinstance(value, ThinConfig):
    return f"{{after {duration_text(value.after)}: {', '.join(value.keep)}}}"
  return duration_text(value) if isinstance(value, float) else str(value)


def _healthy(checkpoint: Any) -> bool:
  return getattr(checkpoint, "healthy", None) is not False


def _ages(times: list[datetime.datetime | None]) -> list[float | None]:
  """Seconds by which each step is older than the youngest of those with no lower number; newest number first."""
  ages: list[float | None] = []
  latest = None
  for time in times:
    latest = time if latest is None or (time is not None and time > latest) else latest
    ages.append(None if time is None or latest is None else (latest - time).total_seconds())
  return ages


def _ranked(checkpoints: Sequence[Any], best: BestConfig) -> list[Any]:
  scored = [(score, -c.step, c) for c in checkpoints if (score := _score(c, best)) is not None]
  return [c for _, _, c in sorted(scored, key=lambda x: x[:2])]


def _score(checkpoint: Any, best: BestConfig) -> float | None:
  value = (checkpoint.metrics or {}).get(best.metric)
  if not isinstance(value, (int, float)) or math.isnan(value) or not _healthy(checkpoint):
    return None
  return value if best.mode == "min" else -value


def _saved_later_than(a: int, b: int, time_of: Mapping[int, datetime.datetime | None]) -> bool:
  """Whether `a` has the lower number and yet was saved after `b`."""
  time_a, time_b = time_of[a], time_of[b]
  return a < b and time_a is not None and time_b is not None and time_a > time_b


def _in_order(times: list[datetime.datetime | None]) -> bool:
  known = [t for t in times if t is not None]
  return all(a >= b for a, b in itertools.pairwise(known))


def _utc(time: datetime.datetime | None) -> datetime.datetime | None:
  if time is None:
    return None
  return time.replace(tzinfo=datetime.timezone.utc) if time.tzinfo is None else time.astimezone(datetime.timezone.utc)
