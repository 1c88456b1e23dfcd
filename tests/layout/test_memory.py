"""Free memory: the host's, or the cgroup's where that is nearer."""

import json
import os
import pathlib
import subprocess
import sys

import psutil
import pytest

from ckpt_jax.tuning.profile import available_memory


def test_without_a_cgroup_the_host_decides(tmp_path):
  assert abs(available_memory(tmp_path) - psutil.virtual_memory().available) < 1 << 30


def test_cgroup_limit_counts_and_page_cache_is_free(tmp_path):
  (tmp_path / "memory.max").write_text("1000000\n")
  (tmp_path / "memory.current").write_text("900000\n")
  (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 200000\n")
  assert available_memory(tmp_path) == 300_000


def test_unlimited_cgroup_leaves_the_host_to_decide(tmp_path):
  (tmp_path / "memory.max").write_text("max\n")
  (tmp_path / "memory.current").write_text("900000\n")
  (tmp_path / "memory.stat").write_text("inactive_file 0\n")
  assert available_memory(tmp_path) > 1 << 20


def measured(run, *arguments):
  program = pathlib.Path(__file__).parents[1] / "programs" / "memory.py"
  done = subprocess.run(
    [sys.executable, str(program), str(run), *arguments],
    # What stands for pinned memory comes from malloc, which would keep freed blocks for each thread.
    env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"},
    capture_output=True,
    text=True,
    timeout=240,
    check=True,
  )
  return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("devices", ["cpu", "accelerators"])
def test_host_memory_bounds_what_saving_and_restoring_take_beside_the_state(tmp_path, devices):
  limit, slack = 32_000_000, 32_000_000  # code and small objects come on top
  bounded = measured(tmp_path / "a", "32MB", "on", devices)
  assert bounded["state"] > 4 * limit
  assert max(bounded["saving"], bounded["restoring"]) < limit + slack, bounded
  if devices == "accelerators":
    return
  free = measured(tmp_path / "b", "none", "on", devices)
  assert free["saving"] > 2 * limit, free  # else the measurement sees nothing
