"""Compares what a restore delivers with what was recorded when it was saved."""

from __future__ import annotations

import concurrent.futures
import os
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from ckpt_jax.errors import CorruptCheckpointError
from ckpt_jax.integrity import device, fingerprint
from ckpt_jax.integrity.record import Record
from ckpt_jax.integrity.sums import MASK, SMALL_NBYTES
from ckpt_jax.job.threads import transfers_asked_for

if TYPE_CHECKING:  # a room below
  from ckpt_jax.job.waits import Together

_MAX_NAMED = 10
_BUNCH_NBYTES = 4 << 20  # a task for each leaf would cost more than its sum
_SMALL_BUNCH = 256  # leaves


class _Found(NamedTuple):
  """What was found of a leaf: its sum, or its hash where it lies in the parts that were hashed when it was saved."""

  dtype: str
  shape: tuple[int, ...]
  number: int
  copies: int
  is_hash: bool


_Sums = dict[str, _Found]


class Verifier:
  """Sums up leaves as they arrive, beside the reading of the others; `finish` compares.

  All processes of the job make one for the same restore.
  """

  def __init__(self, threads: int | None = None):
    self._pool = concurrent.futures.ThreadPoolExecutor(threads or min(2, os.cpu_count() or 1), "ckpt_jax_verify")
    self._lock = threading.Lock()
    self._bunch: dict[str, Any] = {}
    self._bunch_nbytes = 0
    self._small: dict[str, Any] = {}
    self._sums: list[_Sums | concurrent.futures.Future[_Sums]] = []
    self._later: dict[str, Any] = {}
    self._dtypes: Mapping[str, str] = {}
    self._record: Record | None = None

  def expecting(self, record: Record | None) -> Verifier | None:
    """Itself, told what was saved; None if nothing was recorded, and nothing need be summed up."""
    self._record = record
    if record is None:
      return None
    # A number may come back as another type of number than it was saved as.
    self._dtypes = {path: leaf.dtype for path, leaf in record.leaves.items()}
    return self

  def __call__(self, path: str, value: Any) -> None:
    """Takes a leaf as it was saved: decoded, and not cast. From any thread; if one comes twice the later counts."""
    due: dict[str, Any] = {}
    with self._lock:
      nbytes = getattr(value, "nbytes", 0)
      if device.is_on_accelerator(value):
        self._later[path] = value  # one dispatch for all of them
      elif nbytes <= SMALL_NBYTES:
        self._small[path] = value
        if len(self._small) >= _SMALL_BUNCH:
          due, self._small = self._small, {}
      else:
        self._bunch[path] = value
        self._bunch_nbytes += nbytes
        if self._bunch_nbytes >= _BUNCH_NBYTES:
          due, self._bunch, self._bunch_nbytes = self._bunch, {}, 0
    if due:
      self._begin(due, small=nbytes <= SMALL_NBYTES)

  def _begin(self, leaves: dict[str, Any], *, small: bool) -> None:
    """Hashes leaves here, and sums up in the pool what cannot be hashed.

    To hash is faster than to hand over: 1 GB read from a disk and hashed took 0.55 s here, 0.60 in two threads, which
    take turns with the reading one at Python's lock. So do sums of small leaves, which are Python for the most part.
    """
    taken, hashed = self._take(leaves)
    found: _Sums | concurrent.futures.Future[_Sums]
    if small or leaves.keys() <= hashed:
      found = self._sum(taken, hashed)
    else:
      found = self._pool.submit(self._sum, taken, hashed)
    self._sums.append(found)

  def _take(self, leaves: dict[str, Any]) -> tuple[fingerprint.Taken, set[str]]:
    """Views of leaves, and which of them can be hashed."""
    assert self._record is not None
    taken = fingerprint.take(leaves, every_copy=True, saved_as=self._dtypes)
    return taken, taken.in_parts_of(self._record.leaves)

  @staticmethod
  @transfers_asked_for()
  def _sum(taken: fingerprint.Taken, hashed: set[str]) -> _Sums:
    copies, out = taken.copies, {}
    tallies = taken.tallies(1, health=False, hashed=hashed)
    for path, leaf in taken.leaves.items():
      is_hash, tally = path in hashed, tallies[path]
      out[path] = _Found(leaf.dtype, leaf.shape, tally.hash if is_hash else tally.total, copies[path], is_hash)
    return out

  def finish(self, where: str, together: Together) -> int:
    """Waits for the sums and compares them.

    Returns:
      How many leaves were compared: all that were read; 0 without a record.

    Raises:
      CorruptCheckpointError: on every process, naming the leaves that are not what was saved.
    """
    record = self._record
    if record is None:
      return 0
    error: Exception | None = None
    found: _Sums = {}
    shared: set[str] = set()
    try:
      self._begin(self._bunch, small=False)
      self._begin(self._small, small=True)
      for part in self._sums:
        found |= part if isinstance(part, dict) else part.result()
      if self._later:
        found |= self._sum(*self._take(self._later))
        shared = set(self._later)
    except Exception as e:
      error = e
    together.meet("all processes to verify what they read", error)
    names = sorted(found)
    totals = _over_all_processes([0 if n in shared and jax.process_index() else found[n].number for n in names])
    bad = [name for name, total in zip(names, totals, strict=True) if not _matches(record, name, found[name], total)]
    # All found the same, unless one of them has a damaged copy of the record.
    wrong = CorruptCheckpointError(f"{where}: {len(bad)} leaves are not what was saved: {_named(bad)}") if bad else None
    together.meet("all processes to compare what they read with what was saved", wrong)
    return len(names)

  def stop(self) -> None:
    """Gives up without comparing."""
    self._pool.shutdown(wait=False, cancel_futures=True)


def _matches(record: Record, name: str, found: _Found, total: int) -> bool:
  saved = record.leaves.get(name)
  if saved is None or (saved.dtype, saved.shape) != (found.dtype, found.shape):
    return False
  want = saved.hash[1] if found.is_hash and saved.hash else saved.total
  return want * found.copies & MASK == total


def _over_all_processes(sums: Sequence[int]) -> list[int]:
  if jax.process_count() == 1:
    return list(sums)
  # As bytes: jax without x64 would cut 64-bit numbers to 32.
  mine = np.array(sums, np.uint64).view(np.uint8)
  everyone = np.asarray(multihost_utils.process_allgather(mine), np.uint8).reshape(jax.process_count(), -1)
  return [int(n) & MASK for n in everyone.view(np.uint64).sum(axis=0, dtype=np.uint64)]


def _named(names: Sequence[str]) -> str:
  shown = ", ".join(names[:_MAX_NAMED])
  return shown if len(names) <= _MAX_NAMED else f"{shown} and {len(names) - _MAX_NAMED} more"
