"""What lies in a run directory, read without a CheckpointManager: committed steps, their metadata, their leaves."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import datetime
import math
import os
from typing import Any

from etils import epath

from ckpt_jax import untrusted
from ckpt_jax.errors import CheckpointError, CorruptCheckpointError, NoCheckpointError, StorageError
from ckpt_jax.seal import is_intact
from ckpt_jax.storage.kvstore import connect, is_object_store
from ckpt_jax.storage.objects import snapshot

STEP_METADATA = "_CHECKPOINT_METADATA"
ITEM_METADATA = "_METADATA"
DEFAULT_ITEM = "default"
COMMIT_MARKER = "commit_success.txt"
RECORD = "ckpt_jax.json"  # beside ITEM_METADATA: fingerprints and health, see integrity/record.py
OURS = "ckpt_jax"  # our key inside Orbax's custom_metadata
# What ckpt_jax notes about a run: RUN/.ckpt_jax/pins/STEP, RUN/.ckpt_jax/deleting/STEP and more. Plain small files,
# each written in one go, since a bucket has neither rename nor append.
NOTES = ".ckpt_jax"
PINS, DELETING = "pins", "deleting"
# Steps in a bucket that count no longer and are still there (RUN/.ckpt_jax/aside/STEP); on a disk they are moved away.
ASIDE = "aside"
THINNED = "thinned"  # in our metadata: what was kept of a step that holds a part of its state alone


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


@dataclasses.dataclass(frozen=True)
class LeafInfo:
  """One leaf as it was saved.

  Attributes:
    path: names with slashes between, as Orbax names the leaf.
    shape: () for scalars.
    dtype: numpy's name; `int`, `float`, `bool`, `str`, `complex` for Python's own; `key<impl>` for PRNG keys.
    nbytes: bytes of the value.
    scalar: whether it was a Python number or text rather than an array.
  """

  path: str
  shape: tuple[int, ...]
  dtype: str
  nbytes: int
  scalar: bool = False


@dataclasses.dataclass(frozen=True)
class StepDescription:
  """A committed step with everything but its values."""

  step: int
  metadata: dict[str, Any]
  metrics: dict[str, Any]
  extras: Any
  leaves: list[LeafInfo]


def run_directory(path: str | os.PathLike[str]) -> epath.Path:
  """An absolute path, with `~` expanded; URLs stay as they are (plain Orbax refuses relative paths)."""
  text = os.fspath(path)
  if is_object_store(text):
    connect(text)
    return epath.Path(text.rstrip("/"))
  if "://" in text:
    raise StorageError(f"{text}: only local paths, gs:// and s3:// are known")
  return epath.Path(os.path.abspath(os.path.expanduser(text)))


def committed_steps(run: epath.Path) -> list[int]:
  """Step numbers in ascending order.

  Leftovers of unfinished saves, steps marked for deletion, and empty or foreign directories are not steps.
  """
  with snapshot(run):
    if not run.exists():
      return []
    doomed = uncounted_steps(run)
    names = [p.name for p in run.iterdir() if p.name.isdigit() and int(p.name) not in doomed]
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
      good = list(pool.map(lambda name: is_step(run / name), names))
  return sorted(int(name) for name, ok in zip(names, good, strict=True) if ok)


def noted_steps(run: epath.Path, kind: str) -> set[int]:
  """The steps with a note of a kind, `PINS` or `DELETING`."""
  try:
    return {int(p.name) for p in (run / NOTES / kind).iterdir() if p.name.isdigit()}
  except (FileNotFoundError, NotADirectoryError):
    return set()


def uncounted_steps(run: epath.Path) -> set[int]:
  """Steps that are no steps any more: marked for deletion, quarantined, or behind a rollback."""
  gone = noted_steps(run, DELETING)
  return gone | noted_steps(run, ASIDE) if is_object_store(run) else gone


def is_step(directory: epath.Path) -> bool:
  """Whether `directory` holds what every committed Orbax step holds."""
  if is_object_store(directory):
    # Nothing is renamed there: a step is committed once its marker is written, last of all.
    return (directory / COMMIT_MARKER).exists()
  return (directory / STEP_METADATA).exists() or (directory / DEFAULT_ITEM / ITEM_METADATA).exists()


def step_directory(run: epath.Path, step: int) -> epath.Path:
  """The directory of a committed step.

  Raises:
    NoCheckpointError: naming the steps that there are.
  """
  directory = run / str(step)
  if not is_step(directory) or step in uncounted_steps(run):
    steps = committed_steps(run)
    there = f"; committed steps: {_brief(steps)}" if steps else "; no step is committed there"
    raise NoCheckpointError(f"{run}: no committed step {step}{there}")
  return directory


def _brief(steps: list[int]) -> str:
  text = [str(s) for s in steps]
  return ", ".join(text if len(text) <= 10 else [*text[:3], "...", *text[-5:]])


def latest_committed(run: epath.Path) -> int:
  """The newest committed step.

  Raises:
    NoCheckpointError: if there is none.
  """
  steps = committed_steps(run)
  if not steps:
    raise NoCheckpointError(f"{run}: no committed checkpoint; save one first, or check the path")
  return steps[-1]


def newest_to_restore(run: epath.Path) -> int | None:
  """The newest committed step that was not thinned, else the newest; None in an empty run."""
  steps = committed_steps(run)
  for step in reversed(steps):
    try:
      if thinned_to(run / str(step)) is None:
        return step
    except CorruptCheckpointError:
      return step  # reading it tells what is wrong
  return steps[-1] if steps else None


def newest_resumable(run: epath.Path) -> int | None:
  """The newest committed step that training can go on from: whole, and not known to be unhealthy. None without one."""
  for step in reversed(committed_steps(run)):
    try:
      info = _info(run / str(step), step)
    except CorruptCheckpointError:
      continue
    if info.resumable and info.healthy is not False:
      return step
  return None


def thinned_to(step_dir: epath.Path) -> list[str] | None:
  """The paths that a thinned step still holds, e.g. `["params"]`; None for a whole one."""
  return (our_metadata(step_dir).get(THINNED) or {}).get("keep")


def item_directory(step_dir: epath.Path) -> epath.Path:
  """The directory of the training state inside a step, ours or plain Orbax's.

  Raises:
    CorruptCheckpointError: if the step holds no state.
    CheckpointError: if it holds several and none is called `default` or `state`.
  """
  items = sorted(p.name for p in step_dir.iterdir() if (p / ITEM_METADATA).exists())
  for name in (DEFAULT_ITEM, "state"):
    if name in items:
      return step_dir / name
  if len(items) == 1:
    return step_dir / items[0]
  if not items:
    raise CorruptCheckpointError(f"{step_dir}: no item with a {ITEM_METADATA}; the step holds no state")
  raise CheckpointError(f"{step_dir}: several items ({', '.join(items)}) and none is called default or state")


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


def _ours(data: dict[str, Any], step_dir: epath.Path) -> dict[str, Any] | None:
  custom = data.get("custom_metadata") or {}
  ours = custom.get(OURS) if isinstance(custom, dict) else None
  if ours is not None and not (isinstance(ours, dict) and is_intact(ours)):
    raise CorruptCheckpointError(f"{step_dir / STEP_METADATA}: what ckpt_jax wrote there has changed")
  return ours


def list_steps(path: str | os.PathLike[str]) -> list[StepInfo]:
  """All committed steps of a run, oldest first.

  Raises:
    CorruptCheckpointError: if the metadata of one cannot be read.
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
  return _info(run / str(step), step)


