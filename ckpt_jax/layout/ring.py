"""Pieces of arrays on their way to host memory: all at once, or as a ring of waves of which some are there at a time.

Whoever reads the pieces of a ring reads them in the order of `Values.turn`, and says of each that it is done: when all
readers of a wave are, its memory is free for the next one.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import sys
import threading
from collections.abc import Callable, Sequence

import jax
import numpy as np

from ckpt_jax.errors import CheckpointError
from ckpt_jax.job.threads import transfers_asked_for, with_x64_of_caller

_WAVES = 4  # that fill a ring: while one is sent, others are written
Cut = tuple[slice, ...]  # a part of an array


class Values:
  """The values of a piece of an array in host memory; here of one that is there.

  Attributes:
    turn: number of the wave that brings them.
    is_sent: whether they are here or on their way, so that calling this does not wait for other pieces to be read.
  """

  turn = 0
  is_sent = True

  def __init__(self, array: np.ndarray):
    self._array = array

  def __call__(self) -> np.ndarray:
    """The values, once they have arrived."""
    return self._array

  def begin(self) -> None:
    """Says that there is one more reader."""

  def done(self) -> None:
    """Says, once for each reader, that it needs them no more."""


class Copy(Values):
  """A piece that a ring brings.

  Attributes:
    source: the single-device array; None once it is sent.
    cut: which part of it; None for all.
    found: what has been sent; None before and after.
    readers: how many have yet to read it.
  """

  def __init__(self, ring: Ring, wave: _Wave, source: jax.Array, cut: Cut | None):
    self.source: jax.Array | None = source
    self.cut = cut
    self.found: jax.Array | np.ndarray | None = None
    self.readers = 0
    self.turn = wave.turn
    self._ring = ring
    self._wave = wave

  @property
  def is_sent(self) -> bool:  # type: ignore[override]
    return self._wave.sent.is_set()

  @property
  def is_gone(self) -> bool:
    """Whether the array was donated before it was sent."""
    return self.source is not None and self.source.is_deleted()

  def __call__(self) -> np.ndarray:
    """See `Values`.

    Raises:
      CheckpointError: if the save was given up before it was sent.
    """
    self._wave.sent.wait()  # until Ring.close at the latest
    found = self.found
    if found is None:
      raise CheckpointError("the save was given up", topic="save-failed") from self._ring.error
    return np.asarray(found)  # a view of pinned memory

  def begin(self) -> None:
    self.readers += 1

  def done(self) -> None:
    self._ring.release(self, self._wave)


class Late(Values):
  """A piece that is copied only if somebody asks for it, behind all others, and that may be gone then."""

  turn = sys.maxsize

  def __init__(self, ring: Ring, source: jax.Array, cut: Cut | None, nbytes: int):
    self._source: jax.Array | None = source
    self._cut = cut
    self._nbytes = nbytes
    self._ring = ring
    self._copy: Copy | None = None

  @property
  def is_sent(self) -> bool:  # type: ignore[override]
    return self._asked_for().is_sent

  def __call__(self) -> np.ndarray:
    """See `Values`.

    Raises:
      CheckpointError: if the array was donated meanwhile.
    """
    return self._asked_for()()

  def done(self) -> None:
    self._source = None
    if self._copy is not None:
      self._copy.done()

  def _asked_for(self) -> Copy:
    if self._copy is None:
      assert self._source is not None
      self._copy = self._ring.add(self._source, self._cut, self._nbytes)
      self._copy.begin()
      self._ring.start()
    return self._copy


class Part(Values):
  """A part of a piece."""

  def __init__(self, copy: Values, cut: Cut):
    self.turn = copy.turn
    self._copy = copy
    self._cut = cut

  @property
  def is_sent(self) -> bool:  # type: ignore[override]
    return self._copy.is_sent

  def __call__(self) -> np.ndarray:
    return self._copy()[self._cut]

  def begin(self) -> None:
    self._copy.begin()

  def done(self) -> None:
    self._copy.done()


def _gone() -> CheckpointError:
  return CheckpointError(
    "it has not changed, so that it was not copied; what is in storage of it cannot be used, and training has donated "
    "the array by now; the next save writes it",
    topic="save-failed",
  )


@dataclasses.dataclass(eq=False)
class _Wave:
  turn: int
  send: Callable[[], None] = lambda: None
  nbytes: int = 0
  unread: int = 0
  copies: list[Copy] = dataclasses.field(default_factory=list)
  sent: threading.Event = dataclasses.field(default_factory=threading.Event)


class Ring:
  """Sends pieces in waves, each in one batch.

  Attributes:
    limit: bytes that may be on their way or unread at a time; None sends everything at once.
    error: why it was closed, if something failed.
  """

  def __init__(self, send: Callable[[Sequence[Copy]], None], limit: int | None):
    """Sends nothing yet.

    Args:
      send: starts to send copies, and sets `found` of each.
      limit: see the class. Larger pieces are sent alone.
    """
    self.limit = limit
    self.error: BaseException | None = None
    self._send = send
    self._queue: collections.deque[_Wave] = collections.deque()
    self._turns = 0
    self._new: list[Copy] = []  # since the last call of `settled`
    self._held = 0
    self._sending = 0  # waves that leave the queue
    self._changed = threading.Condition()  # held for bookkeeping only, never while something is sent

  def add(self, source: jax.Array, cut: Cut | None, nbytes: int) -> Copy:
    """Queues a piece, for `start`."""
    with self._changed:  # of late pieces others may send the wave meanwhile
      wave = self._queue[-1] if self._queue else None
      if wave is None or (self.limit is not None and wave.nbytes + nbytes > self.limit // _WAVES):
        wave = _Wave(self._turns)
        wave.send = with_x64_of_caller(functools.partial(self._send, wave.copies))
        self._turns += 1
        self._queue.append(wave)
      copy = Copy(self, wave, source, cut)
      self._new.append(copy)
      wave.copies.append(copy)
      wave.unread += 1
      wave.nbytes += nbytes
    return copy

  def start(self) -> None:
    """Sends as many waves as there is room for; the rest follows as waves are read."""
    while (wave := self._next()) is not None:
      try:
        with transfers_asked_for():
          wave.send()
        for copy in wave.copies:
          copy.source = None
      except BaseException as e:
        if any(copy.is_gone for copy in wave.copies):
          self.close(gone := _gone())
          raise gone from None
        self.close(e)
        raise
      finally:
        wave.sent.set()
        with self._changed:
          self._sending -= 1
          self._changed.notify_all()

  def settled(self) -> None:
    """Releases what has no reader; all who will read have said so."""
    for copy in self._new:
      if copy.readers == 0:
        copy.done()
    self._new = []

  def release(self, copy: Copy, wave: _Wave) -> None:
    """Notes that one reader of a piece is done."""
    with self._changed:
      copy.readers -= 1
      if copy.readers > 0:
        return
      copy.found = None
      wave.unread -= 1
      if wave.unread:
        return
      self._held -= wave.nbytes
    self.start()

  @property
  def held(self) -> int:
    """Bytes that are on their way or unread."""
    return self._held

  def wait_until_sent(self, timeout: float) -> bool:
    """Waits until all pieces are here or on their way; False if that takes longer than `timeout` seconds."""
    with self._changed:
      return self._changed.wait_for(lambda: not self._queue and not self._sending, timeout)

  def close(self, error: BaseException | None = None) -> None:
    """Sends nothing more; whoever waits for what was not sent gets an error, caused by `error`."""
    with self._changed:
      self.error = self.error or error
      self._held, left = 0, [*self._queue]
      self._queue.clear()
      self._changed.notify_all()
    for wave in left:
      wave.sent.set()

  def _next(self) -> _Wave | None:
    with self._changed:
      if not self._queue:
        return None
      nbytes = self._queue[0].nbytes
      if self.limit is not None and self._held and self._held + nbytes > self.limit:
        return None
      self._held += nbytes
      self._sending += 1
      return self._queue.popleft()
