"""Is the state worth keeping? Non-finite values, and norms of its top-level groups, found before or behind a save."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from ckpt_jax.errors import UnhealthyStateError
from ckpt_jax.integrity.fingerprint import Taken
from ckpt_jax.integrity.sums import Tally

# Up to this much of a state in host memory is looked at before `save` goes on: BLAS reads some 30 GB/s.
BEFORE_SAVE_NBYTES = 64 << 20
_MAX_GROUPS = 64
_MAX_NAMED = 10
JUMP = 10.0


@dataclasses.dataclass(frozen=True)
class Health:
  """Of a whole state, over all processes.

  Attributes:
    nonfinite: how many NaN and infinite numbers a leaf holds, by path; leaves without any are left out.
    norms: Euclidean norm by top-level group (`params`, `opt_state`), without the non-finite numbers.
    nan: how many of `nonfinite` are NaN.
    meant: how many infinities and NaNs the leaves of `nonfinite` may hold, see `meant.Meant`.
  """

  nonfinite: dict[str, int]
  norms: dict[str, float]
  nan: dict[str, int] = dataclasses.field(default_factory=dict)
  meant: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)

  @property
  def unexpected(self) -> list[str]:
    """The leaves that hold more than they are meant to."""
    return [
      path
      for path, count in self.nonfinite.items()
      if count - self.nan.get(path, 0) > self.meant.get(path, (0, 0))[0]
      or self.nan.get(path, 0) > self.meant.get(path, (0, 0))[1]
    ]

  @property
  def healthy(self) -> bool:
    return not self.unexpected

  def to_json(self) -> dict[str, Any]:
    norms = {group: norm if math.isfinite(norm) else None for group, norm in self.norms.items()}
    return {"healthy": self.healthy, "nonfinite": self.nonfinite, "norms": norms}

  def error(self, where: str) -> UnhealthyStateError:
    """What `health.nonfinite: refuse` raises; names the leaves."""
    unexpected = self.unexpected
    named = [self._described(path) for path in unexpected[:_MAX_NAMED]]
    if len(unexpected) > _MAX_NAMED:
      named.append(f"and {len(unexpected) - _MAX_NAMED} more leaves")
    return UnhealthyStateError(
      f"{where} was not saved: the state holds non-finite numbers ({', '.join(named)}). Go back with "
      "restore(healthy=True), or save it all the same with health: {nonfinite: tag}"
    )

  def _described(self, path: str) -> str:
    nan = self.nan.get(path, 0)
    found = f"{path}: {self.nonfinite[path]}, {nan} of them NaN" if nan else f"{path}: {self.nonfinite[path]}"
    meant = self.meant.get(path, (0, 0))
    return f"{found}; {meant[0]} infinities and {meant[1]} NaNs are meant to be there" if any(meant) else found


def group_of(path: str) -> str:
  return path.split("/", 1)[0]


def from_tallies(tallies: Mapping[str, Tally]) -> Health:
  """Health given the totals of all leaves."""
  nonfinite = {path: t.nonfinite for path, t in tallies.items() if t.nonfinite}
  nan = {path: tallies[path].nan for path in nonfinite if tallies[path].nan}
  squares: dict[str, float] = {}
  for path, t in tallies.items():
    squares[group_of(path)] = squares.get(group_of(path), 0.0) + t.squares
  if len(squares) > _MAX_GROUPS:  # a flat dict of leaves: no groups
    squares = {"": sum(squares.values())}
  return Health(nonfinite, {group: math.sqrt(s) for group, s in squares.items() if s}, nan)


def before_save(taken: Taken, nbytes: int, *, always: bool) -> Health | None:
  """The health of a state that is about to be saved, on every process; None if finding out would keep training.

  All processes must call it alike. Jobs of many processes always find out: a decision to abort a write that all have
  begun would have to travel.

  Args:
    taken: the state.
    nbytes: its bytes, over all processes.
    always: find out whatever it takes.
  """
  alone = jax.process_count() == 1
  if alone and not always and not taken.on_accelerator and nbytes > BEFORE_SAVE_NBYTES:
    return None
  tallies = taken.tallies(2, fingerprint=False)
  if alone:
    return from_tallies(tallies)
  shared = taken.counted_by_all
  names = list(tallies)
  mine = np.array([[t.nonfinite, t.nan, t.squares] for t in tallies.values()], np.float64).reshape(len(names), 3)
  mine[[name in shared and jax.process_index() > 0 for name in names]] = 0
  # As bytes: jax without x64 would cut 64-bit numbers to 32.
  everyone = np.asarray(multihost_utils.process_allgather(mine.view(np.uint8)), np.uint8)
  total = everyone.reshape(jax.process_count(), len(names), 24).view(np.float64).sum(axis=0)
  out = {}
  for name, (count, nan, squares) in zip(names, total, strict=True):
    out[name] = Tally()
    out[name].nonfinite, out[name].nan, out[name].squares = int(count), int(nan), float(squares)
  return from_tallies(out)


def jumps(norms: Mapping[str, float], before: Sequence[Mapping[str, float]]) -> dict[str, float]:
  """How often larger each group's norm is than the median of the steps before; groups that are new are left out."""
  found = {}
  for group, norm in norms.items():
    past = [n[group] for n in before if n.get(group)]
    if past:
      found[group] = norm / statistics.median(past)
  return found
