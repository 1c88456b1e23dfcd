"""The garbage collector is paused for a while and comes back."""

import gc
import time

import jax.numpy as jnp
import pytest

import ckpt_jax as ckpt
from ckpt_jax.job import garbage


@pytest.fixture(autouse=True)
def no_hold_of_others():
  """A save whose commit nobody awaited holds collections for some seconds."""
  deadline = time.monotonic() + 10
  while not gc.isenabled():
    assert time.monotonic() < deadline
    time.sleep(0.01)


def test_collections_come_back_when_the_last_hold_ends():
  with garbage.paused():
    release = garbage.hold(60)
    assert not gc.isenabled()
  assert not gc.isenabled()
  release()
  release()
  assert gc.isenabled()


def test_a_hold_ends_by_itself():
  garbage.hold(0.05)
  deadline = time.monotonic() + 10
  while not gc.isenabled():
    assert time.monotonic() < deadline
    time.sleep(0.01)


def test_a_collector_that_is_off_stays_off():
  gc.disable()
  try:
    with garbage.paused():
      pass
    assert not gc.isenabled()
  finally:
    gc.enable()


def test_saving_restoring_and_failing_leave_the_collector_on(tmp_path):
  with ckpt.Checkpointer(tmp_path) as c:
    c.save(0, {"x": jnp.ones(3)})
    c.wait()
    assert gc.isenabled()
    c.restore()
    assert gc.isenabled()
    with pytest.raises(ckpt.CheckpointError):
      c.save(1, {"x": object()})
    assert gc.isenabled()
