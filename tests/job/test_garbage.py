"""Automatic collections of garbage pause for a while and come back."""

import gc
import threading
import time

import jax.numpy as jnp
import pytest

import ckpt_jax as ckpt
from ckpt_jax.job import garbage


def comes_back():
  deadline = time.monotonic() + 30
  while not gc.isenabled() and time.monotonic() < deadline:
    time.sleep(0.01)
  return gc.isenabled()


@pytest.fixture(autouse=True)
def no_pause_for_others():
  assert comes_back()


def test_collections_come_back_with_the_event_that_ends_the_pause():
  ended = threading.Event()
  garbage.pause(ended, 60)
  garbage.pause(threading.Event(), 0.0)
  assert not gc.isenabled()
  ended.set()
  assert comes_back()


def test_a_pause_ends_by_itself():
  garbage.pause(threading.Event(), 0.05)
  assert comes_back()


def test_a_pause_lasts_as_long_as_its_block():
  with garbage.paused():
    assert not gc.isenabled()
  assert comes_back()


def test_a_collector_that_is_off_stays_off():
  gc.disable()
  try:
    garbage.pause(threading.Event(), 0.0)
    time.sleep(0.05)
    assert not gc.isenabled()
  finally:
    gc.enable()


def test_saving_restoring_and_failing_leave_the_collector_on(tmp_path):
  with ckpt.Checkpointer(tmp_path) as c:
    c.save(0, {"x": jnp.ones(3)})
    c.wait()
    assert comes_back()
    c.restore()
    assert comes_back()
    with pytest.raises(ckpt.CheckpointError):
      c.save(1, {"x": object()})
    assert comes_back()


def test_of_overlapping_pauses_the_last_counts():
  first, second = threading.Event(), threading.Event()
  garbage.pause(first, 60)
  garbage.pause(second, 60)
  first.set()
  deadline = time.monotonic() + 30
  while garbage._pauses != {second} and time.monotonic() < deadline:
    time.sleep(0.01)
  assert not gc.isenabled()
  second.set()
  assert comes_back()
