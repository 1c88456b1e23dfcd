"""Reads whole steps from storage and says what is wrong with them: `ckpt_jax.verify`, `ckpt-jax verify`."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath

from ckpt_jax.config import Config
from ckpt_jax.config.arguments import step_number
from ckpt_jax.errors import ConfigError, CorruptCheckpointError, NoCheckpointError, StorageError
from ckpt_jax.failures import is_unreachable, root_cause
from ckpt_jax.integrity import databases, fingerprint, record, sums
from ckpt_jax.job.threads import transfers_asked_for
from ckpt_jax.layout import contents
from ckpt_jax.layout.keys import database_name, prefix
from ckpt_jax.orbax.format import COMMIT_MARKER, ITEM_HANDLERS, ITEM_METADATA, METRICS_ITEM, USE_ZARR3
from ckpt_jax.restore.leaf import AS_SAVED, LeafPlan, make_plan
from ckpt_jax.restore.read import Reader, Step
from ckpt_jax.run import foreign, quarantine, untrusted
from ckpt_jax.run.steps import (
  committed_steps,
  counts,
  is_gone,
  latest_committed,
  our_metadata,
  run_directory,
  step_directory,
  step_metadata,
  step_path,
  uncounted_steps,
)
from ckpt_jax.storage import look
from ckpt_jax.storage.clients import kvstore_spec
from ckpt_jax.storage.objects import snapshot

_log = logging.getLogger(__name__)
_GROUP_NBYTES = 128 << 20  # leaves read together
_GROUP_LEAVES = 256
_BLOCK_NBYTES = 64 << 20  # a larger leaf is read in blocks of about this size
_AT_ONCE = 4  # blocks
_MOST_UNREADABLE = 3  # leaves that cannot be read, after which the others are not tried
_UNREAD = "could not be read"
UNREADABLE = "unreadable"  # a kind of finding
DELETED = "deleted while it was read"  # how far a step was checked
Progress = Callable[[int, int, int], None]


@dataclasses.dataclass(frozen=True)
class Finding:
  """One thing that is wrong with a step.

  Attributes:
    step: the step.
    kind: `commit` (marker missing), `metadata`, `structure` (an OCDBT database or the tree), `data` (a leaf);
      `unreadable` for what could not be read, which says nothing about what it holds.
    leaf: its path; empty if it is not about one.
    file: the file, or files, relative to the step, as far as it can be told.
    message: what is wrong.
  """

  step: int
  kind: str
  leaf: str
  file: str
  message: str


@dataclasses.dataclass(frozen=True)
class Verdict:
  """How far a step could be checked.

  Attributes:
    step: the step.
    leaves, nbytes: what was read.
    fingerprints: leaves that were compared with what training held when it saved.
    how_far: in words.
    findings: what is wrong.
    items: how far each item of the step could be checked.
  """

  step: int
  leaves: int
  nbytes: int
  fingerprints: int
  how_far: str
  findings: tuple[Finding, ...]
  items: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class _Checked:
  """What `Verdict` says, for one item."""

  name: str
  leaves: int
  nbytes: int
  fingerprints: int
  how_far: str


def verify(run: str | os.PathLike[str], step: int | None = None) -> list[Finding]:
  """Reads a step, or all of a run, from storage and compares it with what was saved. Changes nothing.

  All items, leaf by leaf, in bounded memory. Steps of plain Orbax have no fingerprints: of those it is checked that
  metadata and databases can be read and each chunk decodes; see `verdicts` for how far each step could be checked.

  Args:
    run: the run.
    step: default: all committed steps, and directories that were one.

  Returns:
    What is wrong; empty if nothing is.

  Raises:
    NoCheckpointError: if there is no such step, or none at all.
    NotARunError: if there are checkpoints that are no steps of a run.
    StorageError: if the run cannot be listed.
  """
  return [finding for verdict in verdicts(run, step) for finding in verdict.findings]


def verdicts(
  run: str | os.PathLike[str], step: int | None = None, progress: Progress = lambda step, done, total: None
) -> Iterator[Verdict]:
  """`verify`, step by step.

  Args:
    run, step: as for `verify`.
    progress: called with step, bytes read, bytes in all.
  """
  directory = run_directory(run)
  damaged = quarantine.damaged_steps(directory)
  if step is not None:
    step = step_number(step)
    there = counts(step_path(directory, step)) and step not in uncounted_steps(directory)
    if step not in damaged and not there:
      step_directory(directory, step)  # raises, naming what there is
    steps = [step]
  else:
    steps = sorted({*committed_steps(directory), *damaged})
    if not steps:
      foreign.refuse(directory)
      latest_committed(directory)  # says that there is none
  for number in steps:
    if number in damaged:
      finding = Finding(number, "commit", "", "", str(damaged[number]))
      verdict = Verdict(number, 0, 0, 0, "nothing could be read", (finding,))
    else:
      with snapshot(step_path(directory, number)):
        verdict = _Check(directory, number, progress).verdict()
    if verdict.findings and is_gone(directory, number):
      if step is not None:
        raise NoCheckpointError(f"{directory}: step {step} was deleted while it was read")
      verdict = Verdict(number, 0, 0, 0, DELETED, ())
    yield verdict


class _Check:
  def __init__(self, directory: epath.Path, step: int, progress: Progress):
    self._step_dir = step_path(directory, step)
    self._step = step
    self._progress = progress
    self._findings: list[Finding] = []
    self._stored: dict[str, str] = {}  # names of the leaves in Orbax's databases
    self._done = 0
    self._total = 0

  @transfers_asked_for()
  def verdict(self) -> Verdict:
    try:
      found = self._verdict()
    except StorageError as e:
      self._unreadable(e)
      return Verdict(self._step, 0, self._done, 0, _UNREAD, tuple(self._findings))
    unreadable = any(finding.kind == UNREADABLE for finding in self._findings)
    return dataclasses.replace(found, how_far="not all of it could be read") if unreadable else found

  def _verdict(self) -> Verdict:
    trees: list[tuple[str, Step, list[LeafPlan]]] = []
    checked: list[_Checked] = []
    try:
      ours = our_metadata(self._step_dir)
      state = contents.item_name(self._step_dir) if ours else None  # it must be there, whatever else is
      parts = contents.items(self._step_dir)
      self._missing({part.name for part in parts})
    except CorruptCheckpointError as e:
      self._found("metadata", str(e))
      return Verdict(self._step, 0, 0, 0, "nothing but the metadata, which are damaged", tuple(self._findings))
    for part in parts:
      try:
        if part.kind not in ("tree", "array"):
          checked.append(self._other(part))
          continue
        described = Step(self._step_dir, Config(), part.name)
        plans = [make_plan(n, m, described.notes.get(n), AS_SAVED) for n, m in described.meta.items()]
        trees.append((part.name, described, plans))
      except (ConfigError, CorruptCheckpointError) as e:
        self._found("metadata", str(e), file=part.name)
        checked.append(_Checked(part.name, 0, 0, 0, "nothing but the metadata, which are damaged"))
      except StorageError as e:
        checked.append(self._unread_item(part.name, e))
    self._total = sum(plan.nbytes for _, _, plans in trees for plan in plans)
    checked += [self._tree(name, described, plans, ours if name == state else {}) for name, described, plans in trees]
    return Verdict(
      self._step,
      sum(part.leaves for part in checked),
      sum(part.nbytes for part in checked),
      sum(part.fingerprints for part in checked),
      _in_words(checked),
      tuple(self._findings),
      {part.name: part.how_far for part in checked},
    )

  def _tree(self, name: str, described: Step, plans: list[LeafPlan], ours: dict[str, Any]) -> _Checked:
    try:
      return self._tree_read(name, described, plans, ours)
    except StorageError as e:
      return self._unread_item(name, e)

  def _unread_item(self, name: str, error: Exception) -> _Checked:
    self._unreadable(error, file=name)
    return _Checked(name, 0, 0, 0, _UNREAD)

  def _tree_read(self, name: str, described: Step, plans: list[LeafPlan], ours: dict[str, Any]) -> _Checked:
    item = described.item_dir
    self._stored = {leaf: database_name(path) for leaf, path in described.paths.items()}
    known = self._files(name, item, ours)
    if known is not None and set(known.leaves) != {p.name for p in plans}:
      differ = sorted(set(known.leaves) ^ {p.name for p in plans})
      self._found("structure", f"leaves that were saved and those that there are differ: {', '.join(differ[:10])}")
    # One without files of its own was packed with others.
    large = [p for p in plans if p.nbytes > _GROUP_NBYTES and databases.files_of(item, self._stored[p.name])]
    reader = Reader(described, Config())
    for group in _groups([p for p in plans if p not in large]):
      self._read_group(reader, group, known, item)
    for plan in large:
      self._read_blocks(plan, known, item)
    compared = 0 if known is None else sum(p.name in known.leaves for p in plans)
    if known is None:
      how_far = "databases and chunks are readable; no fingerprints, so that changed values cannot be told"
    else:
      how_far = "all bits compared with what training held"
    return _Checked(name, len(plans), sum(p.nbytes for p in plans), compared, how_far)

  def _other(self, part: contents.Item) -> _Checked:
    """What is no tree: JSON must be JSON; of what only its handler knows, each file must at least be readable."""
    directory = self._step_dir / part.name
    if part.kind == "json":
      contents.json_item(directory)
      return _Checked(part.name, 0, 0, 0, "JSON, read; no fingerprints")
    if quarantine.holds_arrays(directory):
      raise CorruptCheckpointError(f"{directory}: holds arrays, but its {ITEM_METADATA} is gone")
    files = [file for file in look.files_below(directory) if file.name != COMMIT_MARKER]
    nbytes = 0
    for file in files:
      if file.suffix == ".json":
        untrusted.read_json(file)
      nbytes += look.read_through(file, _BLOCK_NBYTES)
    who = f"only its handler{f' ({part.handler})' if part.handler else ''} could tell whether they are sound"
    return _Checked(part.name, 0, nbytes, 0, f"{len(files)} files read; {who}" if files else "holds no file")

  # -- metadata

  def _missing(self, there: set[str]) -> None:
    handlers = step_metadata(self._step_dir).get(ITEM_HANDLERS)
    if isinstance(handlers, dict):
      for name in sorted(set(handlers) - {name.split("/")[0] for name in there}):
        self._found("structure", "this item was saved, and is not there", file=name)

  def _files(self, name: str, item: epath.Path, ours: dict[str, Any]) -> record.Record | None:
    known = None
    try:
      known = record.read_record(self._step_dir, name)
    except (ConfigError, CorruptCheckpointError) as e:  # the item was there a moment ago
      self._found("metadata", str(e), file=self._below_step(item / record.FILE))
    if known is not None:
      for file in record.changed_files(item, known):
        self._found("metadata", "its bits are not those that were written", file=self._below_step(item / file))
    if ours:
      places = [self._step_dir, item, self._step_dir / METRICS_ITEM]
      markers = [place / COMMIT_MARKER for place in places if look.exists(place)]
      for marker in markers:
        if not look.exists(marker):
          self._found("commit", "missing", file=self._below_step(marker))
      self._metrics(ours)
    for database in databases.directories(item):
      why = databases.unreadable(database)
      if why is not None:
        self._found("structure", why, file=self._below_step(database))
    return known

  def _metrics(self, ours: dict[str, Any]) -> None:
    file = self._step_dir / METRICS_ITEM / METRICS_ITEM
    try:
      same = json.loads(look.read_bytes(file)) == ours.get("metrics")
    except FileNotFoundError:
      if look.exists(file.parent):
        self._found("metadata", "missing", file="metrics/metrics")
      return
    except ValueError:
      same = False
    if not same:
      self._found("metadata", "differs from the metrics in the step's JSON", file="metrics/metrics")

  # -- leaves

  def _read_group(self, reader: Reader, plans: Sequence[Any], known: record.Record | None, item: epath.Path) -> None:
    if sum(finding.kind == UNREADABLE for finding in self._findings) >= _MOST_UNREADABLE:
      return
    try:
      values = reader.read([(p, None) for p in plans])
      leaves = {p.name: p.finish(values[p.name]) for p in plans}
    except Exception as e:
      if len(plans) == 1:
        self._unread_leaf(plans[0].name, e, item)
        self._advance(plans[0].nbytes)
        return
      for plan in plans:  # one by one, to tell which
        self._read_group(reader, [plan], known, item)
      return
    if known is not None:
      saved_as = {path: leaf.dtype for path, leaf in known.leaves.items()}
      taken = fingerprint.take_restored(leaves, saved_as)
      # Their sums, which ask for no particular parts.
      tallies = taken.tallies(min(4, os.cpu_count() or 1), health=False, hashed=())
      for path, leaf in taken.leaves.items():
        self._compare(path, known, leaf.dtype, leaf.shape, tallies[path].total * pow(leaf.copies, -1, 1 << 64), item)
    self._advance(sum(p.nbytes for p in plans))

  def _compare(
    self, path: str, known: record.Record, dtype: str, shape: tuple[int, ...], total: int, item: epath.Path
  ) -> None:
    saved = known.leaves.get(path)
    if saved is None:
      return
    if (saved.dtype, saved.shape) != (dtype, shape):
      self._leaf(path, f"is {dtype}{list(shape)}, was saved as {saved.dtype}{list(saved.shape)}", item)
    elif saved.total != total & sums.MASK:
      self._leaf(path, "its bits are not those that training held when it saved", item)

  def _read_blocks(self, plan: Any, known: record.Record | None, item: epath.Path) -> None:
    import tensorstore as ts

    described = item / ITEM_METADATA
    zarr3 = look.exists(described) and json.loads(look.read_bytes(described)).get(USE_ZARR3, False)
    base = kvstore_spec(str(item).rstrip("/") + "/")
    if (item / databases.MANIFEST).exists():
      base = {"driver": "ocdbt", "base": base}
    try:
      root = ts.KvStore.open(base).result()
      spec = {
        "driver": "zarr3" if zarr3 else "zarr",
        "kvstore": (root / prefix(self._stored[plan.name])).spec().to_json(),
      }
      store = ts.open(spec, open=True, read=True).result()
      tally = sums.Tally()
      blocks = list(_blocks(store))
      for at in range(0, len(blocks), _AT_ONCE):
        reads = [(block, store[tuple(slice(*b) for b in block)].read()) for block in blocks[at : at + _AT_ONCE]]
        for block, read in reads:
          value = np.ascontiguousarray(read.result())
          bits = fingerprint.bits_of(value)
          start = tuple(b[0] for b in block) + (0,) * (bits.ndim - len(block))
          shape = (*store.shape, *bits.shape[len(block) :])
          sums.add_block(tally, bits, start, shape)
          self._advance(value.nbytes)
    except Exception as e:
      self._unread_leaf(plan.name, e, item)
      return
    saved = known.leaves.get(plan.name) if known is not None else None
    if saved is not None and saved.total != tally.total:
      self._leaf(plan.name, "its bits are not those that training held when it saved", item)

  # -- what was found

  def _advance(self, nbytes: int) -> None:
    self._done += nbytes
    self._progress(self._step, self._done, self._total)

  def _unread_leaf(self, path: str, error: Exception, item: epath.Path) -> None:
    if is_unreachable(error):
      self._unreadable(error, path)
    else:
      self._leaf(path, root_cause(error), item)

  def _unreadable(self, error: Exception, leaf: str = "", file: str = "") -> None:
    self._found(UNREADABLE, f"{_UNREAD}: {root_cause(error)}", leaf=leaf, file=file)

  def _leaf(self, path: str, message: str, item: epath.Path) -> None:
    files = databases.files_of(item, self._stored.get(path, path))
    self._found("data", message, leaf=path, file=", ".join(self._below_step(item / file) for file in files))

  def _below_step(self, path: epath.Path) -> str:
    return str(path)[len(str(self._step_dir)) + 1 :]

  def _found(self, kind: str, message: str, *, leaf: str = "", file: str = "") -> None:
    self._findings.append(Finding(self._step, kind, leaf, file, message))


def _in_words(checked: Sequence[_Checked]) -> str:
  """How far the items of a step could be checked; metrics, which are in the step's JSON too, are left out."""
  by_text: dict[str, list[str]] = {}
  for part in checked:
    if part.name != METRICS_ITEM:
      by_text.setdefault(part.how_far, []).append(part.name)
  if len(by_text) < 2:
    return "".join(by_text)
  return "; ".join(f"{', '.join(names)}: {text}" for text, names in by_text.items())


def _groups(plans: Sequence[Any]) -> Iterator[list[Any]]:
  group: list[Any] = []
  nbytes = 0
  for plan in plans:
    if group and (nbytes + plan.nbytes > _GROUP_NBYTES or len(group) >= _GROUP_LEAVES):
      yield group
      group, nbytes = [], 0
    group.append(plan)
    nbytes += plan.nbytes
  if group:
    yield group


def _blocks(store: Any) -> Iterator[tuple[tuple[int, int], ...]]:
  """Boxes of whole chunks, of about _BLOCK_NBYTES, that cover an array."""
  shape = list(store.shape)
  chunk = list(store.chunk_layout.read_chunk.shape or shape)
  size = [min(c, n) for c, n in zip(chunk, shape, strict=True)]
  itemsize = store.dtype.numpy_dtype.itemsize
  for axis in reversed(range(len(shape))):
    room = _BLOCK_NBYTES // max(1, math.prod(size) * itemsize)
    if room > 1:
      size[axis] = min(shape[axis], size[axis] * room)
  ranges = [[(at, min(n, at + s)) for at in range(0, n, s)] for n, s in zip(shape, size, strict=True)]
  yield from itertools.product(*ranges)
