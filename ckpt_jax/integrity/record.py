"""The record of a step: fingerprints and health, written beside Orbax's data before the commit, read by every restore.

`default/ckpt_jax.json` holds dtype, shape and fingerprints of each leaf, a digest of each small file of the item, and
the state's health. Each process sums its own shards during the write and leaves the result in a file; the process that
commits adds them up.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import json
import logging
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from ckpt_jax.errors import CheckpointError, CorruptCheckpointError, UnhealthyStateError
from ckpt_jax.integrity import databases, proofs
from ckpt_jax.integrity import health as health_checks
from ckpt_jax.integrity.fingerprint import LeafPrint, Taken, take
from ckpt_jax.integrity.health import Health
from ckpt_jax.integrity.meant import Meant
from ckpt_jax.integrity.sums import MASK
from ckpt_jax.job.rendezvous import PeerFailedError
from ckpt_jax.job.threads import transfers_asked_for
from ckpt_jax.layout import contents
from ckpt_jax.layout.handler import PyTreeHandler
from ckpt_jax.layout.keys import PACK_INDEX
from ckpt_jax.layout.staging import HostCopies, has_accelerators
from ckpt_jax.layout.structure import Flat, flatten
from ckpt_jax.layout.unchanged import Round, nothing_unchanged
from ckpt_jax.orbax.format import ARRAY_METADATAS, DEFAULT_ITEM, ITEM_METADATA, SHARDINGS, STEP_METADATA, TEXTS
from ckpt_jax.run import untrusted
from ckpt_jax.run.checksums import FILE_KEY, is_intact_file, with_file_digest
from ckpt_jax.run.steps import RECORD, our_item
from ckpt_jax.storage import look
from ckpt_jax.storage.objects import BACKEND, snapshot
from ckpt_jax.storage.parallel import in_threads
from ckpt_jax.tuning.profile import usable_cores

_log = logging.getLogger(__name__)
FILE = RECORD
_FORMAT = 1
_SUMMING_THREADS = 8  # XXH3 reads 48 GB/s of pinned memory with as many
# Files that a restore depends on, compared before it reads.
_NEEDED = (ITEM_METADATA, SHARDINGS, TEXTS, PACK_INDEX)


@dataclasses.dataclass
class Recording:
  """The record of one save in the making.

  Attributes:
    taken: views of the state.
    health: the state's health if known; None until the state is summed.
    meant: the non-finite numbers that are meant to be there.
    refuse: whether an unhealthy state aborts the write.
    where: run and step, for messages.
    health_told: what `steps()` reports of the step's health once it is committed.
    writes: whether this process writes arrays, which must be in storage when the step is committed.
    part: what this process contributes: sums and hashes by path, its own leaves, `writes`; empty until summed.
    prints_json: the fingerprints of all processes as they are written; empty until complete.
    unchanged: what the save learns of leaves that have not changed.
    written: called on process 0 once all processes have written their parts of the step, right before the commit.
    mark: in the step's JSON and in the record, so that neither can be taken for that of another save. Process 0's
      counts.
  """

  taken: Taken
  health: Health | None
  meant: Meant
  refuse: bool
  where: str
  health_told: dict[str, bool]
  unchanged: Round = dataclasses.field(default_factory=nothing_unchanged)
  writes: bool = False
  part: dict[str, Any] = dataclasses.field(default_factory=dict)
  prints_json: str = ""
  written: Callable[[], None] = lambda: None
  mark: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex[:16])

  @transfers_asked_for()
  def sum_up(self, wait: Callable[[], None] = lambda: None) -> None:
    """Sums and hashes the state; takes as long as reading it from memory a few times.

    Args:
      wait: called before it looks at what is to be written anyway.

    Raises:
      UnhealthyStateError: see `complete`.
    """
    try:
      tallies = proofs.tallies(self.taken, self.unchanged, self.threads, wait, health=self.health is None)
    except BaseException as e:
      self.unchanged.give_up()
      self.taken.copies.ring.close(e)  # what writes the state must not wait for it to be summed
      raise
    self.taken.pieces.clear()  # the state's buffers are free again
    self.part = {
      "totals": {path: tally.total for path, tally in tallies.items()},
      "hashes": {path: tally.hash for path, tally in tallies.items()},
      "health": health_checks.from_tallies(tallies).part if self.health is None else {},
      "own": self.taken.own,
      "writes": self.writes,
    }
    if jax.process_count() == 1:
      self.complete([])  # now, while the arrays are still being written

  @property
  def threads(self) -> int:
    """How many sum up. On a CPU training wants the others."""
    return min(_SUMMING_THREADS, max(1, usable_cores() // 2)) if has_accelerators() else 1

  def complete(self, others: Sequence[dict[str, Any]]) -> None:
    """Judges the state, unless that was done before the save, and makes `prints_json`, given the parts of the others.

    Raises:
      UnhealthyStateError: if the state is unhealthy and `refuse` is set.
    """
    if self.prints_json:
      return
    if self.health is None:
      parts = [part["health"] for part in (self.part, *others)]
      self.health = self.meant.judge(health_checks.from_parts(parts), alone=True)
      if self.refuse and not self.health.healthy:
        raise self.health.error(self.where)
    totals: collections.Counter[str] = collections.Counter()
    hashes: collections.Counter[str] = collections.Counter()
    for part in (self.part, *others):
      totals.update(part["totals"])
      hashes.update(part["hashes"])
    leaves = self.taken.leaves
    prints = {path: [leaf.dtype, leaf.shape, f"{totals[path] & MASK:016x}"] for path, leaf in leaves.items()}
    # Apart from the leaves, which versions without hashes read too.
    hashed = {
      path: [leaf.part, f"{hashes[path] & MASK:016x}"] for path, leaf in leaves.items() if leaf.part is not None
    }
    self.prints_json = f'"leaves": {json.dumps(prints)}, "hashes": {json.dumps(hashed)}'

  def write(self, directory: epath.Path) -> None:
    """Writes the record of all processes into the item `directory`."""
    found: dict[str, Any] = {"mark": self.mark, "files": file_digests(directory)}
    if self.health is not None:
      norms = self.health.norms
      found["health"] = self.health.to_json() | {"jumps": health_checks.jumps(norms, self.meant.norms)}
      if self.health_told:  # under `ignore` nothing is known of what is meant: a later job looks into this step
        found["health"]["meant"] = self.meant.saved(self.taken.leaves, self.health)
      for group, ratio in found["health"]["jumps"].items():
        if ratio > health_checks.JUMP:
          _log.warning("%s: the norm of %s is %.3g times that of the steps before", self.where, group, ratio)
      self.meant.norms.append(norms)
    text = f'{{"format": {_FORMAT}, {self.prints_json}, {json.dumps(found)[1:]}'
    (directory / FILE).write_bytes(with_file_digest(text))

  def check_own(self, others: Sequence[dict[str, Any]]) -> None:
    """Checks that leaves of which each process has its own are the same on all, since only process 0's is saved.

    Raises:
      CheckpointError: naming those that differ.
    """
    mine = self.taken.own
    differing: dict[str, list[int]] = collections.defaultdict(list)
    for process, part in enumerate(others, 1):
      for path in mine.keys() | part["own"].keys():
        if mine.get(path) != part["own"].get(path):
          differing[path].append(process)
    if differing:
      named = [f"{path} (process {', '.join(map(str, there[:5]))})" for path, there in sorted(differing.items())[:10]]
      raise CheckpointError(
        "leaves that are not arrays of the whole job are saved once and must be the same on all processes; different "
        f"from process 0 are {', '.join(named)}. Make one array of what each process has "
        "(jax.make_array_from_process_local_data), or leave it out",
        topic="processes-differ",
      )


def record_of(
  state: Any | Flat,
  nbytes: int,
  nonfinite: str,
  where: str,
  meant: Meant,
  copies: HostCopies,
  unchanged: Round,
  combined: health_checks.Combined,
) -> Recording:
  """The record of a state that is about to be saved. All processes call it alike.

  Args:
    state, nbytes: what training holds, and its size over all processes.
    nonfinite: `health.nonfinite`.
    where: run and step, for messages.
    meant: the non-finite numbers that are meant to be there.
    copies: in which the state is staged.
    unchanged: which leaves have not changed, as far as it is known.
    combined: see `health.before_save`.

  Raises:
    UnhealthyStateError: if the state is found to be unhealthy before the save and `nonfinite` is `refuse`.
  """
  flat = flatten(state)
  if copies.in_turn:
    proofs.ahead(flat, copies, unchanged)

  def taken_by(copies: HostCopies) -> Taken:
    taken = take(flat, copies)
    taken.summed |= unchanged.held
    for path in unchanged.held:
      taken.pieces[path] = []
    return taken

  before = nonfinite == "tag" or (nonfinite == "refuse" and nbytes <= health_checks.BEFORE_SAVE_NBYTES)
  known = None
  looked_at = taken_by(copies.again(copies.ring.limit)) if before and copies.in_turn else None  # it is read twice
  if looked_at is not None:
    known = health_checks.before_save(looked_at, combined)
  taken = taken_by(copies)
  if looked_at is not None:
    taken.health = looked_at.health
  elif before:
    known = health_checks.before_save(taken, combined)
  if known is not None:
    known = meant.judge(known)
    if not known.healthy:
      if nonfinite == "refuse":
        raise known.error(where)
      _log.warning("%s is tagged unhealthy: non-finite numbers in %s", where, ", ".join(known.unexpected[:10]))
  # If it is not known yet, it will be before the commit, and an unhealthy state is not committed.
  reported = {} if nonfinite == "ignore" else {"healthy": known is None or known.healthy}
  return Recording(taken, known, meant, nonfinite == "refuse", where, reported, unchanged)


@dataclasses.dataclass
class RecordedSave(ocp.args.CheckpointArgs):
  """Orbax's arguments of a save, and the record to write beside it."""

  args: ocp.args.PyTreeSave
  recording: Recording


