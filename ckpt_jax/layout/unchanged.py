"""Leaves that do not change from save to save are written once: LoRA, frozen towers, embeddings.

Each process decides for what it writes of each leaf, in three saves:

  1. It is written with the others.
  2. It has not moved since the last step: it is the same `jax.Array`, or had the same fingerprints in the last two. It
     is written into a database of its own, with others of its kind (a `Home`).
  3. It is proven to be what its home holds. The files of the home are cloned into the new step, by hard links or by the
     bucket's own copies, and nothing is written. From an accelerator the same `jax.Array` is not even copied.

    RUN/12/default/ocdbt.process_0/              the database of process 0, as ever
    RUN/12/default/ocdbt.process_0/unchanged.1/  a home inside it, with all of its files

OCDBT refers to a value by the file that holds it, relative to the database, and takes over the references of a database
below it: so Orbax merges those of the processes. A home is below the database of its process. So each step has all of
its files, plain Orbax reads it, and no deletion of another step harms it.

The proof: the same `jax.Array` in the memory of an accelerator, which nothing can change; elsewhere the XXH3 hash of
its bits, of 128 bits (see `integrity.proofs`). Name, place, dtype, chunks and codec must be the same too, and each file
of the home what it was. What cannot be proven, or cloned, is written.

A ring has no room for what waits for a proof: all is proven before, and goes into it no more. At the first clone of a
home, which shows whether the storage has any, its leaves do, and nothing is read of the ring before.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import logging
import threading
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
from etils import epath

from ckpt_jax.config import LayoutConfig
from ckpt_jax.errors import CheckpointError
from ckpt_jax.failures import root_cause
from ckpt_jax.layout import packing
from ckpt_jax.layout.encoding import is_prng_key
from ckpt_jax.layout.homes import Home, Kept, Saved, Tally, are_equal, as_json, write_homes
from ckpt_jax.layout.keys import UNCHANGED
from ckpt_jax.layout.lookback import LookBack
from ckpt_jax.layout.ring import Values
from ckpt_jax.layout.staging import HostCopies, is_on_accelerator
from ckpt_jax.layout.structure import Flat
from ckpt_jax.layout.writing import Writer, Written, in_turn
from ckpt_jax.orbax.format import process_database
from ckpt_jax.run.quarantine import is_put_aside
from ckpt_jax.storage.clone import CloneError, clone, stamp
from ckpt_jax.storage.urls import is_object_store

_log = logging.getLogger(__name__)
# A hard link is one file for all steps, and so is damage to it. So many steps may share one: writing it anew then costs
# less than 1% of what is saved.
LONGEST = 128
# Of a home, which is three files or more, each a request to a bucket; and of what a process writes.
_LEAST_NBYTES, _LEAST_NBYTES_IN_BUCKETS, _LEAST_SHARE = 64 * 1024, 16 * 2**20, 1 / 200
_LIVE = 3 / 4  # of a home's bytes must be of use, since its files are cloned whole
_MOST_PATIENCE = 1024
_LOOK_S = 1.0


class Unchanged:
  """What one process knows of the leaves of a run, from save to save.

  `never`: whether the storage has no clones.
  """

  def __init__(self) -> None:
    self._last: Saved | None = None
    self._round: Round | None = None
    self._said: set[str] = set()
    self.never = False
    self._homes = 0  # so far
    self._began = False
    self._before = LookBack()

  def look_ahead(self, layout: LayoutConfig, item: Callable[[], epath.Path | None]) -> None:
    """While there is nothing to save yet: begins to look back, if that takes a while."""
    if not self._began and layout.unchanged != "off":
      self._before.begin(item, jax.process_index())

  def look_back(self, item: Callable[[], epath.Path | None]) -> None:
    """Before the first save of a job: finds the homes in the last committed step, whose state `item` returns."""
    if not self._began:
      self._began = True
      self._last = self._before.end(item(), jax.process_index())
      homes = self._last.homes if self._last is not None else {}
      self._homes = max((int(name.removeprefix(UNCHANGED)) for name in homes), default=0)

  def forget(self) -> None:
    """Has the next save write everything: something has moved steps, or found one to be damaged."""
    self._last = self._round = None
    self._began = True

  def begin(self, item: epath.Path, flat: Flat, layout: LayoutConfig) -> Round:
    """A save begins; the one before has ended.

    Args:
      item: where the state will be once it is committed.
      flat: the state.
      layout: how it is written.
    """
    if self._round is not None and self._round.committed():
      self._last = self._round.outcome()
    self._round = None
    if layout.unchanged == "off" or self.never:
      self._last = None
      return Round(self, item, layout, None, {})
    structure, leaves = flat.structure, flat.leaves
    arrays = {structure.names[i]: leaves[i] for i in structure.once(_numbers, leaves)}
    self._round = Round(self, item, layout, self._last, arrays)
    return self._round

  def new_home(self) -> str:
    """A name that no home of this run has in this process."""
    self._homes += 1
    return f"{UNCHANGED}{self._homes}"

  def refused(self, error: Exception) -> None:
    """Notes that a home could not be cloned, and logs each kind of reason once."""
    self.never = self.never or getattr(error, "for_good", False)
    why = str(error) if isinstance(error, CloneError) else root_cause(error)
    if (kind := why.rpartition(": ")[2]) not in self._said:
      self._said.add(kind)
      _log.info("leaves that have not changed are written again: %s", why)


class Round:
  """One save of a process, and which leaves it need not write.

  Attributes:
    first: leaves, by path, that need not be written if their fingerprints are those of what a home holds.
    held: those of them of which that is known without them, and what was counted of each; they are not even copied.
    proven: paths of those that go through a ring, of which that is known.
    identical: paths of leaves that are the same arrays as in the last committed step.
    written: what this process writes, or would write, until the state is summed.
    names: the path of each leaf, by its name in the database.
    committed: whether the step is.
    nbytes: bytes that were not written.
    spared: bytes that all processes together are expected not to write.
    coming: bytes that they are expected to write; None while that is not known.
  """

  def __init__(
    self, run: Unchanged, item: epath.Path, layout: LayoutConfig, last: Saved | None, arrays: Mapping[str, jax.Array]
  ):
    """`last` is None if nothing may be left unwritten; `arrays` is empty if nothing will be said of them either."""
    self.first: dict[str, Kept] = {}
    self.held: dict[str, Any] = {}
    self.proven: frozenset[str] = frozenset()
    self.identical: frozenset[str] = frozenset()
    self.written: Sequence[Written] = ()
    self.names: dict[str, str] = {}
    self.committed: Callable[[], bool] = lambda: False
    self.nbytes = self.spared = 0
    self.coming: int | None = None
    self._run = run
    self._in_turn = False
    self._item = item
    self._layout = layout
    self._last = last
    self._arrays = {path: weakref.ref(x) for path, x in arrays.items()}
    self._paths = {id(x): path for path, x in arrays.items()}
    self._still: set[str] = set()
    self._proofs: concurrent.futures.Future[Mapping[str, Tally]] = concurrent.futures.Future()
    self._nbytes = 0
    self._homes: dict[str, Home] = {}
    self._new: dict[str, Home] = {}
    self._outcome: tuple[Mapping[str, Tally], Mapping[str, Tally], Mapping[str, Tally]] | None = None
    self._summed = threading.Event()
    self._streaks: dict[str, int] = {}
    self._patience: dict[str, int] = {}
    if last is not None:
      before = last.arrays
      self.identical = frozenset([path for path, x in arrays.items() if path in before and before[path]() is x])
      still = {path for path, n in last.streaks.items() if n >= last.patience.get(path, 1)}
      self._still = (still | self.identical) & arrays.keys()

  # -- in the training thread

  def look(self, state: Sequence[Any], copies: HostCopies, read: Mapping[str, Tally] | None = None) -> None:
    """Finds the leaves that homes hold, and has `copies`, which are planned, copy none of which that is known.

    It is called again for other copies. `read`: what was counted, just now, of leaves that are what a home holds.
    """
    self._in_turn = copies.in_turn
    self.first, self.held, self.proven = {}, {}, frozenset()
    copies.held.clear()
    if self._last is None:
      return
    read = read or {}
    by_path = {path: x for x in state if (path := self._paths.get(id(x))) is not None}
    for home in self._last.homes.values() if self._still else ():
      there = [(kept, by_path.get(kept.path)) for kept in home.leaves.values()] if home.saves < LONGEST else []
      fits = [(k, x) for k, x in there if x is not None and k.seen is not None and k.boxes == copies.boxes(x)]
      self.first |= {kept.path: kept for kept, _ in fits}
      here = self.identical if copies.by_piece else ()
      sure = [(k, x) for k, x in fits if k.path in read or (k.path in here and is_on_accelerator(x))]
      self.proven |= {kept.path for kept, _ in sure if copies.in_turn}
      # Only if nothing but the storage can stop it from being cloned, which it has been once.
      alike = self._last.layout == self._layout and home.saves > 1
      if alike and sum(kept.nbytes for kept, _ in sure) >= _LIVE * home.nbytes:
        self.held |= {k.path: read.get(k.path) or self._last.tallies[k.path] for k, _ in sure}
        copies.held |= {id(x): x for _, x in sure}

  @property
  def expected(self) -> int:
    """Bytes that this process is expected not to write."""
    return sum(kept.nbytes for kept in self.first.values())

  def is_plain(self, arrays: Sequence[Written]) -> bool:
    """Whether all of what this process writes goes with the others, so that the step will have no home."""
    if self._last is None or not self._still:
      return True
    self._nbytes = _nbytes(arrays)
    return not self.first and self._are_few([x for x in arrays if self.names.get(x.info.name) in self._still])

  def named(self, names: Sequence[str], arrays: Sequence[jax.Array]) -> None:
    """Says what the arrays are called in the database."""
    self.names = {name: path for name, x in zip(names, arrays, strict=True) if (path := self._paths.get(id(x)))}
    self._paths = {}  # an id may be used again

  # -- while the state is summed

  def last_tally(self, path: str) -> Any:
    """What was counted of a leaf in the last committed step; None if that is not known."""
    return None if self._last is None else self._last.tallies.get(path)

  def is_watched(self, path: str) -> bool:
    """Whether a leaf is taken for one that does not change, so that sum and hash of it should be known."""
    return path in self._still and path not in self.held

  def prove(self, seen: Mapping[str, Tally]) -> None:
    """Says what the leaves of `first` are now, those of `held` left out: sum and hash of what would be written."""
    self._proofs.set_result(seen)

  def note(self, tallies: Mapping[str, Tally], traces: Mapping[str, Tally], seen: Mapping[str, Tally]) -> None:
    """Says what the whole state is, once it is summed.

    Args:
      tallies: what this process counted of each leaf, by path.
      traces: see `Saved`.
      seen: sums and hashes of what this process writes of leaves that are watched.
    """
    if (last := self._last) is not None:
      before = {**last.tallies, **last.traces}
      self._patience = dict(last.patience)
      for path, tally in {**tallies, **traces}.items():
        then, now = before.get(path), tally
        if then is None and path in self.first:  # all that is known of a step of the job before
          then, now = self.first[path].seen, seen.get(path, tally)
        if path in self.proven or (then is not None and are_equal(now, then)):
          self._streaks[path] = last.streaks.get(path, 0) + 1
        elif path in self._still:
          self._patience[path] = min(2 * self._patience.get(path, 1), _MOST_PATIENCE)
    self._outcome = tallies, traces, seen
    self.written = ()
    self._summed.set()

  def give_up(self) -> None:
    """Ends the wait for `prove` and `note`."""
    self._summed.set()
    if not self._proofs.done():
      self._proofs.set_exception(CheckpointError("the save was given up", topic="save-failed"))

  # -- while it is written

  def write(
    self,
    writer: Writer,
    arrays: Sequence[Written],
    slab: packing.Slab | None,
    pieces: Sequence[Values],
    item: epath.Path,
  ) -> None:
    """Writes what has to be.

    Args:
      writer: of the database of this process.
      arrays, slab, pieces: see `Writer.write`.
      item: where the state is being written.
    """
    number = jax.process_index()
    plain, own, first = self._sorted(writer, arrays)
    place = item / process_database(number)
    if self._in_turn and any(self.names[array.info.name] not in self.held for array in first):
      again, moved = self._linked(writer, first, place)  # before anything of the ring is read
      plain, own, first = in_turn(plain + moved), own + again, []
    with concurrent.futures.ThreadPoolExecutor(1, "ckpt_jax-links") as beside:
      links = beside.submit(self._linked, writer, first, place) if first else None
      try:
        if own and self._in_turn:
          self._settle_in(writer, own, place, plain)
          own = []
        elif plain or slab is not None or not (own or first or self._homes):
          writer.write(plain, slab, pieces, number)
      except BaseException:
        writer.stop.set()  # nobody waits for proofs any more
        raise
      writer.queued.set()
    if links is not None:
      again, moved = links.result()
      own += again
      if moved:
        writer.write(moved)
    if own:
      self._settle_in(writer, own, place)
    if self._homes or self._new:
      while not (self._summed.wait(_LOOK_S) or writer.stop.is_set()):
        pass
      write_homes(place, self._homes_now())

  def outcome(self) -> Saved | None:
    """What is known once the step is committed; None if it cannot be compared with the next one."""
    if self._outcome is None or not self._arrays:
      return None
    tallies, traces, _ = self._outcome
    return Saved(
      self._item, self._layout, self._arrays, tallies, traces, self._streaks, self._patience, self._homes_now()
    )

  # -- inside

  def _homes_now(self) -> dict[str, Home]:
    """The homes in the step, once the state is summed."""
    homes, seen = dict(self._homes), self._outcome[2] if self._outcome else {}
    known = {path: kept.seen for path, kept in self.first.items() if path in self.held} | {**seen}
    for name, home in self._new.items():
      leaves = {leaf: dataclasses.replace(kept, seen=known.get(kept.path)) for leaf, kept in home.leaves.items()}
      homes[name] = dataclasses.replace(home, leaves=leaves)
    return homes

  def _sorted(self, writer: Writer, arrays: Sequence[Written]) -> tuple[list[Written], list[Written], list[Written]]:
    """What is written with the others, what goes into a home, and what is in one if that can be proven."""
    if self._last is None or not self._still:
      return [*arrays], [], []
    self._nbytes = _nbytes(arrays)
    plain: list[Written] = []
    own: list[Written] = []
    first: list[Written] = []
    kept = {name: kept for home in self._last.homes.values() for name, kept in home.leaves.items()}
    for array in arrays:
      name = array.info.name
      path = self.names.get(name)
      if path is None or not array.pieces or "/" in name:  # the keys of `a/b` are among those of `a`
        plain.append(array)
      elif path in self.first and name in kept and kept[name].fits(path, array.boxes, writer.spec(array)["metadata"]):
        first.append(array)
      else:
        (own if path in self._still else plain).append(array)
    if self._are_few(own):
      return plain + own, [], first
    return plain, own, first

  def _are_few(self, arrays: Sequence[Written]) -> bool:
    least = _LEAST_NBYTES_IN_BUCKETS if is_object_store(self._item) else _LEAST_NBYTES
    return _nbytes(arrays) < max(least, _LEAST_SHARE * self._nbytes)

  def _linked(
    self, writer: Writer, arrays: Sequence[Written], place: epath.Path
  ) -> tuple[list[Written], list[Written]]:
    """Clones homes. Returns the arrays that do not change but have no home now, and those that have changed."""
    assert self._last is not None
    waited = any(self.names[array.info.name] not in self.held for array in arrays)
    seen = self._proven(writer) if waited and not self._in_turn else {}
    changed: list[Written] = []
    same: dict[str, list[Written]] = {name: [] for name in self._last.homes}
    home_of = {name: home for home in self._last.homes.values() for name in home.leaves}
    for array in arrays:
      name, home = array.info.name, home_of[array.info.name]
      path, then = self.names[name], home.leaves[name].seen
      now = seen.get(path)
      is_same = {path} & (self.held.keys() | self.proven) or (now and then and are_equal(now, then))
      (same[home.name] if is_same else changed).append(array)
    homeless: list[Written] = []
    for name, live in same.items():
      if live and not self._clone(writer, self._last.homes[name], live, place):
        homeless += live
    if self._run.never or self._are_few(homeless):
      changed, homeless = changed + homeless, []
    return homeless, changed

  def _proven(self, writer: Writer) -> Mapping[str, Tally]:
    while not writer.stop.is_set():
      with contextlib.suppress(concurrent.futures.TimeoutError):
        return self._proofs.result(_LOOK_S)
    raise CheckpointError("the save was given up", topic="save-failed")

  def _clone(self, writer: Writer, home: Home, live: Sequence[Written], place: epath.Path) -> bool:
    assert self._last is not None
    if _nbytes(live) < _LIVE * home.nbytes:
      return False
    names = {array.info.name for array in live}
    whole = home.whole and names == home.leaves.keys()
    source, target = self._last.item / place.name / home.name, place / home.name
    try:
      if is_put_aside(self._last.item.parent):
        raise CloneError(f"{self._last.item.parent}: it is in quarantine, or set aside")
      clone(source, target, home.files)
      writer.refer(writer.nested(home.name), None if whole else names)
    except Exception as e:  # whatever is damaged there: it is written instead, which raises if storage fails
      self._run.refused(e)
      with contextlib.suppress(FileNotFoundError):
        target.rmtree()
      return False
    for array in live:
      for _, values in array.pieces:
        values.done()
    self.nbytes += _nbytes(live)
    leaves = {name: kept for name, kept in home.leaves.items() if name in names}
    self._homes[home.name] = dataclasses.replace(home, leaves=leaves, whole=whole, saves=home.saves + 1)
    return True

  def _settle_in(
    self, writer: Writer, arrays: Sequence[Written], place: epath.Path, others: Sequence[Written] | None = None
  ) -> None:
    """Writes arrays into a home of their own, and together with them, if given, what has none."""
    directory = self._run.new_home()
    home, leaves = writer.nested(directory), {}
    for array in arrays:
      name = array.info.name
      leaves[name] = Kept(self.names[name], array.boxes, as_json(writer.spec(array)["metadata"]), array.own_nbytes)
    if others is None:
      home.write(arrays)
    else:
      writer.write(others, beside=(home, arrays))
    writer.refer(home)
    files = {file: stamp(place / directory / file) for file in home.files()}
    self._new[directory] = Home(directory, files, _nbytes(arrays), leaves)


def nothing_unchanged() -> Round:
  """A save of everything."""
  return Round(Unchanged(), epath.Path(), LayoutConfig(), None, {})


def _nbytes(arrays: Collection[Written]) -> int:
  """Bytes that this process writes of arrays."""
  return sum(array.own_nbytes for array in arrays)


def _numbers(leaves: Sequence[Any]) -> list[int]:
  """Which leaves are jax arrays of numbers."""
  return [i for i, x in enumerate(leaves) if isinstance(x, jax.Array) and not is_prng_key(x)]
