"""The steps of a run directory and their metadata, read without Orbax's CheckpointManager.

All of it raises StorageError if storage cannot be read for now, CorruptCheckpointError if metadata is damaged, and
NotARunError if the steps of a run are named in several ways.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
from collections.abc import Sequence
from typing import Any

from etils import epath

from ckpt_jax.config.arguments import step_number
from ckpt_jax.config.units import is_uncompressed, pairs_text, size_text
from ckpt_jax.errors import CheckpointError, CorruptCheckpointError, NoCheckpointError, StorageError
from ckpt_jax.orbax import format as fmt
from ckpt_jax.run import untrusted
from ckpt_jax.run.checksums import is_intact
from ckpt_jax.run.naming import PLAIN, Naming, naming_of
from ckpt_jax.run.notes import ASIDE, DELETING, NOTES, PINS, noted_steps
from ckpt_jax.storage import look
from ckpt_jax.storage.connect import connect
from ckpt_jax.storage.objects import snapshot
from ckpt_jax.storage.parallel import in_threads
from ckpt_jax.storage.paths import given, literal, url_scheme
from ckpt_jax.storage.urls import SCHEMES, is_object_store

RECORD = "ckpt_jax.json"  # beside ITEM_METADATA: fingerprints and health, see integrity/record.py
EXPORT = "ckpt_jax_export.json"  # of an export, see integrity/exported.py: a directory with it is no run
OURS = "ckpt_jax"  # our key inside Orbax's custom_metadata
THINNED = "thinned"  # in our metadata: which part a step still holds, if it was thinned
_LISTINGS = 30  # at most, of a run whose steps are being deleted


@dataclasses.dataclass(frozen=True)
class StepInfo:
  """One committed step.

  Attributes:
    step: the step number.
    time: when it was committed, UTC; None if its metadata does not say.
    nbytes: bytes of its arrays, or of its files for a step that plain Orbax wrote.
    metrics: the metrics given to `save`.
    healthy: False if the step was tagged unhealthy; None if that was not checked.
    pinned: whether it is pinned, so that retention leaves it alone.
    resumable: False if it was thinned to a part of its state, from which training cannot resume.
    compressed: whether it was saved with a codec.
  """

  step: int
  time: datetime.datetime | None
  nbytes: int
  metrics: dict[str, Any]
  healthy: bool | None = None
  pinned: bool = False
  resumable: bool = True
  compressed: bool = False

  def __repr__(self) -> str:
    when = "" if self.time is None else f", {self.time:%Y-%m-%d %H:%M} UTC"
    tags = [(self.pinned, "pinned"), (self.healthy is False, "unhealthy"), (not self.resumable, "thinned")]
    more = "".join(f", {text}" for text in (pairs_text(self.metrics), *(word for true, word in tags if true)) if text)
    return f"StepInfo({self.step}: {size_text(self.nbytes)}{when}{more})"


def run_directory(path: str | os.PathLike[str]) -> epath.Path:
  """An absolute path, with `~` expanded; URLs stay as they are (plain Orbax refuses relative paths).

  Raises:
    ConfigError: if the path is empty, as from a variable that is not set.
    StorageError: if it is another kind of URL, or a path in which TensorStore would write elsewhere.
  """
  path = given(path)
  scheme = url_scheme(path)
  if scheme in SCHEMES:
    connect(path)
  elif scheme:
    raise StorageError(f"{os.fspath(path)}: only local paths, gs:// and s3:// are known", topic="run-directory")
  return literal(path)


# -- which steps there are


def committed_steps(run: epath.Path) -> list[int]:
  """Step numbers in ascending order.

  Leftovers of unfinished saves, steps marked for deletion, and empty or foreign directories are not steps.
  """
  seen: set[str] = set()
  while True:
    with snapshot(run):
      names = look.names(run)
      if not names:
        return []
      uncounted = uncounted_steps(run)
      naming = naming_in(run, names)
      there = [step for name in names if (step := naming.step(name)) is not None]
      steps = [step for step in there if step not in uncounted]
      good = in_threads(counts, [run / naming.name(step) for step in steps])
    # A step that vanished during the listing may have made way for a newer one, which the listing lacks.
    if (len(steps) == len(there) and all(good)) or seen == set(names):
      return sorted(step for step, ok in zip(steps, good, strict=True) if ok)
    seen = set(names)


_namings: dict[str, Naming] = {}


def naming_in(run: epath.Path, names: Sequence[str] | None = None, *, opening: bool = False) -> Naming:
  """The naming of a run's steps, as found when it was last listed.

  `names` are the entries of its directory, if they were just listed. `opening` forgets the naming of a run whose steps
  are all gone.
  """
  key = os.fspath(run)
  if names is not None or opening or key not in _namings:
    names = look.names(run) if names is None else names
    found = naming_of(names, lambda n: counts(run / n), lambda n: not look.names(run / n), key)
    _namings[key] = found or (PLAIN if opening else _namings.get(key, PLAIN))
  return _namings[key]


def use_naming(run: epath.Path, naming: Naming) -> None:
  """Sets the naming of a run's steps on a process that has not listed the run."""
  _namings[os.fspath(run)] = naming


