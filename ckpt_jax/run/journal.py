"""The records of a run: RUN/.ckpt_jax/events/ATTEMPT.NUMBER.jsonl, lines of JSON (`run/events.py`).

Process 0 alone writes, in a thread of its own: what the other processes have to say comes with the messages of the
commit. Each life of a job has files of its own, so that two never write one. On a disk lines are appended; a bucket has
no append, so there the last file is written again, whole, until it has 64 KiB. A kill loses at most the record that is
being written. What is older than the newest 2 MiB or 256 files is rolled up into one Attempt for each life of the job.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import queue
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from etils import epath

from ckpt_jax.failures import is_read_only
from ckpt_jax.run.events import Attempt, End, Event, RolledUp, Save, from_line, to_line
from ckpt_jax.run.notes import NOTES
from ckpt_jax.run.steps import run_directory
from ckpt_jax.storage import look
from ckpt_jax.storage.objects import BACKEND
from ckpt_jax.storage.parallel import in_threads
from ckpt_jax.storage.urls import is_object_store

_log = logging.getLogger(__name__)
EVENTS = "events"
_SUFFIX = ".jsonl"
_ROLLED = "rolled-up-"
_SEGMENT_NBYTES = {True: 128 << 10, False: 64 << 10}  # appended to; written whole
_MOST_NBYTES, _MOST_FILES = 2 << 20, 256
_MOST_PENDING = 1000
_CLOSE_S = 10.0
Sink = Callable[[Event], None]


class Journal:
  """Keeps records of this life of the job, and hands them to `sinks`. Nothing here blocks its caller, or raises.

  Nothing is written before `begin`, so that those who only read a run, or are refused, leave no trace. On all processes
  but the first it does nothing.

  Attributes:
    sinks: called with each record, in a thread of their own; an error of one is logged once.
  """

  def __init__(self, directory: epath.Path, *, keep: bool = True, appends: bool = True):
    """Starts nothing yet.

    `keep`: whether records are written into the run, else `sinks` alone get them. `appends`: whether its storage can
    append to files.
    """
    self.sinks: list[Sink] = []
    self._directory = directory
    self._keep = keep
    self._segment = _Segment(directory, appends and not is_object_store(directory), time.time())
    self._pending: list[Event] = []  # that are not written yet
    self._begun = False
    self._writer = _Thread("ckpt_jax_journal", self._take)
    self._caller = _Thread("ckpt_jax_sinks", self._hand_on)  # a slow sink must not keep records from being written
    self._complained: set[str] = set()

  def emit(self, event: Event | Callable[[], Event]) -> None:
    """Records an event; one that takes time to describe is given as a function, which the journal's thread calls."""
    if self._keep or self.sinks:
      self._writer.put(event)

  def begin(self) -> None:
    """Has records written from now on, those of the past included."""
    if self._keep and not self._begun:
      self._begun = True
      self._writer.put(None)

  def flush(self, timeout: float = 1.0) -> None:
    """Waits until what was emitted is written, or this many seconds."""
    if self._begun:
      self._writer.flush(timeout)

  def close(self, how: str) -> None:
    """Records the end, and waits for what is being written or handed on, for 10 s at most."""
    self.emit(End(how=how))
    self._writer.close(_CLOSE_S)
    self._caller.close(_CLOSE_S)

  # -- inside, in threads

  def _take(self, items: list[Any]) -> None:
    events = [event for item in items if item is not None and (event := self._made(item)) is not None]
    self._pending = [*self._pending, *events][-_MOST_PENDING:] if self._keep else []
    if self._begun and self._pending:
      try:
        self._segment.write(self._pending)
        self._pending = []
      except Exception as e:  # no save may fail or wait because of it
        self._segment.leave()
        self._complain("records cannot be kept", e)
    if self.sinks:
      for event in events:
        self._caller.put(event)

  def _made(self, item: Event | Callable[[], Event]) -> Event | None:
    try:
      event = item if isinstance(item, Event) else item()
      return dataclasses.replace(event, attempt=self._segment.attempt)
    except Exception as e:
      self._complain("an event cannot be described", e)
      return None

  def _hand_on(self, events: list[Event]) -> None:
    for event in events:
      for sink in self.sinks:
        try:
          sink(event)
        except Exception as e:  # somebody else's
          self._complain(f"{getattr(sink, '__qualname__', type(sink).__name__)} failed on an event", e)

  def _complain(self, what: str, error: Exception) -> None:
    if what not in self._complained:
      self._complained.add(what)
      level = logging.INFO if is_read_only(error) else logging.WARNING
      _log.log(level, "%s: %s: %s: %s", self._directory, what, type(error).__name__, error)


