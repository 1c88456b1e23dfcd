"""Runs whose steps are called otherwise than by plain numbers: read, and continued in the same way."""

import json
import os

import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import ckpt_jax as ckpt
from ckpt_jax.cli.app import app
from ckpt_jax.errors import NotARunError
from ckpt_jax.run.naming import PLAIN, Naming, naming_of


def state(value):
  return {"w": jnp.full(3, value, jnp.float32), "n": int(value)}


def orbax_run(path, steps=(12,), **options):
  with ocp.CheckpointManager(path, options=ocp.CheckpointManagerOptions(**options)) as manager:
    for step in steps:
      manager.save(step, args=ocp.args.StandardSave(state(step)))


def found(names, steps=None):
  return naming_of(names, (steps or names).__contains__, lambda name: name not in (steps or names), "RUN")


@given(
  st.from_regex(r"([A-Za-z][A-Za-z_.-]{0,8})?", fullmatch=True),
  st.integers(0, 9),
  st.sets(st.integers(0, 10**10), min_size=1, max_size=6),
)
def test_names_are_those_of_orbax_and_lead_back_to_the_same_steps(prefix, width, steps):
  orbax = ocp.path.step.standard_name_format(step_prefix=prefix or None, step_format_fixed_length=width or None)
  ours = Naming(f"{prefix}_" if prefix else "", width)
  names = [ours.name(step) for step in sorted(steps)]
  assert names == [orbax.build_name(step) for step in sorted(steps)]
  assert [ours.step(name) for name in names] == sorted(steps)
  called = found([*names, "logs", "events.out.12", ".ckpt_jax"], names)
  assert [called.step(name) for name in names] == sorted(steps)


@pytest.mark.parametrize(
  ("names", "named"),
  [
    (["12", "00000014"], "00000014, 12"),
    (["ckpt_12", "model_12"], "ckpt_*, model_*"),
    (["c_7", "c_007"], "c_007, c_7"),
  ],
)
def test_steps_that_would_hide_each_other_are_an_error_that_names_them(names, named):
  with pytest.raises(NotARunError, match=named.replace("*", r"\*")):
    found(names)


def test_copies_and_leftovers_beside_steps_are_not_steps():
  assert found(["5", "10", "old_10", "5.orbax-checkpoint-tmp-17"]) == PLAIN
  assert found(["ckpt_5.orbax-checkpoint-tmp-17", "4.set-aside-20260101T000000-1234"]) is None
  assert found(["0", "9", "10"]) == PLAIN and found(["0009", "10000"]) == Naming(width=4)
  assert found(["checkpoint_1.5"]) is None


@pytest.mark.parametrize(
  "options",
  [{"step_prefix": "ckpt"}, {"step_format_fixed_length": 8}, {"step_prefix": "m", "step_format_fixed_length": 3}],
)
def test_a_run_with_prefix_or_padding_resumes_and_goes_on_so_that_orbax_reads_all_of_it(tmp_path, options):
  orbax_run(tmp_path, **options)
  with ckpt.Checkpointer(tmp_path, {"retention": {"last": 3}}) as c:
    restored = c.restore_or_init(lambda: state(0))
    assert (restored.step, restored.next_step, int(restored.state["w"][0])) == (12, 13, 12)
    for step in range(13, 17):
      c.save(step, state(step), metrics={"loss": 1.0 / step})
      c.wait()
    c.rollback(15)
    assert [s.step for s in c.steps()] == [14, 15] and c.restore(14).state["n"] == 14
  assert ckpt.verify(tmp_path) == []
  listed = CliRunner().invoke(app, ["ls", str(tmp_path), "--json"])
  assert [s["step"] for s in json.loads(listed.stdout)] == [14, 15]
  name = ocp.path.step.standard_name_format(**{"step_prefix": None, "step_format_fixed_length": None} | options)
  assert sorted(n for n in os.listdir(tmp_path) if n[0] != ".") == [name.build_name(14), name.build_name(15)]
  with ocp.CheckpointManager(tmp_path, options=ocp.CheckpointManagerOptions(**options)) as manager:
    assert manager.all_steps() == [14, 15]
    assert manager.restore(15, args=ocp.args.StandardRestore(state(0)))["w"][0] == 15


def test_a_directory_that_is_emptied_and_used_anew_gets_plain_numbers(tmp_path):
  orbax_run(tmp_path, step_prefix="ckpt")
  with ckpt.Checkpointer(tmp_path) as c:
    assert c.latest_step() == 12
  (tmp_path / "ckpt_12").rename(tmp_path.parent / "gone")
  with ckpt.Checkpointer(tmp_path) as c:
    c.save(1, state(1), force=True)
  assert (tmp_path / "1").is_dir()
