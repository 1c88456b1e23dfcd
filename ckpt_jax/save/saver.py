"""The lifecycle of a save over Orbax's manager: from the state in training to a commit or one exception."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from ckpt_jax.config import Config
from ckpt_jax.config.units import is_uncompressed
from ckpt_jax.errors import CheckpointError, SaveFailedError
from ckpt_jax.failures import is_timeout, root_cause, storage_errors
from ckpt_jax.integrity.meant import Meant
from ckpt_jax.integrity.record import RecordedSave, Recording, RecordingHandler, as_item, record_of
from ckpt_jax.job import garbage
from ckpt_jax.job.errand import Errand, wait_for
from ckpt_jax.job.progress import OnProgress, reported
from ckpt_jax.job.rendezvous import PeerFailedError, Rendezvous
from ckpt_jax.job.threads import transfers_asked_for
from ckpt_jax.layout.handler import PyTreeHandler, pytree_handler, target_file_size
from ckpt_jax.layout.sharding import global_nbytes
from ckpt_jax.layout.staging import HostCopies
from ckpt_jax.layout.unchanged import Unchanged
from ckpt_jax.orbax.manager import (
  RunManager,
  end_save,
  forget_failure,
  forget_steps,
  leave_behind,
  never_wait_for_hanging_threads,
)
from ckpt_jax.orbax.saves import Operation, quietly
from ckpt_jax.restore.step import count_nonfinite
from ckpt_jax.run.checksums import with_digest
from ckpt_jax.run.steps import OURS, committed_steps, is_step, step_path
from ckpt_jax.save.after_commit import AfterCommit
from ckpt_jax.save.host_memory import copies_for, warmup
from ckpt_jax.save.manager import Hooks, open_manager
from ckpt_jax.save.opening import OpenRun
from ckpt_jax.save.snapshot import checked_json, encoded, run_metadata
from ckpt_jax.save.write import SaveRecord, Write, left_hanging, not_saved

_log = logging.getLogger(__name__)
PyTree = Any
_NO_COLLECTION_S = 5.0  # a longer write is bound by storage, not by Python, and training makes garbage of its own
_GRACE_S = 5.0  # that Orbax may take beyond timeouts.save to raise by itself that a write has timed out
never_wait_for_hanging_threads()


@dataclasses.dataclass(frozen=True)
class _Snapshot:
  """What one save writes.

  Attributes:
    tree: the state as Orbax takes it; its arrays are the user's until the write holds copies.
    metadata: the step's JSON.
    recording: fingerprints and health, written beside the arrays.
    record: what the save costs.
    config: the settings to write it with.
    copies: of the arrays in host memory, or on their way there.
  """

  tree: PyTree
  metadata: dict[str, Any]
  recording: Recording
  record: SaveRecord
  config: Config
  copies: HostCopies


class Saver:
  """The saves of one run, one at a time.

  The life of a save. All processes of the job take each part alike, unless it names one:

    `save`, in the training thread, which it blocks:
      _snapshot       encode the state, plan its layout, measure it, check its health; wait for the previous save
      admission.admit process 0 takes the lease, clears leftovers and makes room; all get the same answer
      manager.save    Orbax calls the handlers and starts its threads
      _wait_for_copies  if host memory holds only a part of the copies at a time
    in Orbax's threads, behind training:
      handlers        each process writes its own shards (layout.handler) and its part of the record (integrity.record)
      _on_committing  process 0: the lease is still ours, and the write was not given up
      save.commit     process 0: files are synced, the step gets its name
      _on_commit      process 0: the step counts as committed; log, schedule and attempt log hear of it
      _on_end         nothing writes the step any more
    in the next `save`, `wait` or `close`:
      _settle         if it failed: clean up, and raise why, once

  One thread calls at a time. Everything that changes something runs as an errand: an interrupt of the caller tears
  nothing, and the next call goes on where it struck.

  Attributes:
    records: a SaveRecord for each save, oldest first.
    on_progress: called, in a thread of its own, while a caller waits for a write.
  """

  def __init__(self, run: OpenRun):
    """Opens Orbax's manager."""
    self.records: list[SaveRecord] = []
    self.on_progress: OnProgress | None = None
    self._run = run
    self._directory = run.directory
    self._config = run.planner.unplanned
    self._after = AfterCommit(run.directory, run.schedule, run.journal, run.retention, run.config.schedule)
    self._write: Write | None = None
    self._errand: Errand | None = None
    self._beginning: SaveRecord | None = None  # of a save that has not returned
    self._hung = 0  # writes that were given up
    self._collect_again = threading.Event()  # set once the last save has ended, or failed to start
    self._rendezvous = Rendezvous(f"save {run.directory}")
    self._meant = Meant(run.directory, run.item, count_nonfinite, run.meeting.decided)
    self._unchanged = Unchanged()
    run.thinner.busy = lambda: self.under_way is not None
    with storage_errors(f"{run.directory}: cannot open the run"), quietly():
      self._manager: RunManager | None = self._opened(pytree_handler(self._config))

  @property
  def manager(self) -> RunManager:
    """Orbax's manager; replaced when a save needs another handler, or hangs."""
    if self._manager is None:
      self._run.meeting.begin()
      self._run.admission.probe()
      with quietly():
        self._manager = self._opened(pytree_handler(self._config))
    return self._manager

  def save(self, step: int, state: PyTree, metrics: Mapping[str, Any] | None, extras: Any, started: float) -> None:
    """Starts a save and returns once the arrays may be overwritten; see `Checkpointer.save`.

    `started` is `time.perf_counter()` when training began to wait.
    """
    self._collect_again = threading.Event()
    garbage.pause(self._collect_again, _NO_COLLECTION_S)
    self._run.meeting.begin()
    if looked := self.under_way is None:  # else the step that is being written may not be in the listing yet
      self._run.retention.look()
    try:
      snapshot, computing_s = self._snapshot(step, state, metrics, extras)
      self._beginning = snapshot.record
      self._do(functools.partial(self._begin, snapshot, started + computing_s, looked))
    except BaseException as e:
      self._collect_again.set()
      self._run.meeting.fail(f"step {step} was not saved: {root_cause(e)}")  # wherever the others are by now
      if isinstance(e, CheckpointError):
        self._after.failed(step, e)
      raise

  def look_ahead(self) -> None:
    """Training has begun, and will save."""
    self._unchanged.look_ahead(self._config.layout, self._newest_item)

  @property
  def under_way(self) -> SaveRecord | None:
    """The save that has begun and is neither committed nor known to have failed."""
    write = self._write
    if write is None or write.durable or write.ended.is_set():
      return self._beginning if self._errand is not None else None
    return write.record

  def wait(self) -> None:
    """Waits until the last save is committed.

    Raises:
      SaveFailedError: if it failed; raised once.
    """
    self._finish()
    while (write := self._write) is not None:
      plan = self._run.planner.plan
      total = None if plan is None else plan.state.local_nbytes
      with reported(self.on_progress, f"writing step {write.record.step}", total, write.nbytes_written):
        ended = wait_for(write.ended, write.left)
      if not ended:
        raise self._hangs(write)
      if self._write is not write:
        continue  # a signal handler has saved, or waited, meanwhile
      if write.durable and write.error is None:
        self._write = None
      else:
        self._do(functools.partial(self._settle, write))

  def raise_background_error(self) -> None:
    """Raises the error of a background save that has failed, without waiting for one that still runs; once.

    In a job of many, processes notice a failure at different steps. There the next call that all make alike raises it
    (a save that is due, `wait`, `close`), so that all raise at the same one, and a trainer may go on.
    """
    self._finish()
    write = self._write
    if write is not None and jax.process_count() == 1 and (write.ended.is_set() or not write.left):
      self.wait()

  def reload(self) -> None:
    """Has Orbax's manager list the steps again, after some were moved. All processes call it alike."""
    self._unchanged.forget()
    self.manager.reload()

  def steps_in_storage(self, step: int) -> list[int]:
    """The committed steps as process 0 lists them now, once the last save has ended. All processes call it alike.

    Orbax's manager forgets steps that are gone, as when somebody has deleted them by hand.

    Raises:
      CheckpointError: if not all processes ask, each because of this `step` that it is to save.
    """
    self.wait()
    self._run.meeting.begin()
    self._run.meeting.exchange(f"asks whether step {step} is there already")

    def listed() -> list[int]:
      with storage_errors(f"{self._directory}: its steps cannot be listed"):
        return committed_steps(self._directory)

    there = self._run.meeting.decided(listed)
    forget_steps(self.manager, set(self.manager.all_steps()) - set(there))
    return there

  def close(self) -> None:
    """Releases Orbax's threads and the lease; call `wait` first."""
    if self._manager is not None:
      with contextlib.suppress(Exception), quietly():  # wait() has raised its background failure
        self._manager.close()
    self._run.admission.close()

  # -- the parts of a save

  def _snapshot(
    self, step: int, state: PyTree, metrics: Mapping[str, Any] | None, extras: Any
  ) -> tuple[_Snapshot, float]:
    """What is to be written, and seconds until the state was computed. The previous save has ended when it returns."""
    flat, tree, notes, numbers, computing_s = self._run.meeting.agreed(step, lambda: encoded(state, metrics))
    config = self._run.planner.for_save(flat)
    record = SaveRecord(step, global_nbytes(flat))
    metadata = run_metadata(config, flat, record.nbytes)
    metadata |= {"metrics": numbers, "extras": checked_json(extras, "extras"), "encoded": notes}
    waited = time.perf_counter()
    self.wait()
    record.waited_s = time.perf_counter() - waited
    where = f"{self._directory}: step {step}"
    warmup.stop()
    self._unchanged.look_back(self._newest_item)
    unchanged = self._unchanged.begin(step_path(self._directory, step) / self._run.item, flat, config.layout)
    copies = copies_for(self._directory, flat, config, unchanged, self._run.meeting.numbers)
    combined = self._run.meeting.combined
    recording = record_of(flat, record.nbytes, config.health.nonfinite, where, self._meant, copies, unchanged, combined)
    metadata |= {"fingerprints": 1, "health": recording.health_told, "item": self._run.item, "mark": recording.mark}
    return _Snapshot(tree, metadata, recording, record, config, copies), computing_s

  def _newest_item(self) -> epath.Path | None:
    steps = self.manager.all_steps()
    return step_path(self._directory, max(steps)) / self._run.item if steps else None

  @transfers_asked_for()
  def _begin(self, snapshot: _Snapshot, started: float, looked: bool) -> None:
    """From the first file to the return of `save`."""
    record, metadata = snapshot.record, snapshot.metadata
    if not looked:
      self._run.retention.look()
    if snapshot.config != self._config:
      self._replace_manager(snapshot.config)
    compressed = not is_uncompressed(self._config.layout.compression)
    coming = snapshot.recording.unchanged.coming = record.nbytes - snapshot.recording.unchanged.spared
    made_room = self._run.admission.admit(record.step, coming, metadata["leaves"], compressed=compressed)
    forget_steps(self.manager, made_room)
    self._run.journal.begin()
    operation = Operation(self._rendezvous.begin(), functools.partial(self._rendezvous.check, "the step's directory"))
    recording, ring = snapshot.recording, snapshot.copies.ring
    committed = functools.partial(self._after.committed, health=lambda: recording.health)
    timeout = self._config.timeouts.save_s + _GRACE_S
    write = self._write = Write(record, operation, ring, timeout, committed, started)
    recording.written = write.all_written
    recording.unchanged.committed = lambda: write.durable
    write.unchanged = lambda: recording.unchanged.nbytes
    try:
      shares, healthy = recording.unchanged.spared > 0, recording.health_told.get("healthy")
      self._run.retention.note(record.step, record.nbytes, healthy, metadata["metrics"], shares=shares)
      self._after.begun(record.step, self._run.planner.plan)
      arrays = ocp.args.PyTreeSave(snapshot.tree, ocdbt_target_data_file_size=target_file_size(self._config))
      copying = time.perf_counter()
      with operation.begun():
        self.manager.save(
          record.step,
          args=as_item(self._run.item, RecordedSave(arrays, snapshot.recording)),
          metrics=metadata["metrics"],
          custom_metadata={OURS: with_digest(metadata)},
          force=True,
        )
      self._wait_for_copies(write, snapshot.copies)
      record.snapshot_s = time.perf_counter() - copying
    except Exception as e:
      self._settle(write, e)
    write.returned()
    self.records.append(record)

  def _wait_for_copies(self, write: Write, copies: HostCopies) -> None:
    """Waits until training may overwrite the arrays, if their copies do not fit into memory."""
    if not copies.in_turn:
      return
    until_written = copies.views_in_turn
    if not write.ring.wait_until_sent(write.left) or (until_written and not wait_for(write.ended, write.left)):
      raise TimeoutError("training waited for arrays to be written, since their copies do not fit into host memory")
    if write.error is not None and (until_written or jax.process_count() == 1):  # else some would raise, and others not
      raise write.error

  def _do(self, work: Callable[[], None]) -> None:
    """Runs `work` to its end, even if the caller is interrupted; then the next call of `_finish` raises its error."""
    with quietly():
      self._errand = Errand(work)
    self._errand.start()
    self._finish()

  def _finish(self) -> None:
    while (errand := self._errand) is not None:
      errand.wait()
      if self._errand is errand:  # else a signal handler has asked, and got the answer
        self._errand = self._beginning = None
        errand.outcome()

  def _opened(self, handler: PyTreeHandler, known: Sequence[int] | None = None) -> RunManager:
    handlers = as_item(self._run.item, RecordingHandler(handler))
    meet = functools.partial(self._meet, self._hung)
    hooks = Hooks(self._on_committing, self._on_commit, self._on_end, meet)
    return open_manager(self._run, hooks, handlers, self._config, known)

  def _replace_manager(self, config: Config) -> None:
    known = self.manager.all_steps()
    self.manager.close()
    self._manager, self._config = None, config
    self._manager = self._opened(pytree_handler(config), known)

  # -- called by Orbax's threads

  def _meet(self, hung: int, *, key: str, timeout_ms: int) -> None:
    """Orbax's barrier_sync_fn. A process whose write failed comes here too, on its way out, and is not waited for."""
    if hung != self._hung:
      raise SaveFailedError("this write hung and was given up; it must not meet the processes of a later one")
    error = sys.exc_info()[1]
    if error is None:
      write = self._write
      written = write is not None and "async_write_complete" in key
      what = f"all processes to reach {key.strip('_')}"
      text = write.written() if write and written else ""
      told = self._rendezvous.exchange(what, text, timeout_ms / 1000)
      if write and written:
        write.all_written(told)
      if "async_commit_complete" in key and self._write is not None:  # process 0 comes here once storage has the step
        self._write.durable = True
    elif not isinstance(error, PeerFailedError):
      self._rendezvous.fail(root_cause(error))

  def _on_committing(self, step: int) -> None:
    write = self._write
    if write is None or write.record.step != step or not write.begin_commit():
      raise SaveFailedError(f"{self._directory}: step {step} took longer than timeouts.save and was given up", step)

  def _on_commit(self, step: int) -> None:
    write = self._write
    if write is not None and write.record.step == step:
      write.committed()

  def _on_end(self, step: int, error: BaseException | None) -> None:
    write = self._write
    if write is None or write.record.step != step:
      return  # one that was given up
    write.error = error
    write.ring.close()
    if error is not None and jax.process_count() == 1:
      write.operation.end(write.left)
    elif error is not None and jax.process_index() == 0:
      if not isinstance(error, PeerFailedError):
        self._rendezvous.fail(root_cause(error))
      write.operation.fail()
    write.ended.set()
    self._collect_again.set()

  # -- failures

  def _hangs(self, write: Write) -> SaveFailedError:
    """Gives up on a write that does not end: the next save goes through a new manager."""
    step = write.record.step
    uncommitted = write.give_up()
    write.ring.close()
    if self._manager is not None:
      leave_behind(self._manager, write.operation.threads)
    self._manager = None
    self._hung += 1
    self._run.admission.failed(step, hangs=True)
    self._write = None
    timeout = self._config.timeouts.save_s
    return self._after.failed(step, left_hanging(self._directory, step, timeout, uncommitted=uncommitted))

  def _settle(self, write: Write, error: BaseException | None = None) -> None:
    """Cleans up after a write that did not end as it should. Returns if its step is committed all the same.

    Args:
      write: it has ended, unless there is an `error`.
      error: what was raised before, or while, Orbax's last thread started.

    Raises:
      SaveFailedError, UnhealthyStateError: the step is not committed.
    """
    write.ring.close()
    error = error or write.error or SaveFailedError("its background write ended without a commit and without an error")
    single = jax.process_count() == 1
    # In a job of many, processes learn of one that hangs in different ways, and all must keep their manager or none.
    if single and not (self._ends(write) and (write.durable or not is_timeout(error))):
      raise self._hangs(write) from error
    if self._manager is not None and not (single or write.ended.is_set()):
      self._rendezvous.fail(root_cause(error))  # the threads of a save that has raised hear of it, everywhere, and end
      write.operation.fail()
      end_save(self._manager, write.ended, _GRACE_S)
    step, committed = write.record.step, self._is_committed(write)
    if self._manager is not None:
      forget_failure(self._manager)
    if not committed:
      self._run.admission.failed(step, hangs=False)
    with contextlib.suppress(Exception):  # storage is the truth
      self.manager.reload()
      forget_steps(self.manager, self._run.deleter.pending)
    self._write = None
    if not (committed and single):
      raise self._after.failed(step, not_saved(self._directory, step, error, committed=committed)) from error
    _log.warning("%s: step %d is committed, but afterwards: %s", self._directory, step, root_cause(error))

  def _ends(self, write: Write) -> bool:
    """Waits until nothing writes the step any more, however far its save has come; False if it hangs."""
    if not write.ended.is_set():
      assert self._manager is not None
      if not end_save(self._manager, write.ended, write.left):
        return False
    return write.operation.end(write.left)

  def _is_committed(self, write: Write) -> bool:
    if write.durable:
      return True
    with contextlib.suppress(CheckpointError, OSError):
      # A commit that was reported as failed may have reached the storage.
      return is_step(step_path(self._directory, write.record.step))
    return False
