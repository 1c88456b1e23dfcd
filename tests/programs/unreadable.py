"""A run of which this process may not read some files: unreadable.py DIRECTORY. Needs a process that is refused."""

import errno
import os
import pathlib
import resource
import sys

import jax.numpy as jnp
from typer.testing import CliRunner

import ckpt_jax as ckpt
from ckpt_jax.cli.app import app
from ckpt_jax.run import steps as run

base = pathlib.Path(sys.argv[1])
path = base / "runs" / "run"
state = {"w": jnp.ones(1000), "n": 3, "name": "text"}


def everything():
  """What is where; modes aside, and records, which go on in a new file after one that could not be written."""
  found = (p for p in base.rglob("*") if p.parent.name != "events")
  return sorted(str(p) for p in found if not p.name.startswith(("lease", "save-", "job")))


def expect(error, call, *words):
  try:
    call()
  except ckpt.CheckpointError as e:
    assert type(e) is error, f"{type(e).__name__}: {e}"
    assert all(word in str(e) for word in words), str(e)
  else:
    raise AssertionError(f"no {error.__name__}")


def cli(*arguments):
  return CliRunner().invoke(app, list(map(str, arguments)))


with ckpt.Checkpointer(path, {"retention": {"last": None}}) as c:
  for step in range(2):
    c.save(step, state, extras={"at": step})
  c.wait()
  before = everything()
  names = ["default/manifest.ocdbt", "default/ocdbt.process_0/d", "default/_METADATA", "default/ckpt_jax.json"]
  names += ["default", "_CHECKPOINT_METADATA", "default/_strings.json", ""]
  for name in names:
    target = path / "1" / name
    mode = target.stat().st_mode
    target.chmod(0)
    try:
      if os.access(target, os.R_OK):
        raise SystemExit("this process may read everything")
      expect(ckpt.StorageError, lambda: c.restore(like=state), "/1", "ermission")
      expect(ckpt.StorageError, lambda: c.restore(1), "/1", "ermission")
      assert c.restore(0, like=state).extras == {"at": 0}, name
      assert c.latest_step() == 1, name
      found = ckpt.verify(path, 1)
      assert found and {f.kind for f in found} == {"unreadable"}, (name, found)
      assert "could not be read" in found[0].message and "ermission" in found[0].message
    finally:
      target.chmod(mode)
    assert c.restore(like=state).step == 1 and ckpt.verify(path) == [], name
  assert everything() == before, "nothing is moved"

  # Commands: what cannot be read is told from what is damaged, and from what is sound.
  (path / "1" / "default" / "manifest.ocdbt").chmod(0)
  done = cli("verify", path)
  assert done.exit_code == 1 and "could not be read" in done.output and "sound" in done.output, done.output
  assert "damaged" not in done.output
  (path / "1" / "default" / "manifest.ocdbt").chmod(0o644)
  (path / "1").chmod(0)
  done = cli("ls", path)
  assert done.exit_code == 1 and isinstance(done.exception, SystemExit), done.exception
  assert "ermission" in done.output and "/1" in done.output, done.output
  (path / "1").chmod(0o755)

  # All descriptors are in use.
  resource.setrlimit(resource.RLIMIT_NOFILE, (512, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
  taken = []
  try:
    while True:
      taken.append(os.open(os.devnull, os.O_RDONLY))
  except OSError as e:
    assert e.errno == errno.EMFILE
  try:
    expect(ckpt.StorageError, lambda: c.restore(like=state), "oo many open files")
  finally:
    for descriptor in taken:
      os.close(descriptor)
  assert c.restore(like=state).step == 1
  assert everything() == before

# A run that cannot be listed is no new run.
for directory in (path, path.parent):
  directory.chmod(0)
  try:
    expect(ckpt.StorageError, lambda: ckpt.Checkpointer(path).restore_or_init(lambda: state), "ermission")
    expect(ckpt.StorageError, lambda: ckpt.verify(path), "ermission")
    assert cli("ls", path).exit_code == 1
  finally:
    directory.chmod(0o755)
assert run.committed_steps(run.run_directory(path)) == [0, 1] and everything() == before
print("fine", flush=True)
