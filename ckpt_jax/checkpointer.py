"""Checkpointer: the one object that a trainer holds."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
from etils import epath
from orbax.checkpoint.checkpoint_managers import SaveDecisionPolicy

from ckpt_jax.config import BestConfig, Config
from ckpt_jax.config.arguments import check_schedule, check_type, checked, step_number
from ckpt_jax.config.html import html_table
from ckpt_jax.config.units import one_of, size_text
from ckpt_jax.errors import CheckpointError, ConfigError
from ckpt_jax.job.progress import OnProgress
from ckpt_jax.job.threads import transfers_asked_for
from ckpt_jax.layout.sharding import abstract_state
from ckpt_jax.observe.progress import Bar
from ckpt_jax.observe.sinks import make_sinks
from ckpt_jax.policies.retention import Retention, best_steps
from ckpt_jax.policies.schedule import Schedule
from ckpt_jax.restore.like import Initialise
from ckpt_jax.restore.read import RestoreRequest
from ckpt_jax.restore.restorer import Restorer
from ckpt_jax.restore.result import Restored
from ckpt_jax.restore.strategies import STRATEGIES
from ckpt_jax.run import pins
from ckpt_jax.run.events import Event
from ckpt_jax.run.steps import StepInfo, committed_steps, list_steps, step_directory
from ckpt_jax.save.host_memory import warmup
from ckpt_jax.save.last import LastSave
from ckpt_jax.save.opening import open_run, start
from ckpt_jax.save.session import Session, check_not_forked
from ckpt_jax.save.write import SaveRecord
from ckpt_jax.storage.kinds import StorageKind
from ckpt_jax.tuning.plan import NoPlan, Plan

_log = logging.getLogger(__name__)
PyTree = Any


class Checkpointer:
  """Saves and restores the training state of one run. Made and called alike by all processes of the job.

  Threads may share one; their calls take turns. After a Ctrl-C within `save`, `wait` or `close` the write goes on, and
  the next of these calls waits for it.

  Example:

      with Checkpointer("~/runs/a", Config(schedule={"every_steps": 500}, retention={"last": 3})) as c:
        restored = c.restore_or_init(init_fn)
        state = restored.state
        for step in range(restored.next_step, n):
          state, metrics = train_step(state, batch)
          c.save(step, state, metrics=metrics, extras={"data": iterator_state}, final=step == n - 1)

  Attributes:
    directory: the run's absolute path.
    config: the settings in force.
    storage: the kind of storage that the run is on.
    saves: a SaveRecord for each save of this object, oldest first.
    schedule: decides when to save, apart from preemption; `schedule.explain()` gives its reasons.

  Raises:
    ConfigError: if `config` or `schedule` is wrong.
    NotARunError: if `directory` holds checkpoints but no steps of a run; the message says how to open them.
    StorageError: if `directory` cannot be created or reached, or is on a disk that the job's other hosts do not share.
  """

  @transfers_asked_for()
  def __init__(
    self,
    directory: str | os.PathLike[str],
    config: Config | Mapping[str, Any] | str | os.PathLike[str] | None = None,
    *,
    schedule: SaveDecisionPolicy | None = None,
    on_event: Callable[[Event], None] | None = None,
    on_progress: OnProgress | None = None,
    progress: bool = False,
  ):
    """Opens a run, which need not exist.

    Args:
      directory: the run.
      config: settings, or a YAML file with them.
      schedule: in place of the configuration's, e.g. `policies.AtSteps`, which a file cannot express. The same on all
        processes.
      on_event: called with each record of what happens to the run (`ckpt_jax.observe`), in a thread of its own, on
        process 0: for Weights & Biases, MLflow and the like.
      on_progress: called with a `ckpt_jax.observe.Progress` five times a second while a restore reads, and while
        `save`, `wait` or `close` wait for a write; in a thread of its own, on each process.
      progress: show a bar then, on process 0; as `observe.progress`.
    """
    check_not_forked()
    if schedule is not None:
      check_schedule(schedule)
    for name, called in (("on_event", on_event), ("on_progress", on_progress)):
      check_type(name, called, called is None or callable(called), "a function of one argument")
    self._run = run = open_run(directory, config, schedule)
    self.config = run.config
    self.directory: epath.Path = run.directory
    self.storage: StorageKind = run.storage
    self.schedule: SaveDecisionPolicy = run.schedule
    # On process 0, whose errors are raised on all: a package that is missing, a port that is taken.
    run.meeting.decided(lambda: run.journal.sinks.extend(make_sinks(self.config.observe, run.directory, on_event)))
    run.journal.emit(start())
    self._restoring = threading.RLock()  # reading a step may take minutes, for which a save elsewhere need not wait
    if on_progress is None and (progress or self.config.observe.progress) and jax.process_index() == 0:
      on_progress = Bar()
    self._restorer = Restorer(
      run.directory, self.config, run.planner, run.retention.restoring, run.journal, on_progress
    )
    self._session = Session(run, others=self._restorer)
    self._saver = self._session.saver
    self._saver.on_progress = on_progress
    self._last = LastSave(self._session)
    self.saves: list[SaveRecord] = self._saver.records
    weakref.finalize(self, self._session.abandon).atexit = False  # type: ignore[misc]

  def __repr__(self) -> str:
    return f"Checkpointer({self.directory}: {'; '.join(f'{name} {text}' for name, text in self._described())})"

  def _repr_html_(self) -> str:
    return html_table(("", str(self.directory)), self._described())

  def _described(self) -> list[tuple[str, str]]:
    """What this object knows without asking the storage."""
    retention = Retention.from_config(self.config.retention)
    saves = f"{len(self.saves)} by this object"
    if self.saves:
      last = self.saves[-1]
      waits = "" if self._saver.under_way is None else ", being written"
      saves += f", the last of step {last.step} with {size_text(last.nbytes)}{waits}"
    schedule = self.schedule.explain() if isinstance(self.schedule, Schedule) else repr(self.schedule)
    return [
      ("storage", str(self.storage)),
      ("schedule", schedule),
      ("retention", retention.explain() or "all steps stay"),
      ("saves", saves),
      ("plan", self.plan.summary()),
    ]

  def __enter__(self) -> Checkpointer:
    return self

  def __exit__(self, exc_type: Any, exc: BaseException | None, tb: Any) -> None:
    if exc is None or isinstance(exc, SystemExit):
      self.close()
      return
    record = self._saver.under_way
    interrupted = isinstance(exc, KeyboardInterrupt)
    if record is not None:
      _log.log(
        logging.WARNING if interrupted else logging.INFO,
        "%s: %s; waiting for step %d (%s) to commit%s",
        self.directory,
        type(exc).__name__,
        record.step,
        size_text(record.nbytes),
        ", Ctrl-C again to leave before it has" if interrupted else "",
      )
    try:
      self._close(clean=False)
    except CheckpointError as e:  # the first exception matters more
      _log.error("while another error was on its way: %s", e)
    except KeyboardInterrupt:
      record = self._saver.under_way
      if record is not None:
        _log.error("%s: left before step %d was committed; it may be lost", self.directory, record.step)
      raise

  # -- saving

  @transfers_asked_for()
  def save(
    self,
    step: int,
    state: PyTree,
    *,
    metrics: Mapping[str, Any] | None = None,
    extras: Any = None,
    force: bool = False,
    final: bool = False,
  ) -> bool:
    """Saves `state` if the schedule says so. Returns once the arrays may be overwritten or donated.

    All parts of a step become visible together, when the background write commits. After a preemption notice it saves
    whatever the schedule says, waits for the commit and raises SystemExit. Steps ascend: a save that is due and not
    above the newest committed step is an error, since training that has started over would otherwise never be saved.

    Args:
      step: not negative; each step number can be saved once.
      state: any pytree of arrays, typed PRNG keys, numbers, strings and None: dicts, TrainStates, nnx modules, optax
        and Equinox states, or a single array. A leaf that could not be restored as it is, is refused by name. In a job
        of many, leaves that are not arrays of the whole job (numbers, numpy arrays) must be equal on all processes.
      metrics: `{name: number}`.
      extras: anything JSON can hold, e.g. the data iterator's state. Tuples come back as lists.
      force: save now, whatever the schedule says, also below the newest step. Retention removes neither newer steps
        because of it, nor this one before the next save.
      final: this is the last step of training: save it, whatever the schedule says, unless it is saved already.

    Returns:
      Whether a save was started. False if the schedule did not ask for one, and for the newest step if this object has
      saved or restored it.

    Raises:
      SaveFailedError: if this save, or an earlier one in the background, failed; raised once. Also an OutOfSpaceError
        if the storage was full.
      CheckpointError: if an argument cannot be saved, if the step is saved already, if it is below the newest one and
        not forced, or if a newer Checkpointer of this process saves into this run; the message names the ways out, and
        nothing was written.
    """
    started = time.perf_counter()
    self._session.check_open()
    step = step_number(step)
    with self._session.lock:
      self._session.check_open()
      self._run.check_writable()
      self._session.claim()
      last = self._last.is_asked_for(step)
      if last:
        self._last.clear_the_way(step)
      elif not self._is_wanted(step, state, force=force, final=final):
        return False
      self._session.order.begins(step)  # before the save: an interrupt may end this call, and the save goes on
      self._saver.save(step, state, metrics, extras, started)
      if last:
        self._last.wait(step)
      self._last.saved(step, last=last)
    return True

  def _is_wanted(self, step: int, state: PyTree, *, force: bool, final: bool) -> bool:
    self._session.raise_outcome()
    self._saver.raise_background_error()
    if not (force or final or self._session.order.is_due(step)):
      self._session.order.skipped(step)
      warmup.offer(state, self.config)
      self._saver.look_ahead()
      return False
    return self._session.order.admits(step, force=force)

  @transfers_asked_for()
  def wait(self) -> None:
    """Waits until the last save is committed.

    Raises:
      SaveFailedError: if it failed; raised once.
    """
    self._session.wait()

  def close(self) -> None:
    """Waits for the last save, and releases threads and signal handler. May be called twice.

    Logs a warning if the schedule skipped the last step that was passed to `save`: see its `final`.

    Raises:
      SaveFailedError: if the last save failed; raised once.
      SystemExit: with `preemption.exit_code`, if SIGTERM came and no save has answered it, or will.
    """
    self._close(clean=True)

  @transfers_asked_for()
  def _close(self, *, clean: bool) -> None:
    unanswered = self._session.close(clean=clean)
    if unanswered:
      # Without this object SIGTERM would have ended the process.
      _log.warning("%s: SIGTERM came after the last save; nothing more was saved", self.directory)
      if sys.exc_info()[1] is None:  # else the exception that is on its way ends the process, and is the one to show
        raise SystemExit(self.config.preemption.exit_code)

  # -- steps

  @property
  def plan(self) -> Plan | NoPlan:
    """Decides the settings that are `auto`; `plan.explain()` gives the reasons.

    Before the first save or restore it is a NoPlan, which counts as false and explains what will be decided.
    """
    return self._run.planner.plan or self._run.planner.no_plan

  def steps(self) -> list[StepInfo]:
    """All committed steps, oldest first; without those still being written, or whose write failed."""
    return list_steps(self.directory)

  def latest_step(self) -> int | None:
    """The newest committed step, or None."""
    steps = committed_steps(self.directory)
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
    step = step_number(step)
    step_directory(self.directory, step)  # on each process, so that all raise
    if jax.process_index() == 0:
      pins.pin(self.directory, step)

  def unpin(self, step: int) -> None:
    """Gives a step back to the retention rules, which are applied at the next save."""
    step = step_number(step)
    if jax.process_index() == 0:
      pins.unpin(self.directory, step)

  # -- restoring

  def restore_or_init(self, init_fn: Callable[[], PyTree]) -> Restored:
    """The newest committed state, in the shapes and shardings of `init_fn()`; or `init_fn()` in an empty run.

    `init_fn` takes no arguments. It is run only if nothing was ever committed, or if its shardings cannot be known
    without running it (see `layout.sharding.abstract_state`). It starts afresh only where there is no step, and nothing
    that looks like a checkpoint: one that cannot be read is an error, and the constructor refuses the rest. Leaves that
    `init_fn` makes on each process for itself (an eager `jnp.int32(0)`) come back so in a job of many.
    """
    self._session.check_open()
    check_type("init_fn", init_fn, callable(init_fn), "a function that makes the state, without arguments")
    self._session.wait_for_predecessors()
    self.wait()
    self._session.record_start()
    with self._restoring:
      if self._restorer.is_empty():
        restored = Restored(init_fn(), None, 0, {}, None, None)
      else:
        request = RestoreRequest(abstract_state(init_fn), initial=True)
        restored = self._restored(None, request, self.config.restore.strategy)
    warmup.offer(restored.state, self.config)  # what is only restored may never be saved
    self._saver.look_ahead()
    return restored

  def restore(
    self,
    step: int | None = None,
    like: PyTree | None = None,
    only: str | Iterable[str] | None = None,
    strategy: str | None = None,
    item: str | None = None,
    *,
    init_missing: str | Iterable[str] | Mapping[str, Initialise] | None = None,
    cast: bool | Mapping[str, Any] | None = None,
    healthy: bool = False,
  ) -> Restored:
    """Reads a committed step, or a part of it, and compares it with what was saved (`restore.verify`).

    If the newest step is damaged it restores the one before (`restore.on_corruption`), logs that, and notes it in
    `Restored.report`. A step that is given by number is never replaced by another one.

    Paths name leaves as `ckpt-jax show` does. A pattern names all leaves at or below a node: `params`, or with globs
    within a segment `params/*/kernel`; `**` is any number of segments.

    Args:
      step: default: the newest.
      like: a tree with the structure of the saved one, whose leaves (arrays, `jax.ShapeDtypeStruct`s, scalars) say
        type, shape, dtype and sharding. Shardings over abstract meshes, as `jax.eval_shape` gives them, are taken for
        the mesh of `jax.set_mesh`. Arrays are weakly typed if they were when they were saved. Without `like`: nested
        dicts, lists and tuples of numpy arrays in host memory.
      only: pattern, or several: reads just these leaves. Each comes back in its place in the tree, so that
        `only="params"` gives `{"params": ...}`; a node of which only a part is read comes back as a dict. `like` may
        be the whole state, `{"params": ...}`, or the subtree below `params`, which then is the result.
      strategy: how a job of several processes reads. `direct`: each reads what its devices need, so that R replicas
        read R copies; `gather`: each byte is read by one process and exchanged; `broadcast`: one replica reads and
        sends to the others; `auto`: the fastest by prediction, see `Restored.report`. Default: `restore.strategy`.
      item: of a step with several: which to read; `ckpt-jax show` lists them. Default: the training state, see
        `Config.item`.
      init_missing: pattern, or several, of leaves of `like` that the checkpoint lacks: they keep like's values. With
        `{pattern: function}` they become `function(path, leaf)`. Together with `only`, a pattern that names none of the
        leaves restored, but a node outside of them (`opt_state`), brings those leaves of `like` back too, so that the
        result can be as large as `like`; one that names some of them (`**/lora_*`) is about those alone.
      cast: `{pattern: dtype}`, or True for the dtypes of `like`: the leaves that may change it, floats among themselves
        and integers among themselves. A value that the new dtype cannot hold is an error.
      healthy: of the newest steps, leave out those that are tagged unhealthy.

    Raises:
      NoCheckpointError: if there is no such step.
      StructureMismatchError: listing every difference between `like` and the step; nothing was read.
      CorruptCheckpointError: if the step cannot be read, or what was read is not what was saved; it names the leaves.
      RestoreTimeoutError: after `timeouts.restore`, or many times the expected duration; the message names the wait and
        the processes that did not arrive. All processes of a job raise the same error.
    """
    self._session.check_open()
    self._session.wait_for_predecessors(dropped=True)
    self.wait()
    step = None if step is None else step_number(step)
    strategy = strategy or self.config.restore.strategy
    checked("strategy", one_of, strategy, ("auto", *STRATEGIES))
    return self._restored(step, RestoreRequest(like, only, init_missing, cast, item), strategy, healthy=healthy)

  @transfers_asked_for()
  def rollback(self, step: int, *, delete: bool = False) -> list[int]:
    """Makes an older step the newest one. Training may save the numbers of the later ones anew.

    The later steps are set aside, in `.ckpt_jax/set_aside` of the run, where nothing deletes them.

    Args:
      step: a committed step.
      delete: delete the later steps, those of earlier rollbacks too.

    Returns:
      The later steps.

    Raises:
      NoCheckpointError: if there is no such step; nothing was changed.
      CheckpointError: if `delete` would take a pinned step.
    """
    self._session.check_open()
    step = step_number(step)
    with self._restoring, self._session.lock:
      self._saver.wait()
      with self._run.deleter.paused():
        later = self._restorer.rollback(step, delete=delete)
        self._saver.reload()
    return later

  # -- inside

  def _restored(self, step: int | None, request: RestoreRequest, strategy: str, *, healthy: bool = False) -> Restored:
    with self._restoring:
      restored = self._restorer.restore(step, request, strategy, healthy=healthy)
    with self._session.lock:
      if restored.report is not None and restored.report.quarantined:
        self._saver.reload()
      self._session.order.restored(restored.step)
    return restored
