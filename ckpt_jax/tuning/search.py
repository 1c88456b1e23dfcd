"""Measured refinement of a plan: real saves and restores of a few settings around it, interleaved, within a budget.

It is a race (Maron and Moore, "Hoeffding Races", 1994): all candidates start, and after each round those drop out that
are slower than the best beyond the noise, by the test in noise.py. The caller supplies the measurement (bench/trial.py
does it on storage), so the search itself needs only a clock.
"""

from __future__ import annotations

import dataclasses
import math
import operator
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ckpt_jax.config import Config
from ckpt_jax.config.units import is_uncompressed
from ckpt_jax.tuning.choices import value_text
from ckpt_jax.tuning.costs import MIB
from ckpt_jax.tuning.noise import Comparison, compare
from ckpt_jax.tuning.plan import Plan

PLAN = "plan"
COMBINED = "combined"
# Share of the budget for single changes; the rest is for comparing their combination with the plan.
SINGLE_SHARE = 0.7
# Candidates for which the time does not suffice for so many rounds are not tried: fewer show no noise.
LEAST_ROUNDS = 3
_ROUNDS = 15  # at most, of either part
_UNKNOWN = 10.0  # a margin that is not worth showing


@dataclasses.dataclass(frozen=True)
class Sample:
  """One save and one restore: seconds, and bytes on storage."""

  blocking_s: float
  commit_s: float
  restore_s: float
  nbytes: int

  @property
  def score(self) -> float:
    """What the search minimizes: seconds of commit and restore, plus the blocking time once more."""
    return self.commit_s + self.restore_s + self.blocking_s


@dataclasses.dataclass(frozen=True)
class Candidate:
  """Settings to try: the plan with `changes`, `{key path: value}`."""

  name: str
  changes: Mapping[str, Any]
  samples: tuple[Sample, ...] = ()

  def median(self, field: str) -> float:
    """The median of a field of the samples."""
    return statistics.median(getattr(s, field) for s in self.samples)


@dataclasses.dataclass(frozen=True)
class Standing:
  """How a candidate compares with the plan.

  Attributes:
    candidate: with its samples.
    ratio: its seconds over the plan's, of trials in the same rounds.
    margin: the true ratio is `ratio` times or divided by at most this; infinite while the noise is not known.
    dropped: slower than another beyond the noise, and tried no more.
  """

  candidate: Candidate
  ratio: float = 1.0
  margin: float = math.inf
  dropped: bool = False

  @property
  def text(self) -> str:
    """`-34% (-40% to -28%)`, `within the noise (-6% to +7%)`; nothing for the plan, and until the noise is known."""
    if self.candidate.name == PLAN or self.margin > _UNKNOWN:
      return ""
    low, high = self.ratio / self.margin - 1, self.ratio * self.margin - 1
    found = f"{self.ratio - 1:+.0%}" if low > 0 or high < 0 else "within the noise"
    return f"{found} ({low:+.0%} to {high:+.0%})"


@dataclasses.dataclass(frozen=True)
class Update:
  """What a search is doing.

  Attributes:
    running: the candidate that is tried now, or was.
    sample: the result of the trial; None when it begins.
    round: the number of the round, from 1.
    standings: of the candidates so far, the plan first.
    spent_s, left_s: seconds since the search began, and those that it still needs if nothing changes, at most.
  """

  running: Candidate
  sample: Sample | None
  round: int
  standings: tuple[Standing, ...]
  spent_s: float
  left_s: float


@dataclasses.dataclass(frozen=True)
class Tuned:
  """What a search found.

  Attributes:
    config: the best settings, with a value for each `auto` that matters.
    best: the candidate with these settings: no other was faster beyond the noise.
    standings: all candidates that were tried, the plan first.
    untried: those for which the time did not suffice.
    noise: standard deviation of a trial, as a share of its seconds; infinite if it is not known.
    seconds: duration of the search.
  """

  config: Config
  best: Candidate
  standings: tuple[Standing, ...]
  untried: tuple[Candidate, ...]
  noise: float
  seconds: float


