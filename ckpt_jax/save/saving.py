"""One save at a time over Orbax's manager: from the state that training holds to a commit or one clear exception."""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import SaveDecisionPolicy

from ckpt_jax.config import Config
from ckpt_jax.errors import CheckpointError, SaveFailedError
from ckpt_jax.failures import is_timeout, root_cause, storage_errors
from ckpt_jax.integrity.health import Health
from ckpt_jax.integrity.meant import Meant
from ckpt_jax.integrity.record import (
  RecordedSave,
  Recording,
  RecordingHandler,
  as_item,
  history,
  record_of,
)
from ckpt_jax.job.agreement import decided_by_process_zero
from ckpt_jax.job.errand import Errand, wait_for
from ckpt_jax.job.rendezvous import PeerFailedError, Rendezvous
from ckpt_jax.job.threads import transfers_asked_for
from ckpt_jax.layout.encoding import encode, refuse_unusable
from ckpt_jax.layout.handler import PyTreeHandler, pytree_handler, target_file_size
from ckpt_jax.layout.keeping import keeping
from ckpt_jax.layout.sharding import global_nbytes
from ckpt_jax.orbax.format import DEFAULT_ITEM
from ckpt_jax.orbax.manager import (
  ToldManager,
  end_save,
  forget_failure,
  forget_steps,
  leave_behind,
  never_wait_for_hanging_threads,
)
from ckpt_jax.orbax.saves import Operation, quietly
from ckpt_jax.restore.counting import count_nonfinite
from ckpt_jax.run.attempts import AttemptLog
from ckpt_jax.run.checksums import sealed
from ckpt_jax.run.deletion import StepDeleter
from ckpt_jax.run.steps import OURS, committed_steps, is_step, step_path
from ckpt_jax.save.admission import Gate
from ckpt_jax.save.failure import left_hanging, not_saved
from ckpt_jax.save.filling import Outlook
from ckpt_jax.save.host_memory import chunk_nbytes
from ckpt_jax.save.manager import Managers, Reports
from ckpt_jax.save.metadata import checked_json, plain_metrics, run_metadata
from ckpt_jax.save.notes import CommitNotes
from ckpt_jax.save.retention import LiveRetention
from ckpt_jax.save.underway import SaveRecord, Write
from ckpt_jax.tuning.planner import Planner

_log = logging.getLogger(__name__)
PyTree = Any
# What Orbax may take beyond timeouts.save to tell by itself that a write has timed out.
_GRACE_S = 5.0
never_wait_for_hanging_threads()