def list_readable_steps(path: str | os.PathLike[str]) -> tuple[list[StepInfo], dict[int, CorruptCheckpointError]]:
  """The committed steps of a run whose metadata can be read, oldest first, and why the others cannot, by step."""
  run = run_directory(path)
  damaged: dict[int, CorruptCheckpointError] = {}

  def info(step: int) -> StepInfo | None:
    try:
      return _info(run / str(step), step)
    except CorruptCheckpointError as e:
      damaged[step] = e
      return None

  with concurrent.futures.ThreadPoolExecutor(16) as pool:
    found = list(pool.map(info, committed_steps(run)))
  pins = noted_steps(run, PINS)
  steps = [dataclasses.replace(s, pinned=s.step in pins) for s in found if s is not None]
  return steps, dict(sorted(damaged.items()))


def _info(step_dir: epath.Path, step: int) -> StepInfo:
  data = step_metadata(step_dir)
  try:
    ours = _ours(data, step_dir)
    stamp = data.get("commit_timestamp_nsecs")
    time = datetime.datetime.fromtimestamp(stamp / 1e9, datetime.timezone.utc) if stamp else None
    if ours is not None:
      healthy = (ours.get("health") or {}).get("healthy")
      return StepInfo(step, time, int(ours["nbytes"]), dict(ours["metrics"]), healthy, resumable=THINNED not in ours)
    metrics_file = step_dir / "metrics" / "metrics"
    metrics = untrusted.read_json(metrics_file) if metrics_file.exists() else {}
    untrusted.check_metrics(metrics, str(metrics_file))
  except (KeyError, TypeError, AttributeError, ValueError, OverflowError, OSError) as e:
    raise CorruptCheckpointError(f"{step_dir}: its metadata is damaged ({type(e).__name__}: {e})") from e
  return StepInfo(step, time, _tree_nbytes(step_dir), metrics)


def _tree_nbytes(directory: epath.Path) -> int:
  # epath refuses a recursive glob
  return sum(_tree_nbytes(p) if p.is_dir() else p.stat().length for p in directory.iterdir())


def describe(path: str | os.PathLike[str], step: int | None = None) -> StepDescription:
  """Everything about a step (default: the newest) but its values; reads metadata only.

  Raises:
    NoCheckpointError: if there is no such step.
    CorruptCheckpointError: if its metadata cannot be read.
  """
  run = run_directory(path)
  step = latest_committed(run) if step is None else step
  step_dir = step_directory(run, step)
  ours = our_metadata(step_dir)
  shown = {k: v for k, v in ours.items() if k not in ("metrics", "extras", "encoded")}
  return StepDescription(step, shown, _info(step_dir, step).metrics, ours.get("extras"), saved_leaves(step_dir))


