"""The ratios that the project aims at, checked against results."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from ckpt_jax.bench.results import SuiteResults


@dataclasses.dataclass(frozen=True)
class Aim:
  """How many times faster a variant should be.

  Attributes:
    suite, what: where it is measured, and its description.
    variant, metric: whose median, of what.
    least: the bound.
    against: the baselines, of which the best counts.
  """

  suite: str
  what: str
  variant: str
  metric: str
  least: float
  against: tuple[str, ...] = ("orbax",)

  def ratio(self, suite: SuiteResults) -> float | None:
    """What was measured for it; None if a value is missing."""
    ratios = [suite.ratio(self.variant, self.metric, baseline) for baseline in self.against]
    known = [ratio for ratio in ratios if ratio is not None]
    return min(known) if len(known) == len(ratios) else None


@dataclasses.dataclass(frozen=True)
class Outcome:
  """An aim and what was measured for it."""

  aim: Aim
  ratio: float

  @property
  def met(self) -> bool:
    """Whether the measured ratio reaches the aim."""
    return self.ratio >= self.aim.least


_COMMIT, _COLD, _BLOCKING = "synced_s", "cold_s", "blocking_s"
_FIXED = ("ckpt_jax-uncompressed", "ckpt_jax-zstd")
AIMS = (
  Aim("w1", "tuned, commit + sync against Orbax", "tuned", _COMMIT, 2.2),
  Aim("w1", "tuned, cold restore against Orbax", "tuned", _COLD, 1.7),
  Aim("w1", "tuned, commit + sync against a raw file (1.5 times as long at most)", "tuned", _COMMIT, 1 / 1.5, ("raw",)),
  Aim("w1", "tuned, blocking against DCP async_save", "tuned", _BLOCKING, 2.0, ("dcp-async",)),
  Aim("w2", "defaults, commit + sync against Orbax", "ckpt_jax", _COMMIT, 1.0),
  Aim("w2", "defaults, cold restore against Orbax", "ckpt_jax", _COLD, 1.0),
  Aim("w2", "packed, commit + sync against Orbax", "packed", _COMMIT, 20.0),
  Aim("w2", "packed, cold restore against Orbax", "packed", _COLD, 6.0),
  Aim("w2", "packed, commit + sync against DCP save", "packed", _COMMIT, 1.0, ("dcp",)),
  Aim("w2", "packed, cold restore against DCP", "packed", _COLD, 1.0, ("dcp",)),
  Aim("w3", "tuned, commit + sync against Orbax", "tuned", _COMMIT, 1.8),
  Aim("w3", "tuned, cold restore against Orbax", "tuned", _COLD, 2.3),
  Aim("multi", "tuned, commit + sync against Orbax", "tuned", _COMMIT, 1.5),
  Aim("multi", "tuned, cold restore against Orbax", "tuned", _COLD, 1.3),
  Aim("compressible", "planned, commit + sync against the better fixed choice", "ckpt_jax", _COMMIT, 1 / 1.1, _FIXED),
  Aim("compressible", "planned, cold restore against the better fixed choice", "ckpt_jax", _COLD, 1 / 1.1, _FIXED),
)


def outcomes(suites: Iterable[SuiteResults]) -> list[Outcome]:
  """The aims that these results can answer."""
  by_name = {s.name: s for s in suites}
  found = [(aim, aim.ratio(by_name[aim.suite])) for aim in AIMS if aim.suite in by_name]
  return [Outcome(aim, ratio) for aim, ratio in found if ratio is not None]
