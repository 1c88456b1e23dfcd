"""Host memory for the copies of a state: how much there is, and taking it from XLA before the first save needs it."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import logging
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from ckpt_jax.config import Config
from ckpt_jax.config.units import size_text
from ckpt_jax.job.threads import Worker
from ckpt_jax.layout.sharding import local_nbytes
from ckpt_jax.layout.shares import Limits
from ckpt_jax.layout.staging import (
  PINNED_LIMIT,
  HostCopies,
  has_accelerators,
  is_on_accelerator,
  pinned_limit,
  uses_pinned,
)
from ckpt_jax.layout.structure import Flat, flatten
from ckpt_jax.layout.unchanged import Round
from ckpt_jax.tuning.profile import available_memory

_log = logging.getLogger(__name__)
_HEADROOM = 1.1  # what Orbax and TensorStore need beside the copy itself
_PINNED_HEADROOM = 2.0  # XLA takes pinned memory in regions that double, and keeps it
_LEAST_RING_NBYTES = 1 << 20
_STOP_S = 10.0
_arena_nbytes = 0  # the most that copies have taken of pinned memory in this process


@dataclasses.dataclass(frozen=True)
class _Need:
  """What copies of a state need of this process's memory, what they may take, and what bounds it, in words."""

  needed: int
  free: int
  why: str
  beside: int = 0  # what Orbax's own copies of numpy arrays need of it

  @property
  def ring(self) -> int:
    """Bytes of a ring: half of what is free, since compressed chunks are there beside the copies."""
    return max(self.free // 2 - self.beside, _LEAST_RING_NBYTES)


def _planned(state: Flat, config: Config, unchanged: Round | None = None) -> tuple[HostCopies, _Need]:
  """Copies of a state as this process will make them, and what they need."""
  copies = HostCopies(Limits.of(config.layout))
  beside = sum(x.nbytes for x in state.leaves if isinstance(x, (np.ndarray, np.generic)))
  copies.plan(state.leaves, beside)
  if unchanged is not None:
    unchanged.look(state.leaves, copies)
  free, why = available_memory(), "free"
  if not has_accelerators():
    needed = int(local_nbytes(state) * _HEADROOM)
  else:
    needed = int((copies.nbytes(state.leaves) + beside) * _PINNED_HEADROOM)
    free += int(_arena_nbytes * _PINNED_HEADROOM)  # XLA has it already
    if (most := pinned_limit()) is not None and most < free:
      free, why = most, f"allowed by {PINNED_LIMIT}, which would have to be larger"
  limit = config.limits.host_memory
  return copies, _Need(needed, free if isinstance(limit, str) else min(free, limit), why, beside)


def copies_for(
  directory: epath.Path,
  state: Flat,
  config: Config,
  unchanged: Round,
  all_numbers: Callable[[list[int]], Sequence[Sequence[int]]],
) -> HostCopies:
  """Copies of a state that take no more host memory than there is; nothing is copied yet.

  All processes call it alike, and all get a ring or none does, of the same size: large leaves are stored in its slices.
  `limits.host_memory` bounds the copies; of leaves that have not changed some need none. `all_numbers` gives the
  numbers of each process to all.
  """
  copies, need = _planned(state, config, unchanged)
  mine = [int(need.needed <= need.free), need.ring, unchanged.expected]
  fits, rings, expected = zip(*all_numbers(mine), strict=True)
  unchanged.spared = sum(expected)
  if all(fits):
    _note_arena(int(need.needed / _PINNED_HEADROOM))
    return copies
  _log.log(
    logging.WARNING if need.needed > need.free else logging.INFO,  # a process that lacks memory warns itself
    "%s: copies of what this process writes need %s of host memory and %s are %s: saving in chunks, and training "
    "waits for what memory cannot hold. More memory, or more processes, bring asynchronous saving back.",
    directory,
    size_text(need.needed),
    size_text(need.free),
    need.why,
  )
  ring = min(rings)
  _note_arena(ring)
  copies = copies.again(ring)
  unchanged.look(state.leaves, copies)  # which has pieces of other sizes
  unchanged.spared = sum(sum(expected) for expected in all_numbers([unchanged.expected]))
  return copies


def _note_arena(nbytes: int) -> None:
  global _arena_nbytes
  _arena_nbytes = max(_arena_nbytes, nbytes)


class Warmup:
  """Takes the pinned memory that a save will need from XLA, while nothing waits for it.

  Pinning is slow: the first 2.95 GB took 2 s on an H200, and later saves, for which XLA keeps the memory, 0.1 s. So
  what training begins with, or offers to a save that is not due, is copied as a save would copy it and forgotten.
  Only weak references are held: training may go on, and donate the arrays, at any time.
  """

  def __init__(self) -> None:
    self._over = False
    self._worker: Worker | None = None
    self._work: concurrent.futures.Future[None] | None = None
    self._copies: HostCopies | None = None
    self._held: list[Any] = []  # until all is there, so that memory is not used twice
    self._done = 0  # how many arrays

  def offer(self, state: Any, config: Config) -> None:
    """Goes on with the arrays of a state, in the background, unless a save was begun or all is done."""
    if self._over or not has_accelerators() or not (self._work is None or self._work.done()):
      return
    try:
      flat = flatten(state)
      arrays = [leaf for leaf in flat.leaves if is_on_accelerator(leaf)]
      if not arrays or not uses_pinned(arrays[0]):
        return
      if self._copies is None:
        _, need = _planned(flat, config)
        self._copies = HostCopies(Limits.of(config.layout), None if need.needed <= need.free else need.ring)
    except Exception as e:  # a state that cannot be saved, which the save says
      _log.debug("no pinned memory is taken ahead of the first save: %s", e)
      return
    self._worker = self._worker or Worker("ckpt_jax_warmup")
    self._work = self._worker.submit(functools.partial(self._take, list(map(weakref.ref, arrays)), self._copies))

  def stop(self) -> None:
    """Ends it, before a save: what is not there yet the save takes itself."""
    self._over = True
    if self._worker is not None:
      self._worker.close()
      concurrent.futures.wait([self._work] if self._work else [], _STOP_S)
      self._worker = self._work = None
    self._copies, self._held = None, []

  def _take(self, arrays: Sequence[weakref.ref[jax.Array]], copies: HostCopies) -> None:
    full = False
    while self._done < len(arrays) and not self._over and not full:
      array = arrays[self._done]()
      if array is None or array.is_deleted():
        return  # the next state goes on
      try:
        copies.stage([array])
        self._held.append(copies.pieces(array))
      except Exception as e:  # donated a moment ago, or no memory: a save raises what matters
        _log.debug("pinned memory was not taken ahead of the first save: %s", e)
        return
      finally:
        copies.settled()
      _note_arena(copies.ring.held)
      self._done += 1
      full = not copies.ring.wait_until_sent(0)
      del array
    self._over = True
    self._held = []


warmup = Warmup()
