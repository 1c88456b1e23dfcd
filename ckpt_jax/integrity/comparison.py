"""Compares what a restore delivers with the record of the save."""

from __future__ import annotations

import collections
import concurrent.futures
import json
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import jax
import numpy as np

from ckpt_jax.errors import CorruptCheckpointError
from ckpt_jax.integrity.fingerprint import Taken, take_restored
from ckpt_jax.integrity.record import Record
from ckpt_jax.integrity.sums import MASK, mix
from ckpt_jax.job.threads import transfers_asked_for
from ckpt_jax.tuning.profile import usable_cores

if TYPE_CHECKING:
  from ckpt_jax.job.waits import Together

_MAX_NAMED = 10
# A task for each leaf would cost more than its sum.
_BUNCH_NBYTES = 4 << 20
_BUNCH_LEAVES = 256
# XXH3 ran at 7.6 GB/s in one thread of a host of an H200, at 25 in 4, at 48 in 8.
_MOST_THREADS = 8
# With no more threads than these, the one that reads hashes faster than it hands over: reading 1 GB from a disk and
# hashing it took 0.55 s in one thread and 0.60 s in two, which take turns at Python's lock.
_FEW_THREADS = 2
_WAITING_NBYTES = 64 << 20  # of leaves that the threads have not summed yet; one that is larger goes alone
_Found = dict[str, int]  # by path: how far the sum or hash is off; it must be 0 over all processes


class Verifier:
  """Sums leaves as they arrive, while the others are still being read; `finish` compares.

  All processes of the job make one for the same restore.
  """

  def __init__(self, record: Record, host_memory: int | Literal["auto"] = "auto"):
    """Begins with no leaf. Leaves that wait for their sum take an eighth of `host_memory`, in bytes."""
    self._saved = record.leaves
    self._saved_as = {path: leaf.dtype for path, leaf in record.leaves.items()}
    self._threads = min(_MOST_THREADS, usable_cores())
    self._pool = concurrent.futures.ThreadPoolExecutor(self._threads, "ckpt_jax_verify")
    self._most_waiting = _WAITING_NBYTES if host_memory == "auto" else min(_WAITING_NBYTES, host_memory // 8)
    self._waiting: collections.deque[tuple[concurrent.futures.Future[_Found], int]] = collections.deque()
    self._lock = threading.Lock()
    self._bunch: dict[str, Any] = {}
    self._bunch_nbytes = 0
    self._found: list[_Found | concurrent.futures.Future[_Found]] = []

  def __call__(self, path: str, value: Any) -> None:
    """Takes a leaf as it was saved: decoded, not cast. From any thread; if one comes twice, the later counts.

    Its values may be in host memory still, on their way to accelerators (`Unplaced`).
    """
    with self._lock:
      self._bunch[path] = value
      self._bunch_nbytes += getattr(value, "nbytes", 0)
      if self._bunch_nbytes < min(_BUNCH_NBYTES, self._most_waiting) and len(self._bunch) < _BUNCH_LEAVES:
        return
      due, nbytes, place = self._bunch, self._bunch_nbytes, len(self._found)
      self._bunch, self._bunch_nbytes = {}, 0
      self._found.append({})
      self._make_room(nbytes)
    self._found[place] = self._begin(due, nbytes)

  def _make_room(self, nbytes: int) -> None:
    while self._waiting and nbytes + sum(n for _, n in self._waiting) > self._most_waiting:
      self._waiting.popleft()[0].exception()  # waits; raises CancelledError after `stop`

  def _begin(self, leaves: dict[str, Any], nbytes: int) -> _Found | concurrent.futures.Future[_Found]:
    """Sums leaves in the pool; in this thread where that is faster: sums of small leaves, which are mostly Python."""
    taken = take_restored(leaves, self._saved_as)
    hashed = taken.in_parts_of(self._saved)
    few = self._threads <= _FEW_THREADS
    if few and (nbytes < _BUNCH_NBYTES or leaves.keys() <= hashed):
      return self._sums(taken, hashed)
    future = self._pool.submit(self._sums, taken, hashed)
    with self._lock:
      self._waiting.append((future, nbytes))
    return future

  @transfers_asked_for()
  def _sums(self, taken: Taken, hashed: set[str]) -> _Found:
    tallies = taken.tallies(1, health=False, hashed=hashed)
    found: _Found = {}
    for path, leaf in taken.leaves.items():
      saved = self._saved.get(path)
      if saved is None or (saved.dtype, saved.shape) != (leaf.dtype, leaf.shape):
        found[path] = 1
        continue
      number, wanted = tallies[path].total, saved.total
      if path in hashed and saved.hash is not None:
        number, wanted = tallies[path].hash, saved.hash[1]
      # Process 0 answers for what belongs to the whole job, each process for its own.
      copies = {"own": 1, "elsewhere": 0}.get(leaf.place, leaf.copies if jax.process_index() == 0 else 0)
      found[path] = (number * leaf.times - wanted * copies) & MASK
    return found

  def finish(self, where: str, together: Together) -> int:
    """Waits for the sums and compares them.

    Returns:
      How many leaves were compared: all that were read.

    Raises:
      CorruptCheckpointError: on every process, naming the leaves that are not what was saved.
    """
    error: Exception | None = None
    found: _Found = {}
    try:
      self._found.append(self._begin(self._bunch, self._bunch_nbytes))
      for part in self._found:
        found |= part if isinstance(part, dict) else part.result()
    except Exception as e:
      error = e
    told = together.meet("all processes to verify what they read", error, str(_folded(found)))
    if sum(map(int, told)) & MASK:
      (bad,) = together.meet("all processes to say which leaves are wrong", text=json.dumps(found), combine=_wrong)
      wrong = CorruptCheckpointError(f"{where}: {_named(json.loads(bad))}")
      together.meet("all processes to compare what they read with what was saved", wrong)
    return len(found)

  def stop(self) -> None:
    """Gives up without comparing."""
    self._pool.shutdown(wait=False, cancel_futures=True)


def _folded(found: _Found) -> int:
  """One number for all leaves: what all processes add up to is not 0 if a leaf is wrong, or but one time in 2**63."""
  numbers = np.array([found[path] for path in sorted(found)], np.uint64)
  return int((numbers * mix(np.arange(len(numbers)), 0)).sum(dtype=np.uint64))


def _wrong(parts: list[str]) -> list[str]:
  """The leaves that are not right over all processes, given what each has found."""
  totals: collections.Counter[str] = collections.Counter()
  for part in parts:
    totals.update(json.loads(part))
  return [json.dumps(sorted(path for path, total in totals.items() if total & MASK))]


def _named(paths: Sequence[str]) -> str:
  count = "1 leaf is" if len(paths) == 1 else f"{len(paths)} leaves are"
  more = f" and {len(paths) - _MAX_NAMED} more" if len(paths) > _MAX_NAMED else ""
  return f"{count} not what was saved: {', '.join(paths[:_MAX_NAMED])}{more}"
