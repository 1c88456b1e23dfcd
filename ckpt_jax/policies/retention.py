"""What to keep: an Orbax `PreservationPolicy` in restic's words."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from orbax.checkpoint import checkpoint_managers as ocp_policies

from ckpt_jax.config import BestConfig
from ckpt_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Retention(ocp_policies.PreservationPolicy):
  """Keeps a step if any rule keeps it; without any rule, keeps every step.

  The newest step, and the one saved last (an older number, saved after going back), are always kept.

  Attributes:
    last: keep the highest `last` steps.
    every_steps: keep steps that are a multiple of this.
    best: keep the `n` best by a metric; steps without it, or with NaN, are not kept by this rule.

  Raises:
    ConfigError: if a number is not positive.
  """

  last: int | None = None
  every_steps: int | None = None
  best: BestConfig | Mapping[str, Any] | None = None

  def __post_init__(self):
    for name in ("last", "every_steps"):
      value = getattr(self, name)
      if value is not None and value <= 0:
        raise ConfigError(f"Retention({name}={value}): must be above zero")
    if isinstance(self.best, Mapping):
      object.__setattr__(self, "best", BestConfig(**self.best))

  def should_preserve(self, checkpoints: Sequence[Any], *, context: Any = None) -> Sequence[bool]:
    """One bool for each of `checkpoints` (objects with `step`, `time`, `metrics`): whether it stays."""
    if self.last is None and self.every_steps is None and self.best is None:
      return [True] * len(checkpoints)
    numbers = sorted((c.step for c in checkpoints), reverse=True)
    keep = set(numbers[: self.last or 1])
    if checkpoints:
      keep.add(max(checkpoints, key=lambda c: (c.time, c.step)).step)
    if self.every_steps:
      keep |= {n for n in numbers if n % self.every_steps == 0}
    if isinstance(self.best, BestConfig):
      keep |= set(best_steps(checkpoints, self.best))
    return [c.step in keep for c in checkpoints]


def best_steps(checkpoints: Sequence[Any], best: BestConfig) -> list[int]:
  """Up to `best.n` step numbers, best first; of equals, the newer one. NaN and missing metrics never win."""
  sign = 1 if best.mode == "min" else -1
  scored = []
  for c in checkpoints:
    value = (c.metrics or {}).get(best.metric)
    if isinstance(value, (int, float)) and not math.isnan(value):
      scored.append((sign * value, -c.step))
  return [-step for _, step in sorted(scored)[: best.n]]