class Saver:
  """The save pipeline of one run.

  A save goes through `save` (what training waits for), Orbax's background write, and the commit. What fails on the way
  is raised once, by the next call of `raise_background_error`, `save` or `wait`. One thread calls at a time.

  Whatever changes something runs as an errand: an interrupt of the caller tears nothing, and the next call goes on
  where it struck.

  Attributes:
    records: a SaveRecord for each save, oldest first.
  """

  def __init__(
    self,
    directory: epath.Path,
    config: Config,
    *,
    planner: Planner,
    policy: SaveDecisionPolicy,
    schedule: SaveDecisionPolicy,
    retention: LiveRetention,
    deleter: StepDeleter,
    attempt: AttemptLog,
    gate: Gate,
    item: str = DEFAULT_ITEM,
  ):
    """Opens Orbax's manager.

    Args:
      directory: the run.
      config: the settings.
      planner: decides on those that are `auto`, once it sees a state.
      policy: what decides on saving, preemption included.
      schedule: the part of it that is told when saves begin and what they cost.
      retention: what stays.
      deleter: removes the rest.
      attempt: remembers what saves cost.
      gate: admits saves to the storage, and makes their commits durable.
      item: what the state is saved as within a step.
    """
    self.records: list[SaveRecord] = []
    self._directory = directory
    self._config = planner.unplanned
    self._planner = planner
    self._retention = retention
    self._deleter = deleter
    self._gate = gate
    outlook = Outlook(directory, retention, schedule, config.schedule)
    self._notes = CommitNotes(directory, schedule, attempt, outlook)
    self._item = item
    self._write: Write | None = None
    self._errand: Errand | None = None
    self._beginning: SaveRecord | None = None  # of a save that has not returned
    self._hung = 0  # writes that were left to themselves
    self._norms = history()
    self._meant = Meant(directory, item, count_nonfinite)
    self._rendezvous = Rendezvous(f"save {directory}")
    self._asking = Rendezvous(f"steps of {directory}")
    reports = Reports(
      self._on_committing, self._on_commit, self._on_end, lambda: functools.partial(self._meet, self._hung)
    )
    self._managers = Managers(directory, policy, schedule, retention, deleter, gate, reports)
    gate.opened()
    with quietly():
      self._manager: ToldManager | None = self._opened(pytree_handler(self._config))

  @property
  def manager(self) -> ToldManager:
    """Orbax's manager; replaced when a save needs another handler, or hangs."""
    if self._manager is None:
      self._gate.probe()
      with quietly():
        self._manager = self._opened(pytree_handler(self._config))
    return self._manager

  @keeping()
  def save(
    self,
    step: int,
    state: PyTree,
    metrics: Mapping[str, Any] | None,
    extras: Any,
    started: float,
    committed: Callable[[], None] = lambda: None,
  ) -> None:
    """Starts a save and returns once the arrays may be overwritten; see `Checkpointer.save`.

    Args:
      step, state, metrics, extras: what to save.
      started: `time.perf_counter()` when training began to wait.
      committed: called on process 0 once the step is committed.
    """
    numbers, encoded, notes, computing_s = _encoded(state, metrics)
    started += computing_s
    planned = self._planner.for_save(state)
    record = SaveRecord(step, global_nbytes(state))
    metadata = run_metadata(planned, state, record.nbytes) | {
      "metrics": numbers,
      "extras": checked_json(extras, "extras"),
      "encoded": notes,
    }
    waited = time.perf_counter()
    self.wait()
    record.waited_s = time.perf_counter() - waited

    where = f"{self._directory}: step {step}"
    recording = record_of(step, state, record.nbytes, planned.health.nonfinite, where, self._judge)
    metadata |= {"fingerprints": 1, "health": recording.health_told, "item": self._item}
    in_chunks = chunk_nbytes(self._directory, state, self._config.limits.host_memory)
    self._beginning = record
    told = functools.partial(self._notes.committed, committed)
    self._do(functools.partial(self._begin, planned, encoded, recording, metadata, record, told, in_chunks, started))

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
      SaveFailedError: if it failed; told once.
    """
    self._finish()
    while (write := self._write) is not None:
      if not wait_for(write.ended, write.left):
        raise self._hangs(write)
      if self._write is not write:
        continue  # a signal handler has saved, or waited, meanwhile
      if write.durable and write.error is None:
        self._write = None
      else:
        self._do(functools.partial(self._settle, write))

  def raise_background_error(self) -> None:
    """Raises what a background save has died of, without waiting for one that still runs; told once.

    In a job of many the processes learn of a failure at different steps. There the next call that all make alike tells
    (a save that is due, `wait`, `close`), so that all raise at the same one, and a trainer may go on.
    """
    self._finish()
    write = self._write
    if write is None or jax.process_count() > 1:
      return
    if write.ended.is_set() or not write.left:
      self.wait()

  def reload(self) -> None:
    """Has Orbax's manager look again at which steps there are, after some were moved. All processes call it alike."""
    self.manager.reload()

  def steps_in_storage(self) -> list[int]:
    """The committed steps as process 0 finds them now, once the last save has ended. All processes call it alike.

    Orbax's manager forgets the others: somebody has removed them by hand.
    """
    self.wait()

    def look() -> list[int]:
      with storage_errors(f"{self._directory}: its steps cannot be listed"):
        return committed_steps(self._directory)

    there = decided_by_process_zero(look, self._asking, self._config.timeouts.save_s)
    forget_steps(self.manager, set(self.manager.all_steps()) - set(there))
    return there

  def close(self) -> None:
    """Releases Orbax's threads and the claim to the run; call `wait` first."""
    if self._manager is not None:
      with contextlib.suppress(Exception), quietly():  # its background failure was raised by wait()
        self._manager.close()
    self._gate.close()

  # -- inside

  def _judge(self, health: Health) -> Health:
    """What of a state's non-finite numbers is meant to be there. All processes call it alike."""
    timeout = self._config.timeouts.save_s
    return self._meant.judge(health, lambda decide: decided_by_process_zero(decide, self._asking, timeout))

  def _do(self, work: Callable[[], None]) -> None:
    """Runs `work` to its end, even if the caller is interrupted; then the next call of `_finish` raises what it did."""
    with quietly():
      self._errand = Errand(work)
    self._errand.start()
    self._finish()

  def _finish(self) -> None:
    while (errand := self._errand) is not None:
      errand.wait()
      if self._errand is errand:  # else a signal handler has asked, and was answered
        self._errand = self._beginning = None
        errand.outcome()

  @transfers_asked_for()
  def _begin(
    self,
    planned: Config,
    encoded: PyTree,
    recording: Recording,
    metadata: dict[str, Any],
    record: SaveRecord,
    told: Callable[[SaveRecord], None],
    in_chunks: int | None,
    started: float,
  ) -> None:
    """From the first file to the return of `save`."""
    step = record.step
    if planned != self._config:
      self._config = planned
      self._replace_manager(pytree_handler(planned))
    made_room = self._gate.admit(step, record.nbytes, metadata["leaves"], compressed=planned.layout.compression == "on")
    forget_steps(self.manager, made_room)
    operation = Operation(self._rendezvous.begin())
    write = self._write = Write(record, operation, self._config.timeouts.save_s + _GRACE_S, told)
    try:
      if in_chunks is not None:
        self._replace_manager(pytree_handler(self._config, chunk_nbytes=in_chunks))
      self._retention.note(step, record.nbytes, recording.health_told.get("healthy"), metadata["metrics"])
      self._notes.begun(step)
      with operation.begun():
        self.manager.save(
          step,
          args=as_item(
            self._item,
            RecordedSave(
              ocp.args.PyTreeSave(encoded, ocdbt_target_data_file_size=target_file_size(self._config)), recording
            ),
          ),
          metrics=metadata["metrics"],
          custom_metadata={OURS: sealed(metadata)},
          force=True,
        )
      if in_chunks is not None:
        # Before the clock is read: training waits for all of it.
        self.manager.wait_until_finished()
        self._replace_manager(pytree_handler(self._config))
    except Exception as e:
      self._settle(write, e)
    write.returned(started)
    self.records.append(record)

  def _opened(self, handler: PyTreeHandler, known: Sequence[int] | None = None) -> ToldManager:
    handlers = as_item(self._item, RecordingHandler(handler, self._norms, self._meant))
    return self._managers.open(handlers, self._config, known)

  def _replace_manager(self, handler: PyTreeHandler) -> None:
    known = self.manager.all_steps()
    self.manager.close()
    self._manager = None
    self._manager = self._opened(handler, known)

  # -- what Orbax's threads report

  def _meet(self, hung: int, *, key: str, timeout_ms: int) -> None:
    """Orbax's barrier_sync_fn. A process whose write failed comes here too, on its way out, and is not waited for."""
    if hung != self._hung:
      raise SaveFailedError("this write hung and was given up; it may not meet the processes of a later one")
    error = sys.exc_info()[1]
    if error is None:
      self._rendezvous.wait(key, timeout_ms / 1000)
      if "async_commit_complete" in key and self._write is not None:  # where process 0 comes once storage has the step
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
    if error is not None and jax.process_count() == 1:
      write.operation.end(write.left)
    write.ended.set()

  # -- failures

  def _hangs(self, write: Write) -> SaveFailedError:
    """Leaves a write that does not end to itself: the next save goes through a new manager."""
    step = write.record.step
    uncommitted = write.give_up()
    if self._manager is not None:
      leave_behind(self._manager, write.operation.threads)
    self._manager = None
    self._hung += 1
    self._gate.failed(step, hangs=True)
    self._write = None
    return left_hanging(self._directory, step, self._config.timeouts.save_s, uncommitted=uncommitted)

  def _settle(self, write: Write, error: BaseException | None = None) -> None:
    """Cleans up after a write that did not end as it should. Returns if its step is committed all the same.

    Args:
      write: it has ended, unless there is an `error`.
      error: what was raised before Orbax's last thread was there, or when it was.

    Raises:
      SaveFailedError, UnhealthyStateError: the step is not committed.
    """
    error = error or write.error or SaveFailedError("its background write ended without a commit and without an error")
    single = jax.process_count() == 1
    # In a job of many, processes learn of one that hangs in different ways, and all must keep their manager or none.
    if single and not (self._ends(write) and (write.durable or not is_timeout(error))):
      raise self._hangs(write) from error
    step = write.record.step
    committed = self._is_committed(write)
    if self._manager is not None:
      forget_failure(self._manager)
    if not committed:
      self._gate.failed(step, hangs=False)
    with contextlib.suppress(Exception):  # what is on disk is the truth
      self.manager.reload()
      forget_steps(self.manager, self._deleter.pending)
    self._write = None
    if not (committed and single):
      raise not_saved(self._directory, step, error, committed=committed) from error
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


def _encoded(
  state: PyTree, metrics: Mapping[str, Any] | None
) -> tuple[dict[str, Any], PyTree, dict[str, dict[str, Any]], float]:
  """Metrics as numbers, the state as Orbax is given it, notes on that, and the seconds until it was computed."""
  try:
    computing = time.perf_counter()
    jax.block_until_ready((state, metrics))
    computed = time.perf_counter()
    return plain_metrics(metrics), *encode(state), computed - computing
  except CheckpointError:
    raise
  except Exception:
    refuse_unusable(state)
    plain_metrics(metrics)
    raise
