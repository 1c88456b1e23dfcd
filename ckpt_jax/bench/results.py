"""Results of suites: the JSON file, medians, ratios."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ckpt_jax.bench import files
from ckpt_jax.bench.suites import SUITES
from ckpt_jax.bench.variants import VARIANTS
from ckpt_jax.errors import ConfigError

FORMAT = 1
# Metric -> column, in the order of the tables.
TIMES = {
  "blocking_s": "blocking",
  "commit_s": "commit",
  "synced_s": "commit + sync",
  "cold_s": "cold restore",
  "warm_s": "warm restore",
}
SPACE = {
  "stored_nbytes": "stored MB",
  "files": "files",
  "save_rss": "save: peak MB",
  "restore_rss": "restore: peak MB",
}


@dataclasses.dataclass(frozen=True)
class Spread:
  """Median, minimum and maximum over the rounds."""

  median: float
  least: float
  most: float


def spread(values: Sequence[float] | None) -> Spread | None:
  """The Spread of measured values; None where nothing was measured."""
  return Spread(statistics.median(values), min(values), max(values)) if values else None


@dataclasses.dataclass(frozen=True)
class Measured:
  """One variant in one suite: a Spread a metric, or None where it cannot be measured."""

  name: str
  title: str
  metrics: Mapping[str, Spread | None]

  def median(self, metric: str) -> float | None:
    """The median of a metric; None if it was not measured."""
    found = self.metrics.get(metric)
    return None if found is None else found.median


@dataclasses.dataclass(frozen=True)
class SuiteResults:
  """One suite's variants, the baseline first.

  Attributes:
    name, what, nbytes, leaves, rounds, machine: the state, and the conditions.
    variants: in the suite's order.
    left_out: why a variant is not among them, by title.
  """

  name: str
  what: str
  nbytes: int
  leaves: int
  rounds: int
  machine: Mapping[str, Any]
  variants: tuple[Measured, ...]
  left_out: Mapping[str, str]

  def variant(self, name: str) -> Measured | None:
    """A variant by name; None if it was not measured."""
    return next((v for v in self.variants if v.name == name), None)

  def ratio(self, variant: str, metric: str, baseline: str = "orbax") -> float | None:
    """How many times faster than the baseline: its median divided by the variant's; None if either is missing."""
    ours, theirs = self.variant(variant), self.variant(baseline)
    if ours is None or theirs is None:
      return None
    a, b = theirs.median(metric), ours.median(metric)
    return a / b if a is not None and b else None


def suite_results(name: str, data: Mapping[str, Any]) -> SuiteResults:
  """The medians of a suite of the file."""
  order = [n for n in SUITES[name].variants if n in data["variants"]] if name in SUITES else list(data["variants"])
  measured = [
    Measured(n, _title(n), {metric: spread(data["variants"][n].get(metric)) for metric in (*TIMES, *SPACE)})
    for n in order
  ]
  return SuiteResults(
    name,
    data["what"],
    data["nbytes"],
    data["leaves"],
    data["rounds"],
    data["machine"],
    tuple(measured),
    {_title(n): reason for n, reason in data["left_out"].items()},
  )


def _title(name: str) -> str:
  return VARIANTS[name].title if name in VARIANTS else name


def all_results(data: Mapping[str, Any]) -> list[SuiteResults]:
  """All suites of a file, in the order of `SUITES`."""
  names = sorted(data["suites"], key=lambda n: list(SUITES).index(n) if n in SUITES else len(SUITES))
  return [suite_results(name, data["suites"][name]) for name in names]


def merge(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
  """The suites of both; a suite in both is the newer one as a whole, since ratios are meaningful within a run only."""
  return {"format": FORMAT, "suites": {**old.get("suites", {}), **new["suites"]}}


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
  """The results in a file.

  Raises:
    ConfigError: if it holds something else.
  """
  try:
    data = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
  except ValueError as e:
    raise ConfigError(f"{os.fspath(path)}: not JSON: {e}") from e
  if not isinstance(data, dict) or data.get("format") != FORMAT or not isinstance(data.get("suites"), dict):
    raise ConfigError(f"{os.fspath(path)}: no results of `ckpt-jax bench suites` (format {FORMAT})")
  return data


def save(path: str | os.PathLike[str], new: Mapping[str, Any]) -> dict[str, Any]:
  """Merges results into a file, which need not exist, and returns all of them."""
  file = pathlib.Path(path)
  merged = merge(load(file) if file.exists() else {}, new)
  files.write(file, merged)
  return merged