class RecordingHandler(ocp.AsyncCheckpointHandler):
  """Orbax's PyTree handler for saves, which writes a record beside each state; `restore.read` has the restores."""

  def __init__(self, inner: PyTreeHandler):
    """Wraps `inner`."""
    self._inner = inner
    self._recording: Recording | None = None
    # What the step's metadata names as this item's handler: plain Orbax must know it.
    self.typestr = inner.typestr  # type: ignore[method-assign]

  async def async_save(self, directory: epath.Path, args: RecordedSave) -> list[ocp.future.Future]:  # type: ignore[override]
    """See Orbax's; sums the state in the background, most of it once enough of the arrays is queued."""
    self._recording = args.recording
    self._inner.copies, self._inner.unchanged = args.recording.taken.copies, args.recording.unchanged
    futures = await self._inner.async_save(directory, args=args.args)
    args.recording.taken.copies.settled()
    args.recording.writes = self._inner.writes
    write = ocp.future.CommitFutureAwaitingContractedSignals(
      self._sum_up(args.recording, directory), name="ckpt_jax_record"
    )
    return [*(futures or []), write]

  async def _sum_up(self, recording: Recording, directory: epath.Path) -> None:
    recording.sum_up(self._inner.wait_until_queued)
    if jax.process_index() > 0:  # process 0 commits, and has its own part in memory
      _part(directory, jax.process_index()).write_text(json.dumps(recording.part))

  def save(self, *args: Any, **kwargs: Any) -> None:
    """Never called, nor is `restore`: saves are asynchronous, and restores go through `restore.read`."""
    raise NotImplementedError

  restore = save

  def metadata(self, directory: epath.Path) -> Any:
    """See Orbax's."""
    return self._inner.metadata(directory)

  def finalize(self, directory: epath.Path) -> None:
    """See Orbax's; on process 0, checks what all processes wrote and writes the record."""
    recording, self._recording = self._recording, None
    if not (recording and self._inner.is_merged):
      BACKEND.end_claim(directory)
    if recording is None:
      self._inner.finalize(directory)
      return
    recording.written()
    others = in_threads(lambda i: json.loads(_part(directory, i).read_text()), range(1, jax.process_count()))
    recording.check_own(others)
    recording.complete(others)
    if self._inner.is_merged:  # nobody else wrote, so that no listing is needed
      self._inner.finalize(directory)
      databases.check_merged(directory)
      recording.write(directory)
      return
    writers = [process for process, part in enumerate([recording.part, *others]) if part["writes"]]
    with snapshot(directory):  # all processes have written their parts; the merged database is looked for afterwards
      databases.check_written(directory, writers)
      self._inner.finalize(directory)
    with snapshot(directory):
      if writers:
        databases.check_merged(directory)
      recording.write(directory)
    for process in range(1, jax.process_count()):
      _part(directory, process).unlink()

  def close(self) -> None:
    """See Orbax's."""
    self._inner.close()