class _Thread:
  """Calls `work` with what was put, in order, in a daemon thread that begins with the first item."""

  def __init__(self, name: str, work: Callable[[list[Any]], None]):
    self._name, self._work = name, work
    self._waiting: queue.SimpleQueue[Any] = queue.SimpleQueue()
    self._thread: threading.Thread | None = None
    self._starting = threading.RLock()  # a signal handler may save too

  def put(self, item: Any) -> None:
    self._waiting.put(item)
    with self._starting:
      if self._thread is None:
        self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
        try:
          self._thread.start()
        except RuntimeError:  # no more threads; the next item tries again
          self._thread = None

  def flush(self, timeout: float) -> None:
    done = threading.Event()
    self.put(done)
    done.wait(timeout)

  def close(self, timeout: float) -> None:
    if self._thread is not None:
      self.put(_END)
      self._thread.join(timeout)

  def _run(self) -> None:
    ended = False
    while not ended:
      items = [self._waiting.get()]
      while not self._waiting.empty():
        items.append(self._waiting.get_nowait())
      ended = _END in items
      self._work([item for item in items if item is not _END and not isinstance(item, threading.Event)])
      for item in items:
        if isinstance(item, threading.Event):
          item.set()


_END = "end"


class _Segment:
  """The file that an attempt writes now, and the next one when it is full."""

  def __init__(self, directory: epath.Path, appends: bool, started: float):
    self.attempt = f"{int(started * 1e6)}-{os.getpid()}-{uuid.uuid4().hex[:4]}"
    self._place = directory / NOTES / EVENTS
    self._appends = appends
    self._number = 0
    self._nbytes = 0
    self._lines: list[str] = []  # of this file, where it is written whole
    self._made = self._looked_around = False

  def write(self, events: Sequence[Event]) -> None:
    """Writes records; raises what storage raises."""
    if not self._made:
      self._place.mkdir(parents=True, exist_ok=True)
      self._made = True
    # A job that commits has the lease: no other one is writing a file that is rolled up.
    if not self._looked_around and any(isinstance(event, Save) for event in events):
      self._looked_around = True
      roll_up(self._place)
    lines = [to_line(dataclasses.replace(event, attempt="")) + "\n" for event in events]
    file = self._place / f"{self.attempt}.{self._number:05}{_SUFFIX}"
    if self._appends:
      with open(file, "ab", buffering=0) as opened:
        opened.write("".join(lines).encode())
    else:
      file.write_text("".join([*self._lines, *lines]))
      self._lines += lines
    self._nbytes += sum(map(len, lines))
    if self._nbytes >= _SEGMENT_NBYTES[self._appends]:
      self.leave()

  def leave(self) -> None:
    """Goes on in a new file: this one is full, or nobody knows what a failed write has left in it."""
    self._number += 1
    self._nbytes, self._lines, self._looked_around = 0, [], False


def record(directory: epath.Path, *events: Event) -> None:
  """Records what a command did to a run that no job has open. Never raises."""
  if events:
    try:
      _Segment(directory, appends=False, started=time.time()).write(events)
    except Exception as e:
      _log.info("%s: not recorded: %s", directory, e)


# -- reading


@dataclasses.dataclass(frozen=True)
class Records:
  """What a run has recorded.

  Attributes:
    attempts: each life of the job summed up, oldest first; those that a command has begun have no `start`.
    events: the records that are not rolled up yet, in the order of time.
  """

  attempts: list[Attempt]
  events: list[Event]


