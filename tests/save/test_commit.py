"""The system calls of a save, recorded by strace: what is synced, and in which order."""

import os
import pathlib
import re
import shutil
import stat
import subprocess
import sys

import jax.numpy as jnp
import pytest

import ckpt_jax as ckpt
from ckpt_jax.save.admission import sealing_of
from ckpt_jax.storage.kinds import StorageKind

TRAIN = str(pathlib.Path(__file__).parents[1] / "programs" / "train.py")
SAVE = """
import sys, jax, jax.numpy as jnp, ckpt_jax as ckpt
config = {"storage": {"fsync": sys.argv[2]}, "limits": {"file_io": sys.argv[3]}}
with ckpt.Checkpointer(sys.argv[1], config) as c:
  c.save(3, {"a": jnp.arange(6.0), "b": {"c": jnp.ones((2, 3)), "n": 1}}, metrics={"loss": 1.0}, extras={"at": 3})
"""


def traced(*command):
  """(call, path, second path of a rename) in the order in which the calls ended."""
  if shutil.which("strace") is None:
    pytest.skip("no strace here (Debian package strace)")
  log = pathlib.Path(command[0]).with_name("trace")
  calls = "trace=fsync,fdatasync,rename,renameat,renameat2"
  done = subprocess.run(
    ["strace", "-f", "-y", "--seccomp-bpf", "-qq", "-e", calls, "-o", str(log), sys.executable, *command[1:]],
    capture_output=True,
    text=True,
    timeout=300,
  )
  if "PTRACE" in done.stderr or "ptrace" in done.stderr:
    pytest.skip(f"strace may not trace here: {done.stderr.strip()[:200]}")
  assert done.returncode == 0, done.stderr
  events, unfinished = [], {}
  for line in log.read_text().splitlines():
    pid, _, text = line.partition(" ")
    text = text.strip()
    if text.endswith("<unfinished ...>"):
      unfinished[pid] = text.removesuffix("<unfinished ...>")
      continue
    resumed = re.match(r"<\.\.\. \w+ resumed>(.*)", text)
    if resumed:
      text = unfinished.pop(pid) + resumed[1]
    sync = re.match(r"(fsync|fdatasync)\(\d+<(.*?)>\s*\)\s*= 0", text)
    if sync:
      events.append(("sync", sync[2].removesuffix("(deleted)"), None))
    rename = re.match(r'rename\w*\((?:AT_FDCWD\S*, )?"(.*?)", (?:AT_FDCWD\S*, )?"(.*?)".*\)\s*= 0', text)
    if rename:
      events.append(("rename", rename[1], rename[2]))
  return events


@pytest.mark.parametrize("file_io", ["buffered", "direct"])
def test_every_file_and_directory_is_synced_before_the_rename_and_the_run_after_it(file_io, tmp_path):
  run = tmp_path / "run"
  events = traced(tmp_path / "x", "-c", SAVE, str(run), "auto", file_io)
  temporary = f"{run}/3.orbax-checkpoint-tmp"
  at = events.index(("rename", temporary, f"{run}/3"))
  synced_before = {path for kind, path, _ in events[:at] if kind == "sync"}
  # An item is renamed inside the step before the step is; TensorStore syncs its files under their temporary names.
  files = [p for p in (run / "3").rglob("*")]
  assert {p.name for p in files} >= {"_METADATA", "_CHECKPOINT_METADATA", "commit_success.txt", "manifest.ocdbt"}
  for path in [run / "3", *files]:
    assert str(path).replace(f"{run}/3", temporary, 1) in synced_before, f"{path} was not synced before the rename"
  for path in [p for p in (run / "3").rglob("*") if p.is_dir()]:
    inside = [str(p).replace(f"{run}/3", temporary, 1) for p in path.rglob("*")]
    last = max(i for i, e in enumerate(events[:at]) if e[:2] == ("sync", str(path).replace(f"{run}/3", temporary, 1)))
    for name in inside:
      first = max(i for i, e in enumerate(events[:at]) if e[:2] == ("sync", name))
      assert first < last, f"{path} was synced before {name} in it"
  assert ("sync", str(run), None) in events[at:], "the run's directory holds the new name only once it is synced"


