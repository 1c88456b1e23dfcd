"""Free space of storage and the space that a save needs, so that one that does not fit fails before it writes."""

from __future__ import annotations

import collections
import dataclasses
import os
from collections.abc import Iterable, Iterator

from etils import epath

from ckpt_jax.storage.paths import files_beneath
from ckpt_jax.storage.urls import is_object_store


@dataclasses.dataclass(frozen=True)
class Room:
  """Free bytes of the storage, and the bytes that a save needs."""

  free: int
  needed: int

  @property
  def fits(self) -> bool:
    """Whether there is room for the save."""
    return self.free >= self.needed


def free_bytes(directory: epath.Path) -> int | None:
  """Bytes that this user may still write under `directory`; None where storage reports no limit, such as buckets.

  Project quotas of XFS, ext4, Lustre and most NFS servers count (statvfs). Blocks reserved for root count only for
  root.
  """
  if is_object_store(directory):
    return None
  path = os.fspath(directory)
  while not os.path.isdir(path) and path != os.path.dirname(path):
    path = os.path.dirname(path)
  try:
    found = os.statvfs(path)
  except OSError:
    return None
  if found.f_blocks == 0:  # not reported, as on some FUSE mounts
    return None
  return (found.f_bfree if os.geteuid() == 0 else found.f_bavail) * found.f_frsize


def tree_nbytes(directory: str) -> int:
  """Bytes of all files beneath a local directory."""
  return count_files(directory)[1]


def own_nbytes(directory: str) -> int:
  """Bytes of the files beneath a local directory that are nowhere else: what one more such directory takes."""
  return sum(info.st_size for info in _files(directory) if info.st_nlink == 1)


def shared_nbytes(directories: Iterable[str]) -> int:
  """Bytes of files beneath local directories that deleting them would not free: those of hard links to other files."""
  counts: collections.Counter[tuple[int, int, int, int]] = collections.Counter()
  for directory in directories:
    counts.update((f.st_dev, f.st_ino, f.st_nlink, f.st_size) for f in _files(directory) if f.st_nlink > 1)
  return sum(nbytes * (count - (count >= links)) for (_, _, links, nbytes), count in counts.items())


def _files(directory: str) -> Iterator[os.stat_result]:
  return map(os.lstat, files_beneath(directory))


def count_files(directory: str) -> tuple[int, int]:
  """Number and bytes of all files beneath a local directory."""
  sizes = [info.st_size for info in _files(directory)]
  return len(sizes), sum(sizes)
