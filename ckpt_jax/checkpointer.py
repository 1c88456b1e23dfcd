"""Checkpointer: the one object a trainer holds. Wires the rooms to Orbax's CheckpointManager and AsyncCheckpointer."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import SaveDecisionPolicy

from ckpt_jax import orbax_private, run
from ckpt_jax.config import BestConfig, Config, load_config
from ckpt_jax.errors import (
  CheckpointError,
  ConfigError,
  NoCheckpointError,
  SaveFailedError,
  SaveOutOfSpaceError,
)
from ckpt_jax.failures import is_out_of_space, root_cause, storage_errors
from ckpt_jax.layout.encoding import encode
from ckpt_jax.layout.handler import pytree_handler, target_file_size
from ckpt_jax.layout.sharding import abstract_state, global_nbytes, largest_shard_nbytes, local_nbytes
from ckpt_jax.metadata import checked_json, plain_metrics, run_metadata
from ckpt_jax.policies import pins
from ckpt_jax.policies.agree import from_process_zero
from ckpt_jax.policies.attempts import CLOSED, PREEMPTED, AttemptLog
from ckpt_jax.policies.deletion import StepDeleter
from ckpt_jax.policies.live import LiveRetention
from ckpt_jax.policies.retention import Retention, best_steps
from ckpt_jax.policies.schedule import AnyOf, OnPreemption
from ckpt_jax.policies.wiring import make_schedule
from ckpt_jax.preemption import PreemptionNotice
from ckpt_jax.restore.read import read_as_saved, read_like
from ckpt_jax.storage.kinds import StorageKind, check_suitable
from ckpt_jax.storage.kvstore import connect
from ckpt_jax.storage.objects import snapshot
from ckpt_jax.tuning.profile import available_memory

_log = logging.getLogger(__name__)
PyTree = Any
# Room for what Orbax and TensorStore need beside the copy itself when the host's memory is checked.
_COPY_HEADROOM = 1.1


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


@dataclasses.dataclass(frozen=True)
class RestoreReport:
  """How a state was restored: `strategy`, `seconds`, `nbytes` of the whole state, and the step's `directory`."""

  strategy: str
  seconds: float
  nbytes: int
  directory: str


@dataclasses.dataclass(frozen=True)
class Restored:
  """A state and where training goes on.

  Attributes:
    state: the state; the types of `like`, or nested dicts, lists and tuples of numpy arrays without one.
    step: the step it was saved at; None if it was initialised afresh.
    next_step: the first step still to be trained: `step + 1`, or 0.
    metrics, extras: what was given to `save`.
    report: how it was read; None if it was initialised afresh.
  """

  state: PyTree
  step: int | None
  next_step: int
  metrics: dict[str, Any]
  extras: Any
  report: RestoreReport | None


