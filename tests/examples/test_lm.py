"""The trainer: resumes bitwise, and starts unchanged under another launcher."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from ckpt_jax.multihost import launch

SMALL = ["--width", "32", "--layers", "1", "--heads", "2", "--context", "16", "--fsdp", "2", "--every", "3"]


def command(run, notes, steps):
  return ["-m", "ckpt_jax.examples.lm", "--run", str(run), "--notes", str(notes), "--steps", str(steps), *SMALL]


pytestmark = [pytest.mark.multiprocess, pytest.mark.usefixtures("lenient_jax")]


def test_resumed_on_another_mesh_is_bitwise_what_was_trained(tmp_path):
  run = tmp_path / "run"
  first = launch(command(run, tmp_path / "a", 4), processes=2, devices=2, timeout=180)
  assert [r.returncode for r in first] == [0, 0], first[0].log
  (second,) = launch(command(run, tmp_path / "b", 7), processes=1, devices=2, timeout=180)
  assert second.returncode == 0 and "resumed from step 3" in second.log, second.log
  trained = json.loads((tmp_path / "a" / "trained-3.json").read_text())
  restored = json.loads((tmp_path / "b" / "restored-3.json").read_text())
  assert len(trained) > 20 and trained == restored


def test_starts_unchanged_under_open_mpi(tmp_path):
  if shutil.which("mpirun") is None:
    assert "CI" not in os.environ, "CI installs openmpi-bin"
    pytest.skip("no mpirun here (Debian: openmpi-bin)")
  environment = {
    **os.environ,
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
  }
  done = subprocess.run(
    ["mpirun", "--oversubscribe", "-n", "2", sys.executable, *command(tmp_path / "run", tmp_path / "notes", 4)],
    env=environment,
    capture_output=True,
    text=True,
    timeout=240,
  )
  assert done.returncode == 0, done.stderr[-2000:]
  assert "2 processes: from scratch" in done.stdout
  assert pathlib.Path(tmp_path / "run" / "3").is_dir()
