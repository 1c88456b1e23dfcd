"""What a restore gives back."""

from __future__ import annotations

import dataclasses
from typing import Any

PyTree = Any


@dataclasses.dataclass(frozen=True)
class RestoreReport:
  """How a state was restored: `strategy`, `seconds`, `nbytes` of the whole state, and the step's `directory`."""

  strategy: str
  seconds: float
  nbytes: int
  directory: str


@dataclasses.dataclass(frozen=True)
class Restored:
  """A state and where training goes on.

  Attributes:
    state: the state; the types of `like`, or nested dicts, lists and tuples of numpy arrays without one.
    step: the step it was saved at; None if it was initialised afresh.
    next_step: the first step still to be trained: `step + 1`, or 0.
    metrics, extras: what was given to `save`.
    report: how it was read; None if it was initialised afresh.
  """

  state: PyTree
  step: int | None
  next_step: int
  metrics: dict[str, Any]
  extras: Any
  report: RestoreReport | None
