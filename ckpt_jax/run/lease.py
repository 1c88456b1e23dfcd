"""One writer per run: a lease with owner, host and heartbeat, RUN/.ckpt_jax/lease.

Two jobs that write into one run delete and overwrite each other's steps. So the first save takes the lease, and a job
that finds it held by another one writes nothing. Readers never need it.

The file is replaced by compare-and-swap (TensorStore's conditional writes: a lock file on disks, generations on gs://,
ETags on s3://), and read back before each heartbeat for stores that ignore the condition. Whether an owner is dead is
never judged by comparing clocks: on the same host its process is looked up, elsewhere its heartbeat is observed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import errno
import json
import logging
import os
import pathlib
import socket
import threading
import time
import uuid
import weakref
from collections.abc import Callable
from typing import Any

import pydantic
from etils import epath

from ckpt_jax.config.units import duration_text
from ckpt_jax.errors import StorageError
from ckpt_jax.failures import is_out_of_space, is_read_only, os_errors, root_cause, storage_errors, why_read_only
from ckpt_jax.run.notes import NOTES
from ckpt_jax.storage.cache import boot_id
from ckpt_jax.storage.clients import kvstore_spec
from ckpt_jax.storage.durable import restrict
from ckpt_jax.storage.urls import is_object_store

_log = logging.getLogger(__name__)
LEASE = "lease"
_BEAT_S = 10.0
_MOST_SILENCE_S = 10 * _BEAT_S  # whatever interval a file names
_REQUEST_S = 60.0  # the longest that one read or write of the lease may take
_LAST_REQUEST_S = 10.0  # the same when the lease is given back, so that a job that ends does not wait long
# A process that opens a run holds the lease for a moment if it clears leftovers; that is no reason to fail.
_MOMENT_S = 3.0
_NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL}
_here: weakref.WeakValueDictionary[str, Lease] = weakref.WeakValueDictionary()  # all of this process, by owner


@dataclasses.dataclass(frozen=True)
class Holder:
  """The process that holds, or held, the lease of a run.

  Attributes:
    owner: a random name, new for each Checkpointer.
    host: host name, for messages.
    boot: boot id and pid namespace; processes with the same one can look each other up.
    pid, started: process id, and the start time that distinguishes it from a later process with the same id.
    place, inode: path or URL of the run, and the inode of its notes (0 on a bucket), which reveal a copied lease.
    beat: grows with each heartbeat.
    interval: seconds between heartbeats.
    since: seconds since the epoch by the owner's clock; for messages only.
    saving: steps that were begun and are not known to be committed.
    released: whether the owner has given it back.
  """

  owner: str
  host: str
  boot: str
  pid: int
  started: str
  place: str
  inode: int
  beat: int
  interval: float
  since: float
  saving: tuple[int, ...] = ()
  released: bool = False


_holder = pydantic.TypeAdapter(Holder)


def parse(data: bytes) -> Holder | None:
  """The holder in a lease file; None if the file holds anything else."""
  try:
    return _holder.validate_json(data, strict=True)
  except pydantic.ValidationError:
    return None


def judge(holder: Holder | None, me: Holder, start_of: Callable[[int], str | None]) -> str:
  """The state of a lease for `me`: `free`, `dead`, `alive`, or `elsewhere` if only its heartbeat can show that.

  `start_of` gives the start time of a process id; None if there is no such process.
  """
  if holder is None or holder.released:
    return "free"
  if holder.place != me.place and (holder.inode != me.inode or me.inode == 0):
    return "free"  # the lease of the run that this one was copied from
  if holder.boot != me.boot:
    return "elsewhere"
  return "alive" if start_of(holder.pid) == holder.started else "dead"


class Lease:
  """This process's claim to a run. Nothing is written before `acquire`.

  Once another job has taken the lease, or if storage does not answer, methods raise StorageError.

  Attributes:
    held: whether it is held, as of the last heartbeat.
  """

  def __init__(self, directory: epath.Path, *, patience: float = 60.0, mode: int | None = None):
    """Writes nothing.

    An owner on another host counts as dead after `patience` seconds, and three of its intervals, without a heartbeat.
    `mode` has the permission bits of the file; None: as the umask says.
    """
    self.held = False
    self._directory = directory
    self._patience = patience
    self._file = _File(directory, mode)
    self._me = Holder(
      owner=uuid.uuid4().hex,
      host=socket.gethostname(),
      boot=_boot(),
      pid=os.getpid(),
      started=_start_of(os.getpid()) or "",
      place=os.fspath(directory),
      inode=0,
      beat=0,
      interval=min(_BEAT_S, patience / 4),
      since=0.0,
    )
    self._saving: set[int] = set()
    self._lost: Holder | None = None
    self._seen: tuple[str, int, float] | None = None  # owner, beat, and when that pair was first seen
    self._written_at = 0.0
    self._written = b""  # the generation of the file as this object wrote it last
    self._lock = threading.RLock()
    self._stop = threading.Event()
    _here[self._me.owner] = self

  @property
  def saving(self) -> frozenset[int]:
    """Steps begun under this lease, or inherited from a dead owner, that are not known to be committed or cleared."""
    return frozenset(self._saving)

  def look(self) -> str:
    """The state of the lease now, as `judge`, or `mine`; begins to observe an owner on another host."""
    return "mine" if self.held else self._read()[2]

  def acquire(self, wait: float | None = None) -> None:
    """Takes the lease if no living process holds it; else a StorageError names the owner, its host and the way out.

    Waits `wait` seconds for an owner that may be dead; default: one and a half times as long as one may be silent.
    """
    with self._lock:
      self.ensure_ours()
      if self.held:
        return
    started = time.monotonic()
    logged = False
    while True:
      holder, generation, verdict = self._read()
      limit = started + (self._silence(holder) * 1.5 + _MOMENT_S if wait is None else wait)
      moment = min(started + _MOMENT_S, limit)
      if verdict in ("free", "dead") and self._take(holder, generation):
        return
      now = time.monotonic()
      if holder is not None and ((verdict == "alive" and now > moment) or now > limit):
        raise self._refused(holder, "writes into this run")
      if verdict == "elsewhere" and holder is not None and not logged:
        logged = True
        _log.info(
          "%s: waiting to see whether the job on %s is alive (up to %.0f s)", self._directory, holder.host, limit - now
        )
      time.sleep(0.1)

  def begin(self, step: int) -> None:
    """Notes that a step is being written, so that what a crash leaves of it is known to be ours."""
    with self._lock:
      self._saving.add(step)
      self.renew()

  def done(self, step: int) -> None:
    """Forgets a step that is committed, or whose leftovers are gone; the next heartbeat writes that."""
    with self._lock:
      self._saving.discard(step)

  def check(self) -> None:
    """Makes sure, before a commit, that the lease is still ours; reads it only if the last heartbeat is late."""
    with self._lock:
      if self._lost is not None or self._late:
        self.renew()

  def ensure_ours(self) -> None:
    """Raises StorageError if the lease is known to be lost; reads nothing."""
    if self._lost is not None:
      raise self._refused(self._lost, "has taken this run over: this process gave no sign of life for too long")

  def renew(self, create: bool = True) -> None:
    """Writes a heartbeat; `create`: even if the file is gone."""
    with self._lock:
      self.ensure_ours()
      self._me = dataclasses.replace(self._me, beat=self._me.beat + 1)
      # So soon after the last heartbeat nobody can have taken it, even where writes are not conditional.
      if create and self._written and not self._late and self._write(self._written):
        return
      holder, generation = self._file.read()
      if holder is not None and holder.owner != self._me.owner and holder.place == self._me.place:
        self.held, self._lost = False, holder
        self.ensure_ours()
      if holder is None and not create:
        return  # the run was deleted; a heartbeat must not bring its directory back
      self._write(generation)

  def release(self) -> None:
    """Gives the lease back; it can be acquired again."""
    self._stop.set()
    self._stop = threading.Event()
    with self._lock:
      if not self.held:
        return
      self.held = False
      _here.pop(self._me.owner, None)  # free for this process even if storage cannot be written
      with contextlib.suppress(StorageError):  # it expires by itself
        holder, generation = self._file.read(_LAST_REQUEST_S)
        if holder is not None and holder.owner == self._me.owner:
          self._file.swap(self._record(released=True), generation, _LAST_REQUEST_S)

  def __del__(self):
    # A Checkpointer that was dropped without close(), as in a notebook cell that is run again. A bucket may be gone by
    # now, and a destructor must not wait for it.
    with contextlib.suppress(Exception):
      if os.getpid() == self._me.pid:  # a forked child must not give back what its parent holds
        self._stop.set()
        if not is_object_store(self._directory):
          self.release()

  # -- inside

  def _read(self) -> tuple[Holder | None, bytes, str]:
    holder, generation = self._file.read()
    verdict = judge(holder, dataclasses.replace(self._me, inode=_inode(self._directory)), _start_of)
    if holder is None:
      return holder, generation, verdict
    if verdict == "alive" and holder.pid == self._me.pid and holder.owner not in _here:
      verdict = "dead"  # this process lives, but the object that held the lease in it does not
    if verdict == "elsewhere":
      now = time.monotonic()
      owner, beat, since = self._seen or ("", 0, now)
      if (owner, beat) != (holder.owner, holder.beat):
        self._seen = holder.owner, holder.beat, now
        verdict = "alive" if owner == holder.owner else verdict
      elif now - since > self._silence(holder):
        verdict = "dead"
    return holder, generation, verdict

  def _silence(self, holder: Holder | None) -> float:
    """Seconds without a heartbeat after which an owner on another host is dead; one that beats slowly is given more."""
    return self._patience if holder is None else max(self._patience, min(3 * holder.interval, _MOST_SILENCE_S))

  def _record(self, released: bool = False) -> Holder:
    return dataclasses.replace(self._me, saving=tuple(sorted(self._saving)), released=released)

  @property
  def _late(self) -> bool:
    return time.monotonic() - self._written_at > 2 * self._me.interval

  def _write(self, generation: bytes) -> bool:
    """Replaces the file if it is still of this generation."""
    self._written = self._file.swap(self._record(), generation)
    if self._written:
      self._written_at = time.monotonic()
    return bool(self._written)

  def _take(self, holder: Holder | None, generation: bytes) -> bool:
    if not is_object_store(self._directory):
      with storage_errors(f"{self._directory / NOTES}"):
        (self._directory / NOTES).mkdir(parents=True, exist_ok=True)
    with self._lock:
      self._me = dataclasses.replace(self._me, inode=_inode(self._directory), since=time.time(), beat=1)
      self._saving |= set(holder.saving if holder else ())
      if not self._write(generation):
        return False
      written, _ = self._file.read()
      if written is None or written.owner != self._me.owner:
        return False  # a store without conditional writes, and another process was faster
      self.held = True
      _here[self._me.owner] = self
      if holder is not None and not holder.released:
        _log.info("%s: took over from process %d on %s, which is gone", self._directory, holder.pid, holder.host)
    arguments = weakref.ref(self), self._stop, self._me.interval
    threading.Thread(target=_beat, args=arguments, name="ckpt_jax_lease", daemon=True).start()
    return True

  def _refused(self, holder: Holder, what: str) -> StorageError:
    when = datetime.datetime.fromtimestamp(holder.since, datetime.timezone.utc)
    age = duration_text(max(0.0, time.time() - holder.since))
    who = f"process {holder.pid} on host {holder.host}"
    if (holder.pid, holder.boot) == (self._me.pid, self._me.boot):
      who += " (this very process: a Checkpointer that is not closed)"
    return StorageError(
      f"{self._directory}: another job {what}: {who}, owner {holder.owner[:8]}, since {when:%Y-%m-%d %H:%M:%S} UTC "
      f"({age} ago), heartbeat {holder.beat}. Nothing was written. End that job (or close "
      f"that Checkpointer), or give this one a directory of its own. A job that is gone for good loses its lease by "
      f"itself: on this host at once, on another one after {self._silence(holder):.0f} s without a heartbeat, for "
      "which the next attempt waits (timeouts.lease, but at least three of its heartbeats)",
      topic="another-job",
    )


def _beat(lease: weakref.ref[Lease], stop: threading.Event, interval: float) -> None:
  failing = False
  while not stop.wait(interval):
    this = lease()
    if this is None:
      return
    try:
      this.renew(create=False)
      failing = False
    except StorageError as e:
      if this._lost is not None:
        _log.error("%s", e)
        return
      if not failing:
        _log.warning("%s: the heartbeat cannot be written: %s", this._directory, e)
      failing = True
    del this


class _File:
  """The lease file, which is replaced only if it is still as it was read."""

  def __init__(self, directory: epath.Path, mode: int | None):
    self._path = os.fspath(directory / NOTES)
    self.mode = mode
    self._store: Any = None

  def read(self, timeout: float = _REQUEST_S) -> tuple[Holder | None, bytes]:
    found = self._call(lambda store: store.read(LEASE), timeout)
    return parse(found.value) if found.state == "value" else None, found.stamp.generation

  def swap(self, holder: Holder, generation: bytes, timeout: float = _REQUEST_S) -> bytes:
    """The new generation; empty if the file was no longer of the given one, and stays."""
    data = json.dumps(dataclasses.asdict(holder)).encode()
    written = self._call(lambda store: store.write(LEASE, data, if_equal=generation), timeout).generation
    if written and not is_object_store(self._path):
      with contextlib.suppress(OSError):  # each write makes a new file
        restrict(os.path.join(self._path, LEASE), self.mode)
    return written

  def _call(self, operation: Callable[[Any], Any], timeout: float) -> Any:
    try:
      if self._store is None:
        self._store = self._open("os")
      try:
        return operation(self._store).result(timeout=timeout)
      except ValueError as e:
        # Some mounts have no locks (NFS without lockd, Lustre, FUSE). Reading back is all that is left there.
        if is_object_store(self._path) or not os_errors(e) & _NO_LOCKS:
          raise
        self._store = self._open("none")
        return operation(self._store).result(timeout=timeout)
    except TimeoutError as e:
      raise StorageError(f"{self._path}/{LEASE}: no answer in {timeout:.0f} s") from e
    except (ValueError, OSError) as e:
      if is_out_of_space(e):
        why = "No space left on device"
      else:
        why = why_read_only(f"{self._path}/{LEASE}", e) if is_read_only(e) else root_cause(e)
      raise StorageError(f"{self._path}/{LEASE}: {why}") from e

  def _open(self, locking: str) -> Any:
    import tensorstore as ts

    spec = kvstore_spec(self._path + "/")
    if spec["driver"] == "file":
      spec |= {"file_io_sync": False, "file_io_locking": {"mode": locking}}
    return ts.KvStore.open(spec).result(timeout=_REQUEST_S)


def _boot() -> str:
  """The running kernel and the pid namespace, which processes must share to look each other up by id."""
  try:
    return f"{boot_id()} {os.readlink('/proc/self/ns/pid')}"
  except OSError:
    return socket.gethostname()


def _start_of(pid: int) -> str | None:
  """The start time of a process; None if there is none, or if it is a zombie."""
  try:
    # man 5 proc_pid_stat: the name may hold spaces and brackets; state is field 3, start time in ticks field 22.
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return None if fields[0] in "ZX" else fields[19]
  except (OSError, IndexError):
    return None


def _inode(directory: epath.Path) -> int:
  if is_object_store(directory):
    return 0
  try:
    return os.stat(os.fspath(directory / NOTES)).st_ino
  except OSError:
    return -1
