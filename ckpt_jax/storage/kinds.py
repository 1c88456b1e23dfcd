"""The kind of storage of a path, from its URL or the mount table, and what follows for checkpoints.

A new file system is a new line in the tables. Without a mount table (not Linux) a path counts as `local`.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import logging
import os
import pathlib
import re

from ckpt_jax.config.arguments import check_type
from ckpt_jax.errors import StorageError
from ckpt_jax.storage.paths import given, url_scheme

_log = logging.getLogger(__name__)
_MIB = 2**20


class StorageKind(enum.StrEnum):
  """Kinds of storage; each value is the name used in configuration and output."""

  LOCAL = "local"
  NETWORK_DISK = "network_disk"
  TMPFS = "tmpfs"
  NFS = "nfs"
  LUSTRE = "lustre"
  GLUSTERFS = "glusterfs"
  CEPHFS = "cephfs"
  GPFS = "gpfs"
  WEKAFS = "wekafs"
  BEEGFS = "beegfs"
  SMB = "smb"
  GCS = "gcs"
  S3 = "s3"
  BUCKET_MOUNT = "bucket_mount"

  @property
  def traits(self) -> Traits:
    """What holds on this kind of storage."""
    return TRAITS[self]


@dataclasses.dataclass(frozen=True)
class Traits:
  """What holds on a kind of storage; the defaults are those of a disk.

  Attributes:
    why: the reason for what is special about it.
    shared: whether all hosts of a job see the same files.
    atomic_rename: whether a directory is renamed as a whole or not at all; else a commit marker is needed.
    overwrite_in_place: whether a part of a file can be rewritten.
    real_directories: whether an empty directory exists, and deleting one is one operation.
    listing: `cheap`, `dear` (a request per 1000 names) or `slow` (a round trip per file for its attributes).
    consistency: `strict`: other hosts see a finished write at once; `close_to_open`: once they open the file anew;
      `cached`: a mount may answer from a cache for seconds.
    retries: the `kernel` retries (calls block until the server is back), or the `client`, this process.
    request_nbytes: size of a request above which throughput hardly grows; the usual value, `probe` measures it.
    parallelism: requests in flight that one host needs for full throughput; the usual value, `probe` measures it.
    durable_on_close: whether data is safe from a power cut once the file is closed; else fsync is needed.
  """

  why: str
  shared: bool = False
  atomic_rename: bool = True
  overwrite_in_place: bool = True
  real_directories: bool = True
  listing: str = "cheap"
  consistency: str = "strict"
  retries: str = "kernel"
  request_nbytes: int = 1 * _MIB
  parallelism: int = 8
  durable_on_close: bool = False


_CLUSTER = Traits(
  "A cluster file system with POSIX locks: all hosts see a finished write; data is striped over servers, so large "
  "requests in parallel are fast and many small files are not.",
  shared=True,
  request_nbytes=4 * _MIB,
  parallelism=16,
)
_BUCKET = Traits(
  "A map from keys to objects: no rename, no append, no directories. A step is committed by writing a marker last. "
  "One request is slow and many at once are not; too many are answered by 429 or 503 and must be repeated.",
  shared=True,
  atomic_rename=False,
  overwrite_in_place=False,
  real_directories=False,
  listing="dear",
  retries="client",
  request_nbytes=8 * _MIB,
  parallelism=32,
  durable_on_close=True,
)
TRAITS: dict[StorageKind, Traits] = {
  StorageKind.LOCAL: Traits("A disk of this host: rename is atomic within it, and writes are safe only after fsync."),
  StorageKind.NETWORK_DISK: Traits(
    "A block device over the network, attached to one host at a time: other hosts cannot see it. Throughput is capped "
    "by the size of disk and machine, and grows with requests in flight.",
    request_nbytes=4 * _MIB,
    parallelism=16,
  ),
  StorageKind.TMPFS: Traits("Memory: lost at reboot, and every byte is missing from the host's RAM.", parallelism=2),
  StorageKind.NFS: Traits(
    "Close-to-open consistency: a host sees another's write once it opens the file after the writer closed it, and "
    "directory listings may be seconds old. close() sends everything to the server. One server is the bottleneck.",
    shared=True,
    listing="slow",
    consistency="close_to_open",
    durable_on_close=True,
  ),
  StorageKind.LUSTRE: _CLUSTER,
  StorageKind.GLUSTERFS: dataclasses.replace(
    _CLUSTER,
    listing="slow",
    why="Files are spread over bricks by the hash of their names: a listing asks every brick, and renames may leave "
    "link files behind.",
  ),
  StorageKind.CEPHFS: _CLUSTER,
  StorageKind.GPFS: _CLUSTER,
  StorageKind.WEKAFS: _CLUSTER,
  StorageKind.BEEGFS: _CLUSTER,
  StorageKind.SMB: Traits(
    "Windows file shares: leases let clients cache, and renaming a directory fails while a file in it is open.",
    shared=True,
    listing="slow",
    consistency="cached",
    request_nbytes=4 * _MIB,
  ),
  StorageKind.GCS: _BUCKET,
  StorageKind.S3: _BUCKET,
  StorageKind.BUCKET_MOUNT: dataclasses.replace(
    _BUCKET,
    consistency="cached",
    retries="kernel",
    why="Looks like a disk and is not one: a rename copies every object, an append rewrites it, and the mount caches "
    "listings for a while. The URL of the bucket avoids all of it.",
  ),
}

# Types in the mount table, without `fuse.` in front. Most kinds of shared storage have the name of their type.
_BY_TYPE: dict[str, StorageKind] = {
  "tmpfs": StorageKind.TMPFS,
  "ramfs": StorageKind.TMPFS,
  "nfs3": StorageKind.NFS,
  "nfs4": StorageKind.NFS,
  "efs": StorageKind.NFS,
  "ceph": StorageKind.CEPHFS,
  "ceph-fuse": StorageKind.CEPHFS,
  "mmfs": StorageKind.GPFS,
  "cifs": StorageKind.SMB,
  "smb3": StorageKind.SMB,
  "smbfs": StorageKind.SMB,
} | {kind.value: kind for kind in TRAITS if kind.traits.shared and kind.traits.overwrite_in_place}
# Programs that mount buckets, and the scheme of the URL that serves better.
BUCKET_MOUNTS: dict[str, str] = {
  "s3fs": "s3",
  "goofys": "s3",
  "mountpoint-s3": "s3",
  "geesefs": "s3",
  "gcsfuse": "gs",
  "rclone": "",
  "juicefs": "",
}
# Vendor, model or serial strings of the clouds' disks in /sys/block/DEVICE/device.
_NETWORK_DISKS = re.compile(
  r"Amazon Elastic Block Store|nvme_card-pd|PersistentDisk|Google\s*PersistentDisk|Msft\s*Virtual Disk|"
  r"MSFT NVMe Accelerator|HyperDisk|BlockVolume|iSCSI|LIO-ORG|IET",
  re.IGNORECASE,
)
_LOCAL_IN_CLOUDS = re.compile(
  r"Amazon EC2 NVMe Instance Storage|nvme_card\d*$|EphemeralDisk|Microsoft NVMe Direct", re.I
)


@dataclasses.dataclass(frozen=True)
class Mount:
  """One line of /proc/self/mountinfo: device number `major:minor`, where it is mounted, type and source."""

  device: str
  point: str
  type: str
  source: str


def parse_mounts(text: str) -> list[Mount]:
  """The mounts in text of the form of /proc/self/mountinfo (man 5 proc_pid_mountinfo); other lines are skipped."""
  mounts = []
  for line in text.splitlines():
    left, dash, right = line.partition(" - ")
    before, after = left.split(), right.split()
    if not dash or len(before) < 6 or len(after) < 2:
      continue
    mounts.append(Mount(before[2], _unescaped(before[4]), after[0], _unescaped(after[1])))
  return mounts


def _unescaped(text: str) -> str:
  return re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), text)


def detect(path: str | os.PathLike[str], mounts: str | None = None) -> StorageKind:
  """The kind of storage of `path`. Reads no data and sends no request.

  Args:
    path: a path that need not exist yet, or a gs:// or s3:// URL.
    mounts: a mount table in the form of /proc/self/mountinfo; default: this system's.

  Raises:
    StorageError: if the URL's scheme is not known.
    ConfigError: if `path` is no path, or `mounts` no text.
  """
  check_type("mounts", mounts, mounts is None or isinstance(mounts, str), "the text of a /proc/self/mountinfo")
  return _detect(path, mounts)[0]


def _detect(path: str | os.PathLike[str], mounts: str | None) -> tuple[StorageKind, Mount | None]:
  text = given(path)
  scheme = url_scheme(text)
  if scheme in ("gs", "s3"):
    return (StorageKind.GCS if scheme == "gs" else StorageKind.S3), None
  if scheme not in ("", "file"):
    raise StorageError(f"{text}: scheme {scheme}:// is not known; use a path, gs:// or s3://", topic="run-directory")
  mount = _mount_of(text.removeprefix("file://"), mounts)
  if mount is None:
    return StorageKind.LOCAL, None
  kind = _BY_TYPE.get(mount.type.removeprefix("fuse."), StorageKind.LOCAL)
  if _mounter(mount):
    kind = StorageKind.BUCKET_MOUNT
  elif kind is StorageKind.LOCAL and mounts is None and _is_network_disk(mount.device):
    kind = StorageKind.NETWORK_DISK
  return kind, mount


def _mount_of(path: str, mounts: str | None) -> Mount | None:
  """The deepest mount above `path`; of several on one point the last, which hides the others."""
  # realpath resolves symlinks in the part that exists and leaves the rest as it is.
  resolved = "/" + os.path.realpath(os.path.expanduser(path)).lstrip("/")
  if mounts is None:
    try:
      mounts = pathlib.Path("/proc/self/mountinfo").read_text()
    except OSError:
      return None
  best = None
  for mount in parse_mounts(mounts):
    inside = resolved == mount.point or resolved.startswith(mount.point.rstrip("/") + "/")
    if inside and (best is None or len(mount.point) >= len(best.point)):
      best = mount
  return best


def _mounter(mount: Mount) -> str | None:
  """The program in BUCKET_MOUNTS that made this mount."""
  if not mount.type.startswith("fuse"):
    return None
  name = mount.type.removeprefix("fuse").removeprefix(".")
  if name in BUCKET_MOUNTS:
    return name
  # goofys, geesefs and mountpoint-s3 may show up as plain `fuse` with their name or the bucket's URL as source.
  source = mount.source.lower()
  for mounter in BUCKET_MOUNTS:
    if source == mounter or source.startswith((f"{mounter}#", f"{mounter}:")):
      return mounter
  return "mountpoint-s3" if source.startswith("s3://") else None


def _is_network_disk(device: str, sys_root: str = "/sys") -> bool:
  """Whether /sys says that a block device is one of the clouds' network disks, or reached by iSCSI or nbd."""
  try:
    node = pathlib.Path(sys_root, "dev", "block", device).resolve(strict=True)
  except OSError:
    return False
  disk = node.parent if (node / "partition").exists() else node
  below = [
    _text(device / "dev") for device in (disk / "slaves").glob("*")
  ]  # LVM, RAID and encryption use other devices
  if any(_is_network_disk(number, sys_root) for number in below if number):
    return True
  if disk.name.startswith(("nbd", "rbd", "drbd")) or "/session" in str(disk):
    return True
  text = " ".join(_text(disk / "device" / name) for name in ("vendor", "model", "serial", "subsysnqn")).strip()
  return bool(_NETWORK_DISKS.search(text)) and not _LOCAL_IN_CLOUDS.search(text)


