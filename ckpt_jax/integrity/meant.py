"""Non-finite numbers that are meant to be there: masks of -inf, a best loss that begins as inf.

The record of each step (`health.meant` in `ckpt_jax.json`) notes how many infinities each leaf held at the run's first
save of it. The notes are carried on from step to step, so that they outlive retention, restarts, copies and thinning.
NaN is never meant to be there, unless an old run holds it: in a run whose newest step has no notes (written by plain
Orbax, an older version, or under `health.nonfinite: ignore`) what that step holds of a leaf counts, NaN included.
"""

from __future__ import annotations

import collections
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
_PAST = 5  # saves whose norms are kept to compare with
Counts = tuple[int, int]  # infinities, NaNs
_NONE: Counts = (0, 0)


@dataclasses.dataclass(eq=False)
class Meant:
  """What each leaf of a run may hold of non-finite numbers. Process 0's answers count.

  Reads storage when a leaf is not finite for the first time, or after the first save.

  Attributes:
    directory, item: where the state is saved.
    count: counts the non-finite numbers of leaves in an item of a step, by path; those that it lacks are left out.
    decide: calls a function on process 0 and returns its result on all.
    norms: norms by group of the last few saves.
  """

  directory: epath.Path
  item: str
  count: Callable[[epath.Path, str, Collection[str]], Mapping[str, Counts]]
  decide: Callable[[Callable[[], Sequence[int]]], Sequence[int]]

  def __post_init__(self) -> None:
    self.norms: collections.deque[Mapping[str, float]] = collections.deque(maxlen=_PAST)
    self._loaded = False
    self._notes: dict[str, Counts] = {}
    self._seen: set[str] = set()  # leaves that were saved, and whose notes are known
    self._old: epath.Path | None = None  # a step without notes, for the leaves that are not in `_seen`

  def judge(self, health: Health, *, alone: bool = False) -> Health:
    """Adds what is meant to be there to the health of a whole state before it is committed.

    All processes call it alike, unless process 0 calls it `alone`.
    """
    if not health.nonfinite:
      return health
    paths = sorted(health.nonfinite)

    def allowed() -> list[int]:
      return [n for path in paths for n in self._allowed(path, health)]

    numbers = allowed() if alone else self.decide(allowed)
    meant = dict(zip(paths, zip(numbers[::2], numbers[1::2], strict=True), strict=True))
    return dataclasses.replace(health, meant=meant)

  def saved(self, paths: Collection[str], health: Health) -> dict[str, Counts]:
    """The notes for the record of a step with these leaves, which count as saved from now on."""
    self._load()
    self._notes |= {path: health.meant[path] for path in health.nonfinite if health.meant.get(path, _NONE) != _NONE}
    self._seen.update(paths)
    return self._notes

  # -- inside

  def _allowed(self, path: str, health: Health) -> Counts:
    self._load()
    if path in self._notes:
      return self._notes[path]
    if path not in self._seen and (found := self._found_in_old(path)) is not None:
      return found
    # A leaf in place of a node, or the other way round, is not new.
    before = [s for s in self._seen if s == path or s.startswith(f"{path}/") or path.startswith(f"{s}/")]
    if before:
      infinite, nan = zip(*(self._notes.get(s, _NONE) for s in before), strict=True)
      return sum(infinite), sum(nan)
    infinities = health.nonfinite[path] - health.nan.get(path, 0)
    if infinities:
      _log.info(
        "%s: %s holds %d infinite numbers at its first save: as many are allowed in it from now on",
        self.directory,
        path,
        infinities,
      )
    return infinities, 0

  def _found_in_old(self, path: str) -> Counts | None:
    if self._old is None:
      return None
    try:
      return self.count(self._old, self._item_of(self._old), [path]).get(path)
    except (CheckpointError, OSError) as e:
      _log.warning("%s: cannot be read to count the non-finite numbers of %s: %s", self._old, path, e)
      return None

  def _load(self) -> None:
    """Reads the notes of the newest step, once."""
    if self._loaded:
      return
    self._loaded = True
    try:
      steps = committed_steps(self.directory)
      if not steps:
        return
      newest = self._old = step_path(self.directory, steps[-1])
      data = untrusted.read_json(newest / self._item_of(newest) / RECORD, is_intact_file)
      known = data.get("health") or {}
      if "meant" in known:
        self._notes = {str(path): (int(n), int(nan)) for path, (n, nan) in known["meant"].items()}
        self._seen = {*data["leaves"], *self._notes}
        self._old = None
      elif known:  # of an earlier version, or under `ignore`: which leaves were not finite, but not how
        self._seen = set(data["leaves"]) - set(known["nonfinite"])
    except (CheckpointError, OSError, KeyError, TypeError, ValueError, AttributeError) as e:
      _log.debug("%s: no notes on non-finite numbers: %s", self.directory, e)

  def _item_of(self, step_dir: epath.Path) -> str:
    try:
      return item_name(step_dir, self.item)
    except ConfigError:  # another program has named it differently
      return item_name(step_dir)
