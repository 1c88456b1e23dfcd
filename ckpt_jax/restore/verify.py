"""Reads whole steps from storage and reports what is wrong with them: `ckpt_jax.verify`, `ckpt-jax verify`."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from ckpt_jax.config.arguments import step_number
from ckpt_jax.config.units import count
from ckpt_jax.errors import ConfigError, CorruptCheckpointError, NoCheckpointError, StorageError
from ckpt_jax.failures import is_unreachable, root_cause
from ckpt_jax.integrity import databases, exported, fingerprint, record, sums
from ckpt_jax.job.progress import Counter, OnProgress, reported
from ckpt_jax.job.threads import transfers_asked_for
from ckpt_jax.layout import contents
from ckpt_jax.layout.description import ONCE
from ckpt_jax.orbax.format import COMMIT_MARKER, ITEM_HANDLERS, ITEM_METADATA, METRICS_ITEM
from ckpt_jax.restore import stream
from ckpt_jax.restore.leaf import LeafPlan
from ckpt_jax.restore.step import Step
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
from ckpt_jax.storage.objects import snapshot

_GROUP_NBYTES = 128 << 20  # leaves read together
_BLOCK_NBYTES = 64 << 20  # of a file
_MOST_UNREADABLE = 3  # leaves that cannot be read, after which the others are not tried
_UNREAD = "could not be read"
_METADATA_DAMAGED = "nothing but the metadata, which are damaged"
UNREADABLE = "unreadable"  # a kind of finding
DELETED = "deleted while it was read"  # how far a step was checked


@dataclasses.dataclass(frozen=True)
class Finding:
  """One thing that is wrong with a step.

  Attributes:
    step: the step.
    kind: `commit` (marker missing), `metadata`, `structure` (an OCDBT database or the tree), `data` (a leaf);
      `unreadable` for what could not be read, which says nothing about what it holds.
    leaf: its path; empty if it is not about one.
    file: the file, or files, relative to the step, if they are known.
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
  leaves: int = 0
  nbytes: int = 0
  fingerprints: int = 0
  how_far: str = ""
  findings: tuple[Finding, ...] = ()
  items: dict[str, str] = dataclasses.field(default_factory=dict)


class _Checked(NamedTuple):
  """What a Verdict says, for one item."""

  how_far: str
  leaves: int = 0
  nbytes: int = 0
  fingerprints: int = 0


def verify(
  run: str | os.PathLike[str], step: int | None = None, *, on_progress: OnProgress | None = None
) -> list[Finding]:
  """Reads a step, or all of a run, or an export, and compares it with what was written. Changes nothing.

  All items, leaf by leaf, in bounded memory. Steps of plain Orbax have no fingerprints: of these it checks that the
  metadata and databases can be read and that each chunk decodes; `verdicts` reports how far each step was checked.

  Args:
    run: the run, or what `export` wrote.
    step: default: all committed steps, and directories that were one.
    on_progress: called with how far each step is read.

  Returns:
    What is wrong; empty if nothing is.

  Raises:
    NoCheckpointError: if there is no such step, or none at all.
    NotARunError: if there are checkpoints that are no steps of a run.
    StorageError: if the run cannot be listed.
  """
  return [finding for verdict in verdicts(run, step, on_progress) for finding in verdict.findings]


def verdicts(
  run: str | os.PathLike[str], step: int | None = None, on_progress: OnProgress | None = None
) -> Iterator[Verdict]:
  """`verify`, step by step."""
  directory = run_directory(run)
  if (export := exported.read_export(directory)) is not None:
    yield _exported(directory, export, step, on_progress)
    return
  damaged = quarantine.damaged_steps(directory)
  if step is not None:
    step = step_number(step)
    there = counts(step_path(directory, step)) and step not in uncounted_steps(directory)
    if step not in damaged and not there:
      step_directory(directory, step)  # raises, naming the steps that there are
    steps = [step]
  else:
    steps = sorted({*committed_steps(directory), *damaged})
    if not steps:
      foreign.refuse(directory)
      latest_committed(directory)  # raises
  for number in steps:
    if number in damaged:
      finding = Finding(number, "commit", "", "", str(damaged[number]))
      verdict = Verdict(number, how_far="nothing could be read", findings=(finding,))
    else:
      with snapshot(step_path(directory, number)):
        verdict = _Check(directory, number, on_progress).verdict()
    if verdict.findings and is_gone(directory, number):
      if step is not None:
        raise NoCheckpointError(f"{directory}: step {step} was deleted while it was read", topic="deleted-while-read")
      verdict = Verdict(number, how_far=DELETED)
    yield verdict


def _exported(
  directory: epath.Path, export: exported.ExportRecord, step: int | None, on_progress: OnProgress | None
) -> Verdict:
  """Checks what `ckpt_jax.export` wrote."""
  made_from = int(export.about["step"])
  if step not in (None, made_from):
    raise NoCheckpointError(f"{directory}: is an export of step {made_from}, not of step {step}")
  counter = Counter()
  with reported(on_progress, f"verifying the export of step {made_from}", export.nbytes, counter):
    wrong = exported.wrong_files(directory, export.files, counter.add)
  findings = tuple(Finding(made_from, "data", leaf, file, message) for file, leaf, message in wrong)
  how_far = f"all bits compared with what was exported ({export.about['format']})"
  return Verdict(made_from, len(export.leaves), export.nbytes, len(export.leaves), how_far, findings)