def _text(file: pathlib.Path) -> str:
  try:
    return file.read_text().strip()
  except OSError:
    return ""


def check_suitable(
  path: str | os.PathLike[str],
  wanted: str = "auto",
  hosts: int = 1,
  mounts: str | None = None,
) -> StorageKind:
  """The kind of storage of `path`, with an error or a warning where checkpoints would suffer.

  Args:
    path: directory or URL of the run.
    wanted: `storage.kind` of the configuration; anything but `auto` overrides what `detect` finds.
    hosts: hosts of the job.
    mounts: as for `detect`.

  Raises:
    StorageError: if several hosts would write on a disk of one of them.
  """
  found, mount = _detect(path, mounts)
  kind = found if wanted == "auto" else StorageKind(wanted)
  if not kind.traits.shared and hosts > 1:
    raise StorageError(
      f"{os.fspath(path)}: is on {kind} storage, which only one host sees, and this job runs on several: each would "
      "write its shards where no other can read them. Use shared storage (gs://, s3://, NFS, Lustre ...); if it is "
      "shared after all, set storage: nfs in the configuration",
      topic="disk-of-one-host",
    )
  if kind is StorageKind.TMPFS:
    _warn_once(f"{os.fspath(path)}: is in memory (tmpfs): checkpoints are lost at reboot and take RAM from training")
  if kind is StorageKind.BUCKET_MOUNT:
    _warn_once(f"{os.fspath(path)}: is on a bucket mounted as a file system; {_better_url(path, mount)}")
  return kind


