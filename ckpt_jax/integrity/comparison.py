"""Compares what a restore delivers with the record of the save."""

from __future__ import annotations

import concurrent.futures
import os
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from ckpt_jax.errors import CorruptCheckpointError
from ckpt_jax.integrity.fingerprint import Taken, sum_over_processes, take_restored
from ckpt_jax.integrity.record import Record
from ckpt_jax.integrity.sums import MASK
from ckpt_jax.job.threads import transfers_asked_for
from ckpt_jax.layout.staging import is_on_accelerator

if TYPE_CHECKING:
  from ckpt_jax.job.waits import Together

_MAX_NAMED = 10
# A task for each leaf would cost more than its sum.
_BUNCH_NBYTES = 4 << 20
_BUNCH_LEAVES = 256
_Found = dict[str, int]  # by path: how far the sum or hash is off; it must be 0 over all processes


class Verifier:
  """Sums leaves as they arrive, while the others are still being read; `finish` compares.

  All processes of the job make one for the same restore.
  """

  def __init__(self, record: Record):
    """Takes the record of the step that is being restored."""
    self._saved = record.leaves
    self._saved_as = {path: leaf.dtype for path, leaf in record.leaves.items()}
    self._pool = concurrent.futures.ThreadPoolExecutor(min(2, os.cpu_count() or 1), "ckpt_jax_verify")
    self._lock = threading.Lock()
    self._bunch: dict[str, Any] = {}
    self._bunch_nbytes = 0
    self._on_accelerator: dict[str, Any] = {}
    self._found: list[_Found | concurrent.futures.Future[_Found]] = []

  def __call__(self, path: str, value: Any) -> None:
    """Takes a leaf as it was saved: decoded, not cast. From any thread; if one comes twice, the later counts."""
    with self._lock:
      if is_on_accelerator(value):
        self._on_accelerator[path] = value  # one dispatch for all of them
        return
      self._bunch[path] = value
      self._bunch_nbytes += getattr(value, "nbytes", 0)
      if self._bunch_nbytes < _BUNCH_NBYTES and len(self._bunch) < _BUNCH_LEAVES:
        return
      due, nbytes, place = self._bunch, self._bunch_nbytes, len(self._found)
      self._bunch, self._bunch_nbytes = {}, 0
      self._found.append({})
    self._found[place] = self._begin(due, nbytes)

  def _begin(self, leaves: dict[str, Any], nbytes: int) -> _Found | concurrent.futures.Future[_Found]:
    """Hashes leaves in this thread, and sums in the pool what cannot be hashed.

    Hashing is faster than handing over: reading 1 GB from a disk and hashing it took 0.55 s in one thread and 0.60 s
    in two, which take turns at Python's lock. The same holds for sums of small leaves, which are mostly Python.
    """
    taken = take_restored(leaves, self._saved_as)
    hashed = taken.in_parts_of(self._saved)
    if nbytes < _BUNCH_NBYTES or leaves.keys() <= hashed:
      return self._sums(taken, hashed)
    return self._pool.submit(self._sums, taken, hashed)

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
      found[path] = (number - wanted * copies) & MASK
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
      on_accelerator = dict(sorted(self._on_accelerator.items()))  # arrivals differ, programs of several hosts may not
      self._found += [self._begin(self._bunch, self._bunch_nbytes), self._begin(on_accelerator, 0)]
      for part in self._found:
        found |= part if isinstance(part, dict) else part.result()
    except Exception as e:
      error = e
    together.meet("all processes to verify what they read", error)
    paths = sorted(found)
    numbers = np.array([found[path] for path in paths], np.uint64)
    totals = sum_over_processes(numbers, [path in self._on_accelerator for path in paths])
    bad = [path for path, total in zip(paths, totals.tolist(), strict=True) if total]
    # All processes find the same, unless one has a damaged copy of the record.
    wrong = CorruptCheckpointError(f"{where}: {_named(bad)}") if bad else None
    together.meet("all processes to compare what they read with what was saved", wrong)
    return len(paths)

  def stop(self) -> None:
    """Gives up without comparing."""
    self._pool.shutdown(wait=False, cancel_futures=True)


def _named(paths: Sequence[str]) -> str:
  count = "1 leaf is" if len(paths) == 1 else f"{len(paths)} leaves are"
  more = f" and {len(paths) - _MAX_NAMED} more" if len(paths) > _MAX_NAMED else ""
  return f"{count} not what was saved: {', '.join(paths[:_MAX_NAMED])}{more}"
