"""One restore: which step, reading it, comparing it with what was saved, and going back from a damaged one."""

from __future__ import annotations

import dataclasses
import logging
import time
from typing import Any

import jax
from etils import epath

from ckpt_jax.config import Config
from ckpt_jax.errors import CheckpointError, CorruptCheckpointError, NoCheckpointError, StructureMismatchError
from ckpt_jax.integrity.comparison import Verifier
from ckpt_jax.integrity.record import Record, read_record
from ckpt_jax.job import garbage
from ckpt_jax.job.rendezvous import Rendezvous
from ckpt_jax.job.threads import transfers_asked_for
from ckpt_jax.job.waits import Together
from ckpt_jax.layout.forms import why_not_flat
from ckpt_jax.layout.sharding import global_nbytes
from ckpt_jax.orbax.format import STEP_METADATA
from ckpt_jax.orbax.saves import quietly
from ckpt_jax.restore import fallback
from ckpt_jax.restore.item import item_to_read
from ckpt_jax.restore.placement import on_real_devices
from ckpt_jax.restore.read import Request, read_state
from ckpt_jax.restore.result import Restored, RestoreReport
from ckpt_jax.run.steps import RECORD, our_metadata, step_directory, step_info, step_path
from ckpt_jax.storage import look
from ckpt_jax.storage.objects import snapshot
from ckpt_jax.tuning.planner import Planner

_log = logging.getLogger(__name__)


class Restorer:
  """The restores of one run. All processes of the job call it alike."""

  def __init__(self, directory: epath.Path, config: Config, planner: Planner, restoring: set[int]):
    """Reads nothing.

    Args:
      directory: the run.
      config: the settings.
      planner: chooses those that are left open.
      restoring: told which steps are being read, so that nobody deletes them.
    """
    self._directory = directory
    self._config = config
    self._planner = planner
    self._restoring = restoring
    self._rendezvous = Rendezvous(f"restore {directory}")

  def together(self) -> Together:
    """The waits of a new restore."""
    return Together(self._rendezvous, self._config.timeouts.restore_s)

  def is_empty(self) -> bool:
    """Whether the run never had a step.

    Raises:
      CorruptCheckpointError: if it had, and none is left that counts.
    """
    together = self.together()
    if self._candidates(None, False, together):
      return False
    fallback.refuse_to_start_afresh(self._directory, together)
    return True

  def restore(self, step: int | None, request: Request, strategy: str, *, healthy: bool) -> Restored:
    """See `Checkpointer.restore`."""
    if problem := why_not_flat(request.like):
      raise StructureMismatchError(f"like= is no tree for jax; nothing was read:\n  {problem}")
    with garbage.paused(), quietly(), transfers_asked_for():
      return self._restore(step, request, strategy, healthy=healthy)

  # -- inside

  def _restore(self, step: int | None, request: Request, strategy: str, *, healthy: bool) -> Restored:
    together = self.together()
    wrong: Exception | None = None
    try:
      request = dataclasses.replace(request, like=on_real_devices(request.like))
    except Exception as e:
      wrong = e
    known = self._candidates(step, healthy, together, wrong)

    def read(number: int) -> Restored:
      return self._read(number, request, strategy, together)

    def steps() -> list[int]:
      nonlocal known
      found, known = known, []
      return found or self._candidates(None, healthy, together)

    if step is not None:
      return fallback.unless_gone(self._directory, int(step), read, together)
    may_fall_back = self._config.restore.on_corruption == "fallback"
    sound = fallback.newest_sound(self._directory, steps, read, together, fallback=may_fall_back)
    if sound is None:
      which = "no committed checkpoint that is not tagged unhealthy" if healthy else "no committed checkpoint"
      raise NoCheckpointError(f"{self._directory}: {which}; save one first, or check the path")
    if not sound.failed and not sound.gone:
      return sound.found
    assert sound.found.report is not None
    report = dataclasses.replace(sound.found.report, quarantined=sound.failed, gone=sound.gone)
    return dataclasses.replace(sound.found, report=report)

  def _candidates(
    self, step: int | None, healthy: bool, together: Together, error: Exception | None = None
  ) -> list[int]:
    """The steps to try, which process 0 looks up for all, so that a commit in between cannot split them.

    `error`: what was wrong before, on this process, and is raised on all.
    """
    found: list[int] = []
    if jax.process_index() == 0 and step is None and error is None:
      try:
        found = fallback.candidates(self._directory, healthy=healthy)
      except Exception as e:
        error = e
    said = together.meet(f"all processes to restore from {self._directory}", error, f"{step}:{found}")
    asked = {process: text.split(":")[0] for process, text in enumerate(said)}
    if len(set(asked.values())) > 1:
      who = ", ".join(f"process {process}: {wanted}" for process, wanted in list(asked.items())[:20])
      raise CheckpointError(f"{self._directory}: the processes ask for different steps ({who})")
    steps = said[0].split(":")[1].strip("[]")
    return [int(text) for text in steps.split(",")] if steps else []

  def _read(self, step: int, request: Request, strategy: str, together: Together) -> Restored:
    started = time.perf_counter()
    step_dir = step_path(self._directory, step)
    self._restoring.add(step)
    verifier: Verifier | None = None
    try:
      with snapshot(step_dir):
        error: Exception | None = None
        ours: dict[str, Any] = {}
        metrics: dict[str, Any] = {}
        try:
          ours, metrics, item, record = self._described(step, request)
          request = dataclasses.replace(request, item=item or None)  # no name: the step is one tree
          verifier = Verifier(record) if record is not None else None
        except Exception as e:
          error = e
        together.meet("all processes to read what the step says of itself", error)
        settings = self._planner.for_restore(request.like)
        read = read_state(step_dir, settings, request, together, strategy=strategy, check=verifier)
      jax.block_until_ready(read.state)
      verified = verifier.finish(str(step_dir), together) if verifier is not None else 0
    finally:
      self._restoring.discard(step)
      if verifier is not None:
        verifier.stop()
    report = RestoreReport(
      read.choice.strategy,
      time.perf_counter() - started,
      global_nbytes(read.state),
      str(step_dir),
      read.choice.why,
      read.choice.predicted,
      read.casts,
      read.initialised,
      verified,
      "" if verified else "the step has no fingerprints" if self._config.restore.verify else "restore.verify is off",
    )
    _log.info("restored step %d of %s in %.2f s", step, self._directory, report.seconds)
    return Restored(read.state, step, step + 1, metrics, ours.get("extras"), report)

  def _described(self, step: int, request: Request) -> tuple[dict[str, Any], dict[str, Any], str, Record | None]:
    """What a step says of itself: our notes, metrics, the item to read and its fingerprints."""
    damaged = fallback.damage(self._directory, step)
    if damaged is not None:
      raise damaged
    step_dir = step_directory(self._directory, step)
    ours = our_metadata(step_dir)
    item = item_to_read(step_dir, self._config, request.item, request.like, ours)
    record = read_record(step_dir, item) if self._config.restore.verify else None
    # Read once: the file that holds them is among the first that a deletion takes, and a step without it is an old
    # Orbax's, which has no extras.
    if ours and isinstance(ours.get("metrics"), dict):
      return ours, dict(ours["metrics"]), item, record
    if not ours and look.exists(step_dir / item / RECORD):
      raise CorruptCheckpointError(f"{step_dir / STEP_METADATA}: what ckpt_jax wrote there is missing")
    return ours, step_info(self._directory, step).metrics, item, record