def _better_url(path: str | os.PathLike[str], mount: Mount | None) -> str:
  mounter = mount and _mounter(mount)
  scheme = BUCKET_MOUNTS.get(mounter or "", "")
  if mount is None or not scheme:
    return "the bucket's own URL (gs://... or s3://...) is faster and needs no renames"
  source = mount.source.removeprefix(f"{mounter}#").removeprefix("s3://")
  bucket = source if source and source not in (mounter, "fuse") else "BUCKET"
  inside = os.path.relpath(os.path.realpath(os.fspath(path)), mount.point)
  return f"{scheme}://{bucket.replace(':/', '/').rstrip('/')}/{inside} is faster and needs no renames"


@functools.cache
def _warn_once(message: str) -> None:
  _log.warning("%s", message)


def storage_identity(path: str | os.PathLike[str]) -> str:
  """A name for the storage, the same for all paths on it: the bucket and its endpoint, or the mount."""
  kind, mount = _detect(path, None)
  if kind in (StorageKind.GCS, StorageKind.S3):
    endpoint = os.environ.get("AWS_ENDPOINT_URL" if kind is StorageKind.S3 else "STORAGE_EMULATOR_HOST", "")
    return f"{kind} {os.fspath(path).split('/')[2]} {endpoint}"
  return f"{kind} {mount.source} {mount.point}" if mount else str(kind)
