"""Measured refinement of a plan: real saves and restores of a few settings around it, interleaved, within a budget.

What measures is handed in (bench/trial.py does it on storage), so that the search itself is a function of a clock.
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
from ckpt_jax.tuning.choices import nbytes_text, seconds_text
from ckpt_jax.tuning.costs import MIB
from ckpt_jax.tuning.plan import Plan

PLAN = "plan"
COMBINED = "combined"
# What varies less than this between two runs of one setting is no reason to leave the plan.
_BETTER = 0.95
# A candidate this much behind after a round is not tried again.
_HOPELESS = 1.3
# Of the budget, for trying single changes; the rest compares their combination with the plan.
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
    """What is made small: median seconds of commit and restore together, and what training waits for once more."""
    return self.median("commit_s") + self.median("restore_s") + self.median("blocking_s")


@dataclasses.dataclass(frozen=True)
class Tuned:
  """What a search found.

  Attributes:
    config: the best settings; all that was `auto` and matters has a value.
    best: the candidate that they are.
    candidates: all that were measured, the plan first.
    seconds: what it took.
  """

  config: Config
  best: Candidate
  candidates: tuple[Candidate, ...]
  seconds: float


def candidates(plan: Plan, user: Config, *, pack: bool = False) -> list[Candidate]:
  """The plan and single changes to it that may matter on its storage; what the user set stays."""
  values = plan.values
  cores = plan.host.cores
  largest = plan.state.largest_local_nbytes or plan.state.largest_leaf_nbytes
  bucket = not plan.storage.kind.traits.overwrite_in_place
  wanted: list[tuple[str, Any]] = [("layout.compression", "off" if values["layout.compression"] == "on" else "on")]
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
      found.append(Candidate(f"{name} {_text(key, value)}", {key: value}))
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

  A round tries each candidate once, so that a slow minute of the storage hits all alike. A change is taken only if its
  median over at least two rounds beats the plan's by 5%.

  Args:
    plan: where to start.
    user: settings that stay.
    measure: saves and restores under a configuration.
    budget_s: seconds; one trial that takes unexpectedly long may exceed it.
    pack: whether packing may be tried too.
    clock: for tests.
    progress: told each result.
  """
  started = clock()
  base = plan.apply(user)
  measured: dict[str, Candidate] = {}
  cost: dict[str, float] = {}

  def attempt(candidate: Candidate, until: float) -> bool:
    """Measures once if that should end in time; the plan is measured in any case."""
    now = clock()
    expected = cost.get(candidate.name, max(cost.values(), default=0.0))
    if measured and now + expected > until:
      return False
    sample = measure(changed(base, candidate.changes))
    cost[candidate.name] = clock() - now
    known = measured.get(candidate.name, candidate)
    measured[candidate.name] = dataclasses.replace(known, samples=(*known.samples, sample))
    progress(f"{candidate.name}: commit {seconds_text(sample.commit_s)}, restore {seconds_text(sample.restore_s)}")
    return True

  measure(base)  # the first of a process compiles and connects; it counts for nothing but time
  live = candidates(plan, user, pack=pack)
  single_until = started + _SINGLE_SHARE * budget_s
  rounds = 0
  while len(live) > 1 and rounds < _ROUNDS and all([attempt(c, single_until) for c in live]):
    rounds += 1
    if rounds > 1:  # one slow moment is no reason to drop a candidate
      best = min(measured[c.name].score for c in live)
      live = [c for c in live if c.name == PLAN or measured[c.name].score <= _HOPELESS * best]
    live.reverse()  # whoever comes after a large write must not always be the same

  reference = measured[PLAN]
  good = [c for c in measured.values() if _beats(c, reference)]
  best_by_key: dict[str, Candidate] = {}
  for c in sorted(good, key=lambda c: c.score):
    best_by_key.setdefault(next(iter(c.changes)), c)
  changes = {k: v for c in best_by_key.values() for k, v in c.changes.items()}
  finalists = [reference, *best_by_key.values()]
  if len(best_by_key) > 1:
    finalists.append(Candidate(COMBINED, changes))
  if len(finalists) > 1:
    until = started + budget_s
    rounds = 0
    while rounds < _ROUNDS and all([attempt(c, until) for c in finalists]):
      rounds += 1
  good = [c for c in measured.values() if _beats(c, measured[PLAN])]
  best_found = min(good, key=lambda c: c.score, default=measured[PLAN])
  return Tuned(changed(base, best_found.changes), best_found, tuple(measured.values()), clock() - started)


def _beats(candidate: Candidate, reference: Candidate) -> bool:
  enough = len(candidate.samples) >= 2 and len(reference.samples) >= 2
  return candidate.name != PLAN and enough and candidate.score <= _BETTER * reference.score


# -- the file


def to_yaml(tuned: Tuned, plan: Plan, user: Config, header: list[str]) -> str:
  """A commented YAML file that `load_config` reads: the user's settings, the tuned ones with their reasons, the table.

  Args:
    tuned, plan, user: what was found, from where it started, and what the user had set.
    header: lines that say where and of what it was measured.
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
  """Medians of all that was tried, the plan first, as text."""
  width = max(len(c.name) for c in tuned.candidates)
  rows = [f"{'settings':{width}}  {'blocks':>9}  {'commit':>9}  {'restore':>9}  {'bytes':>9}  rounds"]
  for c in tuned.candidates:
    seconds = "  ".join(f"{seconds_text(c.median(f)):>9}" for f in ("blocking_s", "commit_s", "restore_s"))
    mark = "  <- taken" if c.name == tuned.best.name else ""
    rows.append(f"{c.name:{width}}  {seconds}  {nbytes_text(c.median('nbytes')):>9}  {len(c.samples):>6}{mark}")
  return rows


def _entry(path: str, value: Any) -> list[str]:
  import yaml

  text = _text(path, value) if not isinstance(value, (dict, list)) else yaml.safe_dump(value, default_flow_style=True)
  return [f"  {path.split('.')[1]}: {text.strip()}"]


def _text(path: str, value: Any) -> str:
  if value is None:
    return "null"
  if isinstance(value, bool):
    return str(value).lower()
  if isinstance(value, int) and value % MIB == 0 and value:
    return f"{value // MIB}MiB"
  if isinstance(value, float) and path.startswith("timeouts."):
    return f"{value:.0f}s"
  return str(value)