def saved_leaves(step_dir: epath.Path) -> list[LeafInfo]:
  """The leaves of a step as its trainer saw them, sorted as in the saved tree."""
  return leaf_infos(describe_item(item_directory(step_dir)).tree, our_metadata(step_dir).get("encoded", {}))


def leaf_infos(tree: Any, encoded: dict[str, Any]) -> list[LeafInfo]:
  """The leaves that `describe_item` finds, as their trainer saw them; `encoded` is what `layout.encoding` noted."""
  import jax  # listing steps needs neither jax nor Orbax
  import numpy as np

  from ckpt_jax.layout.encoding import dtype_name
  from ckpt_jax.layout.structure import path_name

  leaves = []
  for path, meta in jax.tree_util.tree_flatten_with_path(tree)[0]:
    name = path_name(path)
    note = encoded.get(name, {})
    kind = type(meta).__name__
    if kind == "StringMetadata":
      leaves.append(LeafInfo(name, (), "str", 0, scalar=True))
      continue
    shape, dtype = tuple(meta.shape), np.dtype(meta.dtype)
    nbytes = math.prod(shape) * dtype.itemsize
    label = dtype_name(dtype)
    if kind == "ScalarMetadata":
      label = {"b": "bool", "i": "int", "f": "float"}.get(dtype.kind, label)
    if note.get("kind") == "empty":
      shape, label, nbytes = tuple(note["shape"]), note["dtype"], 0
    elif note.get("kind") == "prng_key":
      shape, label = shape[:-1], note["dtype"]
    elif note.get("kind") == "complex":
      label = "complex"
    elif "dtype" in note:
      label = note["dtype"]
    leaves.append(LeafInfo(name, shape, label, nbytes, scalar=kind == "ScalarMetadata"))
  return leaves


@dataclasses.dataclass(frozen=True)
class ItemDescription:
  """What an item says of itself.

  Attributes:
    tree: as Orbax describes it: nested containers with ArrayMetadata, ScalarMetadata, StringMetadata leaves.
    info: Orbax's description of an array, without a name; None if only Orbax knows the item, see `layout.direct`.
    index: where its small arrays lie; empty if it is not packed.
    stores: its other arrays, open, by their names in the database.
  """

  tree: Any
  info: Any = None
  index: dict[str, Any] = dataclasses.field(default_factory=dict)
  stores: dict[str, Any] = dataclasses.field(default_factory=dict)


def describe_item(item_dir: epath.Path, config: Any = None) -> ItemDescription:
  """Reads what an item, RUN/STEP/default, says of itself, and opens its arrays within the limits of `config`.

  Raises:
    CorruptCheckpointError: if it cannot be read.
  """
  from ckpt_jax.config import Config
  from ckpt_jax.layout import direct, packing
  from ckpt_jax.layout.handler import pytree_handler

  try:
    data = untrusted.read_json(item_dir / ITEM_METADATA)
    untrusted.check_tree(data, str(item_dir / ITEM_METADATA))
    index = packing.read_index(item_dir)
    known = bool(index) or direct.is_known(item_dir, data)
    if not known:
      tree = pytree_handler(Config()).metadata(item_dir).tree
      _check_claims(tree, item_dir)
      return ItemDescription(tree)
    info = direct.item_info(item_dir, data, (config or Config()).limits)
    tree, stores = direct.describe(info, data, index)
    _check_claims(tree, item_dir)
    return ItemDescription(tree, info, index, stores)
  except (CheckpointError, MemoryError):
    raise
  except Exception as e:
    raise CorruptCheckpointError(f"{item_dir}: its metadata cannot be read: {' '.join(str(e).split())[:500]}") from e


def _check_claims(tree: Any, item_dir: epath.Path) -> None:
  import jax
  import numpy as np

  leaves = [leaf for leaf in jax.tree.leaves(tree) if getattr(leaf, "shape", None) is not None]
  claimed = untrusted.claimed_bytes(
    ((leaf.shape, np.dtype(leaf.dtype).itemsize if leaf.dtype is not None else 1) for leaf in leaves), str(item_dir)
  )
  if claimed > untrusted.FREE_CLAIM:
    untrusted.check_claim(claimed, _tree_nbytes(item_dir), str(item_dir))


def orbax_can_list(step_dir: epath.Path) -> bool:
  """Whether Orbax's manager, which reads the metadata of all steps when it opens a run, can read this one's."""
  try:
    untrusted.check_step_metadata(step_metadata(step_dir), str(step_dir / STEP_METADATA))
    metrics = step_dir / "metrics" / "metrics"
    if metrics.exists():
      untrusted.check_metrics(untrusted.read_json(metrics), str(metrics))
  except (CorruptCheckpointError, OSError):
    return False
  return True
