"""Retention in a running job: decided by the metadata of each step, which is read once."""

from __future__ import annotations

import concurrent.futures
import datetime
import logging
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
from etils import epath
from orbax.checkpoint import checkpoint_managers as ocp_policies

from ckpt_jax.errors import CheckpointError, CorruptCheckpointError
from ckpt_jax.layout.homes import shared_files
from ckpt_jax.policies.retention import Retention, RetentionContext
from ckpt_jax.run.steps import PINS, StepInfo, noted_steps, step_info, step_path
from ckpt_jax.storage.parallel import in_threads

_log = logging.getLogger(__name__)
Agree = Callable[[Callable[[], list[int]]], list[int]]


class LiveRetention(ocp_policies.PreservationPolicy):
  """Process 0 applies `rules` and sends the others its decision, so that all managers agree on the steps.

  The metadata of each step is read once, in the background from the moment that the run is opened; each save then costs
  two listings, of the pins and of the run, which are made while the save begins.

  Attributes:
    rules: the retention in force.
    restoring: steps that this process is reading, which stay.
    thin: called on process 0 with the steps to thin.
  """

  def __init__(self, rules: Retention, directory: epath.Path, agree: Agree):
    """Reads nothing. `agree` calls a function on process 0 and returns its result on all."""
    self.rules = rules
    self._agree = agree
    self.restoring: set[int] = set()
    self.thin: Callable[[Collection[int]], None] = lambda steps: None
    self._directory = directory
    self._known: dict[int, StepInfo] = {}
    self._told: set[str] = set()
    self._why: dict[int, str] = {}
    self._coming: int | None = None
    self._shares = False  # whether that will have the files that the last one shares
    self._shared: dict[int, Mapping[Any, int]] = {}
    self._looking_at_files: concurrent.futures.Future[None] | None = None
    self._lock = threading.Lock()
    self._ahead: threading.Thread | None = None
    self._pool = concurrent.futures.ThreadPoolExecutor(2, "ckpt_jax_retention")
    self._looking: tuple[concurrent.futures.Future[set[int]], concurrent.futures.Future[set[str]]] | None = None

  def read_ahead(self, steps: Collection[int]) -> None:
    """Starts to read the metadata of these steps, for the next save."""
    if jax.process_index() == 0 and not self._idle:
      self._ahead = threading.Thread(target=self._read, args=[steps], name="ckpt_jax_retention", daemon=True)
      self._ahead.start()

  def look(self) -> None:
    """Starts to look up, while a save begins, what its decision needs: the pins, and which steps are there."""
    if jax.process_index() == 0 and not self._idle:
      pins = self._pool.submit(noted_steps, self._directory, PINS)
      self._looking = pins, self._pool.submit(lambda: {p.name for p in self._directory.iterdir()})
      if self.rules.budget is not None:
        self._looking_at_files = self._pool.submit(self._look_at_files)

  def _look_at_files(self) -> None:
    """Notes which files the committed steps have together with others."""
    for step in [s.step for s in self.known() if s.step not in self._shared]:
      self._shared[step] = shared_files(step_path(self._directory, step))

  def note(self, step: int, nbytes: int, healthy: bool | None, metrics: Mapping[str, Any], *, shares: bool) -> None:
    """Notes a step that is about to be written, and whether it will share files with the last one.

    Storage has no metadata of it before the commit.
    """
    self._shares = shares
    self._shared.pop(step, None)
    now = datetime.datetime.now(datetime.timezone.utc)
    self._coming = step
    with self._lock:
      self._known[step] = StepInfo(step, now, nbytes, dict(metrics), healthy)

  def forget(self, step: int) -> None:
    """Forgets a step that has changed in storage."""
    with self._lock:
      self._known.pop(step, None)
      self._shared.pop(step, None)

  def known(self) -> list[StepInfo]:
    """The steps whose metadata was read, oldest first; none if no rule needs it."""
    with self._lock:
      return sorted(self._known.values(), key=lambda s: s.step)

  def why(self, step: int) -> str:
    """Why a step was dropped."""
    with self._lock:
      return self._why.get(step, "")

  @property
  def _idle(self) -> bool:
    return self.rules.keeps_all and self.rules.thin is None

  def should_preserve(self, checkpoints: Sequence[Any], *, context: Any = None) -> Sequence[bool]:
    if self._idle or not checkpoints:
      return [True] * len(checkpoints)

    def removed() -> list[int]:
      try:
        return self._decide(checkpoints)
      except (CheckpointError, OSError) as e:  # an unreadable note must neither lose a step nor fail a save
        _log.warning("%s: retention cannot be decided, every step stays: %s", self._directory, e)
        return []

    gone = set(self._agree(removed))
    return [c.step not in gone for c in checkpoints]

  def _decide(self, checkpoints: Sequence[Any]) -> list[int]:
    if self._ahead is not None:
      self._ahead.join()
      self._ahead = None
    numbers = [c.step for c in checkpoints]
    unread = self._read(numbers)
    if self._looking is None:
      self.look()
    assert self._looking is not None
    pins, there = self._looking
    self._looking = None
    if self._looking_at_files is not None:
      self._looking_at_files.result()
    shared, last = dict(self._shared), max([n for n in numbers if n != self._coming], default=None)
    if self._shares and last is not None and self._coming is not None:
      shared[self._coming] = shared.get(last, {})
    context = RetentionContext(pins.result(), self.restoring, shared)
    with self._lock:
      steps = [self._known.get(n) or unread[n] for n in numbers]
    decided = self.rules.decide(steps, context=context)
    if decided.removed and (vanished := self._vanished(numbers, there.result())):
      # Deleted by hand: it must not count in place of one that exists.
      steps = [s for s in steps if s.step not in vanished]
      decided = self.rules.decide(steps, context=context)
    for note in set(decided.notes) - self._told:
      self._told.add(note)
      _log.warning("%s: %s", self._directory, note)
    removed = [step for step in decided.removed if step not in unread]
    with self._lock:
      for step in removed:
        del self._known[step]
        self._why[step] = self.rules.why_removed(step, decided.over_budget)
    self.thin(decided.thinned)
    return removed

  def _vanished(self, steps: Collection[int], names: set[str]) -> set[int]:
    """Steps without a directory among `names`, except the one that is being written."""
    return {s for s in steps if step_path(self._directory, s).name not in names and s != self._coming}

  def _read(self, steps: Collection[int]) -> dict[int, StepInfo]:
    """Reads metadata not read yet. Returns placeholders for steps that cannot be read for now, which stay.

    Such a step may be the best one, or the only healthy one: it is read again at the next save.
    """
    with self._lock:
      missing = [step for step in steps if step not in self._known]
    if not missing:
      return {}
    unread: dict[int, StepInfo] = {}

    def info(step: int) -> StepInfo:
      nothing = StepInfo(step, None, 0, {}, healthy=False)  # never taken for the newest healthy step
      try:
        return step_info(self._directory, step)
      except CorruptCheckpointError:
        return nothing
      except (CheckpointError, OSError) as e:
        unread[step] = nothing
        _log.warning("%s: step %d cannot be read for now, and stays: %s", self._directory, step, e)
        return nothing

    found = dict(zip(missing, in_threads(info, missing), strict=True))
    with self._lock:
      self._known = {step: s for step, s in found.items() if step not in unread} | self._known
    return unread
