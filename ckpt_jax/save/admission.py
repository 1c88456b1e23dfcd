"""Admits saves to storage: one writer at a time, no leftovers, enough room; and makes their commits durable."""

from __future__ import annotations

import concurrent.futures
import contextlib
import datetime
import functools
import logging
import os
import time
from collections.abc import Callable

import jax
import orbax.checkpoint as ocp
from etils import epath

from ckpt_jax.config import Config
from ckpt_jax.config.units import decimal_text
from ckpt_jax.errors import CheckpointError, SaveFailedError, SaveOutOfSpaceError, SaveStorageError, StorageError
from ckpt_jax.failures import is_out_of_space, is_read_only, storage_errors
from ckpt_jax.layout.homes import shared_by_step
from ckpt_jax.planning.estimate import room_nbytes
from ckpt_jax.policies.retention import RetentionContext
from ckpt_jax.run import leftovers, quarantine
from ckpt_jax.run.deletion import StepDeleter
from ckpt_jax.run.lease import LEASE, Lease
from ckpt_jax.run.naming import PLAIN
from ckpt_jax.run.steps import (
  NOTES,
  PINS,
  StepInfo,
  committed_steps,
  list_readable_steps,
  naming_in,
  noted_steps,
  step_info,
  step_path,
)
from ckpt_jax.save.commit import Hooks, StepNames, step_path_class, sync_own_files
from ckpt_jax.save.meeting import Meeting
from ckpt_jax.save.retention import LiveRetention
from ckpt_jax.storage.durable import Sealing, restrict
from ckpt_jax.storage.kinds import StorageKind
from ckpt_jax.storage.objects import BACKEND
from ckpt_jax.storage.space import Room, free_bytes, tree_nbytes
from ckpt_jax.storage.urls import is_object_store

_log = logging.getLogger(__name__)


