"""What this process has open of a run: ended once, however its Checkpointer goes, and never by a forked child.

A Checkpointer is often not closed: a notebook cell is run again, a variable is overwritten, a script ends. So a Session
holds what it has opened, and does not know the Checkpointer: when that is dropped, the session ends by itself, once its
last write has committed. In one process a run has one writer, the newest Checkpointer that saves; it waits for the
write of the one before, which raises an error if it is used again.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import os
import sys
import threading
from collections.abc import Iterable, Iterator
from typing import Any

from etils import epath

from ckpt_jax.errors import CheckpointError
from ckpt_jax.job.agreement import decided_by_process_zero
from ckpt_jax.job.errand import Errand
from ckpt_jax.job.preemption import end_by_sigterm, in_a_thread
from ckpt_jax.job.rendezvous import Rendezvous
from ckpt_jax.orbax import private
from ckpt_jax.run.attempts import CLOSED
from ckpt_jax.save.opening import OpenRun
from ckpt_jax.save.order import StepOrder
from ckpt_jax.save.saver import Saver
from ckpt_jax.storage.urls import is_object_store, split_url

_log = logging.getLogger(__name__)
_INTERRUPTED = 130  # what shells report of a program that ended by Ctrl-C
_MOMENT_S = 10.0  # beyond what a write may take: for the commit, and for deletions to be given up
_numbers = itertools.count()
_open: set[Session] = set()
_claiming = threading.Lock()


class Session:
  """What one Checkpointer has open: Orbax's manager, threads, the lease, the answer to SIGTERM.

  Attributes:
    run: the run, and the parts that act on it.
    saver: saves into it.
    order: which step numbers it takes next.
    lock: held by whatever uses or ends the session.
    closed: whether it has ended.
    writes: whether it has saved, or was about to.
  """

  def __init__(self, run: OpenRun, others: Any = ()):
    """Opens Orbax's manager. `others` is whatever else must not be destroyed in a forked child."""
    self.run = run
    self.saver = Saver(run)
    self.order = StepOrder(run.directory, self.saver)
    self.lock = threading.RLock()
    self.closed = False
    self.writes = False
    self._superseded = False
    self._dropped = False  # its Checkpointer is gone
    self._stale = False  # another session has written since this one listed the steps
    self._outcome: Exception | None = None  # of the last write, until the user has waited for it
    self._claimed = False  # and nothing else in this process writes there any more
    self._taking: Errand | None = None
    self._ending: Errand | None = None
    self._number = next(_numbers)
    self._pid = os.getpid()
    self._directory = run.directory
    self._place = _place(run.directory)
    self._patience = run.config.timeouts.save_s  # seconds that one write may take
    self._others = others
    self._rendezvous = Rendezvous(f"claim {run.directory}")
    _open.add(self)
    _end_all_at_exit()

  # -- for the Checkpointer

  def check_open(self) -> None:
    """Raises CheckpointError if this session cannot be used: it has ended, or belongs to another process."""
    self._check_process()
    if self._superseded:
      raise CheckpointError(
        f"{self._directory}: a newer Checkpointer of this process saves into this run and has taken it over; use that "
        "one, or make a new one",
        topic="closed-or-forked",
      )
    if self.closed:
      raise CheckpointError(f"{self._directory}: this Checkpointer is closed; make a new one", topic="closed-or-forked")

  def claim(self) -> None:
    """Makes this session the only one of this process that writes into the run. All processes call it before each save.

    Raises:
      CheckpointError: if a newer one writes already, or an older one does not end.
    """
    if self._claimed:
      return
    if self._taking is not None:  # an interrupt has ended the last call
      self._taking.wait()
    with _claiming:
      others = [s for s in list(_open) if s is not self and s.writes and _same_run(s._place, self._place)]
      newer = any(s._number > self._number for s in others)
      self.writes = not newer
    if newer:
      self._superseded = True
      self.check_open()
    if self.run.notice is not None:
      self.run.notice.listen()
    error: CheckpointError | None = None
    try:
      if others:
        self._taking = Errand(functools.partial(_supersede, others))
        self._taking.start()
        self._taking.wait()
        self._taking.outcome()
    except CheckpointError as e:
      error = e

    def is_stale() -> list[int]:
      if error is not None:
        raise error
      return [int(self._stale)]

    # Process 0 decides: the old Checkpointer may have been garbage-collected earlier on one process than on another.
    if decided_by_process_zero(is_stale, self._rendezvous, self._patience) == [1]:
      self.saver.reload()
    self.record_start()
    self._claimed = True
    if error is not None:
      raise error

  def record_start(self) -> None:
    """Has this life of the job recorded from now on, since it trains; unless another job may be writing the run."""
    if self.run.admission.unclaimed:
      self.run.journal.begin()

  def wait_for_predecessors(self, *, dropped: bool = False) -> None:
    """Waits for the writes of earlier Checkpointers of this process into this run, so that their steps count.

    With `dropped` only for Checkpointers that were dropped, whose writes nothing else waits for.
    """
    for other in sorted((s for s in list(_open) if s.writes and s._number < self._number), key=lambda s: s._number):
      if (other._dropped or not dropped) and _same_run(other._place, self._place):
        settling = Errand(other._settle)
        settling.start()
        settling.wait()
        settling.outcome()
        self._stale = True

  def wait(self) -> None:
    """Waits for the last save. See `Checkpointer.wait`."""
    self._check_process()
    with self.lock:
      self.raise_outcome()
      if not self.closed:
        self.saver.wait()
        self.run.journal.flush()

  def raise_outcome(self) -> None:
    """Raises, once, the error of the last write, if it surfaced while a newer Checkpointer took over."""
    error, self._outcome = self._outcome, None
    if error is not None:
      raise error

  def close(self, how: str = CLOSED, *, clean: bool = False) -> bool:
    """Waits for the last save and ends the session; does nothing in a forked child, or a second time.

    After an interrupt it may be called again, and goes on where it was.

    Args:
      how: how the attempt ends, for the run's notes.
      clean: training has ended by itself, as far as is known: warn if its last step was not saved.

    Returns:
      Whether SIGTERM came and no save has answered it, or will.

    Raises:
      SaveFailedError: if the last save failed; raised once.
    """
    if self._pid != os.getpid():
      return False
    with self.lock:
      if not self.closed:
        try:
          self.saver.wait()
        except Exception as e:
          self._outcome = e
      unanswered = self._end(how)
      self.raise_outcome()
      if clean:
        self.order.warn_of_lost_end()
      return unanswered

  def abandon(self) -> None:
    """Called when the Checkpointer is gone, at any point of any thread: takes no lock, and waits for nothing."""
    if self._pid != os.getpid() or self.closed:
      return
    self._dropped = True
    if self.run.notice is not None and self.saver.under_way is None and self.run.notice.close():
      end_by_sigterm()
    in_a_thread(self._end_quietly, "ckpt_jax_closer")

  # -- inside

  def _check_process(self) -> None:
    if self._pid != os.getpid():
      raise CheckpointError(
        f"{self._directory}: this Checkpointer was opened in another process, {self._pid}, and this is process "
        f"{os.getpid()}, forked from it. Save and restore where it was opened. A worker that needs a Checkpointer "
        "makes a new one after it was started by spawn or forkserver, since TensorStore does not survive a fork",
        topic="closed-or-forked",
      )

  def _settle(self) -> None:
    """Waits for the write under way, and keeps its error for the user's next `wait` or `close`."""
    with self._held():
      if self.closed:
        return
      record = self.saver.under_way
      if record is not None:
        _log.warning(
          "%s: waiting for step %d, which an earlier Checkpointer of this process is writing (up to %.0f s)",
          self._directory,
          record.step,
          self._patience,
        )
      try:
        self.saver.wait()
      except CheckpointError as e:
        _log.error("%s: of an earlier Checkpointer of this process: %s", self._directory, e)
        self._outcome = e

  def _supersede(self) -> None:
    with self._held():
      self._settle()
      if not self.closed:
        self._superseded = True
        _log.info("%s: an earlier Checkpointer of this process was not closed; the new one takes over", self._directory)
        self._end(CLOSED)

  def _end_quietly(self) -> None:
    try:
      if self.close(clean=True):
        end_by_sigterm()
    except Exception as e:
      _log.error("%s: of a Checkpointer that was dropped without close(): %s", self._directory, e)

  @contextlib.contextmanager
  def _held(self) -> Iterator[None]:
    """Waits for the lock with a limit; for errands only, since an interrupt here would leave it locked."""
    limit = self._patience + _MOMENT_S
    if not self.lock.acquire(timeout=limit):
      raise CheckpointError(
        f"{self._directory}: another thread of this process is still using an earlier Checkpointer of this run, after "
        f"{limit:.0f} s; close that one first",
        topic="closed-or-forked",
      )
    try:
      yield
    finally:
      self.lock.release()

  def _end(self, how: str) -> bool:
    self.closed = True
    for other in list(_open):
      if self.writes and self in _open and _same_run(other._place, self._place):
        other._stale = True
    unanswered = self.run.notice is not None and self.run.notice.close()
    while self._ending is None or not self._ending.wait():  # it may have been begun by a caller who was interrupted
      self._ending = Errand(functools.partial(self._let_go, how))
      self._ending.start()
    self._ending.outcome()
    return unanswered

  def _let_go(self, how: str) -> None:
    try:
      self.saver.close()
      self.run.deleter.finish()
      self.run.thinner.finish()
      self.run.journal.close(how)
    finally:
      _open.discard(self)


