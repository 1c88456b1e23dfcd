"""Damage in a bucket, where nothing can be renamed: marked, gone back from, moved when its number is saved again."""

import contextlib

import jax.numpy as jnp
import numpy as np
import pytest

import ckpt_jax as ckpt
from ckpt_jax.run import quarantine
from ckpt_jax.run.steps import committed_steps, run_directory
from ckpt_jax.storage.objects import BACKEND


@pytest.fixture
def url(s3):
  return f"{s3.url}/run"


def state(step):
  return {"w": jnp.asarray(np.random.default_rng(step).standard_normal((40, 50), dtype=np.float32)), "step": step}


def same(got, step):
  return got["w"].tobytes() == np.asarray(state(step)["w"]).tobytes() and got["step"] == step


def test_a_damaged_step_of_a_bucket_is_marked_and_its_number_can_be_saved_again(url):
  with ckpt.Checkpointer(url) as c:
    for step in range(2):
      c.save(step, state(step))
  directory = run_directory(url)
  data = [k for k in BACKEND.tree(directory / "1") if np.asarray(state(1)["w"]).tobytes()[:99] in read(directory, k)]
  file = directory / "1" / data[0]
  content = bytearray(file.read_bytes())
  content[len(content) // 2] ^= 8
  file.write_bytes(bytes(content))
  assert {f.leaf for f in ckpt.verify(url)} == {"w"}
  with ckpt.Checkpointer(url) as c:
    got = c.restore(like=state(0))
    assert got.step == 0 and same(got.state, 0) and list(got.report.quarantined) == [1]
    assert [s.step for s in c.steps()] == [0]
    assert file.read_bytes() == bytes(content), "nothing is deleted"
  with ckpt.Checkpointer(url) as c:  # also in the next job
    assert c.restore(like=state(0)).step == 0
    assert c.save(1, state(1))
    c.wait()
    assert [s.step for s in c.steps()] == [0, 1]
    assert same(c.restore(like=state(0)).state, 1)
  kept = BACKEND.tree(directory / ".ckpt_jax" / "quarantine")
  assert sum(k.endswith(data[0]) for k in kept) == 1
  assert ckpt.verify(url) == []


def test_rollback_in_a_bucket(url):
  with ckpt.Checkpointer(url) as c:
    for step in range(3):
      c.save(step, state(step))
    assert c.rollback(0) == [1, 2]
    assert c.latest_step() == 0 and c.restore().step == 0
    assert c.save(1, state(7))
    c.wait()
    assert [s.step for s in c.steps()] == [0, 1] and c.restore().state["step"] == 7
    assert c.rollback(0, delete=True) == [1, 2]
    assert [s.step for s in c.steps()] == [0]
  directory = run_directory(url)
  assert not [
    k for k in BACKEND.tree(directory) if k.startswith(("1/", "2/", ".ckpt_jax/set_aside", ".ckpt_jax/aside"))
  ]


def read(directory, key):
  return (directory / "1" / key).read_bytes()


def test_what_was_put_aside_in_a_bucket_is_listed_and_comes_back(url):
  with ckpt.Checkpointer(url) as c:
    for step in range(2):
      c.save(step, state(step))
  directory = run_directory(url)
  quarantine.put_aside(directory, [1], quarantine.QUARANTINE, {1: "for a test"})
  assert [(a.step, a.kind, a.reason) for a in quarantine.listed(directory)] == [(1, "quarantine", "for a test")]
  quarantine.put_back(directory, 1)
  assert committed_steps(directory) == [0, 1] and quarantine.listed(directory) == []
  quarantine.put_aside(directory, [1], quarantine.QUARANTINE, {1: "for a test"})
  with ckpt.Checkpointer(url) as c:
    assert c.save(1, state(7))  # moves the other one away
    c.wait()
    assert [(a.step, a.reason) for a in quarantine.listed(directory)] == [(1, "for a test")]
    with pytest.raises(ckpt.CheckpointError, match="there is a step 1 already"):
      quarantine.put_back(directory, 1)
    assert c.rollback(0, delete=True) == [1]
  quarantine.put_back(directory, 1)
  assert quarantine.listed(directory) == [] and ckpt.verify(url) == []
  with ckpt.Checkpointer(url) as c:
    assert same(c.restore().state, 1)


def test_a_step_that_somebody_else_removed_can_be_saved_again_at_once(url):
  with ckpt.Checkpointer(url) as c:
    for step in range(2):
      c.save(step, state(step))
    c.wait()
    with behind_our_back():
      BACKEND.rmtree(f"{url}/1")
    assert c.save(1, state(7))
  with ckpt.Checkpointer(url) as c:
    assert [s.step for s in c.steps()] == [0, 1] and same(c.restore().state, 7)


@contextlib.contextmanager
def behind_our_back():
  """What this process has written stays in its memory, as if another process had removed it from the bucket."""
  own = dict(BACKEND._own)
  yield
  BACKEND._own.update(own)
