"""Files that survive a power cut, with the right permission bits."""

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
    """Permission bits of directories: 0750 for a mode of 0640."""
    return None if self.mode is None else self.mode | (self.mode & 0o444) >> 2


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

  def seal_file(file: str) -> None:
    restrict(file, how.mode)
    if how.fsync:
      sync_file(file)

  with concurrent.futures.ThreadPoolExecutor(_WORKERS) as pool:
    list(pool.map(seal_file, files))
  for folder in reversed(folders):  # os.walk names parents first
    restrict(folder, how.directory_mode)
    if how.fsync:
      sync_directory(folder)


def restrict(path: str, mode: int | None) -> None:
  """Sets permission bits; None only takes writing away from the world, which an umask of 0 would leave.

  Set-group-id and the like stay, since shared directories rely on them. Links are not followed.
  """
  info = os.lstat(path)
  if stat.S_ISLNK(info.st_mode):
    return
  now = stat.S_IMODE(info.st_mode)
  wanted = now & ~0o002 if mode is None else (now & 0o7000) | mode
  if wanted != now:
    os.chmod(path, wanted)


def sync_file(path: str) -> None:
  """Returns once a file is safe from a power cut."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def sync_directory(path: str) -> None:
  """Returns once the names in a directory are safe from a power cut; without effect where directories have no fsync."""
  try:
    sync_file(path)
  except OSError as e:
    if e.errno not in _NO_FSYNC_OF_DIRECTORIES:
      raise
