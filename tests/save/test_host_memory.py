"""Host memory for copies of the state: pinned memory that is taken ahead of the first save, and no growth after it."""

import importlib
import json
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

import ckpt_jax as ckpt
from ckpt_jax.layout import staging
from ckpt_jax.layout.unchanged import nothing_unchanged
from ckpt_jax.save import host_memory
from ckpt_jax.save.host_memory import Warmup


@pytest.fixture
def warmup(monkeypatch):
  """CPU devices count as accelerators; yields a warm-up that nothing was offered to, and notes what is sent."""
  monkeypatch.setattr(staging, "as_accelerators", True)
  mine, send = Warmup(), staging._send
  mine.sent = []

  def noted(copies):
    mine.sent += [copy.source.nbytes for copy in copies]
    send(copies)

  monkeypatch.setattr(staging, "_send", noted)
  for name in ("save.host_memory", "checkpointer", "save.saver"):
    monkeypatch.setattr(importlib.import_module(f"ckpt_jax.{name}"), "warmup", mine)
  yield mine
  mine.stop()


def arrays(n=8):
  return {f"w{i}": jnp.full((64, 64), float(i)) for i in range(n)}


def ended(warmup):
  warmup._work.result(timeout=60)


def test_the_state_that_training_begins_with_warms_the_arena_once(tmp_path, warmup):
  held = arrays()
  with ckpt.Checkpointer(tmp_path) as c:
    warmup._over, over = True, warmup._over
    c.save(0, held)
    c.wait()
    warmup._over = over
    warmup.sent.clear()
    c.restore(0, like=held)
    assert warmup._work is None, "it may never be saved"
    restored = c.restore_or_init(arrays)
    ended(warmup)
    assert warmup.sent == [64 * 64 * 4] * 8 and warmup._held == []
    c.restore_or_init(arrays)
    assert len(warmup.sent) == 8 and all(leaf._npy_value is None for leaf in restored.state.values())


def test_so_does_the_state_of_a_new_run(tmp_path, warmup):
  with ckpt.Checkpointer(tmp_path) as c:
    held = c.restore_or_init(arrays).state
    ended(warmup)
  assert len(warmup.sent) == len(held)


def test_a_save_that_is_not_due_warms_it_and_goes_on_with_the_next_state(tmp_path, warmup):
  with ckpt.Checkpointer(tmp_path, {"schedule": {"every_steps": 100}}) as c:
    held = arrays()
    held["w3"].delete()  # as if donated meanwhile
    assert not c.save(1, held)
    ended(warmup)
    assert len(warmup.sent) == 3
    after = arrays()
    assert not c.save(2, after)
    ended(warmup)
    assert len(warmup.sent) == 8
    assert not c.save(3, arrays())
    assert len(warmup.sent) == 8


def test_nothing_is_warmed_once_a_save_has_begun(tmp_path, warmup):
  with ckpt.Checkpointer(tmp_path, {"schedule": {"every_steps": 100}}) as c:
    c.save(0, arrays(), force=True)
    c.wait()
    warmup.sent.clear()
    assert not c.save(1, arrays())
  assert warmup.sent == [] and warmup._work is None


def test_no_more_is_warmed_than_host_memory_may_take(tmp_path, warmup):
  with ckpt.Checkpointer(tmp_path, {"schedule": {"every_steps": 100}, "limits": {"host_memory": "1MB"}}) as c:
    held = {f"w{i}": jnp.full((64, 1024), float(i)) for i in range(16)}
    assert not c.save(1, held)
    ended(warmup)
  assert 0 < sum(warmup.sent) <= 1 << 20


def test_the_arena_that_xla_holds_counts_as_free(monkeypatch):
  monkeypatch.setattr(staging, "as_accelerators", True)
  monkeypatch.setattr(host_memory, "_arena_nbytes", 0)
  held, config = {"w": jnp.ones(500_000)}, ckpt.Config()
  for left in (5_000_000, 1_000_000):  # the first save has taken the rest
    monkeypatch.setattr(host_memory, "available_memory", lambda left=left: left)
    copies = host_memory.copies_for(
      pathlib.Path("run"), host_memory.flatten(held), config, nothing_unchanged(), lambda mine: [mine]
    )
    assert not copies.in_turn


@pytest.mark.parametrize(("limit", "saves"), [("auto", 100), ("2MB", 40)])
def test_later_saves_take_no_more_memory_than_the_first(tmp_path, limit, saves):
  program = pathlib.Path(__file__).parents[1] / "programs" / "flat_memory.py"
  command = [sys.executable, str(program), str(tmp_path), limit, str(saves)]
  done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
  found = json.loads(done.stdout.splitlines()[-1])
  assert found["live"] == 0, "arrays of ours that are still alive"
  assert np.median(found["growth"]) <= 1 << 20, found
