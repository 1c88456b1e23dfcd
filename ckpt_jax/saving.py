"""One save at a time over Orbax's manager: from the state that training holds to a commit or one clear exception."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import logging
import math
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import SaveDecisionPolicy

from ckpt_jax import orbax_private, run
from ckpt_jax.config import Config
from ckpt_jax.errors import CheckpointError, SaveFailedError, SaveOutOfSpaceError, UnhealthyStateError
from ckpt_jax.failures import is_out_of_space, is_timeout, root_cause, storage_errors
from ckpt_jax.integrity.filling import Outlook
from ckpt_jax.integrity.gate import Gate
from ckpt_jax.integrity.record import (
  RecordedSave,
  RecordingHandler,
  history,
  is_unhealthy,
  record_of,
)
from ckpt_jax.layout.encoding import encode
from ckpt_jax.layout.handler import PyTreeHandler, pytree_handler, target_file_size
from ckpt_jax.layout.keeping import keeping
from ckpt_jax.layout.sharding import global_nbytes, largest_shard_nbytes, local_nbytes
from ckpt_jax.metadata import checked_json, plain_metrics, run_metadata
from ckpt_jax.policies.agree import decided_by_process_zero, from_process_zero
from ckpt_jax.policies.attempts import AttemptLog
from ckpt_jax.policies.deletion import StepDeleter
from ckpt_jax.policies.live import LiveRetention
from ckpt_jax.policies.schedule import Schedule
from ckpt_jax.rendezvous import PeerFailedError, Rendezvous
from ckpt_jax.seal import sealed
from ckpt_jax.tuning.planner import Planner
from ckpt_jax.tuning.profile import available_memory
from ckpt_jax.units import size_text

_log = logging.getLogger(__name__)
PyTree = Any
# Room for what Orbax and TensorStore need beside the copy itself when the host's memory is checked.
_COPY_HEADROOM = 1.1
_LONG_AGO = datetime.datetime.min.replace(tzinfo=datetime.timezone.utc)
# What Orbax may take beyond timeouts.save to tell by itself that a write has timed out.
_GRACE_S = 5.0
orbax_private.never_wait_for_hanging_threads()


@dataclasses.dataclass
class SaveRecord:
  """What one save cost.

  Attributes:
    step: the step saved.
    nbytes: bytes of the whole state.
    blocking_s: seconds that `save` kept the training loop, without those that it waited for the state to be computed:
      jax dispatches steps ahead of the device, and whoever reads the state first waits for it.
    waited_s: the part of `blocking_s` spent on waiting for the previous save's background write.
    background_s: seconds from the return of `save` to the commit; None while it runs, and for a save that failed.
  """

  step: int
  nbytes: int
  blocking_s: float = 0.0
  waited_s: float = 0.0
  background_s: float | None = None


class Saver:
  """The save pipeline of one run.

  A save goes through `save` (what training waits for), Orbax's background write, and `_on_commit`. What fails on the
  way is raised once, by the next call of `raise_background_error`, `save` or `wait`.

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
    """
    self.records: list[SaveRecord] = []
    self._directory = directory
    self._config = planner.unplanned
    self._planner = planner
    self._policy = policy
    self._schedule = schedule
    self._retention = retention
    self._deleter = deleter
    self._attempt = attempt
    self._gate = gate
    self._outlook = Outlook(directory, retention, schedule, config.schedule)
    self._writing: SaveRecord | None = None
    self._returned_at: float | None = None
    self._committed: Callable[[], None] = lambda: None
    self._deadline = 0.0
    self._hung = 0  # writes that were left to themselves
    self._record_lock = threading.Lock()
    self._norms = history()
    self._known: Sequence[int] | None = None  # what the manager knew that is being replaced
    self._rendezvous = Rendezvous(f"save {directory}")
    self._asking = Rendezvous(f"steps of {directory}")
    gate.opened()
    self._manager: orbax_private.ToldManager | None = self._open_manager(pytree_handler(self._config))

  @property
  def manager(self) -> orbax_private.ToldManager:
    """Orbax's manager; replaced when a save needs another handler, or hangs."""
    if self._manager is None:
      self._gate.probe()
      self._manager = self._open_manager(pytree_handler(self._config))
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
    computing = time.perf_counter()
    jax.block_until_ready((state, metrics))
    started += time.perf_counter() - computing
    planned = self._planner.for_save(state)
    numbers = plain_metrics(metrics)
    encoded, notes = encode(state)
    record = SaveRecord(step, global_nbytes(state))
    metadata = run_metadata(planned, state, record.nbytes) | {
      "metrics": numbers,
      "extras": checked_json(extras, "extras"),
      "encoded": notes,
    }
    waited = time.perf_counter()
    self.wait()
    record.waited_s = time.perf_counter() - waited

    if planned != self._config:
      self._config = planned
      self._replace_manager(pytree_handler(planned))
    made_room = self._gate.admit(step, record.nbytes, metadata["leaves"], compressed=planned.layout.compression == "on")
    orbax_private.forget_steps(self.manager, made_room)
    recording = record_of(step, state, record.nbytes, self._config.health.nonfinite, f"{self._directory}: step {step}")
    metadata |= {"fingerprints": 1, "health": recording.health_told}
    chunk_nbytes = self._chunk_nbytes(state)
    self._deadline = time.monotonic() + self._config.timeouts.save_s + _GRACE_S
    with self._record_lock:
      self._writing, self._returned_at, self._committed = record, None, committed
    try:
      if chunk_nbytes is not None:
        self._replace_manager(pytree_handler(self._config, chunk_nbytes=chunk_nbytes))
      self._retention.note(step, record.nbytes, recording.health_told.get("healthy"), numbers)
      self._told_schedule("begun", step)
      self._rendezvous.begin()
      self.manager.save(
        step,
        args=RecordedSave(
          ocp.args.PyTreeSave(encoded, ocdbt_target_data_file_size=target_file_size(self._config)), recording
        ),
        metrics=numbers,
        custom_metadata={run.OURS: sealed(metadata)},
        force=True,
      )
      if chunk_nbytes is not None:
        # Before the clock is read: training waits for all of it.
        self.manager.wait_until_finished()
        self._replace_manager(pytree_handler(self._config))
      with self._record_lock:
        self._returned_at = time.perf_counter()
        record.blocking_s = self._returned_at - started
        early = record.background_s is not None  # committed before save returned
        if early:
          record.background_s = 0.0
      if early:
        self._note_commit(record)
      self.records.append(record)
    except Exception as e:
      raise self._save_failed(e) from e

  @property
  def writing(self) -> bool:
    """Whether a save has begun and not committed yet."""
    record = self._writing
    return record is not None and record.background_s is None

  @property
  def step_being_written(self) -> int | None:
    """The step whose save has begun and not committed yet."""
    record = self._writing
    return record.step if record is not None and record.background_s is None else None

  def wait(self) -> None:
    """Waits until the last save is committed.

    Raises:
      SaveFailedError: if it failed; told once.
    """
    if self._manager is None:
      return
    try:
      if not orbax_private.join_save(self._manager, max(0.0, self._deadline - time.monotonic())):
        raise self._hangs()
      self._manager.wait_until_finished()
    except SaveFailedError:
      raise
    except Exception as e:
      if self._writing is None:
        return  # told already: Orbax raises once a thread, this package once in all
      raise self._save_failed(e) from e
    with self._record_lock:
      self._writing = None

  def raise_background_error(self) -> None:
    """Raises what a background save has died of, without waiting for one that still runs; told once.

    In a job of many the processes learn of a failure at different steps. There the next call that all make alike tells
    (a save that is due, `wait`, `close`), so that all raise at the same one, and a trainer may go on.
    """
    if jax.process_count() > 1 or self._manager is None or self._writing is None:
      return
    error = orbax_private.background_error(self._manager)
    if error is not None:
      raise self._save_failed(error) from error
    if time.monotonic() > self._deadline and not orbax_private.join_save(self._manager, 0):
      raise self._hangs()

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
        return run.committed_steps(self._directory)

    there = decided_by_process_zero(look, self._asking, self._config.timeouts.save_s)
    orbax_private.forget_steps(self.manager, set(self.manager.all_steps()) - set(there))
    return there

  def close(self) -> None:
    """Releases Orbax's threads and the claim to the run; call `wait` first."""
    if self._manager is not None:
      with contextlib.suppress(Exception):  # its background failure was raised by wait()
        self._manager.close()
    self._gate.close()

  # -- inside

  def _open_manager(self, handler: PyTreeHandler) -> orbax_private.ToldManager:
    best = self._config.retention.best
    with self._deleter.paused():
      self._deleter.resume()
      manager = orbax_private.ToldManager(
        self._directory,
        self._steps_there,
        item_handlers=RecordingHandler(handler, self._norms),
        options=ocp.CheckpointManagerOptions(
          save_decision_policy=self._policy,
          preservation_policy=self._retention,
          # Orbax writes metrics, and reads them back for the policies, only if it has a function that ranks by them.
          best_fn=lambda m: m.get(best.metric, float("nan")) if best else float("nan"),
          temporary_path_class=self._gate.path_class(self._on_commit),
          step_name_format=self._gate.step_names(),
          async_options=ocp.options.AsyncOptions(
            timeout_secs=math.ceil(self._config.timeouts.save_s),
            barrier_sync_fn=self._gate.barrier(functools.partial(self._meet, self._hung)),
          ),
        ),
      )
      orbax_private.use_deleter(manager, self._deleter)
      orbax_private.forget_steps(manager, from_process_zero(sorted(self._deleter.pending)))
    self._retention.read_ahead(manager.all_steps())
    return manager

  def _replace_manager(self, handler: PyTreeHandler) -> None:
    self._known = self.manager.all_steps()
    self.manager.close()
    self._manager = self._open_manager(handler)

  def _steps_there(self) -> list[tuple[int, datetime.datetime]]:
    """For a manager that opens or reloads."""
    steps, self._known = self._known, None
    if steps is None:
      steps = run.committed_steps(self._directory)
    if isinstance(self._schedule, Schedule) and not self._schedule.needs_times:
      return [(step, _LONG_AGO) for step in steps]
    return [(step, self._commit_time(step)) for step in steps]

  def _commit_time(self, step: int) -> datetime.datetime:
    try:
      return run.step_info(self._directory, step).time or _LONG_AGO
    except CheckpointError:  # damaged: that is told by whoever wants to restore it
      return _LONG_AGO

  def _meet(self, hung: int, *, key: str, timeout_ms: int) -> None:
    """Orbax's barrier_sync_fn. A process whose write failed comes here too, on its way out, and is not waited for."""
    if hung != self._hung:
      raise SaveFailedError("this write hung and was given up; it may not meet the processes of a later one")
    error = sys.exc_info()[1]
    if error is None:
      self._rendezvous.wait(key, timeout_ms / 1000)
    elif not isinstance(error, PeerFailedError):
      self._rendezvous.fail(root_cause(error))

  def _on_commit(self) -> None:
    with self._record_lock:
      if self._writing is not None:
        since = self._returned_at
        self._writing.background_s = 0.0 if since is None else time.perf_counter() - since
        record = self._writing if since is not None else None  # else `save` notes it, when its blocking time is known
      else:
        record = None
    if record is not None:
      self._note_commit(record)

  def _note_commit(self, record: SaveRecord) -> None:
    assert record.background_s is not None
    self._committed()
    # What a save waited for its predecessor is not its own cost.
    blocking = record.blocking_s - record.waited_s
    self._told_schedule("finished", blocking, record.background_s)
    self._attempt.committed(record.step, record.nbytes, blocking, record.background_s)
    self._outlook.committed(record.step, record.nbytes)

  def _told_schedule(self, event: str, *arguments: Any) -> None:
    # Orbax's own policies can be given too; they do not listen.
    listener = getattr(self._schedule, event, None)
    if listener is not None:
      listener(*arguments)

  def _hangs(self) -> SaveFailedError:
    """Leaves a write that does not end to itself: the next save goes through a new manager."""
    with self._record_lock:
      record, self._writing = self._writing, None
    step = record.step if record else None
    assert self._manager is not None
    orbax_private.leave_behind(self._manager)
    self._manager = None
    self._hung += 1
    self._gate.failed(step, hangs=True)
    return SaveFailedError(
      f"{self._directory}: step {step} was not saved: its background write did not end within "
      f"{self._config.timeouts.save_s:.0f} s (timeouts.save) and still hangs; the storage does not answer. Earlier "
      "steps are untouched, and this step will not be committed any more",
      step,
    )

  def _save_failed(self, error: BaseException) -> CheckpointError:
    """Forgets the failed step and says so; the caller raises what is returned."""
    # In a job of many, processes learn of one that hangs in different ways, and all must keep their manager or none.
    if jax.process_count() == 1 and is_timeout(error):
      return self._hangs()
    with self._record_lock:
      record, self._writing = self._writing, None
    step = record.step if record else None
    # The manager has dropped the failed step, or will when asked to wait; what is on disk is the truth.
    with contextlib.suppress(Exception):
      self.manager.wait_until_finished()
    if jax.process_count() == 1:
      orbax_private.cancel_waiting_writes()
    self._gate.failed(step, hangs=False)
    with contextlib.suppress(Exception):
      self.manager.reload()
      orbax_private.forget_steps(self.manager, self._deleter.pending)
    unhealthy = is_unhealthy(error)
    if unhealthy is not None:
      return UnhealthyStateError(str(unhealthy))
    cause = root_cause(error)
    steps = run.committed_steps(self._directory)
    newest = steps[-1] if steps else None
    kept = f"the newest committed step is {newest}" if newest is not None else "no step is committed"
    message = f"{self._directory}: step {step} was not saved: {cause}; {kept}"
    if is_out_of_space(error):
      hint = "The storage is full: free space, or keep fewer steps (retention)"
      return SaveOutOfSpaceError(f"{message}. {hint}", step)
    return SaveFailedError(message, step)

  def _chunk_nbytes(self, state: PyTree) -> int | None:
    """None if a copy of this process's shards fits into host memory; else how much of it to hold at a time."""
    limit = self._config.limits.host_memory
    free = available_memory()
    free = free if limit == "auto" else min(free, limit)
    needed = int(local_nbytes(state) * _COPY_HEADROOM)
    if _all_processes(needed <= free):
      return None
    chunk = max(int(largest_shard_nbytes(state) * _COPY_HEADROOM), min(10**9, free // 4))
    _log.log(
      logging.WARNING if needed > free else logging.INFO,  # another process's shortage is its own to warn of
      "%s: a copy of this process's shards needs %s of host memory and %s are free: saving in chunks, and "
      "training waits until they are written. More memory, or more processes, bring asynchronous saving back.",
      self._directory,
      size_text(needed),
      size_text(free),
    )
    return chunk


def _all_processes(answer: bool) -> bool:
  """True only if every process says so: all must take the same road through a save."""
  if jax.process_count() == 1:
    return answer
  return bool(np.all(multihost_utils.process_allgather(np.array(answer))))
