"""What lies in a run directory, read without a CheckpointManager: committed steps and their metadata."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import datetime
import os
from collections.abc import Sequence
from typing import Any

from etils import epath

from ckpt_jax.config.arguments import step_number
from ckpt_jax.errors import CheckpointError, CorruptCheckpointError, NoCheckpointError, StorageError
from ckpt_jax.orbax.format import (
  AGGREGATE,
  COMMIT_MARKER,
  COMMITTED_AT,
  CUSTOM,
  DEFAULT_ITEM,
  ITEM_METADATA,
  METRICS_ITEM,
  STEP_METADATA,
)
from ckpt_jax.run import untrusted
from ckpt_jax.run.checksums import is_intact
from ckpt_jax.run.naming import PLAIN, Naming, naming_of
from ckpt_jax.storage import look
from ckpt_jax.storage.connect import connect
from ckpt_jax.storage.objects import snapshot
from ckpt_jax.storage.paths import given, literal, url_scheme
from ckpt_jax.storage.urls import SCHEMES, is_object_store

RECORD = "ckpt_jax.json"  # beside ITEM_METADATA: fingerprints and health, see integrity/record.py
OURS = "ckpt_jax"  # our key inside Orbax's custom_metadata
# What ckpt_jax notes about a run: RUN/.ckpt_jax/pins/STEP, RUN/.ckpt_jax/deleting/STEP and more. Plain small files,
# each written in one go, since a bucket has neither rename nor append.
NOTES = ".ckpt_jax"
PINS, DELETING = "pins", "deleting"
# Steps in a bucket that count no longer and are still there (RUN/.ckpt_jax/aside/STEP); on a disk they are moved away.
ASIDE = "aside"
THINNED = "thinned"  # in our metadata: what was kept of a step that holds a part of its state alone
_LISTINGS = 30  # of a run whose steps are deleted while they are looked at


@dataclasses.dataclass(frozen=True)
class StepInfo:
  """One committed step.

  Attributes:
    step: the step number.
    time: when it was committed, UTC; None if its metadata does not say.
    nbytes: bytes of its arrays, or of its files for a step that plain Orbax wrote.
    metrics: what was given to `save`.
    healthy: False if the step was tagged unhealthy; None if nobody looked.
    pinned: whether it was pinned, so that retention leaves it alone.
    resumable: False if it was thinned to a part of its state, from which training cannot go on.
  """

  step: int
  time: datetime.datetime | None
  nbytes: int
  metrics: dict[str, Any]
  healthy: bool | None = None
  pinned: bool = False
  resumable: bool = True


def run_directory(path: str | os.PathLike[str]) -> epath.Path:
  """An absolute path, with `~` expanded; URLs stay as they are (plain Orbax refuses relative paths).

  Raises:
    ConfigError: if there is no path in it, as from a variable that is not set.
    StorageError: if it is another kind of URL, or a path in which TensorStore would write elsewhere.
  """
  path = given(path)
  scheme = url_scheme(path)
  if scheme in SCHEMES:
    connect(path)
  elif scheme:
    raise StorageError(f"{os.fspath(path)}: only local paths, gs:// and s3:// are known")
  return literal(path)


def committed_steps(run: epath.Path) -> list[int]:
  """Step numbers in ascending order.

  Leftovers of unfinished saves, steps marked for deletion, and empty or foreign directories are not steps.

  Raises:
    NotARunError: if steps are called in several ways.
  """
  seen: set[str] = set()
  while True:
    with snapshot(run):
      names = look.names(run)
      if not names:
        return []
      doomed = uncounted_steps(run)
      called = naming_in(run, names)
      there = [step for name in names if (step := called.step(name)) is not None]
      steps = [step for step in there if step not in doomed]
      with concurrent.futures.ThreadPoolExecutor(16) as pool:
        good = list(pool.map(counts, [run / called.name(step) for step in steps]))
    # A step that went while it was looked at may have given way to a newer one, which this listing lacks.
    if (len(steps) == len(there) and all(good)) or seen == set(names):
      return sorted(step for step, ok in zip(steps, good, strict=True) if ok)
    seen = set(names)


_namings: dict[str, Naming] = {}


def naming_in(run: epath.Path, names: Sequence[str] | None = None, *, opening: bool = False) -> Naming:
  """How the steps of a run are called: as those that were there when it was last listed.

  Args:
    run: the run.
    names: what its directory holds, if that was looked up just now.
    opening: forget what was known of a run whose steps are all gone.

  Raises:
    NotARunError: if they are called in several ways.
  """
  key = os.fspath(run)
  if names is not None or opening or key not in _namings:
    names = look.names(run) if names is None else names
    found = naming_of(names, lambda n: counts(run / n), lambda n: not look.names(run / n), key)
    _namings[key] = found or (PLAIN if opening else _namings.get(key, PLAIN))
  return _namings[key]


def is_called(run: epath.Path, naming: Naming) -> None:
  """For processes that did not look: how the steps of a run are called."""
  _namings[os.fspath(run)] = naming


def newest_step(run: epath.Path, names: Sequence[str] | None = None) -> int | None:
  """The newest committed step; looks at as few of the others as can be. `names` as for `naming`."""
  names = look.names(run) if names is None else names
  called = naming_in(run, names)
  doomed = uncounted_steps(run) if names else set()
  steps = sorted({step for name in names if (step := called.step(name)) is not None} - doomed, reverse=True)
  return next((step for step in steps if counts(run / called.name(step))), None)


def step_path(run: epath.Path, step: int) -> epath.Path:
  """The directory of a step, whether it is there or not."""
  return run / naming_in(run).name(step)


def noted_steps(run: epath.Path, kind: str) -> set[int]:
  """The steps with a note of a kind, `PINS` or `DELETING`."""
  return {int(name) for name in look.names(run / NOTES / kind) if name.isdigit()}


def uncounted_steps(run: epath.Path) -> set[int]:
  """Steps that are no steps any more: marked for deletion, quarantined, or behind a rollback."""
  gone = noted_steps(run, DELETING)
  return gone | noted_steps(run, ASIDE) if is_object_store(run) else gone


def is_step(directory: epath.Path) -> bool:
  """Whether `directory` holds what every committed Orbax step holds.

  Raises:
    StorageError: if that cannot be found out.
  """
  if is_object_store(directory):
    # Nothing is renamed there: a step is committed once its marker is written, last of all.
    return (directory / COMMIT_MARKER).exists()
  if look.exists(directory / STEP_METADATA) or look.exists(directory / DEFAULT_ITEM / ITEM_METADATA):
    return True
  # Orbax before 0.5.20 wrote nothing about a step as a whole.
  return is_tree(directory) or any(_is_bare_item(directory / name) for name in look.names(directory))


def is_tree(directory: epath.Path) -> bool:
  """Whether `directory` holds a pytree that some version of Orbax wrote."""
  return look.exists(directory / ITEM_METADATA) or is_message_pack(directory / AGGREGATE)


def _is_bare_item(path: epath.Path) -> bool:
  """Whether a directory is an item of a step, rather than a checkpoint by itself in a run of such."""
  return not path.name[-1:].isdigit() and is_tree(path) and not look.exists(path / STEP_METADATA)


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
  """Whether a directory is a step, or may be: one of a disk that cannot be looked into must not be passed over."""
  try:
    return is_step(directory)
  except StorageError:
    if is_object_store(directory):
      raise
    return True


def is_gone(run: epath.Path, step: int) -> bool:
  """Whether a step that was there is deleted, or will be: to whoever reads it that may look like damage."""
  if step in uncounted_steps(run):
    return True
  directory = step_path(run, step)
  there = is_step(directory) if is_object_store(directory) else look.exists(directory)
  return not there or look.is_vanishing(directory)


def step_directory(run: epath.Path, step: int) -> epath.Path:
  """The directory of a committed step.

  Raises:
    CheckpointError: if `step` is no whole number.
    NoCheckpointError: naming the steps that there are.
  """
  step = step_number(step)
  directory = step_path(run, step)
  if not is_step(directory) or step in uncounted_steps(run):
    steps = committed_steps(run)
    there = f"; committed steps: {_brief(steps)}" if steps else "; no step is committed there"
    raise NoCheckpointError(f"{run}: no committed step {step}{there}{_aside_hint(run, step)}")
  return directory


def _aside_hint(run: epath.Path, step: int) -> str:
  """Where a step went that is no step any more; see `integrity.aside`, which is a room below."""
  marked = is_object_store(run) and step in noted_steps(run, ASIDE)
  moved = any(n.split("-", 1)[0] == str(step) for k in ("quarantine", "set_aside") for n in look.names(run / NOTES / k))
  return f". Step {step} was put aside: `ckpt-jax ls {run} --all` says why" if marked or moved else ""


def _brief(steps: list[int]) -> str:
  text = [str(s) for s in steps]
  return ", ".join(text if len(text) <= 10 else [*text[:3], "...", *text[-5:]])


def latest_committed(run: epath.Path) -> int:
  """The newest committed step.

  Raises:
    NoCheckpointError: if there is none.
  """
  step = newest_step(run)
  if step is None:
    raise NoCheckpointError(f"{run}: no committed checkpoint; save one first, or check the path")
  return step


def newest_to_restore(run: epath.Path) -> int | None:
  """The newest committed step that was not thinned, else the newest; None in an empty run."""
  steps = committed_steps(run)
  for step in reversed(steps):
    try:
      if thinned_to(step_path(run, step)) is None:
        return step
    except (CorruptCheckpointError, StorageError):
      return step  # reading it tells what is wrong
  return steps[-1] if steps else None


def newest_resumable(run: epath.Path) -> int | None:
  """The newest committed step that training can go on from: whole, and not known to be unhealthy. None without one."""
  for step in reversed(committed_steps(run)):
    try:
      info = _info(step_path(run, step), step)
    except (CorruptCheckpointError, StorageError):
      continue
    if info.resumable and info.healthy is not False:
      return step
  return None


def thinned_to(step_dir: epath.Path) -> list[str] | None:
  """The paths that a thinned step still holds, e.g. `["params"]`; None for a whole one."""
  return (our_metadata(step_dir).get(THINNED) or {}).get("keep")


def step_metadata(step_dir: epath.Path) -> dict[str, Any]:
  """The step's JSON as Orbax keeps it; ours is under custom_metadata/ckpt_jax. Empty if an old Orbax wrote none.

  Raises:
    CorruptCheckpointError: if it is no JSON object.
  """
  file = step_dir / STEP_METADATA
  try:
    data = untrusted.read_json(file)
  except FileNotFoundError:
    return {}
  if not isinstance(data, dict):
    raise CorruptCheckpointError(f"{file}: expected a JSON object")
  return data


def our_metadata(step_dir: epath.Path) -> dict[str, Any]:
  """What ckpt_jax recorded in a step; empty for a step that plain Orbax wrote.

  Raises:
    CorruptCheckpointError: if it cannot be read, or is not what was written.
  """
  return _ours(step_metadata(step_dir), step_dir) or {}


def our_item(ours: dict[str, Any]) -> str:
  """The item that ckpt_jax saved the state as, in a step of which `ours` is `our_metadata`."""
  return str(ours.get("item", DEFAULT_ITEM))


def _ours(data: dict[str, Any], step_dir: epath.Path) -> dict[str, Any] | None:
  custom = data.get(CUSTOM) or {}
  ours = custom.get(OURS) if isinstance(custom, dict) else None
  if ours is not None and not (isinstance(ours, dict) and is_intact(ours)):
    raise CorruptCheckpointError(f"{step_dir / STEP_METADATA}: what ckpt_jax wrote there has changed")
  return ours


def list_steps(path: str | os.PathLike[str]) -> list[StepInfo]:
  """All committed steps of a run, oldest first.

  Raises:
    CorruptCheckpointError: if the metadata of one is damaged.
    StorageError: if it cannot be read for now.
  """
  steps, damaged = list_readable_steps(path)
  for error in damaged.values():
    raise error
  return steps


def step_info(run: epath.Path, step: int) -> StepInfo:
  """One committed step; whether it is pinned is left out.

  Raises:
    CorruptCheckpointError: if its metadata cannot be read.
  """
  return _info(step_path(run, step), step)


def list_readable_steps(path: str | os.PathLike[str]) -> tuple[list[StepInfo], dict[int, CheckpointError]]:
  """The committed steps of a run whose metadata can be read, oldest first, and why the others cannot, by step: a
  CorruptCheckpointError, or a StorageError for what cannot be read for now. One that is deleted meanwhile is neither.
  """
  run = run_directory(path)
  found: list[StepInfo | CheckpointError | None] = []
  listed: list[int] = []
  for _ in range(_LISTINGS):
    before, listed = listed, committed_steps(run)
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
      found = list(pool.map(lambda step: _info_or_error(run, step), listed))
    if None not in found or listed == before:  # else newer steps may have come as those went
      break
  pins = noted_steps(run, PINS)
  steps = [dataclasses.replace(s, pinned=s.step in pins) for s in found if isinstance(s, StepInfo)]
  return steps, {step: e for step, e in zip(listed, found, strict=True) if isinstance(e, CheckpointError)}


def _info_or_error(run: epath.Path, step: int) -> StepInfo | CheckpointError | None:
  """None for a step that is deleted meanwhile."""
  directory = step_path(run, step)
  try:
    found = _info(directory, step)
    # An old Orbax's step does not say when it was committed; nor does one whose metadata has just gone.
    return found if found.time is not None or is_step(directory) else None
  except (CorruptCheckpointError, StorageError) as e:
    return None if is_gone(run, step) else e


def _info(step_dir: epath.Path, step: int) -> StepInfo:
  data = step_metadata(step_dir)
  try:
    ours = _ours(data, step_dir)
    stamp = data.get(COMMITTED_AT)
    time = datetime.datetime.fromtimestamp(stamp / 1e9, datetime.timezone.utc) if stamp else None
    if ours is not None:
      healthy = (ours.get("health") or {}).get("healthy")
      return StepInfo(step, time, int(ours["nbytes"]), dict(ours["metrics"]), healthy, resumable=THINNED not in ours)
    metrics_file = step_dir / METRICS_ITEM / METRICS_ITEM
    metrics = untrusted.read_json(metrics_file) if look.exists(metrics_file) else {}
    untrusted.check_metrics(metrics, str(metrics_file))
    nbytes = tree_nbytes(step_dir)
  except StorageError:
    raise
  except (KeyError, TypeError, AttributeError, ValueError, OverflowError, FileNotFoundError, NotADirectoryError) as e:
    raise CorruptCheckpointError(f"{step_dir}: its metadata is damaged ({type(e).__name__}: {e})") from e
  except OSError as e:
    raise look.cannot_be_read(step_dir, e) from e
  return StepInfo(step, time, nbytes, metrics)


def tree_nbytes(directory: epath.Path) -> int:
  # epath refuses a recursive glob
  return sum(tree_nbytes(p) if p.is_dir() else p.stat().length for p in directory.iterdir())


def orbax_can_list(step_dir: epath.Path) -> bool:
  """Whether Orbax's manager, which reads the metadata of all steps when it opens a run, can read this one's."""
  try:
    untrusted.check_step_metadata(step_metadata(step_dir), str(step_dir / STEP_METADATA))
    metrics = step_dir / METRICS_ITEM / METRICS_ITEM
    if metrics.exists():
      untrusted.check_metrics(untrusted.read_json(metrics), str(metrics))
  except (CorruptCheckpointError, OSError):
    return False
  return True
