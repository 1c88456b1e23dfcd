"""Free memory: the host's, or the cgroup's where that is nearer."""

import psutil

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