def newest_step(run: epath.Path, names: Sequence[str] | None = None) -> int | None:
  """The newest committed step, found by looking into as few others as possible. `names` as for `naming_in`."""
  names = look.names(run) if names is None else names
  naming = naming_in(run, names)
  uncounted = uncounted_steps(run) if names else set()
  steps = sorted({step for name in names if (step := naming.step(name)) is not None} - uncounted, reverse=True)
  return next((step for step in steps if counts(run / naming.name(step))), None)


def latest_committed(run: epath.Path) -> int:
  """The newest committed step; raises NoCheckpointError if there is none."""
  step = newest_step(run)
  if step is None:
    raise NoCheckpointError(why_no_step(run))
  return step


def why_no_step(run: epath.Path) -> str:
  """The message for a run without a committed step."""
  if not look.exists(run):
    why = "nothing is stored there" if is_object_store(run) else "there is no such directory"
    return f"{run}: no committed checkpoint: {why}; check the path"
  if not look.names(run):
    return f"{run}: no committed checkpoint: the directory is empty; save one first, or check the path"
  return f"{run}: no committed checkpoint; save one first, or check the path"


def newest_to_restore(run: epath.Path) -> int | None:
  """The newest committed step that was not thinned, else the newest; None in an empty run."""
  steps = committed_steps(run)
  for step in reversed(steps):
    try:
      if THINNED not in our_metadata(step_path(run, step)):
        return step
    except (CorruptCheckpointError, StorageError):
      return step  # reading it reports the damage
  return steps[-1] if steps else None


def newest_resumable(run: epath.Path) -> int | None:
  """The newest committed step that training can resume from: whole and not known to be unhealthy; None without one."""
  for step in reversed(committed_steps(run)):
    try:
      info = step_info(run, step)
    except (CorruptCheckpointError, StorageError):
      continue
    if info.resumable and info.healthy is not False:
      return step
  return None


def uncounted_steps(run: epath.Path) -> set[int]:
  """Steps that no longer count although they are still there: marked for deletion, quarantined or rolled back."""
  with snapshot(run / NOTES):
    marked = noted_steps(run, DELETING)
    return marked | noted_steps(run, ASIDE) if is_object_store(run) else marked


# -- one step


def step_path(run: epath.Path, step: int) -> epath.Path:
  """The directory of a step, whether it exists or not."""
  return run / naming_in(run).name(step)


def step_directory(run: epath.Path, step: int) -> epath.Path:
  """The directory of a committed step.

  Raises:
    CheckpointError: if `step` is not a whole number.
    NoCheckpointError: if it is not a committed step; the message lists those that are.
  """
  step = step_number(step)
  directory = step_path(run, step)
  if not is_step(directory) or step in uncounted_steps(run):
    steps = [str(s) for s in committed_steps(run)]
    if not steps and not look.exists(run):
      raise NoCheckpointError(why_no_step(run))
    shown = ", ".join(steps if len(steps) <= 10 else [*steps[:3], "...", *steps[-5:]])
    there = f"; committed steps: {shown}" if steps else "; no step is committed there"
    raise NoCheckpointError(f"{run}: no committed step {step}{there}{_aside_hint(run, step)}")
  return directory


