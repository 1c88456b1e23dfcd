"""Kinds of storage, from recorded mount tables and the one of this machine."""

import logging
import os
import pathlib
import subprocess
import typing

import pytest

import ckpt_jax as ckpt
from ckpt_jax.config.sections import StorageName
from ckpt_jax.storage import kinds
from ckpt_jax.storage.kinds import StorageKind, check_suitable, detect

MOUNTS = pathlib.Path(__file__).parent / "mounts"


@pytest.mark.parametrize(
  ("table", "path", "kind"),
  [
    ("cloud-nfs", "/home/me/run", "local"),
    ("cloud-nfs", "/mnt/shared/run", "nfs"),
    ("cloud-nfs", "/mnt/old/run", "nfs"),
    ("cloud-nfs", "/mnt/sharedx/run", "local"),
    ("cloud-nfs", "/mnt/shared/scratch/run", "tmpfs"),
    ("cloud-nfs", "/mnt/with space/run", "nfs"),
    ("cluster", "/lustre/fs0/me", "lustre"),
    ("cluster", "/gluster/a", "glusterfs"),
    ("cluster", "/ceph/a", "cephfs"),
    ("cluster", "/gpfs/data/a", "gpfs"),
    ("cluster", "/weka/a", "wekafs"),
    ("cluster", "/beegfs/a", "beegfs"),
    ("cluster", "/smb/a", "smb"),
    ("buckets", "/mnt/s3fs/run", "bucket_mount"),
    ("buckets", "/mnt/s3fs/deep/run", "local"),
    ("buckets", "/mnt/goofys2/run", "bucket_mount"),
    ("buckets", "/mnt/mountpoint/run", "bucket_mount"),
    ("buckets", "/mnt/mountpoint2/run", "bucket_mount"),
    ("buckets", "/mnt/gcsfuse/run", "bucket_mount"),
    ("buckets", "/mnt/rclone/run", "bucket_mount"),
    ("buckets", "/mnt/geesefs/run", "bucket_mount"),
    ("buckets", "/mnt/juicefs/run", "bucket_mount"),
    ("buckets", "/mnt/sshfs/run", "local"),
    ("buckets", "gs://bucket/run", "gcs"),
    ("buckets", "s3://bucket/run", "s3"),
  ],
)
def test_kind_is_that_of_the_deepest_mount(table, path, kind):
  found = detect(path, mounts=(MOUNTS / f"{table}.txt").read_text())
  assert found == kind and found is StorageKind(kind) and str(found) == kind


def test_symlink_is_followed_to_the_mount_it_points_at(tmp_path):
  (tmp_path / "link").symlink_to("/mnt/shared/runs")
  assert detect(tmp_path / "link" / "new", mounts=(MOUNTS / "cloud-nfs.txt").read_text()) == "nfs"


def test_unknown_scheme_is_refused():
  with pytest.raises(ckpt.StorageError, match="hdfs://"):
    detect("hdfs://name/run")


def test_every_kind_has_traits_with_a_reason():
  for kind in StorageKind:
    traits = kind.traits
    assert traits.why and traits.parallelism >= 1, kind
    assert traits.listing in ("cheap", "dear", "slow") and traits.retries in ("kernel", "client"), kind
    assert traits.consistency in ("strict", "close_to_open", "cached"), kind
    assert not (traits.atomic_rename and not traits.real_directories), kind


def test_configuration_takes_every_kind_by_its_name():
  assert {*typing.get_args(StorageName)} == {"auto", *StorageKind}


def test_disk_is_a_network_disk_if_its_model_in_sys_says_so(tmp_path):
  for number, model in {"259:0": "Amazon Elastic Block Store", "259:1": "Amazon EC2 NVMe Instance Storage"}.items():
    disk = tmp_path / "devices" / number.replace(":", "-")
    (disk / "device").mkdir(parents=True)
    (disk / "device" / "model").write_text(model + "   \n")
    (tmp_path / "dev" / "block").mkdir(parents=True, exist_ok=True)
    (tmp_path / "dev" / "block" / number).symlink_to(disk)
  assert kinds._is_network_disk("259:0", str(tmp_path))
  assert not kinds._is_network_disk("259:1", str(tmp_path))
  assert not kinds._is_network_disk("8:1", str(tmp_path))


def test_disk_of_one_host_is_refused_to_a_job_on_several(tmp_path):
  table = (MOUNTS / "cloud-nfs.txt").read_text()
  with pytest.raises(ckpt.StorageError, match="only one host sees"):
    check_suitable("/data/run", mounts=table, hosts=2)
  assert check_suitable("/data/run", mounts=table, hosts=1) == "local"
  assert check_suitable("/data/run", "nfs", mounts=table, hosts=2) == "nfs"
  assert check_suitable("/mnt/shared/run", mounts=table, hosts=2) == "nfs"


def test_bucket_mount_warns_once_with_the_url_to_use(caplog):
  table = (MOUNTS / "buckets.txt").read_text()
  with caplog.at_level(logging.WARNING, "ckpt_jax"):
    for _ in range(2):
      assert check_suitable("/mnt/gcsfuse/a/run", mounts=table) == "bucket_mount"
  assert [r.getMessage().count("gs://gbucket/a/run") for r in caplog.records] == [1]


def test_memory_gets_a_warning(caplog):
  with caplog.at_level(logging.WARNING, "ckpt_jax"):
    assert check_suitable("/mnt/shared/scratch/y", mounts=(MOUNTS / "cloud-nfs.txt").read_text()) == "tmpfs"
  assert "lost at reboot" in caplog.text


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_real_mount_of_this_machine_is_found(tmp_path):
  assert subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(tmp_path)], check=False).returncode == 0
  try:
    assert detect(tmp_path / "not" / "there" / "yet") == "tmpfs"
  finally:
    subprocess.run(["umount", str(tmp_path)], check=True)