class Admission:
  """Admits saves to a run. Only process 0 looks at storage; all processes get its answer.

  Attributes:
    lease: the claim to the run; only process 0 takes it.
    sealing: how files are left.
    unclaimed: whether no other job was writing the run when it was opened; only process 0 knows.
  """

  def __init__(
    self,
    directory: epath.Path,
    config: Config,
    kind: StorageKind,
    retention: LiveRetention,
    deleter: StepDeleter,
    meeting: Meeting,
  ):
    """Writes nothing. `meeting` is where the processes meet during a save."""
    self.sealing = sealing_of(config, kind)
    self.lease = Lease(directory, patience=config.timeouts.lease, mode=self.sealing.mode)
    self._directory = directory
    self._config = config
    self._retention = retention
    self._deleter = deleter
    self._meeting = meeting
    self._abandoned: set[int] = set()
    self._failed: set[int] = set()
    self._vacant: set[int] = set()  # steps with nothing of others in their place, so that all there is ours
    self._first = jax.process_index() == 0
    self.unclaimed = False
    self._entering: concurrent.futures.Future[None] | None = None
    self._claim = contextlib.ExitStack()  # to the names in the step that is being created in a bucket

  def opened(self) -> None:
    """Clears the leftovers of a dead writer, before Orbax lists the run; nothing if the writer may be alive."""
    if not self._first:
      return
    try:
      if is_object_store(self._directory):
        # An owner on another host is watched from now on; its leftovers wait for the first save.
        self.unclaimed = self.lease.look() in ("free", "dead")
        return
      leftovers.empty_trash(self._directory)
      self.unclaimed = self.lease.look() in ("free", "dead")
      if self.unclaimed and leftovers.temporary_steps(self._directory):
        self.lease.acquire(wait=0)
        self._clear()
        self.lease.release()
    except (CheckpointError, OSError) as e:  # a reader may lack the right to clean up
      _log.info("%s: leftovers of unfinished saves stay: %s", self._directory, e)

  def admit(self, step: int, nbytes: int, leaves: int, *, compressed: bool) -> list[int]:
    """Lets a save begin: takes the lease, clears leftovers, makes room. All processes call it alike.

    Args:
      step: the step to be saved.
      nbytes, leaves: bytes of its arrays that are expected to be written, and their number.
      compressed: whether they will take less space than that.

    Returns:
      Steps that were deleted to make room; retention would have dropped them after this save.

    Raises:
      StorageError: if another job writes into this run.
      OutOfSpaceError: if there is no room; a SaveFailedError too. Nothing was written.
    """
    if self._failed:
      self._meeting.wait("the failed save to end on every process")
    admit = functools.partial(self._admit_or_full, step, nbytes, leaves, compressed)
    what = f"process 0 to see whether the storage admits step {step}"
    decided = self._meeting.decided(admit, what)
    self._failed.clear()
    return decided

  def failed(self, step: int | None, *, hangs: bool) -> None:
    """Cleans up after a save that failed. Files of a hanging write, which may go on, stay until the next open.

    In a job of many this happens at the next save: until then another process may still be writing its part.
    """
    self._leave()
    if step is None:
      return
    if hangs:
      self._abandoned.add(step)
      return
    self._failed.add(step)
    if jax.process_count() == 1:
      self._clear_failed()

  def probe(self) -> None:
    """Checks that storage answers again after a write that hung.

    Raises:
      StorageError: if it does not.
    """

    def renew() -> list[int]:
      if self.lease.held:
        self.lease.renew()
      return []

    what = "process 0 to see whether the storage answers again"
    self._meeting.decided(renew, what)

  def close(self) -> None:
    """Releases the lease."""
    self._leave()
    self._restrict_notes()
    self.lease.release()

  # -- for Orbax

  def path_class(
    self, committing: Callable[[int], None], committed: Callable[[int], None]
  ) -> type[ocp.path.atomicity_types.TemporaryPath]:
    """Orbax's `temporary_path_class`.

    On process 0 `committing` is called right before a commit, which it stops by raising, and `committed` once it is
    durable.
    """

    def on_committing(step: int) -> None:
      self.lease.check()
      self._ensure_there()
      committing(step)

    def on_committed(step: int) -> None:
      self._deleter.committed(step)  # within the claim, which has its metadata
      self._claim.close()
      committed(step)
      self._vacant.discard(step)
      self.lease.done(step)
      self._restrict_notes()

    def on_beginning(step: int) -> None:
      if self._entering is not None:
        self._entering.result()

    return step_path_class(self._directory, self.sealing, Hooks(on_beginning, on_committing, on_committed))

  def step_names(self) -> StepNames | None:
    """Orbax's `step_name_format`; None for plain numbers."""
    called = naming_in(self._directory)
    return None if called == PLAIN else StepNames(called)

  def barrier(self, meet: Callable[..., None]) -> Callable[..., None]:
    """Orbax's `barrier_sync_fn` around `meet`: a process syncs its files before it reports its part as written."""

    def sync_and_wait(*, key: str, timeout_ms: int) -> None:
      if "async_write_complete" in key and self.sealing.fsync and not self._first:
        for path in self._temporary_items():
          sync_own_files([path])
      meet(key=key, timeout_ms=timeout_ms)

    return sync_and_wait

  # -- inside

  def _restrict_notes(self) -> None:
    """Gives the run's directory and our notes in it the same modes as its steps."""
    if not self.lease.held or is_object_store(self._directory):
      return
    top = os.fspath(self._directory / NOTES)
    with contextlib.suppress(OSError):  # somebody else's, or gone meanwhile
      restrict(os.fspath(self._directory), self.sealing.directory_mode)
    for folder, folders, names in os.walk(top):
      folders[:] = [f for f in folders if f != leftovers.TRASH]
      for path, mode in [(folder, self.sealing.directory_mode), *((f"{folder}/{n}", self.sealing.mode) for n in names)]:
        with contextlib.suppress(OSError):
          restrict(path, mode)

  def _temporary_items(self) -> list[str]:
    if is_object_store(self._directory):
      return []
    items = []
    for path in leftovers.temporary_steps(self._directory):
      items += [entry.path for entry in os.scandir(path) if entry.is_dir()]
    return items

  def _clear(self) -> None:
    if self.lease.saving or not is_object_store(self._directory):
      for step in leftovers.clear(self._directory, self.lease.saving):
        self.lease.done(step)

  def _clear_failed(self) -> None:
    steps, self._failed = self._failed & self._vacant, set()
    if not (self._first and self.lease.held and steps):
      return
    try:
      for cleared in leftovers.clear(self._directory, steps):
        self.lease.done(cleared)
    except OSError as e:
      _log.warning("%s: what was written of %s stays: %s", self._directory, sorted(steps), e)

  def _admit_or_full(self, step: int, nbytes: int, leaves: int, compressed: bool) -> list[int]:
    try:
      return self._admit(step, nbytes, leaves, compressed)
    except StorageError as e:
      if isinstance(e, SaveFailedError):
        raise
      if is_out_of_space(e):
        raise SaveOutOfSpaceError(
          f"{self._directory}: step {step} was not saved: the storage is full, not even a note about the save can be "
          f"written ({e}). Free space",
          step,
        ) from e
      if is_read_only(e):
        raise SaveStorageError(
          f"{self._directory}: step {step} was not saved: {e}. Nothing was written; what is there can be restored", step
        ) from e
      raise

  def _admit(self, step: int, nbytes: int, leaves: int, compressed: bool) -> list[int]:
    if step in self._abandoned:
      raise CheckpointError(
        f"{self._directory}: an earlier write of step {step} still hangs; save another step", topic="steps-in-the-way"
      )
    if not self.lease.held:
      self.lease.acquire()
      with storage_errors(f"{self._directory}: leftovers cannot be cleared"):
        self._clear()
      self._restrict_notes()
    self.lease.ensure_ours()
    self._ensure_there()
    self._clear_failed()
    if not self._deleter.wait_for({step}, self._config.timeouts.save_s):
      raise CheckpointError(
        f"{self._directory}: an older step {step} is still being deleted (timeouts.save)", topic="steps-in-the-way"
      )
    if not is_object_store(self._directory):  # whose requests are made behind training, see `_claim_place`
      quarantine.vacate(self._directory, step)
      self._vacant.add(step)
    dropped = self._make_room(step, nbytes, lambda: self._room(nbytes, leaves, compressed))
    if is_object_store(self._directory):
      self._entering = self._enter(step)
    else:
      self.lease.begin(step)
    return dropped

  def _enter(self, step: int) -> concurrent.futures.Future[None]:
    """Starts to claim a place in a bucket, before Orbax is ready to write into it; no request holds up training."""
    pool = concurrent.futures.ThreadPoolExecutor(2, "ckpt_jax_claim")
    try:
      # Side by side, since neither needs the other.
      noted = pool.submit(self.lease.begin, step)

      def enter() -> None:
        self._claim_place(step)
        noted.result()

      return pool.submit(enter)
    finally:
      pool.shutdown(wait=False)

  def _leave(self) -> None:
    """Ends the claim of a save that has failed, once it is there."""
    if self._entering is not None:
      concurrent.futures.wait([self._entering], self._config.timeouts.save_s)
      self._entering = None
    self._claim.close()

  def _ensure_there(self) -> None:
    """Makes sure that nobody has moved or deleted the run since the lease was taken: a save would begin another one."""
    if is_object_store(self._directory) or os.path.exists(self._directory / NOTES / LEASE):
      return
    with storage_errors(f"{self._directory}: its steps cannot be listed"):
      if committed_steps(self._directory):
        return  # only our notes were deleted
    raise StorageError(
      f"{self._directory}: the run is gone: it was moved, renamed or deleted while this job had it open, and no new "
      "one was begun in its place. Move it back, and the next save goes on; or open a Checkpointer where it is now",
      topic="run-directory",
    )

  def _claim_place(self, step: int) -> None:
    """Lists the place of a step in a bucket, makes sure that nothing is there, and keeps the answer for Orbax."""
    self._claim.close()
    place = step_path(self._directory, step)
    self._claim.enter_context(BACKEND.claim(place))
    quarantine.vacate(self._directory, step)
    if place.exists():
      place.rmtree()
      self._claim.enter_context(BACKEND.claim(place))
    self._vacant.add(step)

  def _make_room(self, step: int, nbytes: int, ask: Callable[[], Room | None]) -> list[int]:
    room = ask()
    if room is None or room.fits:
      return []
    deadline = time.monotonic() + self._config.timeouts.delete
    leftovers.wait_for_trash(self._directory, deadline - time.monotonic())
    self._deleter.wait_for(timeout=max(0.0, deadline - time.monotonic()))
    room = ask()
    dropped: list[int] = []
    for old in self._droppable(step, nbytes):
      if room is None or room.fits:
        break
      self._deleter.delete(old, f"to make room for step {step}, after which no retention rule keeps it")
      dropped.append(old)
      self._deleter.wait_for({old}, max(0.0, deadline - time.monotonic()))
      room = ask()
    if dropped:
      _log.warning("%s: removed steps %s before step %d to make room for it", self._directory, dropped, step)
    if room is None or room.fits:
      return dropped
    gone = f", {len(dropped)} old steps are removed already" if dropped else ""
    raise SaveOutOfSpaceError(
      f"{self._directory}: step {step} was not saved: it needs {decimal_text(room.needed)} and "
      f"{decimal_text(room.free)} are free{gone}; nothing was written. Free space, or keep fewer steps (retention)",
      step,
    )

  def _room(self, nbytes: int, leaves: int, compressed: bool) -> Room | None:
    free = free_bytes(self._directory)
    if free is None:
      return None
    share = self._stored_share() if compressed else 1.0
    if share is None:
      return None  # how far it shrinks is not known
    return Room(free, room_nbytes(nbytes, leaves, share))

  def _stored_share(self) -> float | None:
    steps = committed_steps(self._directory)
    if not steps:
      return None
    try:
      nbytes = step_info(self._directory, steps[-1]).nbytes
      stored = tree_nbytes(os.fspath(step_path(self._directory, steps[-1])))
      # Metadata outweighs the arrays of a tiny step, whose share tells nothing about a large one.
      return min(1.0, stored / nbytes) if nbytes else None
    except (CheckpointError, OSError):
      return None

  def _droppable(self, step: int, nbytes: int) -> list[int]:
    """Steps that the rules drop once `step` is committed, oldest first; never the newest (healthy) one."""
    steps, _ = list_readable_steps(self._directory)
    if not steps:
      return []
    rules = self._retention.rules
    shared = {} if rules.budget is None else shared_by_step(self._directory, [s.step for s in steps])
    context = RetentionContext(noted_steps(self._directory, PINS), self._retention.restoring, shared)
    coming = StepInfo(step, datetime.datetime.now(datetime.timezone.utc), nbytes, {})
    later = set(rules.decide([*steps, coming], context=context).removed)
    healthy = [s.step for s in steps if s.healthy is not False]
    safe = {steps[-1].step, *healthy[-1:]}
    return sorted(s.step for s in steps if s.step in later and s.step not in safe)


def sealing_of(config: Config, kind: StorageKind) -> Sealing:
  """What `storage.fsync` and `storage.mode` ask for on a kind of storage."""
  wanted = config.storage.fsync
  fsync = not kind.traits.durable_on_close if wanted == "auto" else wanted == "on"
  mode = config.storage.mode
  return Sealing(fsync, None if mode is None else int(mode, 8))