def read_records(path: str | os.PathLike[str]) -> Records:
  """The records of a run; none of both if it has none. Lines that cannot be read are left out.

  Raises:
    StorageError: if they cannot be listed or read for now.
  """
  rolled, live, _ = _read(run_directory(path) / NOTES / EVENTS)
  events = [dataclasses.replace(event, attempt=attempt) for attempt, found in live.items() for event in found]
  return Records(_summed_up(rolled, live), sorted(events, key=lambda e: e.time))


def sum_up(directory: epath.Path) -> list[Attempt]:
  """The attempts of `read_records` alone, in half the time."""
  rolled, live, _ = _read(directory / NOTES / EVENTS)
  return _summed_up(rolled, live)


_Live = dict[str, list[Event]]  # records by attempt


def _summed_up(rolled: dict[str, Attempt], live: _Live) -> list[Attempt]:
  found = dict(rolled)
  for attempt, events in live.items():
    started = int(attempt.split("-")[0]) / 1e6
    found[attempt] = (rolled.get(attempt) or Attempt(attempt=attempt, started=started, time=started)).then(events)
  return sorted(found.values(), key=lambda a: a.started)


def _read(place: epath.Path, names: Sequence[str] | None = None) -> tuple[dict[str, Attempt], _Live, set[str]]:
  """Attempts that are rolled up, the records that are not, and names of replaced files that are still there."""
  found = sorted(n for n in (look.names(place) if names is None else names) if n.endswith(_SUFFIX))
  texts = dict(zip(found, in_threads(lambda name: _text(place / name), found), strict=True))
  heads = {name: list(_events(text)) for name, text in texts.items() if name.startswith(_ROLLED)}
  gone = {old for events in heads.values() for e in events if isinstance(e, RolledUp) for old in e.replaces}
  rolled = {e.attempt: e for n, events in heads.items() if n not in gone for e in events if isinstance(e, Attempt)}
  live: _Live = {}
  for name, text in texts.items():
    if name not in heads and name not in gone and name.split("-")[0].isdigit():
      live.setdefault(name.split(".")[0], []).extend(_events(text))
  return rolled, live, gone & texts.keys()


def _text(file: epath.Path) -> bytes:
  try:
    return look.read_bytes(file)
  except FileNotFoundError:  # rolled up meanwhile
    return b""


def _events(text: bytes) -> list[Event]:
  return [event for line in text.split(b"\n") if line and (event := from_line(line)) is not None]


# -- rolling up


def roll_up(place: epath.Path) -> None:
  """Sums up the oldest files, once there are too many of them. Called by the job that writes the run.

  The new file is complete before those that it replaces go, and names them: a crash in between counts nothing twice.
  """
  sizes = _sizes(place)
  left_nbytes, left = sum(sizes.values()), len(sizes)
  if left_nbytes <= _MOST_NBYTES and left <= _MOST_FILES:
    return
  oldest = []
  for name in sorted(sizes):
    if left_nbytes <= _MOST_NBYTES // 2 and left <= _MOST_FILES // 2:
      break
    oldest.append(name)
    left_nbytes, left = left_nbytes - sizes[name], left - 1
  before = [name for name in look.names(place) if name.startswith(_ROLLED)]
  rolled, live, gone = _read(place, [*oldest, *before])
  replaced = (*oldest, *before, *gone)
  lines = [to_line(RolledUp(replaces=replaced)), *map(to_line, _summed_up(rolled, live))]
  new = place / f"{_ROLLED}{uuid.uuid4().hex[:8]}"
  if is_object_store(place):
    new.with_suffix(_SUFFIX).write_text("\n".join(lines) + "\n")
  else:
    new.write_text("\n".join(lines) + "\n")
    os.rename(new, new.with_suffix(_SUFFIX))
  for name in set(replaced):
    (place / name).unlink(missing_ok=True)


def _sizes(place: epath.Path) -> dict[str, int]:
  """Bytes of the files that are not rolled up yet, by name."""
  if is_object_store(place):
    found = {name: entry.nbytes for name, entry in BACKEND.tree(place).items()}
  else:
    found = {entry.name: entry.stat().st_size for entry in os.scandir(place)}
  return {name: size for name, size in found.items() if name.endswith(_SUFFIX) and not name.startswith(_ROLLED)}
