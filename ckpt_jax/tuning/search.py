"""Measured refinement of a plan: real saves and restores of a few settings around it, interleaved, within a budget.

The caller supplies the measurement (bench/trial.py does it on storage), so the search itself needs only a clock.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import pydantic

from ckpt_jax.config import Config
from ckpt_jax.config.units import decimal_text
from ckpt_jax.layout.codec import is_off
from ckpt_jax.tuning.choices import seconds_text, value_text
from ckpt_jax.tuning.costs import MIB
from ckpt_jax.tuning.plan import Plan

PLAN = "plan"
COMBINED = "combined"
# A candidate must be this much faster than the plan; two runs of one setting may differ by as much.
_BETTER = 0.95
# A candidate this much slower than the best after a round is not tried again.
_HOPELESS = 1.3
# Share of the budget for single changes; the rest is for comparing their combination with the plan.
_SINGLE_SHARE = 0.7
_ROUNDS = 7


@dataclasses.dataclass(frozen=True)
class Sample:
  """One save and one restore: seconds, and bytes on storage."""

  blocking_s: float
  commit_s: float
  restore_s: float
  nbytes: int


@dataclasses.dataclass(frozen=True)
class Candidate:
  """Settings to try: the plan with `changes`, `{key path: value}`."""

  name: str
  changes: Mapping[str, Any]
  samples: tuple[Sample, ...] = ()

  def median(self, field: str) -> float:
    """The median of a field of the samples."""
    return statistics.median(getattr(s, field) for s in self.samples)

  @property
  def score(self) -> float:
    """What the search minimizes: median seconds of commit and restore, plus the blocking time once more."""
    return self.median("commit_s") + self.median("restore_s") + self.median("blocking_s")


@dataclasses.dataclass(frozen=True)
class Tuned:
  """What a search found.

  Attributes:
    config: the best settings, with a value for each `auto` that matters.
    best: the candidate with these settings.
    candidates: all that were measured, the plan first.
    seconds: duration of the search.
  """

  config: Config
  best: Candidate
  candidates: tuple[Candidate, ...]
  seconds: float


def candidates(plan: Plan, user: Config, *, pack: bool = False) -> list[Candidate]:
  """The plan, and single changes to it that may help on its storage; what the user set stays."""
  values = plan.values
  cores = plan.host.cores
  largest = plan.state.largest_local_nbytes or plan.state.largest_leaf_nbytes
  bucket = not plan.storage.kind.traits.overwrite_in_place
  wanted: list[tuple[str, Any]] = [
    ("layout.compression", "shuffled" if is_off(values["layout.compression"]) else "off")
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
    section, name = key.split(".")
    free = getattr(getattr(user, section), name) == "auto" or key == "layout.pack"
    if free and value != values.get(key) and {key: value} not in [c.changes for c in found]:
      found.append(Candidate(f"{name} {value_text(key, value)}", {key: value}))
  return found


def changed(config: Config, changes: Mapping[str, Any]) -> Config:
  """`config` with `{key path: value}`."""
  for path, value in changes.items():
    section, key = path.split(".")
    config = config.model_copy(update={section: getattr(config, section).model_copy(update={key: value})})
  return config


def search(
  plan: Plan,
  user: Config,
  measure: Callable[[Config], Sample],
  budget_s: float,
  *,
  pack: bool = False,
  clock: Callable[[], float] = time.monotonic,
  progress: Callable[[str], None] = lambda _: None,
) -> Tuned:
  """Tries the plan and single changes in turn, then the changes that helped together, until `budget_s` is used up.

  A round tries each candidate once, so that a slow minute of the storage affects all alike. A change is adopted only if
  its median over at least two rounds beats the plan's by 5%.

  Args:
    plan: where to start.
    user: settings that stay.
    measure: saves and restores under a configuration.
    budget_s: seconds; one trial that takes unexpectedly long may exceed it.
    pack: whether packing may be tried too.
    clock: for tests.
    progress: called with each result as a line of text.
  """
  started = clock()
  trials = _Trials(plan.apply(user), measure, clock, progress)
  measure(trials.base)  # the first measurement of a process compiles and connects, and is thrown away
  live = candidates(plan, user, pack=pack)
  for number in range(_ROUNDS):
    if (number and len(live) == 1) or not trials.round(live, started + _SINGLE_SHARE * budget_s):
      break
    if number:  # one slow moment is no reason to drop a candidate
      best = min(trials.measured[c.name].score for c in live)
      live = [c for c in live if c.name == PLAN or trials.measured[c.name].score <= _HOPELESS * best]
    live.reverse()  # so that it is not always the same one that follows a large write
  by_key: dict[str, Candidate] = {}
  for c in trials.better():
    by_key.setdefault(next(iter(c.changes)), c)
  finalists = [trials.measured[PLAN], *by_key.values()]
  if len(by_key) > 1:
    finalists.append(Candidate(COMBINED, {k: v for c in by_key.values() for k, v in c.changes.items()}))
  for _ in range(_ROUNDS if by_key else 0):
    if not trials.round(finalists, started + budget_s):
      break
  best_found = next(iter(trials.better()), trials.measured[PLAN])
  return Tuned(changed(trials.base, best_found.changes), best_found, tuple(trials.measured.values()), clock() - started)


@dataclasses.dataclass
class _Trials:
  """Measures candidates as long as there is time, and keeps the samples by name."""

  base: Config
  measure: Callable[[Config], Sample]
  clock: Callable[[], float]
  progress: Callable[[str], None]
  measured: dict[str, Candidate] = dataclasses.field(default_factory=dict)
  cost: dict[str, float] = dataclasses.field(default_factory=dict)

  def round(self, candidates: list[Candidate], until: float) -> bool:
    """Measures each candidate once; False if there was not enough time for all of them."""
    return all([self._attempt(c, until) for c in candidates])

  def _attempt(self, candidate: Candidate, until: float) -> bool:
    """Measures once if that should end in time; the first one, the plan, is measured in any case."""
    now = self.clock()
    expected = self.cost.get(candidate.name, max(self.cost.values(), default=0.0))
    if self.measured and now + expected > until:
      return False
    sample = self.measure(changed(self.base, candidate.changes))
    self.cost[candidate.name] = self.clock() - now
    known = self.measured.get(candidate.name, candidate)
    self.measured[candidate.name] = dataclasses.replace(known, samples=(*known.samples, sample))
    commit, restore = seconds_text(sample.commit_s), seconds_text(sample.restore_s)
    self.progress(f"{candidate.name}: commit {commit}, restore {restore}")
    return True

  def better(self) -> list[Candidate]:
    """Candidates that beat the plan, the best first."""
    plan = self.measured[PLAN]
    tried = [c for c in self.measured.values() if min(len(c.samples), len(plan.samples)) >= 2]
    return sorted((c for c in tried if c.name != PLAN and c.score <= _BETTER * plan.score), key=lambda c: c.score)


# -- the file


def to_yaml(tuned: Tuned, plan: Plan, user: Config, header: list[str]) -> str:
  """A commented YAML file that `load_config` reads: the user's settings, the tuned ones with their reasons, the table.

  Args:
    tuned, plan, user: the result, the plan it started from, and the user's settings.
    header: comment lines that say where it was measured and for which state.
  """
  lines = [f"# {line}".rstrip() for line in [*header, "", *table(tuned), ""]]
  reasons = {c.key: c for c in plan.choices}
  for section in type(tuned.config).model_fields:
    written: list[str] = []
    values = getattr(tuned.config, section)
    if not isinstance(values, pydantic.BaseModel):  # a setting without a section
      if section in user.model_fields_set and values is not None:
        lines += [f"{section}: {json.dumps(values)}", ""]
      continue
    for key in type(values).model_fields:
      value, path = getattr(values, key), f"{section}.{key}"
      if path in tuned.best.changes:
        written += [f"  # measured: {seconds_text(tuned.best.score)} against the plan's", *_entry(path, value)]
      elif path in plan.values and value != "auto":
        choice = reasons[path]
        written += [f"  # {'set by you; ' if choice.by_user else ''}{choice.reason}", *_entry(path, value)]
      elif key in getattr(user, section).model_fields_set:
        written += _entry(path, values.model_dump(mode="json")[key])
    if written:
      lines += [f"{section}:", *written, ""]
  return "\n".join(lines)


def table(tuned: Tuned) -> list[str]:
  """Medians of all candidates, the plan first, as lines of text."""
  width = max(len(c.name) for c in tuned.candidates)
  rows = [f"{'settings':{width}}  {'blocks':>9}  {'commit':>9}  {'restore':>9}  {'bytes':>9}  rounds"]
  for c in tuned.candidates:
    seconds = "  ".join(f"{seconds_text(c.median(f)):>9}" for f in ("blocking_s", "commit_s", "restore_s"))
    mark = "  <- taken" if c.name == tuned.best.name else ""
    rows.append(f"{c.name:{width}}  {seconds}  {decimal_text(c.median('nbytes')):>9}  {len(c.samples):>6}{mark}")
  return rows


def _entry(path: str, value: Any) -> list[str]:
  import yaml

  flow = isinstance(value, (dict, list))
  text = yaml.safe_dump(value, default_flow_style=True) if flow else value_text(path, value)
  return [f"  {path.split('.')[1]}: {text.strip()}"]
