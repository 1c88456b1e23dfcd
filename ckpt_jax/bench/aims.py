"""The ratios that the project aims at, checked against results."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

from ckpt_jax.bench.results import SuiteResults


@dataclasses.dataclass(frozen=True)
class Aim:
  """A ratio that should be at least `least`.

  Attributes:
    suite: where it is measured.
    what: its description.
    ratio: computes it from a suite's results; None if a value for it was not measured.
    least: the bound.
  """

  suite: str
  what: str
  ratio: Callable[[SuiteResults], float | None]
  least: float


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


def _faster(variant: str, metric: str, baseline: str = "orbax") -> Callable[[SuiteResults], float | None]:
  return lambda suite: suite.ratio(variant, metric, baseline)


def _against_the_better(variant: str, metric: str, *fixed: str) -> Callable[[SuiteResults], float | None]:
  def ratio(suite: SuiteResults) -> float | None:
    found = [suite.ratio(variant, metric, f) for f in fixed]
    return min((r for r in found if r is not None), default=None) if None not in found else None

  return ratio


_FIXED = ("ckpt_jax-uncompressed", "ckpt_jax-zstd")
AIMS = (
  Aim("w1", "tuned, commit + sync against Orbax", _faster("tuned", _COMMIT), 2.2),
  Aim("w1", "tuned, cold restore against Orbax", _faster("tuned", _COLD), 1.7),
  Aim(
    "w1",
    "tuned, commit + sync against a raw file (1.5 times as long at most)",
    _faster("tuned", _COMMIT, "raw"),
    1 / 1.5,
  ),
  Aim("w1", "tuned, blocking against DCP async_save", _faster("tuned", _BLOCKING, "dcp-async"), 2.0),
  Aim("w2", "defaults, commit + sync against Orbax", _faster("ckpt_jax", _COMMIT), 1.0),
  Aim("w2", "defaults, cold restore against Orbax", _faster("ckpt_jax", _COLD), 1.0),
  Aim("w2", "packed, commit + sync against Orbax", _faster("packed", _COMMIT), 20.0),
  Aim("w2", "packed, cold restore against Orbax", _faster("packed", _COLD), 6.0),
  Aim("w2", "packed, commit + sync against DCP save", _faster("packed", _COMMIT, "dcp"), 1.0),
  Aim("w2", "packed, cold restore against DCP", _faster("packed", _COLD, "dcp"), 1.0),
  Aim("w3", "tuned, commit + sync against Orbax", _faster("tuned", _COMMIT), 1.8),
  Aim("w3", "tuned, cold restore against Orbax", _faster("tuned", _COLD), 2.3),
  Aim("multi", "tuned, commit + sync against Orbax", _faster("tuned", _COMMIT), 1.5),
  Aim("multi", "tuned, cold restore against Orbax", _faster("tuned", _COLD), 1.3),
  Aim(
    "compressible",
    "planned, commit + sync against the better fixed choice",
    _against_the_better("ckpt_jax", _COMMIT, *_FIXED),
    1 / 1.1,
  ),
  Aim(
    "compressible",
    "planned, cold restore against the better fixed choice",
    _against_the_better("ckpt_jax", _COLD, *_FIXED),
    1 / 1.1,
  ),
)


def outcomes(suites: Iterable[SuiteResults]) -> list[Outcome]:
  """The aims that these results can answer."""
  by_name = {s.name: s for s in suites}
  found = [(aim, aim.ratio(by_name[aim.suite])) for aim in AIMS if aim.suite in by_name]
  return [Outcome(aim, ratio) for aim, ratio in found if ratio is not None]