def candidates(plan: Plan, user: Config, *, pack: bool = False) -> list[Candidate]:
  """The plan, and single changes to it that may help on its storage; what the user set stays."""
  values = plan.values
  cores = plan.host.cores
  largest = plan.state.largest_local_nbytes or plan.state.largest_leaf_nbytes
  bucket = not plan.storage.kind.traits.overwrite_in_place
  wanted: list[tuple[str, Any]] = [
    ("layout.compression", "shuffled" if is_uncompressed(values["layout.compression"]) else "off")
  ]
  for key in ("limits.save_concurrency", "limits.restore_concurrency"):
    least = max(largest, 64 * MIB)
    wanted += [(key, max(least, plan.state.nbytes // 8)), (key, max(least, plan.state.nbytes))]
  wanted += [("limits.data_copy_concurrency", 2 * cores), ("limits.file_io_concurrency", 128)]
  wanted += [("limits.file_io_concurrency", 2 * cores)]
  if largest > 32 * MIB:
    wanted += [("layout.chunk_size", 16 * MIB)]
  if bucket:
    wanted += [("layout.target_file_size", 64 * MIB)]
  if pack:
    wanted += [("layout.pack", "off" if values["layout.pack"] == "on" else "on")]
  found = [Candidate(PLAN, {})]
  for key, value in wanted:
    free = operator.attrgetter(key)(user) == "auto" or key == "layout.pack"
    if free and value != values.get(key) and {key: value} not in [c.changes for c in found]:
      found.append(Candidate(f"{key.split('.')[1]} {value_text(key, value)}", {key: value}))
  return found


def search(
  plan: Plan,
  user: Config,
  measure: Callable[[Config], Sample],
  budget_s: float,
  *,
  pack: bool = False,
  clock: Callable[[], float] = time.monotonic,
  progress: Callable[[Update], None] = lambda _: None,
) -> Tuned:
  """Races the plan and single changes to it, then the plan and the changes that helped, together too.

  A change is taken only if it was faster than the plan beyond the noise; of several the fastest.

  Args:
    plan: where to start.
    user: settings that stay.
    measure: saves and restores under a configuration. Its first measurement in a process, which compiles and connects,
      should lie behind it.
    budget_s: seconds; one trial that takes unexpectedly long may exceed it.
    pack: whether packing may be tried too.
    clock: for tests.
    progress: called when a trial begins and when it ends.
  """
  trials = _Trials(plan.apply(user), measure, clock, progress, clock() + budget_s)
  live = trials.first_round(candidates(plan, user, pack=pack), SINGLE_SHARE * budget_s)
  until = trials.ends - (1 - SINGLE_SHARE) * budget_s
  for _ in range(_ROUNDS - 1):
    if len(live) == 1:
      break
    # Where nothing has helped, there is nothing to save the rest of the time for.
    if not trials.round(live, until) and (trials.faster_than_plan() or not trials.round(live, trials.ends)):
      break
    live = trials.still_racing(live)
  helped: dict[str, Candidate] = {}
  for c in trials.faster_than_plan():
    helped.setdefault(next(iter(c.changes)), c)
  finalists = [trials.tried[PLAN], *helped.values()]
  if len(helped) > 1:
    finalists.append(Candidate(COMBINED, {k: v for c in helped.values() for k, v in c.changes.items()}))
  for _ in range(_ROUNDS if helped else 0):
    if len(finalists) == 1 or not trials.round(finalists, trials.ends):
      break
    finalists = trials.still_racing(finalists)
  best = next(iter(trials.faster_than_plan()), trials.tried[PLAN])
  spent = clock() - (trials.ends - budget_s)
  noise = trials.comparison().noise
  return Tuned(trials.base.changed(best.changes), best, trials.standings(), tuple(trials.untried), noise, spent)


@dataclasses.dataclass
class _Trials:
  """Measures candidates round by round, and keeps the samples.

  Attributes:
    base: the plan's settings.
    ends: when the budget is used up, on the clock.
    tried: candidates with their samples, by name.
    untried: those that the first round left out.
  """

  base: Config
  measure: Callable[[Config], Sample]
  clock: Callable[[], float]
  progress: Callable[[Update], None]
  ends: float
  tried: dict[str, Candidate] = dataclasses.field(default_factory=dict)
  untried: list[Candidate] = dataclasses.field(default_factory=list)

  def __post_init__(self) -> None:
    self._began = self.clock()
    self._rounds: list[dict[str, float]] = []  # scores by candidate
    self._costs: dict[str, float] = {}
    self._dropped: set[str] = set()
    self._random = random.Random(0)
    self._until = self.ends

  def first_round(self, candidates: Sequence[Candidate], seconds: float) -> list[Candidate]:
    """Tries candidates in their order, as many as `seconds` suffice for in all rounds; the plan in any case."""
    self._rounds.append({})
    self._until = self._began + seconds
    for i, candidate in enumerate(candidates):
      expected = sum(self._costs.values()) + max(self._costs.values(), default=0.0)
      if i and LEAST_ROUNDS * expected > seconds:
        self.untried = list(candidates[i:])
        break
      self._try(candidate, candidates)
    return list(candidates[: len(self.tried)])

  def round(self, candidates: Sequence[Candidate], until: float) -> bool:
    """Tries each candidate once, in random order; does nothing and returns False if that would take too long."""
    self._until = until
    if self.clock() + self._expected(candidates) > until:
      return False
    self._rounds.append({})
    for candidate in self._random.sample(list(candidates), len(candidates)):
      if self.clock() >= until:  # something was slower than before
        return False
      self._try(candidate, candidates)
    return True

  def still_racing(self, candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those that nothing beats beyond the noise, and the plan, with which all are compared."""
    found, number = self.comparison(), self._numbers()
    there = [c for c in candidates if c.name in number]
    for c in there:
      if c.name != PLAN and any(found.is_faster(number[o.name], number[c.name]) for o in there):
        self._dropped.add(c.name)
    return [c for c in candidates if c.name not in self._dropped]

  def faster_than_plan(self) -> list[Candidate]:
    """Candidates that beat the plan beyond the noise, the fastest first."""
    found, number = self.comparison(), self._numbers()
    better = [name for name, i in number.items() if found.is_faster(i, number[PLAN])]
    return [self.tried[name] for name in sorted(better, key=lambda name: found.logs[number[name]])]

  def standings(self) -> tuple[Standing, ...]:
    """All candidates that were tried."""
    found, number = self.comparison(), self._numbers()
    return tuple(
      Standing(
        c,
        found.ratio(number[name], number[PLAN]) if name in number else 1.0,
        found.margin(number[name], number[PLAN]) if name in number else math.inf,
        name in self._dropped,
      )
      for name, c in self.tried.items()
    )

  def comparison(self) -> Comparison:
    """Of the candidates in `_numbers`."""
    number = self._numbers()
    rounds = [scores for scores in self._rounds if len(scores) > 1] or self._rounds[:1]
    return compare([(number[n], i, s) for i, scores in enumerate(rounds) for n, s in scores.items()], len(number))

  def _numbers(self) -> dict[str, int]:
    """Candidates that were tried in a round with others: a round that was cut short after one compares nothing."""
    names = dict.fromkeys(n for scores in self._rounds if len(scores) > 1 for n in scores)
    return {name: i for i, name in enumerate(dict.fromkeys([PLAN, *names]))}

  def _try(self, candidate: Candidate, racing: Sequence[Candidate]) -> None:
    known = self.tried.get(candidate.name, candidate)
    self._report(known, None, racing)
    started = self.clock()
    sample = self.measure(self.base.changed(candidate.changes))
    self._costs[candidate.name] = self.clock() - started
    self._rounds[-1][candidate.name] = sample.score
    self.tried[candidate.name] = dataclasses.replace(known, samples=(*known.samples, sample))
    self._report(self.tried[candidate.name], sample, racing)

  def _report(self, candidate: Candidate, sample: Sample | None, racing: Sequence[Candidate]) -> None:
    now, standings = self.clock(), self.standings() if self.tried else ()
    rounds = max(_ROUNDS - len(self._rounds), 0)
    this = [c for c in racing if c.name not in self._rounds[-1]]
    left = self.ends - now
    if self._costs and not (self._until < self.ends and any(s.ratio * s.margin < 1 for s in standings)):
      left = min(left, self._expected(this) + rounds * self._expected(racing))
    self.progress(Update(candidate, sample, len(self._rounds), standings, now - self._began, max(left, 0.0)))

  def _expected(self, candidates: Sequence[Candidate]) -> float:
    """Seconds of one trial of each, as the last one of each took."""
    usual = statistics.median(self._costs.values()) if self._costs else 0.0
    return sum(self._costs.get(c.name, usual) for c in candidates)
