"""Files that survive a power cut, with the right modes: fsync and permission bits of what lies under a directory."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import errno
import os
import stat

_WORKERS = 8
_NO_FSYNC_OF_DIRECTORIES = (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EISDIR, errno.EACCES)


@dataclasses.dataclass(frozen=True)
class Sealing:
  """How the files of a step are left.

  Attributes:
    fsync: whether files and directories are synced.
    mode: permission bits of files; directories also get x where r is. None: as the umask says.
  """

  fsync: bool = True
  mode: int | None = None

  @property
  def directory_mode(self) -> int | None:
    """Permission bits of directories."""
    return None if self.mode is None else directory_mode(self.mode)


def directory_mode(mode: int) -> int:
  """`mode` with x where r is: 0640 gives 0750."""
  return mode | (mode & 0o444) >> 2


def seal(top: str, how: Sealing) -> None:
  """Sets the modes of everything under `top` and syncs it, files before the directories that name them.

  Raises:
    OSError: if a file cannot be synced or its mode set: then it must not count as saved.
  """
  folders: list[str] = []
  files: list[str] = []
  for folder, _, names in os.walk(top):
    folders.append(folder)
    files += [os.path.join(folder, name) for name in names]
  with concurrent.futures.ThreadPoolExecutor(min(_WORKERS, len(files) or 1)) as pool:
    for _ in pool.map(lambda file: _seal_one(file, how), files):
      pass
  for folder in reversed(folders):  # os.walk names parents first
    restrict(folder, how.directory_mode)
    if how.fsync:
      sync_directory(folder)


def _seal_one(file: str, how: Sealing) -> None:
  restrict(file, how.mode)
  if how.fsync:
    sync_file(file)


def restrict(path: str, mode: int | None) -> None:
  """Sets permission bits; None only takes writing away from the world, which an umask of 0 would leave.

  Set-group-id and the like stay: shared directories rely on them.
  """
  info = os.lstat(path)
  if stat.S_ISLNK(info.st_mode):
    return
  now = stat.S_IMODE(info.st_mode)
  wanted = now & ~0o002 if mode is None else (now & 0o7000) | mode
  if wanted != now:
    os.chmod(path, wanted)


def sync_file(path: str) -> None:
  """fsync."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def sync_directory(path: str) -> None:
  """fsync of a directory, where the file system knows such a thing."""
  try:
    sync_file(path)
  except OSError as e:
    if e.errno not in _NO_FSYNC_OF_DIRECTORIES:
      raise