def as_item(name: str, one: Any) -> Any:
  """Orbax's arguments or handler of a state that is saved as the item `name` of a step."""
  if name == DEFAULT_ITEM:
    return one  # unnamed: the manager's own name for it
  return ocp.args.Composite(**{name: one}) if isinstance(one, ocp.args.CheckpointArgs) else {name: one}


ocp.args.register_with_handler(RecordingHandler, for_save=True, for_restore=True)(RecordedSave)


def _part(directory: epath.Path, process: int) -> epath.Path:
  return directory / f"ckpt_jax.process_{process}.json"


def file_digests(item_dir: epath.Path) -> dict[str, str]:
  """Digests, by name, of the item's files that carry no checksum of their own: everything but OCDBT data."""
  names = [*_NEEDED, *(f"{ARRAY_METADATAS}/{name}" for name in sorted(look.names(item_dir / ARRAY_METADATAS)))]
  found = zip(names, in_threads(lambda name: _digest(item_dir / name), names), strict=True)
  return {name: digest for name, digest in found if digest is not None}


def changed_files(item_dir: epath.Path, record: Record) -> list[str]:
  """Small files that are missing or differ from what was written, among those that a restore can do without."""
  return [name for name in record.files if name not in _NEEDED and _digest(item_dir / name) != record.files[name]]