class Checkpointer:
  """Saves and restores the training state of one run. Made and called alike by all processes of the job.

  Example:
    with Checkpointer("~/runs/a", Config(schedule={"every_steps": 500})) as c:
      restored = c.restore_or_init(init_fn)
      state = restored.state
      for step in range(restored.next_step, n):
        state, metrics = train_step(state, batch)
        c.save(step, state, metrics=metrics, extras={"data": iterator_state})

  Attributes:
    directory: the run's absolute path.
    config: the settings in force.
    storage: what kind of storage the run lies on.
    saves: a SaveRecord for each save of this object, oldest first.
    schedule: what decides when to save, but for preemption; `schedule.explain()` says why.

  Raises:
    ConfigError: if `config` is wrong.
    StorageError: if `directory` cannot be created or reached, or if it is on a disk that the job's other hosts do not
      see.
  """

  def __init__(
    self,
    directory: str | os.PathLike[str],
    config: Config | Mapping[str, Any] | str | os.PathLike[str] | None = None,
    *,
    schedule: SaveDecisionPolicy | None = None,
  ):
    """Opens a run, which need not exist.

    Args:
      directory: the run.
      config: settings, or a YAML file with them.
      schedule: in place of the configuration's, for those that a file cannot say, e.g. `policies.AtSteps`. All
        processes must give the same.
    """
    if config is None:
      config = Config()
    elif isinstance(config, Mapping):
      config = Config(**config)
    elif not isinstance(config, Config):
      config = load_config(config)
    self.config: Config = config
    for line in config.unimplemented():
      _log.warning("config: %s", line)
    connect(directory, config.storage)
    self.directory: epath.Path = run.run_directory(directory)
    self.storage: StorageKind = check_suitable(self.directory, config.storage.kind, jax.process_count())
    self.saves: list[SaveRecord] = []
    self._writing: SaveRecord | None = None
    self._returned_at: float | None = None
    self._record_lock = threading.Lock()
    self._closed = False
    self._retention = LiveRetention(Retention.from_config(config.retention), self.directory)
    self._deleter = StepDeleter(self.directory, active=jax.process_index() == 0, timeout=config.timeouts.delete)
    self._attempt = AttemptLog(self.directory, active=jax.process_index() == 0)
    with storage_errors(f"{self.directory}: cannot open the run"), snapshot(self.directory):
      self.schedule: SaveDecisionPolicy = schedule or make_schedule(config.schedule, self.directory)
      self._manager = self._open_manager(pytree_handler(config))
    self._notice = PreemptionNotice() if config.preemption.enabled else None
    finish = weakref.WeakMethod(self._finish_at_exit)
    orbax_private.before_executors_shut_down(lambda: (m := finish()) and m())

  def __enter__(self) -> Checkpointer:
    return self

  def __exit__(self, exc_type: Any, exc: BaseException | None, tb: Any) -> None:
    if exc is None or isinstance(exc, SystemExit):
      self.close()
      return
    try:
      self.close()
    except CheckpointError as e:  # the first exception is the one to show
      _log.error("while another error was on its way: %s", e)

  # -- saving

  def save(
    self,
    step: int,
    state: PyTree,
    *,
    metrics: Mapping[str, Any] | None = None,
    extras: Any = None,
    force: bool = False,
  ) -> bool:
    """Saves `state` if the schedule says so. Returns once the arrays may be overwritten or donated.

    State, metrics, extras and run metadata become visible together, when the background write commits. After a
    preemption notice it saves whatever the schedule says, waits for the commit and raises SystemExit.

    Args:
      step: not negative; a step number can be saved once.
      state: any pytree of arrays, typed PRNG keys, numbers, strings and None.
      metrics: `{name: number}`.
      extras: anything JSON can hold, e.g. the data iterator's state. Tuples come back as lists.
      force: save now, whatever the schedule says.

    Returns:
      Whether a save was started.

    Raises:
      SaveFailedError: if this save, or an earlier one in the background, failed; told once. It is an OutOfSpaceError
        too when the storage was full.
      CheckpointError: if an argument cannot be saved; nothing was written.
    """
    started = time.perf_counter()
    self._check_open()
    self._raise_background_error()
    step = int(step)
    if step < 0:
      raise CheckpointError(f"step {step}: must not be negative")
    if not force and not self._manager.should_save(step):
      return False
    preempted = self._preempted(step)
    if force and step in self._manager.all_steps():
      raise CheckpointError(f"{self.directory}: step {step} is saved already; steps are never overwritten")
    computing = time.perf_counter()
    jax.block_until_ready((state, metrics))
    started += time.perf_counter() - computing
    numbers = plain_metrics(metrics)
    encoded, notes = encode(state)
    record = SaveRecord(step, global_nbytes(state))
    metadata = run_metadata(self.config, state, record.nbytes) | {
      "metrics": numbers,
      "extras": checked_json(extras, "extras"),
      "encoded": notes,
    }
    waited = time.perf_counter()
    self.wait()
    record.waited_s = time.perf_counter() - waited

    chunk_nbytes = self._chunk_nbytes(state)
    with self._record_lock:
      self._writing, self._returned_at = record, None
    try:
      if chunk_nbytes is not None:
        self._replace_manager(pytree_handler(self.config, chunk_nbytes=chunk_nbytes))
      self._retention.note(step, record.nbytes, (metadata.get("health") or {}).get("healthy"))
      if not self._deleter.wait_for({step}, self.config.timeouts.save):
        raise CheckpointError(f"{self.directory}: an older step {step} is still being deleted (timeouts.save)")
      self._told_schedule("begun", step)
      self._manager.save(
        step,
        args=ocp.args.PyTreeSave(encoded, ocdbt_target_data_file_size=target_file_size(self.config)),
        metrics=numbers,
        custom_metadata={run.OURS: metadata},
        force=True,
      )
      with self._record_lock:
        self._returned_at = time.perf_counter()
        record.blocking_s = self._returned_at - started
        early = record.background_s is not None  # committed before save returned
        if early:
          record.background_s = 0.0
      if early:
        self._note_commit(record)
      self.saves.append(record)
      if chunk_nbytes is not None:
        self._manager.wait_until_finished()
        self._replace_manager(pytree_handler(self.config))
    except Exception as e:
      raise self._save_failed(e) from e
    if preempted:
      self._exit_preempted(step)
    return True

  def wait(self) -> None:
    """Waits until the last save is committed.

    Raises:
      SaveFailedError: if it failed; told once.
    """
    if self._closed:
      return
    try:
      self._manager.wait_until_finished()
    except Exception as e:
      if self._writing is None:
        return  # told already: Orbax raises once a thread, this package once in all
      raise self._save_failed(e) from e
    with self._record_lock:
      self._writing = None

  def close(self) -> None:
    """Waits for the last save, and releases threads and signal handler. May be called twice.

    Raises:
      SaveFailedError: if the last save failed; told once.
    """
    if self._closed:
      return
    try:
      self.wait()
    finally:
      self._closed = True
      if self._notice is not None:
        self._notice.close()
      with contextlib.suppress(Exception):  # its background failure was raised by wait() above
        self._manager.close()
      self._deleter.finish()
      self._attempt.ended(CLOSED)

  # -- what there is

  def steps(self) -> list[run.StepInfo]:
    """All committed steps, oldest first. A step that is still being written, or whose write failed, is not there."""
    return run.list_steps(self.directory)

  def latest_step(self) -> int | None:
    """The newest committed step, or None."""
    steps = run.committed_steps(self.directory)
    return steps[-1] if steps else None

  def best_step(self) -> int | None:
    """The committed step with the best metric by `retention.best`, or None if no step has that metric.

    Raises:
      ConfigError: if `retention.best` is not set.
    """
    best = self.config.retention.best
    if best is None:
      raise ConfigError("best_step() needs a metric: set retention.best, e.g. {metric: loss, mode: min}")
    found = best_steps(self.steps(), BestConfig(metric=best.metric, mode=best.mode))
    return found[0] if found else None

  def pin(self, step: int) -> None:
    """Keeps a committed step whatever the retention rules say, in this job and all later ones, until `unpin`.

    Raises:
      NoCheckpointError: if there is no such step.
    """
    if jax.process_index() == 0:
      pins.pin(self.directory, step)

  def unpin(self, step: int) -> None:
    """Gives a step back to the retention rules, which are applied at the next save."""
    if jax.process_index() == 0:
      pins.unpin(self.directory, step)

  # -- restoring

  def restore_or_init(self, init_fn: Callable[[], PyTree]) -> Restored:
    """The newest committed state, in the shapes and shardings of `init_fn()`; or `init_fn()` in an empty run.

    `init_fn` takes no arguments. It is run only if nothing was ever committed, or if its shardings cannot be known
    without running it (see `layout.sharding.abstract_state`). It starts afresh only where there is no step: one that
    cannot be read is an error.
    """
    self._check_open()
    self.wait()
    if self._agreed_step(None, required=False) is None:
      return Restored(init_fn(), None, 0, {}, None, None)
    return self.restore(like=abstract_state(init_fn))

  def restore(self, step: int | None = None, like: PyTree | None = None, strategy: str | None = None) -> Restored:
    """Reads a committed step.

    Args:
      step: default: the newest.
      like: a tree with the structure of the saved one, whose leaves (arrays, `jax.ShapeDtypeStruct`s, scalars) say
        type, shape, dtype and sharding. Without it: nested dicts, lists and tuples of numpy arrays in host memory.
      strategy: `direct`: each process reads what its devices need.

    Raises:
      NoCheckpointError: if there is no such step.
      StructureMismatchError: listing every difference between `like` and the step; nothing was read.
      CorruptCheckpointError: if the step cannot be read.
    """
    self._check_open()
    self.wait()
    strategy = strategy or self.config.restore.strategy
    if strategy not in ("auto", "direct"):
      raise ConfigError(f"strategy {strategy!r} is not available in this version; use direct")
    started = time.perf_counter()
    chosen = self._agreed_step(step, required=True)
    assert chosen is not None
    step_dir = run.step_directory(self.directory, chosen)
    self._retention.restoring.add(chosen)
    try:
      with snapshot(step_dir):
        ours = run.our_metadata(step_dir)
        metrics = run.step_info(self.directory, chosen).metrics
        state = read_as_saved(step_dir, self.config) if like is None else read_like(step_dir, like, self.config)
      jax.block_until_ready(state)
    finally:
      self._retention.restoring.discard(chosen)
    nbytes = global_nbytes(state)
    report = RestoreReport("direct", time.perf_counter() - started, nbytes, str(step_dir))
    _log.info("restored step %d of %s in %.2f s", chosen, self.directory, report.seconds)
    return Restored(state, chosen, chosen + 1, metrics, ours.get("extras"), report)

  # -- inside

  def _check_open(self) -> None:
    if self._closed:
      raise CheckpointError(f"{self.directory}: this Checkpointer is closed; make a new one")

  def _open_manager(self, handler: ocp.PyTreeCheckpointHandler) -> ocp.CheckpointManager:
    best = self.config.retention.best
    preempted = OnPreemption(lambda: self._notice is not None and self._notice.received)
    with self._deleter.paused():
      self._deleter.resume()
      manager = ocp.CheckpointManager(
        self.directory,
        item_handlers=handler,
        options=ocp.CheckpointManagerOptions(
          save_decision_policy=AnyOf([preempted, self.schedule]),
          preservation_policy=self._retention,
          # Orbax writes metrics, and reads them back for the policies, only if it has a function that ranks by them.
          best_fn=lambda m: m.get(best.metric, float("nan")) if best else float("nan"),
          async_options=ocp.options.AsyncOptions(
            timeout_secs=int(self.config.timeouts.save), post_finalization_callback=self._on_commit
          ),
        ),
      )
      orbax_private.use_deleter(manager, self._deleter)
      orbax_private.forget_steps(manager, from_process_zero(sorted(self._deleter.pending)))
    return manager

  def _replace_manager(self, handler: ocp.PyTreeCheckpointHandler) -> None:
    self._manager.close()
    self._manager = self._open_manager(handler)

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
    # What a save waited for its predecessor is not its own cost.
    blocking = record.blocking_s - record.waited_s
    self._told_schedule("finished", blocking, record.background_s)
    self._attempt.committed(record.step, record.nbytes, blocking, record.background_s)

  def _told_schedule(self, event: str, *arguments: Any) -> None:
    # Orbax's own policies can be given too; they do not listen.
    listener = getattr(self.schedule, event, None)
    if listener is not None:
      listener(*arguments)

  def _raise_background_error(self) -> None:
    error = orbax_private.background_error(self._manager)
    if error is not None and self._writing is not None:
      raise self._save_failed(error) from error

  def _save_failed(self, error: BaseException) -> CheckpointError:
    """Forgets the failed step and says so; the caller raises what is returned."""
    with self._record_lock:
      record, self._writing = self._writing, None
    step = record.step if record else None
    # The manager has dropped the failed step, or will when asked to wait; what is on disk is the truth.
    with contextlib.suppress(Exception):
      self._manager.wait_until_finished()
    with contextlib.suppress(Exception):
      self._manager.reload()
      orbax_private.forget_steps(self._manager, self._deleter.pending)
    cause = root_cause(error)
    newest = self.latest_step()
    kept = f"the newest committed step is {newest}" if newest is not None else "no step is committed"
    message = f"{self.directory}: step {step} was not saved: {cause}; {kept}"
    if is_out_of_space(error):
      hint = "The storage is full: free space, or keep fewer steps (retention)"
      return SaveOutOfSpaceError(f"{message}. {hint}", step)
    return SaveFailedError(message, step)

  def _chunk_nbytes(self, state: PyTree) -> int | None:
    """None if a copy of this process's shards fits into host memory; else how much of it to hold at a time."""
    limit = self.config.limits.host_memory
    free = available_memory()
    free = free if limit == "auto" else min(free, limit)
    needed = int(local_nbytes(state) * _COPY_HEADROOM)
    chunk = max(int(largest_shard_nbytes(state) * _COPY_HEADROOM), min(10**9, free // 4))
    if _all_processes(needed <= free):
      return None
    _log.log(
      logging.WARNING if needed > free else logging.INFO,  # another process's shortage is its own to warn of
      "%s: a copy of this process's shards needs %s of host memory and %s are free: saving in chunks, and "
      "training waits until they are written. More memory, or more processes, bring asynchronous saving back.",
      self.directory,
      _size(needed),
      _size(free),
    )
    return chunk

  def _preempted(self, step: int) -> bool:
    if self._notice is None:
      return False
    return self._notice.received or self._manager.reached_preemption(step)

  def _exit_preempted(self, step: int) -> None:
    _log.warning("preempted: waiting for step %d to commit, then exiting", step)
    self.close()
    self._attempt.ended(PREEMPTED)
    if self._notice is not None:
      self._notice.run_users_handler()
    _log.warning("preempted: step %d is committed; exiting", step)
    raise SystemExit(self.config.preemption.exit_code)

  def _finish_at_exit(self) -> None:
    if not self._closed:
      try:
        self.close()
      except CheckpointError as e:
        _log.error("at exit: %s", e)

  def _agreed_step(self, step: int | None, *, required: bool) -> int | None:
    """The step to restore. Process 0 looks and tells the others, so that a commit in between cannot split them."""
    found = -1
    if jax.process_index() == 0:
      steps = run.committed_steps(self.directory)
      found = (steps[-1] if steps else -1) if step is None else int(step)
    if jax.process_count() > 1:
      found = int(multihost_utils.broadcast_one_to_all(np.int64(found)))
    if found >= 0:
      return found
    if required:
      raise NoCheckpointError(f"{self.directory}: no committed checkpoint; save one first, or check the path")
    return None


def _size(nbytes: int) -> str:
  return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.2f} MB"


def _all_processes(answer: bool) -> bool:
  """True only if every process says so: all must take the same road through a save."""
  if jax.process_count() == 1:
    return answer
  return bool(np.all(multihost_utils.process_allgather(np.array(answer))))
