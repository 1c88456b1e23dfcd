"""Is the state worth keeping? Non-finite numbers and norms of its top-level groups, found before or during a save."""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax

from ckpt_jax.errors import UnhealthyStateError
from ckpt_jax.integrity.fingerprint import Taken
from ckpt_jax.integrity.sums import Tally
from ckpt_jax.job.rendezvous import Combine

# Larger states are not checked before `save` goes on: BLAS reads some 30 GB/s, and a copy from an accelerator has to
# arrive first. Programs on the device would answer sooner only for large states, and cost 0.1 s for each distinct shape
# at the first save.
BEFORE_SAVE_NBYTES = 64 << 20
_MAX_GROUPS = 64
_MAX_NAMED = 10
FOUND = "the state holds non-finite numbers"
Combined = Callable[[str, str, Combine], str]
JUMP = 10.0  # a norm so many times the median of the steps before is logged


@dataclasses.dataclass(frozen=True)
class Health:
  """The health of a whole state, over all processes.

  Attributes:
    nonfinite: how many NaN and infinite numbers a leaf holds, by path; leaves without any are left out.
    norms: Euclidean norm by top-level group (`params`, `opt_state`) of the finite numbers.
    nan: how many of `nonfinite` are NaN.
    meant: how many infinities and NaNs each leaf of `nonfinite` may hold, see `meant.Meant`.
  """

  nonfinite: dict[str, int]
  norms: dict[str, float]
  nan: dict[str, int] = dataclasses.field(default_factory=dict)
  meant: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)

  @property
  def unexpected(self) -> list[str]:
    """The leaves that hold more than they are meant to."""
    found = []
    for path, count in self.nonfinite.items():
      nan = self.nan.get(path, 0)
      infinities_meant, nan_meant = self.meant.get(path, (0, 0))
      if count - nan > infinities_meant or nan > nan_meant:
        found.append(path)
    return found

  @property
  def healthy(self) -> bool:
    """Whether no leaf holds more non-finite numbers than it is meant to."""
    return not self.unexpected

  def to_json(self) -> dict[str, Any]:
    """What the record of a step holds."""
    norms = {group: norm if math.isfinite(norm) else None for group, norm in self.norms.items()}
    return {"healthy": self.healthy, "nonfinite": self.nonfinite, "norms": norms}

  @property
  def part(self) -> dict[str, Any]:
    """What `from_parts` makes the whole of; JSON, with Python's infinities."""
    return {"nonfinite": self.nonfinite, "nan": self.nan, "norms": self.norms}

  def error(self, where: str) -> UnhealthyStateError:
    """The error of `health.nonfinite: refuse`, naming the leaves."""
    unexpected = self.unexpected
    named = [self._described(path) for path in unexpected[:_MAX_NAMED]]
    if len(unexpected) > _MAX_NAMED:
      named.append(f"and {len(unexpected) - _MAX_NAMED} more leaves")
    return UnhealthyStateError(
      f"{where} was not saved: {FOUND} ({', '.join(named)}). Go back with "
      "restore(healthy=True), or save it all the same with health: {nonfinite: tag}"
    )

  def _described(self, path: str) -> str:
    nan = self.nan.get(path, 0)
    found = f"{path}: {self.nonfinite[path]}, {nan} of them NaN" if nan else f"{path}: {self.nonfinite[path]}"
    meant = self.meant.get(path, (0, 0))
    return f"{found}; {meant[0]} infinities and {meant[1]} NaNs are meant to be there" if any(meant) else found


def from_tallies(tallies: Mapping[str, Tally]) -> Health:
  """The health of a state, or of one process's part of it, given the totals of all leaves."""
  nonfinite = {path: t.nonfinite for path, t in tallies.items() if t.nonfinite}
  nan = {path: tallies[path].nan for path in nonfinite if tallies[path].nan}
  squares: dict[str, float] = {}
  for path, t in tallies.items():
    group = path.split("/", 1)[0]
    squares[group] = squares.get(group, 0.0) + t.squares
  if len(squares) > _MAX_GROUPS:  # a flat dict of leaves has no groups
    squares = {"": sum(squares.values())}
  return Health(nonfinite, {group: math.sqrt(s) for group, s in squares.items() if s}, nan)


def before_save(taken: Taken, combined: Combined) -> Health:
  """The health of a state that is about to be saved, on every process. All processes call it alike.

  `combined` gives all processes what process 0 makes of the texts of all.
  """
  taken.health = tallies = taken.tallies(2, fingerprint=False, last=taken.copies.in_turn)
  found = from_tallies(tallies)
  if jax.process_count() == 1:
    return found

  def whole(parts: list[str]) -> list[str]:
    return [json.dumps(from_parts(map(json.loads, parts)).part)]

  return Health(**json.loads(combined("all processes to check the health of the state", json.dumps(found.part), whole)))


def from_parts(parts: Iterable[Mapping[str, Any]]) -> Health:
  """The health of a state, given that of each process's part as `Health.part`."""
  nonfinite: collections.Counter[str] = collections.Counter()
  nan: collections.Counter[str] = collections.Counter()
  squares: collections.Counter[str] = collections.Counter()
  for part in parts:
    nonfinite.update(part["nonfinite"])
    nan.update(part["nan"])
    for group, norm in part["norms"].items():
      squares[group] += norm**2
  norms = {group: math.sqrt(s) for group, s in squares.items()}
  return Health(dict(nonfinite), norms, dict(nan))


def jumps(norms: Mapping[str, float], before: Sequence[Mapping[str, float]]) -> dict[str, float]:
  """The ratio of each group's norm to its median in the steps before; new groups are left out."""
  found = {}
  for group, norm in norms.items():
    past = [n[group] for n in before if n.get(group)]
    if past:
      found[group] = norm / statistics.median(past)
  return found
