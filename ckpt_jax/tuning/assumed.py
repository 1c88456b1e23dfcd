"""Usual figures for each kind of storage, for plans made where nothing was measured. A `probe` replaces them."""

from __future__ import annotations

from ckpt_jax.storage.kinds import StorageKind
from ckpt_jax.storage.probe import RangeRead, StorageProfile, Throughput

# One host: bytes/s written and read at the kind's parallelism, and seconds of one small request. Orders of magnitude
# from the vendors' documentation: NVMe drives; EBS gp3 and GCP balanced disks (125 to 1,000 MB/s by size); an NFS
# filer over 10 GbE; a striped cluster file system; Cloud Storage and S3 at 32 requests of 8 MiB and some 50 ms to the
# first byte. Plans made from them say "assumed".
_USUAL: dict[StorageKind, tuple[float, float, float]] = {
  StorageKind.LOCAL: (1.0e9, 2.0e9, 1e-4),
  StorageKind.NETWORK_DISK: (2.4e8, 2.4e8, 1e-3),
  StorageKind.TMPFS: (3.0e9, 4.0e9, 2e-5),
  StorageKind.NFS: (3.0e8, 6.0e8, 1e-3),
  StorageKind.LUSTRE: (1.0e9, 1.5e9, 1e-3),
  StorageKind.GLUSTERFS: (3.0e8, 4.0e8, 2e-3),
  StorageKind.CEPHFS: (8.0e8, 1.0e9, 2e-3),
  StorageKind.GPFS: (1.0e9, 1.5e9, 1e-3),
  StorageKind.WEKAFS: (2.0e9, 3.0e9, 5e-4),
  StorageKind.BEEGFS: (1.0e9, 1.5e9, 1e-3),
  StorageKind.SMB: (1.5e8, 2.0e8, 2e-3),
  StorageKind.GCS: (1.0e9, 1.5e9, 5e-2),
  StorageKind.S3: (1.0e9, 1.5e9, 5e-2),
  StorageKind.BUCKET_MOUNT: (1.0e8, 2.0e8, 1e-1),
}
_RANGES = tuple(4096 * 4**i for i in range(7))


def assumed_profile(kind: StorageKind, path: str = "") -> StorageProfile:
  """A profile of usual figures; `is_assumed` distinguishes it from a measured one."""
  write, read, request = _USUAL[kind]
  streams = kind.traits.parallelism
  # One stream makes requests of the kind's usual size one after the other.
  one = kind.traits.request_nbytes / (request + kind.traits.request_nbytes / (read / streams))
  return StorageProfile(
    path=path or f"({kind})",
    kind=kind,
    measured_at="1970-01-01T00:00:00+00:00",
    host="",
    seconds=0.0,
    written_nbytes=0,
    read_nbytes=0,
    cold_by=None,
    write=(Throughput(1, min(write, one)), Throughput(streams, write)),
    read=(Throughput(1, min(read, one)), Throughput(streams, read)),
    ranges=tuple(RangeRead(n, request + n / (read / streams)) for n in _RANGES),
    latency={"create": request, "stat": request, "list": request, "delete": request},
  )


def is_assumed(profile: StorageProfile) -> bool:
  """Whether a profile is `assumed_profile`'s rather than measured."""
  return profile.seconds == 0.0
