"""Steps that were put aside are seen, and come back; commands that cannot delete say so, and ask before they do."""

import io
import json
import os
import subprocess
import sys

import jax.numpy as jnp
import pytest

import ckpt_jax as ckpt
from ckpt_jax.cli import app
from ckpt_jax.run import quarantine
from ckpt_jax.run.steps import committed_steps, run_directory


def state(step):
  return {"params": {"w": jnp.full(3000, float(step))}, "opt": jnp.ones(9)}


def save(path, steps, **config):
  with ckpt.Checkpointer(path, config) as c:
    for step in steps:
      c.save(step, state(step))


def flip(path, step):
  """Inverts the middle of the largest file of a step."""
  file = max((p for p in (path / str(step)).rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
  data = bytearray(file.read_bytes())
  middle = len(data) // 2
  data[middle : middle + 64] = bytes(255 - b for b in data[middle : middle + 64])
  file.write_bytes(data)


@pytest.fixture
def command(monkeypatch, capsys):
  """Runs a command in this process, with this on its standard input: exit code, stdout, stderr."""

  def run(*arguments, answer=""):
    monkeypatch.setattr(sys, "argv", ["ckpt-jax", *map(str, arguments)])
    monkeypatch.setattr(sys, "stdin", answer if answer is None else io.StringIO(answer))
    with pytest.raises(SystemExit) as e:
      app.main()
    said = capsys.readouterr()
    return e.value.code, said.out, said.err

  return run


def test_a_quarantined_step_is_listed_with_the_reason_and_comes_back_if_it_is_sound(tmp_path, command):
  save(tmp_path, range(3))
  flip(tmp_path, 2)
  with ckpt.Checkpointer(tmp_path) as c:
    assert c.restore(like=state(0)).step == 1
    with pytest.raises(ckpt.NoCheckpointError, match=r"Step 2 was put aside: `ckpt-jax ls .* --all`"):
      c.restore(2)
  code, out, _ = command("ls", tmp_path)
  assert code == 0 and f"1 step in quarantine: ckpt-jax ls {tmp_path} --all" in out
  for arguments in (("ls", tmp_path, "--all"), ("verify", tmp_path)):
    code, out, _ = command(*arguments)
    assert code == 0 and "in quarantine" in out and "params/w" in out
    assert f"ckpt-jax restore-quarantined {tmp_path} STEP" in out
  told = json.loads(command("ls", tmp_path, "--all", "--json")[1])
  assert [t["step"] for t in told] == [0, 1, 2] and told[2]["aside"] == "quarantine" and "params/w" in told[2]["reason"]
  told = json.loads(command("verify", tmp_path, "--json")[1])
  assert told[2]["way_back"].endswith(" 2") and "params/w" in told[2]["reason"] and told[2]["findings"] == []

  code, out, err = command("restore-quarantined", tmp_path, 2)
  assert code == 1 and "params/w: its bits are not those" in err and "stays in quarantine" in err and "again" not in out
  assert committed_steps(run_directory(tmp_path)) == [0, 1]
  (back,) = quarantine.listed(run_directory(tmp_path))
  assert "params/w" in back.reason
  kept = os.fspath(back.path)
  flip_back = tmp_path / ".ckpt_jax" / "quarantine"
  os.rename(kept, flip_back / "2")
  flip(flip_back, 2)  # the disk was mended
  os.rename(flip_back / "2", kept)
  code, out, _ = command("restore-quarantined", tmp_path, 2)
  assert code == 0 and "step 2 counts again; checked: all bits compared" in out
  assert ckpt.Checkpointer(tmp_path).restore(like=state(0)).step == 2
  assert command("restore-quarantined", tmp_path, 2)[0] == 1 and quarantine.listed(run_directory(tmp_path)) == []


def test_steps_behind_a_rollback_come_back_and_never_in_place_of_others(tmp_path, command):
  save(tmp_path, range(4))
  code, out, _ = command("rollback", tmp_path, 1)
  assert code == 0 and f"ckpt-jax restore-quarantined {tmp_path} STEP" in out
  assert "2 steps set aside: ckpt-jax ls" in command("ls", tmp_path)[1]
  save(tmp_path, [2])
  code, _, err = command("restore-quarantined", tmp_path, 2)
  assert code == 1 and "there is a step 2 already" in err
  assert command("restore-quarantined", tmp_path, 3)[0] == 0
  assert committed_steps(run_directory(tmp_path)) == [0, 1, 2, 3]
  code, _, err = command("restore-quarantined", tmp_path, 7)
  assert code == 1 and "no step 7 was put aside; there are 2 (set aside)" in err


def test_a_run_of_which_nothing_counts_says_what_was_put_aside(tmp_path, command):
  save(tmp_path, [0])
  quarantine.put_aside(run_directory(tmp_path), [0], quarantine.QUARANTINE, {0: "for a test"})
  code, out, err = command("ls", tmp_path)
  assert code == 1 and "1 step in quarantine" in out and "no committed checkpoint" in err
  with (
    ckpt.Checkpointer(tmp_path) as c,
    pytest.raises(ckpt.CorruptCheckpointError, match=f"ckpt-jax restore-quarantined {tmp_path} STEP"),
  ):
    c.restore_or_init(lambda: state(0))


@pytest.mark.parametrize(
  "arguments", [("prune", "--keep-last", 1), ("rollback", 1, "--delete")], ids=["prune", "rollback"]
)
def test_what_cannot_be_undone_is_asked_for_and_nobody_to_ask_is_wrong_usage(tmp_path, command, arguments):
  save(tmp_path, range(4))
  name, *rest = arguments
  for answer in ("", None):
    code, _, err = command(name, tmp_path, *rest, answer=answer)
    assert code == 2 and "--yes" in err
  code, out, err = command(name, tmp_path, *rest, answer="n\n")
  assert code == 1 and "elete" in out + err and "nothing deleted" in err
  assert committed_steps(run_directory(tmp_path)) == [0, 1, 2, 3]
  code, _, _ = command(name, tmp_path, *rest, answer="y\n")
  assert code == 0 and len(committed_steps(run_directory(tmp_path))) < 4
  assert command(name, tmp_path, *rest)[0] == 0, "nothing to delete, nothing to ask"


@pytest.fixture
def read_only(tmp_path):
  """A run of five steps on storage that nobody can write, the first pinned, the last behind a rollback."""
  if os.geteuid() != 0:
    pytest.skip("mounting a tmpfs needs root")
  mount = ["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", tmp_path]
  if subprocess.run(mount, capture_output=True).returncode:
    pytest.skip("cannot mount a tmpfs here")
  save(tmp_path / "run", range(5))
  ckpt.Checkpointer(tmp_path / "run").pin(0)
  ckpt.Checkpointer(tmp_path / "run").rollback(3)
  subprocess.run(["mount", "-o", "remount,ro", tmp_path], check=True)
  yield tmp_path / "run"
  subprocess.run(["umount", "-l", tmp_path], check=True)


@pytest.mark.parametrize(
  ("arguments", "steps"),
  [
    ("prune RUN --keep-last 1 -y", [1, 2]),
    ("prune RUN --keep-last 1 -y --json", [1, 2]),
    ("prune RUN --keep-last 9 --thin 1ms -y", [1, 2]),
    ("rollback RUN 1 --delete -y", [3]),
    ("rollback RUN 1", [3]),
    ("restore-quarantined RUN 4", [4]),
    ("pin RUN 1", [1]),
    ("unpin RUN 0", [0]),
    ("repack RUN 1 --pack on", [1]),
  ],
)
def test_on_read_only_storage_no_command_claims_to_have_done_anything(read_only, command, arguments, steps):
  code, out, err = command(*arguments.replace("RUN", str(read_only)).split())
  assert code == 1 and "Read-only file system" in err.split("error:")[-1] and "Traceback" not in err
  assert all(f"{step}" in err.split("error:")[-1].replace(str(read_only), "") for step in steps)
  assert not any(word in out for word in ("deleted", "thinned 2", "pinned step", "counts again", "is the newest"))
  if "--json" in arguments:
    told = json.loads(out)
    assert (told["removed"], told["nbytes_freed"], list(told["failed"])) == ([], 0, ["1", "2"])
  assert committed_steps(run_directory(read_only)) == [0, 1, 2, 3]


def test_prune_counts_what_is_gone_and_names_what_is_not(tmp_path, command, monkeypatch):
  save(tmp_path, range(4))
  unlink = os.unlink

  def refuse(path, **kwargs):
    if f"{tmp_path}/1/" in os.fspath(path):
      raise PermissionError(13, "Permission denied", path)
    unlink(path, **kwargs)

  monkeypatch.setattr(os, "unlink", refuse)
  code, out, err = command("prune", tmp_path, "--keep-last", 1, "-y")
  assert code == 1 and "deleted 2 steps, 23.5 KiB" in out and "step 1: Permission denied" in err
  monkeypatch.undo()
