"""A directory's files in another directory without moving their bytes: hard links on a disk, copies by the bucket.

Both are as good as written anew: no deletion of the one harms the other. But hard links are one file, so that damage to
it is damage to each, and what is no longer as it was written is not linked.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Mapping
from typing import NamedTuple

from etils import epath

from ckpt_jax.storage.parallel import in_threads
from ckpt_jax.storage.paths import files_beneath
from ckpt_jax.storage.urls import is_object_store

_MOST_LINKS = 30_000  # ext4 allows 65,000 of a file, NetApp 100,000, Btrfs 65,535
# What a file system that has no hard links answers, and one that has none across its parts.
_NEVER = (errno.EPERM, errno.EXDEV, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EACCES, errno.EINVAL)


class Stamp(NamedTuple):
  """What a file must still have: its bytes, and when it was written, in nanoseconds; both 0 in a bucket."""

  nbytes: int
  mtime_ns: int


class CloneError(OSError):
  """Files cannot be cloned.

  Attributes:
    for_good: whether it is the storage that has no clones, rather than these files.
  """

  def __init__(self, message: str, *, for_good: bool = False):
    super().__init__(message)
    self.for_good = for_good


def stamp(file: epath.Path) -> Stamp:
  """The stamp of a file."""
  if is_object_store(file):
    return Stamp(0, 0)
  found = os.stat(file)
  return Stamp(found.st_size, found.st_mtime_ns)


def clone(source: epath.Path, target: epath.Path, files: Mapping[str, Stamp]) -> None:
  """Puts the files of `source`, named relative to it, into `target`.

  Raises:
    CloneError: if one of them is gone, or not what it was, or the storage refuses. Some may be there.
  """
  remote = is_object_store(target)
  if not remote:
    for folder in {(target / name).parent for name in files}:
      folder.mkdir(parents=True, exist_ok=True)

  def one(name: str) -> None:
    if remote:
      (source / name).copy(target / name, overwrite=True)
    else:
      _link(os.fspath(source / name), os.fspath(target / name), files[name])

  try:
    if remote:
      in_threads(one, files)
    else:  # a link takes less than a thread to start
      for name in files:
        one(name)
  except CloneError:
    raise
  except FileNotFoundError as e:
    raise CloneError(f"{source}: it is gone") from e
  except OSError as e:
    raise CloneError(f"{source}: {e.strerror or e}", for_good=e.errno in _NEVER) from e


def doubt_links(directory: str) -> None:
  """Has nobody clone the files beneath a local directory that are hard links, some of which may be damaged.

  What has the same files may be damaged too. Changes their times, so that they are not what their stamps say.
  """
  for file in files_beneath(directory):
    with contextlib.suppress(OSError):  # gone, or somebody else's, which is not cloned anyway
      if os.lstat(file).st_nlink > 1:
        os.utime(file)


def _link(source: str, target: str, then: Stamp) -> None:
  found = os.stat(source)
  if (found.st_size, found.st_mtime_ns) != then:
    raise CloneError(f"{source}: it is not what was written there")
  if found.st_nlink >= _MOST_LINKS:
    raise CloneError(f"{source}: it has as many links as a file may have")
  if found.st_uid != os.geteuid():  # whose mode and times are not ours to keep
    raise CloneError(f"{source}: it belongs to another user")
  os.link(source, target)