def _digest(file: epath.Path) -> str | None:
  """The digest of a file; None if it is missing."""
  try:
    return hashlib.blake2b(look.read_bytes(file), digest_size=8).hexdigest()
  except FileNotFoundError:
    return None


@dataclasses.dataclass(frozen=True)
class Record:
  """What was recorded of a step: fingerprints by path, digests by file name, health as it was written."""

  leaves: dict[str, LeafPrint]
  files: dict[str, str]
  health: dict[str, Any]


def read_record(step_dir: epath.Path, item: str, ours: dict[str, Any]) -> Record | None:
  """The record of an item; None if plain Orbax or an older version saved it without one.

  `ours` is `run.our_metadata` of the step.

  Raises:
    CorruptCheckpointError: if it is missing although the step was saved with it, damaged, or at odds with the files.
  """
  item_dir = step_dir / item
  file = item_dir / FILE
  try:
    data = untrusted.read_json(file, is_intact_file)
  except FileNotFoundError:
    if "fingerprints" not in ours or item != our_item(ours):
      return None
    raise CorruptCheckpointError(f"{file}: missing; the step was saved with it") from None
  if not ours:
    raise CorruptCheckpointError(f"{step_dir / STEP_METADATA}: what ckpt_jax wrote there is missing")
  try:
    if data.get("mark") != ours.get("mark"):  # neither has one in a step of an older version
      raise CorruptCheckpointError(
        f"{file}: not of the save that {STEP_METADATA} is of; one of them was put there later"
      )
    hashes = {path: (_shape(part), int(h, 16)) for path, (part, h) in data.get("hashes", {}).items()}
    leaves = {
      path: LeafPrint(_dtype(d), _shape(s), int(h, 16), hashes.get(path)) for path, (d, s, h) in data["leaves"].items()
    }
    record = Record(leaves, dict(data["files"]), dict(data.get("health") or {}))
  except (KeyError, TypeError, ValueError, AttributeError) as e:
    raise CorruptCheckpointError(f"{file}: damaged ({type(e).__name__}: {e})") from e
  for name in [name for name in _NEEDED if name in record.files]:
    if (found := _digest(item_dir / name)) != record.files[name]:
      why = "missing" if found is None else "its bits are not those that were written"
      raise CorruptCheckpointError(f"{item_dir / name}: {why}")
  return record


@functools.lru_cache(maxsize=256)
def _dtype(name: Any) -> str:
  if not isinstance(name, str):
    raise TypeError(f"{name!r:.40} is not a dtype")
  if not name.startswith("key<"):
    jax.numpy.dtype(name)  # raises TypeError if it is none
  return name


def _shape(shape: Any) -> tuple[int, ...]:
  if not isinstance(shape, list) or not all(isinstance(n, int) for n in shape):
    raise TypeError(f"{shape!r:.40} is not a shape")
  return tuple(shape)


def carry_record(old: epath.Path, new: epath.Path) -> None:
  """Writes the record of `new`, another form of the step `old` with all or some of its leaves.

  The fingerprints are those of the original save, so that a restore also detects errors of the copying.
  """
  item = contents.item_directory(old)
  try:
    data = json.loads((item / FILE).read_bytes())
  except FileNotFoundError:
    return
  there = {leaf.path for leaf in contents.saved_leaves(new)}
  for key in ("leaves", "hashes"):
    data[key] = {path: found for path, found in data.get(key, {}).items() if path in there}
  data["files"] = file_digests(new / item.name)
  data.pop(FILE_KEY, None)
  (new / item.name / FILE).write_bytes(with_file_digest(json.dumps(data)))


def is_unhealthy(error: BaseException | None) -> UnhealthyStateError | None:
  """The refusal of an unhealthy state among the causes of an error."""
  while error is not None and not isinstance(error, UnhealthyStateError):
    if isinstance(error, PeerFailedError) and health_checks.FOUND in str(error):  # process 0 has refused it for all
      return UnhealthyStateError(str(error).split(": ", 2)[-1])
    error = error.__cause__ or error.__context__
  return error