class _Check:
  """Checks one step, and collects what is wrong with it."""

  def __init__(self, directory: epath.Path, number: int, on_progress: OnProgress | None):
    self._directory = step_path(directory, number)
    self._number = number
    self._on_progress = on_progress
    self._findings: list[Finding] = []
    self._checked: dict[str, _Checked] = {}
    self._read = Counter()  # bytes

  @transfers_asked_for()
  def verdict(self) -> Verdict:
    """Reads the step."""
    try:
      self._check()
    except StorageError as e:
      self._unreadable(e)
      return Verdict(self._number, nbytes=int(self._read()), how_far=_UNREAD, findings=tuple(self._findings))
    except CorruptCheckpointError as e:
      self._found("metadata", str(e))
      return Verdict(self._number, how_far=_METADATA_DAMAGED, findings=tuple(self._findings))
    checked = self._checked.values()
    incomplete = any(finding.kind == UNREADABLE for finding in self._findings)
    return Verdict(
      self._number,
      sum(item.leaves for item in checked),
      sum(item.nbytes for item in checked),
      sum(item.fingerprints for item in checked),
      "not all of it could be read" if incomplete else _in_words(self._checked),
      tuple(self._findings),
      {name: item.how_far for name, item in self._checked.items()},
    )

  def _check(self) -> None:
    ours = our_metadata(self._directory)
    state = contents.item_name(self._directory) if ours else None  # it must be there, whatever else is
    parts = contents.items(self._directory)
    handlers = step_metadata(self._directory).get(ITEM_HANDLERS)
    for name in sorted(set(handlers if isinstance(handlers, dict) else ()) - {p.name.split("/")[0] for p in parts}):
      self._found("structure", "this item was saved, and is not there", file=name)
    steps = {}
    for part in parts:
      with self._item(part.name):
        if part.kind in ("tree", "array"):
          steps[part.name] = Step(self._directory, ONCE, part.name)
        else:
          self._checked[part.name] = self._other(part)
    plans = {name: [step.plan(leaf) for leaf in step.meta] for name, step in steps.items()}
    total = sum(plan.nbytes for of_item in plans.values() for plan in of_item)
    with reported(self._on_progress, f"verifying step {self._number}", total, self._read):
      for name, step in steps.items():
        with self._item(name):
          self._checked[name] = self._tree(step, plans[name], ours if name == state else {})

  @contextlib.contextmanager
  def _item(self, name: str) -> Iterator[None]:
    """Notes an error that ends the check of an item, so that the others are checked all the same."""
    try:
      yield
    except (ConfigError, CorruptCheckpointError) as e:
      self._found("metadata", str(e), file=name)
      self._checked[name] = _Checked(_METADATA_DAMAGED)
    except StorageError as e:
      self._unreadable(e, file=name)
      self._checked[name] = _Checked(_UNREAD)

  def _tree(self, step: Step, plans: list[LeafPlan], ours: dict[str, Any]) -> _Checked:
    known = self._files(step, ours)
    if known is not None and (differ := sorted(set(known.leaves) ^ step.meta.keys())):
      names = ", ".join(differ[:10])
      self._found("structure", f"the leaves in the step are not those that were saved; they differ in {names}")
    boxes = collections.defaultdict(list)
    for group in stream.parts(step, nbytes=_GROUP_NBYTES):
      if group[0].box is None:
        self._read_group(step, [part.plan for part in group], known)
      else:
        boxes[group[0].plan.name].append(group)
    for name, groups in boxes.items():
      self._read_boxes(step, name, groups, known)
    nbytes = sum(p.nbytes for p in plans)
    if known is None:
      how_far = "databases and chunks are readable; no fingerprints to detect changed values with"
      return _Checked(how_far, len(plans), nbytes)
    compared = sum(p.name in known.leaves for p in plans)
    return _Checked("all bits compared with what training held", len(plans), nbytes, compared)

  def _other(self, part: contents.Item) -> _Checked:
    """An item that is no tree: JSON must be JSON; of one that only its handler knows, each file must be readable."""
    directory = self._directory / part.name
    if part.kind == "json":
      contents.json_item(directory)
      return _Checked("JSON, read; no fingerprints")
    if quarantine.holds_arrays(directory):
      raise CorruptCheckpointError(f"{directory}: holds arrays, but its {ITEM_METADATA} is gone")
    files = [file for file in look.files_below(directory) if file.name != COMMIT_MARKER]
    nbytes = 0
    for file in files:
      if file.suffix == ".json":
        untrusted.read_json(file)
      nbytes += look.read_through(file, _BLOCK_NBYTES)
    handler = f"its handler ({part.handler})" if part.handler else "its handler"
    what = f"{count(len(files), 'file')} read; only {handler} could tell whether they are sound"
    return _Checked(what if files else "holds no file", nbytes=nbytes)

  # -- metadata

  def _files(self, step: Step, ours: dict[str, Any]) -> record.Record | None:
    """Checks an item's files other than its arrays; `ours` if the item is a state of ours. Returns its record."""
    known, item = None, step.item_dir
    try:
      known = record.read_record(self._directory, step.item_name, step.ours)
    except CorruptCheckpointError as e:
      self._found("metadata", str(e), file=self._below_step(item / record.FILE))
    if known is not None:
      for file in record.changed_files(item, known):
        self._found("metadata", "its bits are not those that were written", file=self._below_step(item / file))
    if ours:
      places = [self._directory, item, self._directory / METRICS_ITEM]
      for marker in [place / COMMIT_MARKER for place in places if look.exists(place)]:
        if not look.exists(marker):
          self._found("commit", "missing", file=self._below_step(marker))
      self._metrics(ours)
    for database in databases.directories(item):
      why = databases.unreadable(database)
      if why is not None:
        self._found("structure", why, file=self._below_step(database))
    return known

  def _metrics(self, ours: dict[str, Any]) -> None:
    file, problem = self._directory / METRICS_ITEM / METRICS_ITEM, ""
    try:
      if json.loads(look.read_bytes(file)) != ours.get("metrics"):
        problem = "differs from the metrics in the step's JSON"
    except FileNotFoundError:
      problem = "missing" if look.exists(file.parent) else ""
    except ValueError:
      problem = "is not JSON"
    if problem:
      self._found("metadata", problem, file="metrics/metrics")

  # -- leaves

  def _read_group(self, step: Step, plans: Sequence[LeafPlan], known: record.Record | None) -> None:
    if sum(finding.kind == UNREADABLE for finding in self._findings) >= _MOST_UNREADABLE:
      return
    try:
      values = step.read([(p, None) for p in plans])
      leaves = {p.name: p.finish(values[p.name]) for p in plans}
    except Exception as e:
      if len(plans) == 1:
        self._unread_leaf(step, plans[0].name, e)
        self._read.add(plans[0].nbytes)
      else:
        for plan in plans:  # one by one, to find the damaged ones
          self._read_group(step, [plan], known)
      return
    if known is not None:
      saved_as = {path: leaf.dtype for path, leaf in known.leaves.items()}
      taken = fingerprint.take_restored(leaves, saved_as)
      # Sums rather than hashes, which would need the parts that were hashed when it was saved.
      tallies = taken.tallies(min(4, os.cpu_count() or 1), health=False, hashed=())
      for path, leaf in taken.leaves.items():
        saved = known.leaves.get(path)
        if saved is not None and (saved.dtype, saved.shape) != (leaf.dtype, leaf.shape):
          was = f"was saved as {saved.dtype}{list(saved.shape)}"
          self._leaf(step, path, f"is {leaf.dtype}{list(leaf.shape)}, {was}")
        else:
          self._compare(step, path, known, tallies[path].total)
    self._read.add(sum(p.nbytes for p in plans))

  def _read_boxes(self, step: Step, name: str, groups: list[list[stream.Part]], known: record.Record | None) -> None:
    tally = sums.Tally()
    try:
      for (part,), (value,) in stream.stream(step, groups):
        tally.add(fingerprint.tally_of_box(value, part.box or (), part.plan.shape))
        self._read.add(value.nbytes)
    except Exception as e:
      self._unread_leaf(step, name, e)
      return
    self._compare(step, name, known, tally.total)

  def _compare(self, step: Step, path: str, known: record.Record | None, total: int) -> None:
    saved = known.leaves.get(path) if known is not None else None
    if saved is not None and saved.total != total:
      self._leaf(step, path, "its bits are not those that training held when it saved")

  # -- what was found

  def _unread_leaf(self, step: Step, path: str, error: Exception) -> None:
    if is_unreachable(error):
      self._unreadable(error, path)
    else:
      self._leaf(step, path, root_cause(error))

  def _unreadable(self, error: Exception, leaf: str = "", file: str = "") -> None:
    self._found(UNREADABLE, f"{_UNREAD}: {root_cause(error)}", leaf=leaf, file=file)

  def _leaf(self, step: Step, path: str, message: str) -> None:
    files = databases.files_of(step.item_dir, step.meta[path].name)
    self._found("data", message, leaf=path, file=", ".join(self._below_step(step.item_dir / file) for file in files))

  def _below_step(self, path: epath.Path) -> str:
    return str(path)[len(str(self._directory)) + 1 :]

  def _found(self, kind: str, message: str, *, leaf: str = "", file: str = "") -> None:
    self._findings.append(Finding(self._number, kind, leaf, file, message))


def _in_words(checked: Mapping[str, _Checked]) -> str:
  """How far the items of a step could be checked; metrics, which are in the step's JSON too, are left out."""
  by_text: dict[str, list[str]] = {}
  for name, item in checked.items():
    if name != METRICS_ITEM:
      by_text.setdefault(item.how_far, []).append(name)
  if len(by_text) < 2:
    return "".join(by_text)
  return "; ".join(f"{', '.join(names)}: {text}" for text, names in by_text.items())
