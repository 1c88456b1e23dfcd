"""A disk that is really full: a small tmpfs."""

import datetime
import os
import re
import time

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from hypothesis import given
from hypothesis import strategies as st

import ckpt_jax as ckpt
from ckpt_jax.planning.estimate import room_nbytes
from ckpt_jax.policies import Retention
from ckpt_jax.run.steps import StepInfo
from ckpt_jax.save.after_commit import saves_that_fit
from ckpt_jax.storage.space import free_bytes


def numbers(n, seed=0):
  return {"x": jnp.asarray(np.random.default_rng(seed).standard_normal(n, dtype=np.float32))}


def test_save_that_does_not_fit_is_refused_with_both_figures_before_anything_is_written(small_disk):
  with ckpt.Checkpointer(small_disk / "run") as c:
    c.save(0, numbers(1000))
    c.wait()
    before = sorted(p.name for p in (small_disk / "run").iterdir())
    with pytest.raises(ckpt.OutOfSpaceError, match=r"needs 34\.\d+ MB and 1[12]\.\d+ MB are free"):
      c.save(1, numbers(8 << 20))
    assert sorted(p.name for p in (small_disk / "run").iterdir()) == before
    assert c.save(2, numbers(1000))
    c.wait()
    assert [s.step for s in c.steps()] == [0, 2]


def test_full_disk_reaches_the_next_save_once_and_leaves_nothing_behind(small_disk):
  # Compressed, nobody can know before the first save how much it takes.
  c = ckpt.Checkpointer(small_disk / "run", {"layout": {"compression": "on"}})
  with pytest.raises(ckpt.SaveFailedError, match="step 1 was not saved") as e:
    c.save(1, numbers(8 << 20))  # 33 MB on 12 MB; either save or the write behind it fails
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
      c.save(2, numbers(1000))
      time.sleep(0.05)
  assert isinstance(e.value, ckpt.OutOfSpaceError), "told as what it is"
  assert c.latest_step() is None
  assert c.save(3, numbers(1000))
  c.close()
  with ckpt.Checkpointer(small_disk / "run") as again:
    assert [s.step for s in again.steps()] == [3]
    assert again.restore(3).state["x"].tobytes() == np.asarray(numbers(1000)["x"]).tobytes()


def test_steps_that_retention_drops_anyway_make_room_and_the_newest_stays(small_disk):
  with ckpt.Checkpointer(small_disk / "run", {"retention": {"last": 2}}) as c:
    for step in range(6):  # 4 MB each on 12 MB: a third one fits only once the oldest is gone
      assert c.save(step, numbers(1 << 20, step))
      c.wait()
      assert step in [s.step for s in c.steps()]
    for step in c.steps():
      assert c.restore(step.step).state["x"].tobytes() == np.asarray(numbers(1 << 20, step.step)["x"]).tobytes()


def test_the_only_step_is_never_given_up_for_room(small_disk):
  with ckpt.Checkpointer(small_disk / "run", {"retention": {"last": 1}}) as c:
    c.save(0, numbers(2 << 20))  # 8 MB on 12 MB
    c.wait()
    with pytest.raises(ckpt.OutOfSpaceError):
      c.save(1, numbers(2 << 20))
    assert [s.step for s in c.steps()] == [0]


def test_deleting_works_on_a_disk_without_a_single_free_block(small_disk):
  with ckpt.Checkpointer(small_disk / "run", {"retention": {"last": 2}}) as c:
    for step in range(2):
      c.save(step, numbers(1 << 20, step))
      c.wait()
    filler = os.open(small_disk / "filler", os.O_CREAT | os.O_WRONLY)
    with pytest.raises(OSError):  # somebody else takes the rest
      while True:
        os.write(filler, bytes(4096))
    os.close(filler)
    assert c.save(2, numbers(1 << 18, 2)), "step 0 makes room, though not even its mark could be written"
    c.wait()
    assert [s.step for s in c.steps()] == [1, 2]
    assert c.restore(1).state["x"].tobytes() == np.asarray(numbers(1 << 20, 1)["x"]).tobytes()


def test_a_tiny_step_does_not_make_a_large_one_look_larger(small_disk):
  # 8 bytes of arrays in some kilobytes of metadata: a thousandfold, which 4 MB times it would never fit.
  with ckpt.Checkpointer(small_disk, ckpt.Config(layout={"compression": "on"})) as c:
    c.save(0, numbers(2))
    c.wait()
    c.save(1, numbers(1_000_000))
    c.wait()
    assert c.latest_step() == 1


def test_buckets_have_no_limit_and_planned_bytes_follow_what_was_stored():
  assert free_bytes(epath.Path("/proc")) is None, "a file system that does not say how large it is"
  assert room_nbytes(10**9, 100) > 10**9
  assert room_nbytes(10**9, 100, 0.5) < 6 * 10**8


def test_directory_that_cannot_be_made_is_a_storage_error(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(ckpt.StorageError, match="cannot open the run"):
    ckpt.Checkpointer(tmp_path / "file" / "run")


def fills(path, steps, caplog, **config):
  """Saves 1 MB a step, and what was said of the storage."""
  caplog.clear()
  with ckpt.Checkpointer(path, config) as c:
    for step in steps:
      c.save(step, numbers(1 << 18, step))
      c.wait()
  return [r.getMessage() for r in caplog.records if "will fill its storage" in r.message and r.levelname == "WARNING"]


def test_a_run_that_will_fill_its_storage_is_warned_of_once_with_the_arithmetic(small_disk, caplog):
  (said,) = fills(small_disk / "a", [0, 10, 20], caplog, schedule={"every_steps": 10})
  assert re.search(r"1\d\.\d MiB are free and a step takes 1\.0 MiB, so that 1\d more fit", said), said
  found = re.search(r"so that (\d+) more fit: saving every 10 steps, it is full at step (\d+)\. No rule is set", said)
  assert found and int(found[2]) == 10 * (int(found[1]) + 1) and "retention: {last: 3} takes 4" in said
  assert len(fills(small_disk / "b", [0], caplog, retention={"last": 1, "every_steps": 2})) == 1
  assert fills(small_disk / "c", [0, 1], caplog, retention={"last": 2}) == []
  assert fills(small_disk / "d", [0], caplog, schedule={"every_steps": 10, "last": 15}) == []


rules = st.builds(
  Retention,
  last=st.none() | st.integers(1, 8),
  every_steps=st.none() | st.integers(1, 9),
  budget=st.none() | st.integers(1, 12),
)


@given(rules, st.integers(1, 5), st.integers(0, 15))
def test_as_many_saves_fit_as_do_when_they_are_made_one_by_one(policy, there, free):
  start = datetime.datetime(2026, 1, 1, tzinfo=datetime.timezone.utc)
  steps = [StepInfo(i, start + datetime.timedelta(minutes=i), 1, {}) for i in range(there + 30)]
  kept = [s for s in steps[:there] if s.step in policy.decide(steps[:there]).kept]
  room, made = free + len(kept), 0
  found = saves_that_fit(policy, kept, steps[there:], free, 1)
  for coming in steps[there:]:
    if len(kept) + 1 > room:
      break
    kept.append(coming)
    decided = policy.decide(kept)
    kept = [s for s in kept if s.step in decided.kept]
    made += 1
  assert found == (made if made < 30 else None)
