"""The measurement of the link between devices and host, on CPU devices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from ckpt_jax.layout import link


def test_the_link_is_measured_once_for_a_host(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  puts, put = [], jax.device_put
  monkeypatch.setattr(jax, "device_put", lambda *args: puts.append(args) or put(*args))
  found = link.measured_link()
  assert all(figure > 0 for figure in dataclasses.astuple(found))
  assert puts
  puts.clear()
  assert link.measured_link() == found and not puts


def test_devices_without_pinned_memory_have_figures_of_ordinary_memory(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  monkeypatch.setattr(link, "PINNED", "no_such_kind")
  found = link.measured_link()
  assert (found.to_pinned, found.first_pinned) == (None, None)
  assert found.to_pageable > 0 and not found.prefers_pinned


def test_a_full_device_is_not_measured(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

  def full(*args):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

  with monkeypatch.context() as m:
    m.setattr(jax, "device_put", full)
    assert link.measured_link() is None
  assert link.measured_link() is not None, "nothing is remembered of a failure"


def test_copies_in_ordinary_memory_leave_none_in_the_arrays():
  held = [jnp.arange(5.0), jnp.ones(3, jnp.bfloat16)]
  copies = link.pageable(held)
  assert [np.asarray(copy).tolist() for copy in copies] == [[0, 1, 2, 3, 4], [1, 1, 1]]
  assert all(x._npy_value is None for x in held)
