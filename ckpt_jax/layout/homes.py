"""What one process knows of the leaves of the last committed step: see `unchanged`."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import glob
import itertools
import json
import os
import re
import weakref
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from etils import epath

from ckpt_jax.config import LayoutConfig
from ckpt_jax.errors import CheckpointError
from ckpt_jax.layout.keys import UNCHANGED
from ckpt_jax.run import untrusted
from ckpt_jax.run.checksums import is_intact_file, with_file_digest
from ckpt_jax.run.steps import step_path
from ckpt_jax.storage.clone import Stamp
from ckpt_jax.storage.paths import files_beneath
from ckpt_jax.storage.urls import is_object_store

if TYPE_CHECKING:  # commands that read metadata start without jax
  import jax

  from ckpt_jax.layout.sharding import Box

FILE = "ckpt_jax_unchanged.json"  # in the database of a process: its homes, for the next job
_FORMAT = 2
_INSIDE = re.compile(r"(d/)?\w+(\.\w+)?")


class Tally(Protocol):
  """`integrity.sums.Tally`, or a part of it."""

  total: int
  hash: int
  high: int


def are_equal(now: Tally, then: Tally) -> bool:
  """Whether two tallies are of the same bits."""
  return (now.total, now.hash, now.high) == (then.total, then.hash, then.high)


@dataclasses.dataclass
class Seen:
  """A `Tally` that was read from storage."""

  total: int
  hash: int
  high: int


@dataclasses.dataclass(frozen=True)
class Kept:
  """What a home holds of a leaf.

  Attributes:
    path: of the leaf in the state.
    boxes: the parts of it.
    metadata: of the array in the database, as JSON has it: dtype, chunks, codec.
    nbytes: bytes of the parts.
    seen: sum and hashes of the parts; None until the save that wrote them has ended.
  """

  path: str
  boxes: tuple[Box, ...]
  metadata: Mapping[str, Any]
  nbytes: int
  seen: Tally | None = None

  def fits(self, path: str | None, boxes: tuple[Box, ...], metadata: Mapping[str, Any]) -> bool:
    """Whether this process would write the same parts in the same way now."""
    return (self.path, self.boxes, self.metadata) == (path, boxes, as_json(metadata))


@dataclasses.dataclass(frozen=True)
class Home:
  """A database of leaves that do not change.

  Attributes:
    name: of its directory.
    files: of the database.
    nbytes: of all leaves in it.
    leaves: those that have not changed since, by their names in the database.
    whole: whether that is all of them.
    saves: how many steps share it.
  """

  name: str
  files: Mapping[str, Stamp]
  nbytes: int
  leaves: Mapping[str, Kept]
  whole: bool = True
  saves: int = 1


@dataclasses.dataclass(frozen=True)
class Saved:
  """What is known of the last committed step.

  Attributes:
    item: where it is.
    layout: as it was written.
    arrays: the jax arrays that were saved, by path.
    tallies: of what this process summed of each leaf, by path.
    traces: by which leaves are compared instead of which this process summed other parts than it wrote.
    streaks: for how many saves leaves have not changed; those that have are left out.
    patience: how long a leaf must not have changed before it is taken for one that does not; default: one save.
    homes: by name.
  """

  item: epath.Path
  layout: LayoutConfig
  arrays: Mapping[str, weakref.ref[jax.Array]]
  tallies: Mapping[str, Tally]
  traces: Mapping[str, Tally]
  streaks: Mapping[str, int]
  patience: Mapping[str, int]
  homes: Mapping[str, Home]


def as_json(metadata: Mapping[str, Any]) -> dict[str, Any]:
  """Metadata as it is read back from JSON."""
  return json.loads(json.dumps(metadata))


def shared_files(step_dir: epath.Path) -> dict[tuple[int, int], int]:
  """Bytes of the files of homes in a step, which other steps may have too, by device and inode; none in a bucket."""
  found: dict[tuple[int, int], int] = {}
  if not is_object_store(step_dir):
    for home in glob.iglob(f"{glob.escape(os.fspath(step_dir))}/*/*/{UNCHANGED}*"):
      for file in files_beneath(home):
        with contextlib.suppress(FileNotFoundError):  # it is being deleted
          of = os.lstat(file)
          found[of.st_dev, of.st_ino] = of.st_size
  return found


def shared_by_step(run: epath.Path, steps: Iterable[int]) -> dict[int, dict[tuple[int, int], int]]:
  """Of each step what several of them share: see `shared_files`."""
  files = {step: shared_files(step_path(run, step)) for step in steps}
  holders = collections.Counter(itertools.chain.from_iterable(files.values()))
  return {step: {file: n for file, n in own.items() if holders[file] > 1} for step, own in files.items()}


def write_homes(database: epath.Path, homes: Mapping[str, Home]) -> None:
  """Notes the homes in the database of a process, for a job that goes on from this step."""
  found = {}
  for name, home in homes.items():
    leaves = {
      leaf: [kept.path, kept.boxes, kept.metadata, kept.nbytes, [kept.seen.total, kept.seen.hash, kept.seen.high]]
      for leaf, kept in home.leaves.items()
      if kept.seen is not None
    }
    found[name] = {"files": home.files, "nbytes": home.nbytes, "whole": home.whole, "saves": home.saves} | {
      "leaves": leaves
    }
  (database / FILE).write_bytes(with_file_digest(json.dumps({"format": _FORMAT, "homes": found})))


def read_homes(database: epath.Path) -> dict[str, Home]:
  """The homes in the database of a process; empty if there are none, or the note is damaged."""
  try:
    data = untrusted.read_json(database / FILE, is_intact_file)
    found = data["homes"] if data["format"] == _FORMAT else {}
    return {name: _home(name, home) for name, home in found.items()}
  except (FileNotFoundError, CheckpointError, KeyError, TypeError, ValueError, AttributeError):
    return {}


def _home(name: str, data: Mapping[str, Any]) -> Home:
  for file in (name, *data["files"]):
    if not _INSIDE.fullmatch(file):  # what names it is not to be trusted: it may be a path to somewhere else
      raise ValueError(f"{file!r:.80} is not in the database")
  leaves = {}
  for leaf, (path, boxes, metadata, nbytes, seen) in data["leaves"].items():
    there = tuple([tuple([(int(a), int(b)) for a, b in box]) for box in boxes])
    leaves[leaf] = Kept(path, there, metadata, int(nbytes), Seen(*map(int, seen)))
  files = {file: Stamp(int(nbytes), int(mtime)) for file, (nbytes, mtime) in data["files"].items()}
  return Home(name, files, int(data["nbytes"]), leaves, bool(data["whole"]), int(data["saves"]))
