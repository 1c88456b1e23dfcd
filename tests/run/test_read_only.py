"""Saving where nothing can be written: one error that names the path and the reason, and nothing raw beneath."""

import contextlib
import grp  # epath imports it late, when another user may not read it any more
import os
import shutil
import subprocess
import tempfile
import warnings

import jax.numpy as jnp
import pytest

import ckpt_jax as ckpt
from ckpt_jax.run.lease import _File

STATE = {"x": jnp.arange(4.0)}
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounting, and being somebody else, needs root")
assert grp


@pytest.fixture
def disk(tmp_path):
  mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", tmp_path], capture_output=True)
  if mounted.returncode:
    pytest.skip(f"cannot mount a tmpfs here: {mounted.stderr}")
  yield tmp_path
  subprocess.run(["umount", "-l", tmp_path], check=True)


def remount(disk, how):
  subprocess.run(["mount", "-o", f"remount,{how}", disk], check=True)


def refused(save, *words):
  with warnings.catch_warnings(), pytest.raises(ckpt.StorageError) as e:
    warnings.simplefilter("error", RuntimeWarning)  # "coroutine ... was never awaited"
    save()
  for word in words:
    assert word in str(e.value), str(e.value)
  assert (
    "os_error_code" not in str(e.value) and "PERMISSION_DENIED" not in str(e.value) and "__lock" not in str(e.value)
  )
  return e.value


@needs_root
def test_save_into_a_read_only_file_system_is_one_error_and_restoring_goes_on(disk):
  run = disk / "run"
  with ckpt.Checkpointer(run) as c:
    c.save(0, STATE)
  remount(disk, "ro")
  with ckpt.Checkpointer(run) as c:
    assert c.restore().step == 0
    error = refused(lambda: c.save(1, STATE), str(run), "step 1 was not saved", "mounted read-only")
    assert isinstance(error, ckpt.SaveFailedError) and error.step == 1
    refused(lambda: c.save(2, STATE, force=True), "step 2 was not saved", "mounted read-only")
    c.wait()
    assert [s.step for s in c.steps()] == [0]
    refused(lambda: ckpt.Checkpointer(disk / "another"), "another: cannot open the run", "mounted read-only")
    remount(disk, "rw")
    assert c.save(3, STATE), "writable again"
    c.wait()
    remount(disk, "ro")
    refused(lambda: c.save(4, STATE), "step 4 was not saved", "mounted read-only")
    c.wait()
    remount(disk, "rw")
    check = c._saver._run.admission.lease.check
    c._saver._run.admission.lease.check = lambda: (remount(disk, "ro"), check())  # the last moment before the commit
    c.save(4, STATE)
    error = refused(c.wait, "step 4 was not saved", "Read-only file system")
    assert isinstance(error, ckpt.SaveFailedError)
    assert [s.step for s in c.steps()] == [0, 3]


@needs_root
def test_not_even_a_lease_fits_on_a_full_disk(disk):
  with ckpt.Checkpointer(disk / "run") as c:
    c.save(0, STATE)
  (disk / "run" / ".ckpt_jax" / "lease").unlink()
  with contextlib.suppress(OSError), open(disk / "big", "wb", buffering=0) as f:
    while f.write(bytes(4096)):
      pass
  with ckpt.Checkpointer(disk / "run") as c:
    error = refused(lambda: c.save(1, STATE), str(disk / "run"), "step 1", "No space left")
    assert isinstance(error, ckpt.OutOfSpaceError) and isinstance(error, ckpt.SaveFailedError)
    (disk / "big").unlink()
    assert c.save(1, STATE)


@needs_root
def test_save_into_a_run_of_another_user_names_the_path_its_owner_and_its_mode():
  top = tempfile.mkdtemp()
  os.chmod(top, 0o755)
  run, notes = f"{top}/run", f"{top}/run/.ckpt_jax"
  with ckpt.Checkpointer(run) as c:
    c.save(0, STATE)

  def as_nobody(*words, path=run, opens=True):
    os.setegid(65534)
    os.seteuid(65534)
    try:
      if not opens:
        return refused(lambda: ckpt.Checkpointer(path), *words)
      with ckpt.Checkpointer(path) as c:
        assert c.restore().step == 0
        refused(lambda: c.save(1, STATE), run, "step 1 was not saved", "user 65534", "no permission", *words)
    finally:
      os.seteuid(0)
      os.setegid(0)

  try:
    as_nobody("read-only for", f"{notes}/lease belongs to user 0, group 0, mode 0644")
    os.chmod(run, 0o777)
    as_nobody("read-only for", f"{notes}/lease belongs to user 0")
    shutil.rmtree(notes)
    os.chmod(run, 0o755)
    as_nobody("read-only for", f"{run} belongs to user 0, group 0, mode 0755")
    os.chmod(run, 0o700)
    as_nobody("user 65534 may not read it", f"{run} belongs to user 0, group 0, mode 0700", opens=False)
    as_nobody("read-only for", f"{top} belongs to user 0", path=f"{top}/other", opens=False)
    os.chmod(run, 0o777)
    os.mkdir(notes, 0o777)
    os.chmod(notes, 0o777)
    with open(f"{notes}/lease", "wb") as f:
      os.fchmod(f.fileno(), 0o600)
    as_nobody("may not read it", f"{notes}/lease belongs to user 0, group 0, mode 0600")
    assert sorted(os.listdir(run)) == [".ckpt_jax", "0"]
  finally:
    shutil.rmtree(top)


def test_only_a_mount_without_locks_goes_without_them(tmp_path):
  cell = _File(tmp_path, None)
  tried = []

  def fails_with(code):
    def operation(store):
      del store
      tried.append(code)
      raise ValueError(f"UNKNOWN: Failed to acquire lock on file: \"x/lease.__lock\" [os_error_code='{code}']")

    return operation

  for code, times in ((37, 2), (38, 2), (13, 1), (30, 1)):
    tried.clear()
    with pytest.raises(ckpt.StorageError):
      cell._call(fails_with(code), 1.0)
    assert tried == [code] * times