def _aside_hint(run: epath.Path, step: int) -> str:
  """Where a step is that was put aside, see run/quarantine.py."""
  marked = is_object_store(run) and step in noted_steps(run, ASIDE)
  moved = any(n.split("-", 1)[0] == str(step) for k in ("quarantine", "set_aside") for n in look.names(run / NOTES / k))
  return f". Step {step} was put aside: `ckpt-jax ls {run} --all` says why" if marked or moved else ""


def is_step(directory: epath.Path) -> bool:
  """Whether a directory holds a committed Orbax step."""
  if is_object_store(directory):
    # Buckets have no rename: a step is committed once its marker is written, last of all.
    return (directory / fmt.COMMIT_MARKER).exists()
  if look.exists(directory / fmt.STEP_METADATA) or look.exists(directory / fmt.DEFAULT_ITEM / fmt.ITEM_METADATA):
    return True
  # Orbax before 0.5.20 wrote nothing about a step as a whole.
  return is_tree(directory) or any(_is_bare_item(directory / name) for name in look.names(directory))


def is_tree(directory: epath.Path) -> bool:
  """Whether a directory holds a pytree that some version of Orbax wrote."""
  return look.exists(directory / fmt.ITEM_METADATA) or is_message_pack(directory / fmt.AGGREGATE)


def _is_bare_item(path: epath.Path) -> bool:
  """Whether a directory is an item of a step, rather than a checkpoint by itself in a run of such."""
  return not path.name[-1:].isdigit() and is_tree(path) and not look.exists(path / fmt.STEP_METADATA)


def is_message_pack(file: epath.Path) -> bool:
  """Whether a file may be a MessagePack map with text for keys, as flax and early Orbax write a tree.

  TensorFlow's `checkpoint` is text.
  """
  if not look.exists(file) or look.is_dir(file):
    return False
  head = look.read_bytes(file, 6)
  sizes = {0xDE: 3, 0xDF: 5} | dict.fromkeys(range(0x81, 0x90), 1)
  key = head[sizes.get(head[0], len(head)) :] if head else b""
  return bool(key) and (0xA0 <= key[0] <= 0xBF or key[0] in (0xD9, 0xDA))


def counts(directory: epath.Path) -> bool:
  """Whether a directory is a step, or may be: on a disk one that cannot be read must not be passed over."""
  try:
    return is_step(directory)
  except StorageError:
    if is_object_store(directory):
      raise
    return True


def is_gone(run: epath.Path, step: int) -> bool:
  """Whether a step that existed is deleted or being deleted, which can look like damage to its readers."""
  if step in uncounted_steps(run):
    return True
  directory = step_path(run, step)
  there = is_step(directory) if is_object_store(directory) else look.exists(directory)
  return not there or look.is_vanishing(directory)


# -- metadata


def step_metadata(step_dir: epath.Path) -> dict[str, Any]:
  """The step's JSON as Orbax keeps it; ours is under custom_metadata/ckpt_jax. Empty if an old Orbax wrote none."""
  file = step_dir / fmt.STEP_METADATA
  try:
    data = untrusted.read_json(file)
  except FileNotFoundError:
    return {}
  untrusted.check_object(data, str(file))
  return data


def our_metadata(step_dir: epath.Path, data: dict[str, Any] | None = None) -> dict[str, Any]:
  """What ckpt_jax recorded in a step; empty for a step that plain Orbax wrote.

  `data` is its `step_metadata`, if that was just read.
  """
  custom = (step_metadata(step_dir) if data is None else data).get(fmt.CUSTOM)
  ours = custom.get(OURS) if isinstance(custom, dict) else None
  if ours is not None and not (isinstance(ours, dict) and is_intact(ours)):
    raise CorruptCheckpointError(f"{step_dir / fmt.STEP_METADATA}: what ckpt_jax wrote there has changed")
  return ours or {}


