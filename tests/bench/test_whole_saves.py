"""Benchmarks and trials save one state again and again, and each time all of it is written."""

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from ckpt_jax.bench.trial import Trials
from ckpt_jax.bench.variants import VARIANTS, jax_target
from ckpt_jax.config import Config


def state():
  return {"w": jnp.asarray(np.random.default_rng(0).standard_normal(2**20, dtype=np.float32))}


def kept_apart(directory):
  """What a save holds of leaves that do not change, to be linked by the next one."""
  return [*directory.rglob("unchanged.*")]


@pytest.mark.parametrize("variant", ["ckpt_jax", "packed"])
def test_save_of_a_benchmark_links_nothing(variant, tmp_path):
  target = jax_target(VARIANTS[variant], state(), tmp_path)
  for step in range(4):
    target.save(step)
    target.wait()
  target.close()
  assert (tmp_path / "3").is_dir() and not kept_apart(tmp_path)


def test_trial_of_tune_writes_the_state(tmp_path):
  trials = Trials(epath.Path(tmp_path), state())
  for _ in range(4):
    assert trials(Config()).nbytes > 4_000_000
  assert not kept_apart(tmp_path)
  trials.close()