def test_scratch_disks_are_spared(tmp_path):
  events = traced(tmp_path / "x", "-c", SAVE, str(tmp_path / "run"), "off", "direct")
  synced = {path for kind, path, _ in events if kind == "sync"}
  assert not [path for path in synced if path.endswith(("_METADATA", "commit_success.txt", "/run"))]
  assert (tmp_path / "run" / "3" / "commit_success.txt").exists()


@pytest.mark.multiprocess
def test_each_process_syncs_what_it_wrote_itself(tmp_path):
  # Through the launcher's own environment; strace follows the children.
  run = tmp_path / "run"
  command = ["-m", "ckpt_jax.multihost", "--processes", "2", "--devices", "2", TRAIN, str(run), "save"]
  events = traced(tmp_path / "x", *command)
  at = events.index(("rename", f"{run}/0.orbax-checkpoint-tmp", f"{run}/0"))
  own = f"{run}/0.orbax-checkpoint-tmp/default.orbax-checkpoint-tmp/array_metadatas/process_1"
  assert ("sync", own, None) in events[:at], "process 1 may have it in its own host's cache"


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o000])
def test_files_honour_the_umask_and_nothing_is_world_writable(umask, tmp_path):
  old = os.umask(umask)
  try:
    with ckpt.Checkpointer(tmp_path / "run") as c:
      for step in range(2):
        c.save(step, {"x": jnp.arange(5.0)}, metrics={"loss": 1.0})
      c.wait()
      c.pin(1)
  finally:
    os.umask(old)
  for path in [tmp_path / "run", *(tmp_path / "run").rglob("*")]:
    mode = stat.S_IMODE(path.stat().st_mode)
    assert not mode & 0o002, f"{path} is world-writable"
    if umask:
      assert not mode & umask, f"{path} has {mode:o} under umask {umask:o}"


def test_storage_mode_sets_the_bits_of_files_and_directories_whatever_the_umask(tmp_path):
  old = os.umask(0o077)
  try:
    with ckpt.Checkpointer(tmp_path / "run", {"storage": {"mode": "0640"}}) as c:
      c.save(0, {"x": jnp.arange(5.0)})
  finally:
    os.umask(old)
  for path in (tmp_path / "run" / "0").rglob("*"):
    assert stat.S_IMODE(path.stat().st_mode) == (0o750 if path.is_dir() else 0o640), path
  assert stat.S_IMODE((tmp_path / "run").stat().st_mode) == 0o750
  with ckpt.Checkpointer(tmp_path / "run") as c:
    assert c.restore().step == 0


def test_set_group_id_of_shared_directories_stays(tmp_path):
  (tmp_path / "run").mkdir()
  os.chmod(tmp_path / "run", 0o2775)
  with ckpt.Checkpointer(tmp_path / "run", {"storage": {"mode": "0660"}}) as c:
    c.save(0, {"x": jnp.arange(5.0)})
  assert stat.S_IMODE((tmp_path / "run").stat().st_mode) == 0o2770
  assert stat.S_IMODE((tmp_path / "run" / "0").stat().st_mode) == 0o2770


@pytest.mark.parametrize("mode", [416, "888", "rw-r-----", "0440", "0666", True])
def test_mode_that_means_something_else_is_refused(mode):
  with pytest.raises(ckpt.ConfigError, match=r"storage\.mode"):
    ckpt.Config(storage={"mode": mode})


def test_fsync_follows_from_the_kind_of_storage():
  auto = ckpt.Config()
  assert sealing_of(auto, StorageKind.LOCAL).fsync and sealing_of(auto, StorageKind.LUSTRE).fsync
  assert not sealing_of(auto, StorageKind.NFS).fsync, "close() sends everything to the server"
  assert not sealing_of(auto, StorageKind.GCS).fsync
  assert not sealing_of(ckpt.Config(storage={"fsync": False}), StorageKind.LOCAL).fsync