def our_item(ours: dict[str, Any]) -> str:
  """The item that holds the state in a step whose `our_metadata` is `ours`."""
  return str(ours.get("item", fmt.DEFAULT_ITEM))


def list_steps(path: str | os.PathLike[str]) -> list[StepInfo]:
  """All committed steps of a run, oldest first."""
  steps, damaged = list_readable_steps(path)
  for error in damaged.values():
    raise error
  return steps


def list_readable_steps(path: str | os.PathLike[str]) -> tuple[list[StepInfo], dict[int, CheckpointError]]:
  """The committed steps of a run whose metadata can be read, oldest first, and the errors of the others by step.

  An error is a CorruptCheckpointError, or a StorageError for what cannot be read for now. Steps that are deleted
  meanwhile are left out.
  """
  run = run_directory(path)
  found: list[StepInfo | CheckpointError | None] = []
  listed: list[int] = []
  for _ in range(_LISTINGS):
    before, listed = listed, committed_steps(run)
    found = in_threads(lambda step: _info_or_error(run, step), listed)
    if None not in found or listed == before:  # else newer steps may have replaced those that vanished
      break
  pins = noted_steps(run, PINS)
  steps = [dataclasses.replace(s, pinned=s.step in pins) for s in found if isinstance(s, StepInfo)]
  return steps, {step: e for step, e in zip(listed, found, strict=True) if isinstance(e, CheckpointError)}


def _info_or_error(run: epath.Path, step: int) -> StepInfo | CheckpointError | None:
  """None for a step that is deleted meanwhile."""
  try:
    found = step_info(run, step)
    # A step of an old Orbax has no commit time; nor has one whose metadata was just deleted.
    return found if found.time is not None or is_step(step_path(run, step)) else None
  except (CorruptCheckpointError, StorageError) as e:
    return None if is_gone(run, step) else e


def step_info(run: epath.Path, step: int) -> StepInfo:
  """One committed step, without whether it is pinned."""
  step_dir = step_path(run, step)
  data = step_metadata(step_dir)
  try:
    ours = our_metadata(step_dir, data)
    stamp = data.get(fmt.COMMITTED_AT)
    time = datetime.datetime.fromtimestamp(stamp / 1e9, datetime.timezone.utc) if stamp else None
    if ours:
      layout = (ours.get("config") or {}).get("layout") or {}
      return StepInfo(
        step,
        time,
        int(ours["nbytes"]),
        dict(ours["metrics"]),
        (ours.get("health") or {}).get("healthy"),
        resumable=THINNED not in ours,
        compressed=not is_uncompressed(layout.get("compression")),
      )
    return StepInfo(step, time, tree_nbytes(step_dir), _orbax_metrics(step_dir))
  except StorageError:
    raise
  except (KeyError, TypeError, AttributeError, ValueError, OverflowError, FileNotFoundError, NotADirectoryError) as e:
    raise CorruptCheckpointError(f"{step_dir}: its metadata is damaged ({type(e).__name__}: {e})") from e
  except OSError as e:
    raise look.cannot_be_read(step_dir, e) from e


def _orbax_metrics(step_dir: epath.Path) -> dict[str, Any]:
  """The metrics item that Orbax keeps of a step; empty without one."""
  file = step_dir / fmt.METRICS_ITEM / fmt.METRICS_ITEM
  if not look.exists(file):
    return {}
  metrics = untrusted.read_json(file)
  untrusted.check_object(metrics, str(file))
  return metrics


def tree_nbytes(directory: epath.Path) -> int:
  """Bytes of all files in a directory, on disks and in buckets."""
  # epath refuses a recursive glob
  return sum(tree_nbytes(p) if p.is_dir() else p.stat().length for p in directory.iterdir())