def _supersede(sessions: Iterable[Session]) -> None:
  for session in sorted(sessions, key=lambda s: s._number):
    session._supersede()


def _place(directory: epath.Path) -> str:
  """The path or URL of a run, with links resolved."""
  if is_object_store(directory):
    scheme, bucket, key = split_url(directory)
    return f"{scheme}://{bucket}/{os.path.normpath(key)}"
  return os.path.realpath(os.fspath(directory))


def _same_run(a: str, b: str) -> bool:
  """Whether two paths lead to one run now. The inode of a deleted run may be used again."""
  if a == b:
    return True
  try:
    return "://" not in a + b and os.path.samefile(a, b)  # a run may be mounted twice
  except OSError:
    return False


_hooked = 0


def _end_all_at_exit() -> None:
  """Registers `_end_all` once in a process."""
  global _hooked
  if _hooked != os.getpid():
    _hooked = os.getpid()
    private.before_executors_shut_down(_end_all)


def _end_all() -> None:
  for session in sorted(list(_open), key=lambda s: s._number):
    record = session.saver.under_way
    if record is not None and isinstance(getattr(sys, "last_value", None), KeyboardInterrupt):
      _log.warning(
        "%s: at exit: waiting for step %d to commit, Ctrl-C to leave before it has", session._directory, record.step
      )
    try:
      # Not after an uncaught exception, which has shown why training ended.
      session.close(clean=getattr(sys, "last_value", None) is None)
    except Exception as e:  # the other sessions must end too
      _log.error("at exit: %s", e)
    except KeyboardInterrupt:
      if record is not None:
        _log.error("%s: left before step %d was committed; it may be lost", session._directory, record.step)
      sys.stdout.flush()
      sys.stderr.flush()
      os._exit(_INTERRUPTED)  # Python would join the threads that write


def check_not_forked() -> None:
  """Raises CheckpointError in a child forked from a process with a Checkpointer: TensorStore would abort there."""
  if _parent is not None and _parent[0] == os.getpid():
    raise CheckpointError(
      f"process {os.getpid()} was forked from process {_parent[1]}, which has used a Checkpointer; TensorStore cannot "
      "work here any more. Start workers that need a Checkpointer by spawn or forkserver "
      '(multiprocessing.get_context("spawn")), or fork before the first one is made',
      topic="closed-or-forked",
    )


_inherited: list[Session] = []
_parent: tuple[int, int] | None = (
  None  # this process, if it cannot use TensorStore, and the one that it was forked from
)


def _forked() -> None:
  """In a forked child nothing is open, and the parent's objects are kept: destructors would wait for threads."""
  global _claiming, _parent
  _claiming = threading.Lock()
  if _hooked or _parent is not None:
    _parent = os.getpid(), os.getppid()
  _inherited.extend(_open)
  _open.clear()


os.register_at_fork(after_in_child=_forked)
