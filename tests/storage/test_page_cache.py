"""What is in the page cache, counted in pages by mincore(2), while files and steps are written and read."""

import os
import platform
import subprocess
import time

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath
from jobs import together

import ckpt_jax as ckpt
from ckpt_jax.bench.worker import drop_cache
from ckpt_jax.rewrite.copy import copy_leaves, leaf_names
from ckpt_jax.storage.kinds import StorageKind
from ckpt_jax.storage.page_cache import CAN_RELEASE, cached_nbytes, write_behind

MIB = 2**20


@pytest.fixture
def disk(tmp_path):
  if not CAN_RELEASE or ckpt.detect(tmp_path) is not StorageKind.LOCAL:
    pytest.skip("the pages of files cannot be dropped here")
  return tmp_path


def share(directory):
  cached, total = cached_nbytes(directory)
  return cached / total


def falls_to(most, directory):
  until = time.monotonic() + 60
  while (found := share(directory)) > most and time.monotonic() < until:
    time.sleep(0.01)
  return found <= most


def write(path, nbytes):
  block = np.random.default_rng(0).bytes(MIB)
  with open(path, "wb") as file:
    for _ in range(nbytes // MIB):
      file.write(block)
    file.flush()
    os.fsync(file.fileno())
  return block


def test_pages_are_dropped_while_others_are_written_and_nothing_is_lost(disk):
  with write_behind(disk / "data"):  # which is not there yet
    (disk / "data").mkdir()
    blocks = [write(disk / "data" / name, 160 * MIB) for name in ("a", "b")]
    assert falls_to(0.5, disk / "data"), "not before the end"
  (disk / "data").rename(disk / "renamed")
  assert falls_to(0.05, disk / "renamed")
  for name, block in zip("ab", blocks, strict=True):
    assert (disk / "renamed" / name).read_bytes() == block * 160


def test_an_error_passes_and_a_directory_that_is_gone_is_none(tmp_path):
  with pytest.raises(ZeroDivisionError), write_behind(tmp_path / "never"):
    raise ZeroDivisionError
  with write_behind(tmp_path):
    write(tmp_path / "a", MIB)
    (tmp_path / "a").unlink()


def test_files_in_memory_stay_whole():
  if ckpt.detect("/dev/shm") is not StorageKind.TMPFS:
    pytest.skip("no tmpfs at /dev/shm")
  file = f"/dev/shm/ckpt_jax-{os.getpid()}"
  try:
    with write_behind("/dev/shm"):
      block = write(file, 2 * MIB)
    with open(file, "rb") as f:
      assert f.read() == block * 2
  finally:
    os.unlink(file)


STATE = {f"w{i}": np.random.default_rng(i).standard_normal((1024, 1100), dtype=np.float32) for i in range(8)}
STATE |= {f"small{i}": np.full((100,), i, np.float32) for i in range(300)}


@pytest.mark.parametrize(
  ("config", "array"),
  [
    ({}, jnp.asarray),
    ({}, np.asarray),
    ({"layout": {"pack": "on"}}, jnp.asarray),
    ({"layout": {"compression": "on"}}, jnp.asarray),
    ({"limits": {"host_memory": 16 * MIB}}, jnp.asarray),
  ],
  ids=["plain", "numpy", "packed", "compressed", "in turns"],
)
def test_a_step_leaves_no_pages_behind_whatever_its_layout(config, array, disk):
  state = jax.tree.map(array, STATE)
  for way in ("buffered", "direct"):
    settings = config | {"limits": config.get("limits", {}) | {"file_io": way, "save_concurrency": 16 * MIB}}
    with ckpt.Checkpointer(disk / way, settings) as c:
      c.save(1, state)
      c.wait()
      assert falls_to(0.05, disk / way / "1") if way == "direct" else share(disk / way / "1") > 0.9
      restored = c.restore(like=state)
  assert all(np.array_equal(restored.state[name], x) for name, x in STATE.items())
  if config.get("layout", {}).get("pack") != "on":
    plain = ocp.PyTreeCheckpointer().restore(disk / "direct" / "1" / "default")
    assert all(np.array_equal(plain[name], x) for name, x in STATE.items())


def tells_alignment(directory):
  """Whether TensorStore learns from statx(2) how to read with O_DIRECT: Linux 6.1, and file systems that say."""
  kernel = tuple(int(n) for n in platform.release().split("-")[0].split(".")[:2])
  kind = subprocess.run(
    ["stat", "-f", "-c", "%T", directory], capture_output=True, text=True, check=True
  ).stdout.strip()
  return kernel >= (6, 1) and kind in ("ext2/ext3", "xfs")


def test_a_restore_reads_past_the_page_cache_where_it_was_asked_to(disk):
  if not tells_alignment(disk):
    pytest.skip("this file system does not say how O_DIRECT reads are aligned")
  state = jax.tree.map(jnp.asarray, STATE)
  with ckpt.Checkpointer(disk) as c:
    c.save(1, state)
  for way in ("direct", "buffered"):
    drop_cache(disk / "1")
    with ckpt.Checkpointer(disk, {"limits": {"file_io": way}}) as c:
      restored = c.restore(like=state).state
    assert all(np.array_equal(restored[name], x) for name, x in STATE.items())
    assert share(disk / "1") < 0.1 if way == "direct" else share(disk / "1") > 0.9


def test_who_reads_a_step_once_leaves_the_page_cache_as_it_was(disk):
  if not tells_alignment(disk):
    pytest.skip("this file system does not say how O_DIRECT reads are aligned")
  with ckpt.Checkpointer(disk / "run") as c:
    for step in (1, 2):
      c.save(step, jax.tree.map(jnp.asarray, STATE))
  item = epath.Path(disk / "run" / "1" / "default")

  def copy():
    copy_leaves(item, epath.Path(disk / "copied"), leaf_names(item), pause=lambda: None)
    assert falls_to(0.05, disk / "copied")

  for read in (
    lambda: ckpt.verify(disk / "run", 1),
    lambda: ckpt.diff(disk / "run", 1, disk / "run", 2),
    lambda: ckpt.export(disk / "run", 1, disk / "out", subtree=".", format="safetensors"),
    copy,
  ):
    drop_cache(disk / "run")
    read()
    assert share(disk / "run") < 0.1


@pytest.mark.multiprocess
def test_every_process_drops_what_it_wrote_and_restores_share_pages(disk):
  for result in together("page_cache.py", disk, processes=2):
    assert "restored" in result.log
  assert share(disk / "2") > 0.9, "read through the page cache, which the processes share"
