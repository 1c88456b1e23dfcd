"""Non-finite numbers that are meant to be there: masks of -inf, a best loss that begins as inf.

What a leaf held at the run's first save of it is noted in the record of each step (`health.meant` in `ckpt_jax.json`),
and carried on from step to step, so that it outlives retention, restarts, copies and thinning: infinities, by number.
NaN is never meant to be there, unless an old run holds it: in a run whose newest step has no such notes, written by
plain Orbax, an older version, or under `health.nonfinite: ignore`, what that step holds of a leaf counts, NaN included.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Collection, Mapping, Sequence

from etils import epath

from ckpt_jax.errors import CheckpointError, ConfigError
from ckpt_jax.integrity.health import Health
from ckpt_jax.layout.contents import item_name
from ckpt_jax.run import untrusted
from ckpt_jax.run.checksums import is_intact_file
from ckpt_jax.run.steps import RECORD, committed_steps, step_path

_log = logging.getLogger(__name__)
Counts = tuple[int, int]  # infinities, NaNs
_NONE: Counts = (0, 0)


class Meant:
  """What each leaf of a run may hold of non-finite numbers. Process 0's answers count.

  Storage is looked at when a leaf is not finite for the first time, or behind the first save.
  """

  def __init__(
    self,
    directory: epath.Path,
    item: str,
    look: Callable[[epath.Path, str, Collection[str]], Mapping[str, Counts]],
  ):
    """Reads nothing.

    Args:
      directory: the run.
      item: the one that is saved.
      look: counts the non-finite numbers of leaves in an item of a step, by path; those that it lacks are left out.
    """
    self._directory = directory
    self._item = item
    self._look = look
    self._loaded = False
    self._notes: dict[str, Counts] = {}
    self._seen: set[str] = set()  # leaves that were saved, and whose notes are known
    self._old: epath.Path | None = None  # a step without notes, for the leaves that are not in `_seen`

  def judge(self, health: Health, decide: Callable[[Callable[[], Sequence[int]]], Sequence[int]]) -> Health:
    """`health` with what is meant to be there. All processes call it alike, with the health of the whole state.

    Args:
      health: of a state that is about to be saved.
      decide: calls a function on process 0 and has its result on all.
    """
    if not health.nonfinite:
      return health
    names = sorted(health.nonfinite)
    numbers = decide(lambda: [n for name in names for n in self._allowed(name, health)])
    meant = dict(zip(names, zip(numbers[::2], numbers[1::2], strict=True), strict=True))
    return dataclasses.replace(health, meant=meant)

  def saved(self, names: Collection[str], health: Health) -> dict[str, Counts]:
    """What the record of a step is to say, given its leaves. They count as saved from now on."""
    self._load()
    for name in health.nonfinite:
      if health.meant.get(name, _NONE) != _NONE:
        self._notes[name] = health.meant[name]
    if not self._seen.issuperset(names):
      self._seen.update(names)
    return self._notes

  # -- inside

  def _allowed(self, name: str, health: Health) -> Counts:
    self._load()
    if name in self._notes:
      return self._notes[name]
    if name not in self._seen and self._old is not None:
      found = self._found_in_old(name)
      if found is not None:
        return found
    # A leaf in place of a node, or the other way round, is not new.
    before = [s for s in self._seen if s == name or s.startswith(f"{name}/") or name.startswith(f"{s}/")]
    if before:
      infinite, nan = zip(*(self._notes.get(s, _NONE) for s in before), strict=True)
      return sum(infinite), sum(nan)
    infinities = health.nonfinite[name] - health.nan.get(name, 0)
    if infinities:
      _log.info(
        "%s: %s holds %d infinite numbers at its first save: so many are meant to be there, from now on",
        self._directory,
        name,
        infinities,
      )
    return infinities, 0

  def _found_in_old(self, name: str) -> Counts | None:
    assert self._old is not None
    try:
      return self._look(self._old, self._item_of(self._old), [name]).get(name)
    except (CheckpointError, OSError) as e:
      _log.warning("%s: cannot be read, to see what non-finite numbers are meant to be in %s: %s", self._old, name, e)
      return None

  def _load(self) -> None:
    """From the newest step."""
    if self._loaded:
      return
    self._loaded = True
    try:
      steps = committed_steps(self._directory)
      if not steps:
        return
      newest = step_path(self._directory, steps[-1])
      self._old = newest
      data = untrusted.read_json(newest / self._item_of(newest) / RECORD, is_intact_file)
      known = data.get("health") or {}
      if "meant" in known:
        self._notes = {str(name): (int(n), int(nan)) for name, (n, nan) in known["meant"].items()}
        self._seen = {*data["leaves"], *self._notes}
        self._old = None
      elif known:  # of an earlier version, or under `ignore`: it says which leaves were not finite, but not how
        self._seen = set(data["leaves"]) - set(known["nonfinite"])
    except (CheckpointError, OSError, KeyError, TypeError, ValueError, AttributeError) as e:
      _log.debug("%s: no notes on non-finite numbers: %s", self._directory, e)

  def _item_of(self, step_dir: epath.Path) -> str:
    try:
      return item_name(step_dir, self._item)
    except ConfigError:  # another program has called it otherwise
      return item_name(step_dir)
