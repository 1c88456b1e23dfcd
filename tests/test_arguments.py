"""What somebody passes by mistake to a public function: an error that names the argument, whatever it is."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import ckpt_jax as ckpt
from ckpt_jax import policies

# Of every type that people have at hand: a value that was meant for another argument, a variable that is not set.
WRONG = [None, 3, -1, True, float("nan"), "nonsense", "", b"x", ["a"], {"a": 1}, object(), print, 10**400]


@dataclasses.dataclass
class Call:
  """A public function, right arguments, and which of them are replaced."""

  function: Callable[..., Any]
  right: dict[str, Any]


@pytest.fixture(scope="module")
def calls(tmp_path_factory):
  root = tmp_path_factory.mktemp("arguments")
  run, exported, tensors = root / "run", root / "exported", root / "tensors"
  state = {"params": {"w": jnp.ones((3, 4)), "b": jnp.ones(4)}, "step": jnp.int32(0)}
  c = ckpt.Checkpointer(run)
  for step in range(2):
    c.save(step, state, metrics={"loss": 1.0})
  c.wait()
  ckpt.export(run, 1, exported, quantize="int8")
  ckpt.export(run, 1, tensors, format="safetensors")
  export = {"run": run, "step": 1, "out": root / "out", "dtype": None, "quantize": None, "format": "orbax", "group": 64}
  export |= {"keep": (), "subtree": None, "ema": False, "item": None, "metadata": {}, "shard_size": 10**9, "memory": 1}
  export |= {"overflow": False, "evaluate": None, "progress": print, "rename": ()}
  hows = {
    "direct": None,
    "like": state,
    "only": None,
    "strategy": None,
    "item": None,
    "init_missing": None,
    "cast": None,
  }
  yield [
    Call(c.restore, {"step": 1} | {name: value for name, value in hows.items() if name != "direct"}),
    Call(c.save, {"step": 2, "state": state, "metrics": {}, "extras": None}),
    Call(c.pin, {"step": 1}),
    Call(c.unpin, {"step": 1}),
    Call(c.rollback, {"step": 1}),
    Call(c.restore_or_init, {"init_fn": lambda: state}),
    Call(
      ckpt.Checkpointer, {"directory": run, "config": None, "schedule": None, "on_event": None, "on_progress": None}
    ),
    Call(ckpt.load_config, {"path": "gcs"}),
    Call(ckpt.detect, {"path": run, "mounts": None}),
    Call(ckpt.make_plan, {"state": state, "storage": "gcs", "host": None, "config": None}),
    Call(ckpt.estimate, {"params": 7e9, "optimizer": "adam", "param_dtype": None, "ema": 0, "inference_dtype": "int8"}),
    Call(ckpt.estimate, {"state": state}),
    Call(ckpt.export, export),
    Call(ckpt.load_quantized, {"path": exported, "like": None, "strategy": "gather"}),
    Call(ckpt.load_safetensors, {"path": tensors, "like": None, "rename": (), "cast": None, "strategy": "gather"}),
    Call(ckpt.verify, {"run": run, "step": None, "on_progress": None}),
    Call(ckpt.diff, dict(run_a=run, step_a=0, run_b=run, step_b=1, only=None, item=None, on_progress=None)),
    Call(policies.EverySteps, {"n": 5}),
    Call(policies.EveryMinutes, {"minutes": 5}),
    Call(policies.YoungDaly, {"mtti": 3600, "max_overhead": 0.01}),
    Call(policies.OnPreemption, {"noticed": bool}),
    Call(
      policies.Retention, dict(last=3, hourly=1, within="7d", every_steps=3, best={"metric": "loss"}, budget="2GiB")
    ),
    Call(ckpt.Config, dict(schedule={}, retention={}, layout={}, limits={}, storage="auto", observe={}, item=None)),
  ]
  c.close()


def test_a_wrong_argument_is_an_error_of_this_package_or_means_something(calls, monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)  # text is a path for many of them
  for call in calls:
    for name in call.right:
      for wrong in WRONG:
        try:
          made = call.function(**call.right | {name: wrong})
        except ckpt.CheckpointError:
          continue
        except Exception as e:
          pytest.fail(f"{call.function.__qualname__}({name}={wrong!r}) raises {type(e).__name__}: {e}")
        if isinstance(made, ckpt.Checkpointer):
          made.close()


@pytest.mark.parametrize("strategy", ["gathr", "nonsense", 3])
def test_a_strategy_that_there_is_not_is_refused_by_one_process_too(calls, strategy):
  for call in calls:
    if "strategy" in call.right:
      with pytest.raises(ckpt.ConfigError, match=r"strategy: .* is not one of auto, direct, gather, broadcast"):
        call.function(**call.right | {"strategy": strategy})


def test_a_number_of_numpy_or_jax_is_a_number():
  want = ckpt.estimate(params=7e9)
  for params in (np.float64(7e9), np.int64(7e9), jnp.float32(7e9), np.array(7e9)):
    assert ckpt.estimate(params=params).training_nbytes == pytest.approx(want.training_nbytes)
  assert ckpt.estimate(params=7e9, param_dtype=jnp.bfloat16) == ckpt.estimate(params=7e9, param_dtype="bfloat16")


def test_a_name_near_that_of_a_storage_is_no_path(monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(ckpt.ConfigError, match=r"storage: expected .* did you mean gcs"):
    ckpt.make_plan({"w": jnp.ones(2)}, "gsc")
  (tmp_path / "gsc").mkdir()
  assert ckpt.make_plan({"w": jnp.ones(2)}, "gsc").storage.kind != "gcs"
