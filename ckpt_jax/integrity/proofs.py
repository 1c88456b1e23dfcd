"""Fingerprints of a state in the order in which its save wants them: first those that decide what is written.

A leaf is what it was if its XXH3 hash of 128 bits is. XXH3 was made to have no two inputs of one hash but by chance,
one in 2**128. Its lower half is the hash that the record has of the leaf, and from it the sum follows, which takes six
times as long to compute as the hash: what is proven is read once, at the speed of memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping

import jax

from ckpt_jax.integrity.fingerprint import Taken
from ckpt_jax.integrity.sums import Tally
from ckpt_jax.layout.ring import Values
from ckpt_jax.layout.sharding import shape_of
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
  first = unchanged.first.keys() - unchanged.held.keys()
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
  if taken.copies.in_turn:  # pieces are gone once they were read
    return {}
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
  # Of parts of shards the record has no hash.
  hashed = {
    p: dataclasses.replace(leaf, part=leaf.part or leaf.bits_shape) for p, leaf in taken.of(watched).leaves.items()
  }
  others = watched & apart.keys()
  seen = Taken({p: hashed[p] for p in others}, {p: apart[p] for p in others}).tallies(threads, health=False)
  unhashed = {p for p in watched - others if taken.leaves[p].part is None}
  parts = dataclasses.replace(taken.of(unhashed), leaves={p: hashed[p] for p in unhashed})
  hashes = parts.tallies(threads, health=False, hashed=unhashed)
  found = taken.of(paths).tallies(threads, health=health, last=True)
  for path, known in taken.health.items() if not health else ():
    if path in found and path not in taken.summed:
      found[path].nonfinite, found[path].nan, found[path].squares = known.nonfinite, known.nan, known.squares
  seen |= {
    p: Tally(found[p].total, hashes[p].hash, hashes[p].high) if p in hashes else found[p] for p in watched - others
  }
  return found, seen
