"""Fingerprints of a state in the order in which its save wants them: first those that decide what is written.

A leaf is what it was if its XXH3 hash of 128 bits is. XXH3 was made to have no two inputs of one hash but by chance,
one in 2**128. Its lower half is the hash that the record has of the leaf, and from it the sum follows, which takes six
times as long to compute as the hash: what is proven is read once, at the speed of memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping

import jax

from ckpt_jax.integrity.fingerprint import Leaf, Taken, take_some
from ckpt_jax.integrity.sums import Tally
from ckpt_jax.layout.homes import are_equal
from ckpt_jax.layout.ring import Values
from ckpt_jax.layout.sharding import shape_of
from ckpt_jax.layout.staging import HostCopies
from ckpt_jax.layout.structure import Flat
from ckpt_jax.layout.unchanged import Round
from ckpt_jax.tuning.profile import usable_cores

_THREADS = 8  # XXH3 then reads at the speed of memory
_Apart = Mapping[str, list[tuple[Values, tuple[int, ...]]]]


def tallies(
  taken: Taken, unchanged: Round, threads: int, wait: Callable[[], None], *, health: bool
) -> dict[str, Tally]:
  """Sums, hashes and, if asked for, health of this process's part of a state, by leaf path.

  On the way `unchanged` learns which leaves are what they were; then `wait` is called, before the others are looked at.
  The values are not needed afterwards.
  """
  apart = _apart(taken, unchanged)
  first = set() if taken.copies.in_turn else unchanged.first.keys() - unchanged.held.keys()
  found = _as_before(taken, unchanged, first - apart.keys())
  seen = dict(found)
  if first:
    more, seen_of_more = _looked_at(taken, first - found.keys(), apart, threads, health)
    found, seen = found | more, seen | seen_of_more
    unchanged.prove(seen)
  wait()
  rest = taken.leaves.keys() - found.keys()
  watched = {path for path in rest if unchanged.is_watched(path)}
  more, seen_of_more = _looked_at(taken, rest, apart, threads, health, watched)
  found, seen = found | more, seen | seen_of_more
  others = Taken({path: taken.leaves[path] for path in apart}, dict(apart))
  hashes = others.tallies(threads, health=False, hashed=apart.keys()) if apart else {}
  unchanged.note(found, {path: Tally(hash=tally.hash, high=tally.high) for path, tally in hashes.items()}, seen)
  return {path: found[path] for path in taken.leaves}


def ahead(state: Flat, copies: HostCopies, unchanged: Round) -> None:
  """Proves what it can of a state before the state goes through a ring; what is proven goes into the ring no more.

  What may be unchanged is read once, through a ring of its own, in the training thread. Of what has changed after all,
  which is rare, that is the price.

  Args:
    state: the leaves.
    copies: of them, by a ring, of which nothing is staged.
    unchanged: learns of it.
  """
  then = {path: kept.seen for path, kept in unchanged.first.items() if path not in unchanged.proven and kept.seen}
  arrays = {path: x for path, x in zip(state.structure.names, state.leaves, strict=True) if path in then}
  before = {path: tally for path in then if (tally := unchanged.last_tally(path)) is not None}
  same: dict[str, Tally] = {}
  # What the last step had is hashed and no more; of what a job before this one wrote, all is to be known.
  for known in (True, False):
    some = {path: x for path, x in arrays.items() if (path in before) == known}
    taken = take_some(some, copies.again(copies.ring.limit))
    mine = dataclasses.replace(taken, leaves=_hashed(taken, some))
    found = mine.tallies(min(_THREADS, usable_cores()), health=not known, hashed=some if known else None, last=True)
    for path, now in found.items():
      if known:
        now.total = before[path].total
      if are_equal(now, then[path]):
        same[path] = before[path] if known else now
    _forget_hashes(taken, {} if known else found)
  unchanged.look(state.leaves, copies, same)


def _apart(taken: Taken, unchanged: Round) -> _Apart:
  """The pieces that this process writes of leaves of which it sums others: of replicated ones, in a job of many."""
  apart = {}
  if jax.process_count() > 1 and not taken.copies.by_piece:
    for array in unchanged.written:
      path = unchanged.names.get(array.info.name)
      if path is None or not array.pieces:
        continue
      summed = {(at or (0,) * values().ndim, values().shape) for values, at in taken.pieces.get(path, ())}
      pieces = [(values, tuple([start for start, _ in box])) for box, values in array.pieces]
      if summed != {(at, shape_of(box)) for (_, at), (box, _) in zip(pieces, array.pieces, strict=True)}:
        apart[path] = pieces
  return apart


def _as_before(taken: Taken, unchanged: Round, paths: set[str]) -> dict[str, Tally]:
  """What was known of leaves before, if their hash is the same.

  Also of those that are the same `jax.Array`, on a CPU: it does not change, but may share the memory of a numpy array,
  which does.
  """
  whole = {path for path in paths if taken.leaves[path].part is not None}
  known = {path: tally for path in whole if (tally := unchanged.last_tally(path)) is not None}
  # By as many threads as there are cores, also on a CPU: for moments, and the save waits for it.
  hashes = taken.of(known).tallies(min(_THREADS, usable_cores()), health=False, hashed=known.keys())
  same = {path for path, now in hashes.items() if (now.hash, now.high) == (known[path].hash, known[path].high)}
  for values, _ in (piece for path in same for piece in taken.pieces[path]) if taken.copies.by_piece else ():
    values.done()
  return {path: known[path] for path in same}


def _looked_at(
  taken: Taken,
  paths: Collection[str],
  apart: _Apart,
  threads: int,
  health: bool,
  watched: Collection[str] | None = None,
) -> tuple[dict[str, Tally], dict[str, Tally]]:
  """Tallies of leaves, and sum and hash of what this process writes of those that are watched; default: of all."""
  watched = set(paths if watched is None else watched)
  hashed = _hashed(taken, watched)
  others = watched & apart.keys()
  seen = Taken({p: hashed[p] for p in others}, {p: apart[p] for p in others}).tallies(threads, health=False)
  mine = taken.of(paths)
  mine.leaves |= {p: hashed[p] for p in watched - others}
  found = mine.tallies(threads, health=health, last=True)
  for path, known in taken.health.items() if not health else ():
    if path in found and path not in taken.summed:
      found[path].nonfinite, found[path].nan, found[path].squares = known.nonfinite, known.nan, known.squares
  seen |= {p: Tally(found[p].total, found[p].hash, found[p].high) for p in watched - others}
  _forget_hashes(taken, found)
  return found, seen


def _hashed(taken: Taken, paths: Collection[str]) -> dict[str, Leaf]:
  """Leaves as they are when parts of shards are hashed too, each seeded with the place where it begins."""
  leaves = {path: taken.leaves[path] for path in paths}
  return {
    path: dataclasses.replace(leaf, part=(1,) * len(leaf.bits_shape)) if leaf.part is None else leaf
    for path, leaf in leaves.items()
  }


def _forget_hashes(taken: Taken, found: Mapping[str, Tally]) -> None:
  """Takes back hashes of parts of shards, of which the record has none."""
  for path, tally in found.items():
    if taken.leaves[path].part is None:
      tally.hash = tally.high = 0
