"""The result of a restore: the state, and the report of how it was read."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from ckpt_jax.config.html import html_table
from ckpt_jax.config.units import count, duration_text, size_text

PyTree = Any


@dataclasses.dataclass(frozen=True)
class RestoreReport:
  """How a state was restored.

  Attributes:
    strategy: `direct`, `gather` or `broadcast`.
    seconds: duration of the restore.
    nbytes: bytes of the restored state, each array counted once.
    directory: of the step.
    why: the reason for the strategy.
    predicted: seconds that each strategy was expected to take; empty if there was no choice.
    casts: `{path: (saved dtype, dtype now)}` of the leaves that were cast.
    initialised: paths of the leaves that the step lacks and that `init_missing` named.
    verified: number of leaves that were compared, bit for bit, with what was saved.
    unverified: why no leaf was compared; empty if leaves were.
    quarantined: newer steps that could not be restored and went into quarantine, with the reasons.
    gone: steps that were deleted while they were read.
  """

  strategy: str
  seconds: float
  nbytes: int
  directory: str
  why: str = ""
  predicted: dict[str, float] = dataclasses.field(default_factory=dict)
  casts: dict[str, tuple[str, str]] = dataclasses.field(default_factory=dict)
  initialised: tuple[str, ...] = ()
  verified: int = 0
  unverified: str = ""
  quarantined: dict[int, str] = dataclasses.field(default_factory=dict)
  gone: tuple[int, ...] = ()


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

  def __repr__(self) -> str:
    return f"Restored({'; '.join(f'{name} {text}' for name, text in self._rows())})"

  def _repr_html_(self) -> str:
    return html_table(("", "restored"), self._rows())

  def _rows(self) -> list[tuple[str, str]]:
    leaves = jax.tree.leaves(self.state)
    nbytes = sum(getattr(leaf, "nbytes", 0) for leaf in leaves)
    rows = [
      ("step", "none, initialised afresh" if self.step is None else str(self.step)),
      ("next step", str(self.next_step)),
      ("state", f"{size_text(nbytes)} in {count(len(leaves), 'leaf', 'leaves')}"),
    ]
    if (report := self.report) is not None:
      checked = f"not verified: {report.unverified}" if report.unverified else f"{report.verified:,} verified"
      rows.append(("read", f"by {report.strategy} in {duration_text(report.seconds)}, {checked}"))
      rows += [(f"step {step}", f"quarantined: {why}") for step, why in report.quarantined.items()]
    rows += [(n, f"{text!s:.200}") for n, text in (("metrics", self.metrics), ("extras", self.extras)) if text]
    return rows
