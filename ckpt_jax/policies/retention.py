"""Which steps to keep: an Orbax `PreservationPolicy` with the words and the semantics of restic's `forget`.

`Retention.decide` is the one implementation: the live policy, `ckpt-jax prune` and the simulator all call it. It is a
pure function of what is known about each step and never touches storage.

Steps are ordered by number, not by time. In a run that never goes back both orders agree, and the decisions are
restic's. After a rollback a low number is saved late. Every rule therefore compares a step only with steps that have
higher numbers or were saved earlier, so that a late save never costs a step with a higher number.

A rule is a field of `Retention` and a function in `_RULES` that yields the steps it keeps, such as `_every_steps`.
"""

from __future__ import annotations

import collections
import dataclasses
import datetime
import functools
import itertools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
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
# Reasons that no budget overrides.
PROMISES = NEWEST, SAVED_LAST, NEWEST_HEALTHY, NEWEST_RESUMABLE, PINNED, RESTORING = (
  "newest",
  "saved last",
  "newest healthy",
  "newest that training can go on from",
  "pinned",
  "being restored",
)


@dataclasses.dataclass(frozen=True)
class RetentionContext:
  """What is known besides the steps themselves.

  Attributes:
    pinned: step numbers that every rule must leave alone.
    restoring: steps that are being read right now.
    shared: bytes of the files of a step that others may have too, by step and by what names a file.
  """

  pinned: Collection[int] = ()
  restoring: Collection[int] = ()
  shared: Mapping[int, Mapping[Any, int]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Decisions:
  """Which steps stay, and why.

  Attributes:
    reasons: step -> the rules that keep it, in ascending order of step; empty for a step to delete.
    over_budget: steps that a rule would keep, but for which the budget has no room.
    notes: messages for the user, e.g. that the budget cannot be met.
    thinned: steps that stay, but lose what `thin` does not keep.
  """

  reasons: dict[int, tuple[str, ...]]
  over_budget: frozenset[int] = frozenset()
  notes: tuple[str, ...] = ()
  thinned: frozenset[int] = frozenset()

  @property
  def kept(self) -> list[int]:
    """Steps that stay, in ascending order."""
    return [step for step, why in self.reasons.items() if why]

  @property
  def removed(self) -> list[int]:
    """Steps to delete, in ascending order."""
    return [step for step, why in self.reasons.items() if not why]


@dataclasses.dataclass(frozen=True)
class Retention(ocp_policies.PreservationPolicy):
  """Keeps a step if any rule keeps it; without any rule, keeps every step.

  These steps always stay, whole: the newest; the newest that is not known to be unhealthy; the newest healthy one that
  was not thinned; a step saved after all those with higher numbers (the job has gone back); pinned steps; a step being
  restored.

  Attributes:
    last: how many of the newest steps to keep.
    hourly, daily, weekly, monthly: keep the newest step of each of the last so many hours (days, ISO weeks, months)
      that have one, in UTC. As in restic the oldest step of all also stays until the rule has used up its count.
    within: keep steps younger than this, measured from the newest step: seconds, or text such as `2d6h`.
    every_steps: keep steps that are a multiple of this.
    best: keep the `n` best by a metric. Steps whose metric is missing or NaN are kept only with `keep_missing`.
    budget: bytes (or text such as `2TiB`) that all steps may take together. The oldest go first, and those that `best`
      keeps go last. Steps of unknown size count as nothing.
    thin: what kept steps lose once they are older than its `after`, measured as in `within`. Only the Checkpointer and
      `ckpt-jax prune` thin; a plain Orbax manager does not know how.

  Raises:
    ConfigError: if a count, duration or size is malformed or not positive.
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
    for name in ("last", *_PERIODS, "every_steps"):
      value = getattr(self, name)
      if value is not None and (whole_number(value) or 0) <= 0:
        raise ConfigError(f"Retention({name}={value!r:.80}): must be a whole number above zero")
    for name, parse in (("within", parse_duration), ("budget", parse_bytes)):
      value = getattr(self, name)
      try:
        if value is not None:
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
    """Whether no rule and no budget is set, so that every step stays."""
    return self.budget is None and not self._rules

  @property
  def _rules(self) -> dict[str, Any]:
    """Name and value of the rules that are set."""
    return {name: value for name in _RULES if (value := getattr(self, name)) is not None}

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
    """Orbax's protocol: one bool for each of `checkpoints` (see `decide`), whether it stays."""
    reasons = self.decide(checkpoints, context=context).reasons
    return [bool(reasons[c.step]) for c in checkpoints]

  def decide(self, checkpoints: Sequence[Any], *, context: Any = None) -> Decisions:
    """Which of `checkpoints` stay, and by which rules.

    Args:
      checkpoints: Orbax's PolicyCheckpointInfo or this package's StepInfo, in any order: objects with `step`, `time`
        and `metrics`, and, where known, `nbytes`, `healthy`, `pinned` and `resumable`. A `time` without a zone is UTC.
      context: a RetentionContext; Orbax's own context is accepted and ignored.
    """
    steps = _Steps(checkpoints)
    reasons: _Reasons = {step: {} for step in steps.times}

    def keep(found: _Kept) -> None:
      for step, why in found:
        reasons[step][why] = None

    if not self.keeps_all or self.thin is not None:
      keep(_promises(steps, context))
    if self.keeps_all:
      keep((step, "no rule is set") for step in steps.times)
    for name, value in self._rules.items():
      keep(_RULES[name](steps, value))
    if self.budget is not None and not self._rules:
      keep((step, "budget") for step in steps.times)
    over_budget, notes = _hold_budget(steps, reasons, self.budget, getattr(context, "shared", {}))
    thinned = _to_thin(steps, reasons, self.thin)
    return Decisions({step: tuple(reasons[step]) for step in reversed(reasons)}, over_budget, notes, thinned)


# -- rules: each yields the steps that it keeps, with the reason to report

_Kept = Iterator[tuple[int, str]]
_Reasons = dict[int, dict[str, None]]  # the inner dict is an ordered set


class _Steps:
  """The steps that are decided on, the highest number first, and the UTC time of each, None if it is unknown."""

  def __init__(self, checkpoints: Sequence[Any]):
    self.all = sorted(checkpoints, key=lambda c: c.step, reverse=True)
    self.times = {c.step: _utc(c.time) for c in self.all}

  @functools.cached_property
  def in_order(self) -> bool:
    """Whether no step was saved after one with a higher number."""
    known = [t for t in self.times.values() if t is not None]
    return all(a >= b for a, b in itertools.pairwise(known))

  @functools.cached_property
  def ages(self) -> dict[int, float]:
    """Seconds by which each step of known time is older than the youngest of those with no lower number."""
    ages: dict[int, float] = {}
    latest = None
    for step, time in self.times.items():
      if time is not None:
        latest = time if latest is None else max(latest, time)
        ages[step] = (latest - time).total_seconds()
    return ages

  def went_back(self, low: int, high: int) -> bool:
    """Whether `low` has the lower number and yet was saved later."""
    before, after = self.times[high], self.times[low]
    return low < high and before is not None and after is not None and after > before


def _promises(steps: _Steps, context: Any) -> _Kept:
  """What stays whatever the rules and the budget say."""
  previous = None
  for why, fits in (
    (NEWEST, lambda c: True),
    (NEWEST_HEALTHY, _healthy),
    (NEWEST_RESUMABLE, lambda c: _healthy(c) and getattr(c, "resumable", True)),
  ):
    found = next(filter(fits, steps.all), None)
    if found is not None and found is not previous:
      yield found.step, why
    previous = found
  latest = None
  for i, (step, time) in enumerate(steps.times.items()):
    # Where the newest step's time is unknown, the next known one may have been saved after it.
    if time is not None and (latest is None or time > latest):
      latest = time
      if i:
        yield step, SAVED_LAST
  pinned, restoring = set(getattr(context, "pinned", ())), set(getattr(context, "restoring", ()))
  for c in steps.all:
    if c.step in pinned or getattr(c, "pinned", False):
      yield c.step, PINNED
    if c.step in restoring:
      yield c.step, RESTORING


def _last(steps: _Steps, count: int) -> _Kept:
  for c in steps.all[:count]:
    yield c.step, "last"


def _within(steps: _Steps, seconds: float) -> _Kept:
  for step, age in steps.ages.items():
    if age < seconds:
      yield step, "within"
  yield from _unknown_age(steps)


def _newest_of_each(name: str, steps: _Steps, count: int) -> _Kept:
  # The oldest in time, not in number: a low number saved late must not take this place from a higher one.
  oldest = min(((time, step) for step, time in steps.times.items() if time is not None), default=(None, None))[1]
  seen: set[Any] = set()
  for step, time in steps.times.items():
    if len(seen) >= count:
      break
    if time is None:
      continue
    key = _PERIODS[name](time)
    if key not in seen:
      seen.add(key)
      yield step, name
    elif step == oldest:
      # Steps with lower numbers may have been saved later: the periods left are theirs.
      yield step, f"oldest {name}"
  yield from _unknown_age(steps)


def _unknown_age(steps: _Steps) -> _Kept:
  """A rule on ages keeps what it cannot judge."""
  for step, time in steps.times.items():
    if time is None:
      yield step, "age unknown"


def _every_steps(steps: _Steps, multiple: int) -> _Kept:
  for step in steps.times:
    if step % multiple == 0:
      yield step, "every_steps"


def _best(steps: _Steps, best: BestConfig) -> _Kept:
  ranked = [c.step for c in _ranked(steps.all, best)]
  for i, step in enumerate(ranked[: best.n] if steps.in_order else ranked):
    # Counting stops at n: with 5,000 steps a full count for each of them would take a second.
    rivals = (s for s in itertools.islice(ranked, i) if not steps.went_back(s, step))
    if len(list(itertools.islice(rivals, best.n))) < best.n:
      yield step, "best"
  if best.keep_missing:
    for c in steps.all:
      if _score(c, best) is None:
        yield c.step, "metric missing"


_RULES: dict[str, Callable[[_Steps, Any], _Kept]] = {
  "last": _last,
  "within": _within,
  **{name: functools.partial(_newest_of_each, name) for name in _PERIODS},
  "every_steps": _every_steps,
  "best": _best,
}


# -- what rules keep may still be over the budget, or lose a part


def _hold_budget(
  steps: _Steps, reasons: _Reasons, budget: Any, shared: Mapping[int, Mapping[Any, int]]
) -> tuple[frozenset[int], tuple[str, ...]]:
  """Clears the reasons of steps for which there is no room; returns these steps, and a note if that is not enough.

  What several steps share takes its room once, and is free once the last of them is deleted.
  """
  if budget is None:
    return frozenset(), ()
  kept = [c for c in reversed(steps.all) if reasons[c.step]]
  files = [shared.get(c.step, {}) for c in kept]
  holders = collections.Counter(itertools.chain.from_iterable(files))
  sizes = np.array(
    [max(0, (getattr(c, "nbytes", None) or 0) - sum(own.values())) for c, own in zip(kept, files, strict=True)],
    np.int64,
  )
  times = np.array([np.nan if (t := steps.times[c.step]) is None else t.timestamp() for c in kept])
  total = int(sizes.sum()) + sum({file: n for own in files for file, n in own.items()}.values())
  dropped = set()
  for i in sorted(range(len(kept)), key=lambda i: "best" in reasons[kept[i].step]):
    if total <= budget:
      break
    step = kept[i].step
    if not reasons[step].keys().isdisjoint(PROMISES):
      continue
    # Steps with lower numbers that were saved later must not push this one out.
    if not steps.in_order and total - sizes[:i][times[:i] > times[i]].sum() <= budget:
      continue
    dropped.add(step)
    reasons[step].clear()
    holders.subtract(files[i].keys())
    total -= int(sizes[i]) + sum(n for file, n in files[i].items() if not holders[file])
    sizes[i] = 0
  if total <= budget:
    return frozenset(dropped), ()
  left = [c.step for c in kept if reasons[c.step]]
  note = (
    f"budget: {total} bytes stay and {budget} are allowed. No budget deletes the newest step, the newest healthy one, "
    f"pinned steps or those saved after going back ({', '.join(map(str, left[-5:]))}); unpin some, or raise the budget"
  )
  return frozenset(dropped), (note,)


def _to_thin(steps: _Steps, reasons: _Reasons, thin: Any) -> frozenset[int]:
  if thin is None:
    return frozenset()
  whole = {c.step for c in steps.all if getattr(c, "resumable", True)}
  old = {step for step, age in steps.ages.items() if age > thin.after}
  return frozenset(s for s in whole & old if reasons[s] and reasons[s].keys().isdisjoint(PROMISES))


def best_steps(checkpoints: Sequence[Any], best: BestConfig) -> list[int]:
  """Up to `best.n` step numbers, best first; of equals, the newer one. Unhealthy steps and NaN never count."""
  return [c.step for c in _ranked(checkpoints, best)[: best.n]]


def _ranked(checkpoints: Sequence[Any], best: BestConfig) -> list[Any]:
  scored = [(score, -c.step, c) for c in checkpoints if (score := _score(c, best)) is not None]
  return [c for _, _, c in sorted(scored, key=lambda x: x[:2])]


def _score(checkpoint: Any, best: BestConfig) -> float | None:
  """The metric, lower is better; None if it is missing, NaN, or of an unhealthy step."""
  value = (checkpoint.metrics or {}).get(best.metric)
  if not isinstance(value, (int, float)) or math.isnan(value) or not _healthy(checkpoint):
    return None
  return value if best.mode == "min" else -value


def _healthy(checkpoint: Any) -> bool:
  return getattr(checkpoint, "healthy", None) is not False


def _utc(time: datetime.datetime | None) -> datetime.datetime | None:
  if time is None:
    return None
  return time.replace(tzinfo=datetime.timezone.utc) if time.tzinfo is None else time.astimezone(datetime.timezone.utc)


def _rule_text(value: Any) -> str:
  if isinstance(value, BestConfig):
    return f"{{{value.mode} {value.metric}, n={value.n}}}"
  if isinstance(value, ThinConfig):
    return f"{{after {duration_text(value.after)}: {', '.join(value.keep)}}}"
  return duration_text(value) if isinstance(value, float) else str(value)
