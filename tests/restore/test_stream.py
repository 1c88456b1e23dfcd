"""Steps read part by part: every value once, bit for bit, in bounded groups."""

import damage
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath
from test_checkpointer import odd_state

import ckpt_jax as ckpt
from ckpt_jax.config import Config
from ckpt_jax.layout.structure import path_name
from ckpt_jax.restore import stream
from ckpt_jax.restore.step import Step
from ckpt_jax.run.steps import step_path


def opened(run, step=0):
  return Step(step_path(epath.Path(run), step), Config())


def assembled(step, groups):
  """The leaves by path, put together from their parts."""
  found = {}
  for group, values in stream.stream(step, groups):
    for part, value in zip(group, values, strict=True):
      if part.box is None:
        assert part.plan.name not in found
        found[part.plan.name] = value
      else:
        whole = found.setdefault(part.plan.name, np.zeros(part.plan.shape, value.dtype))
        whole[tuple(slice(a, b) for a, b in part.box)] = value
  return found


def words(leaf):
  return jax.random.key_data(leaf) if jnp.issubdtype(getattr(leaf, "dtype", None), jax.dtypes.prng_key) else leaf


@pytest.mark.parametrize("pack", ["off", "on"])
def test_parts_make_up_what_a_restore_gives(tmp_path, pack, assert_same):
  state = odd_state() | {"wide": jnp.asarray(np.random.default_rng(0).standard_normal((700, 90)), jnp.bfloat16)}
  with ckpt.Checkpointer(
    tmp_path, Config(layout={"pack": pack, "chunk_size": 10_000}, health={"nonfinite": "ignore"})
  ) as c:
    c.save(0, state)
    c.wait()
    whole = c.restore().state
  want = {path_name(path): words(leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(whole)[0]}
  step = opened(tmp_path)
  got = assembled(step, stream.parts(step, nbytes=20_000))
  assert got.keys() == want.keys()
  for path in got:
    assert_same(got[path], np.asarray(want[path]) if isinstance(want[path], jax.Array) else want[path])


def test_groups_are_bounded_and_chunks_are_never_cut(tmp_path):
  with ckpt.Checkpointer(tmp_path, Config(layout={"chunk_size": 4096, "pack": "off"})) as c:
    c.save(0, {"a": jnp.ones((64, 256)), "b": [jnp.ones(100)] * 9, "c": jnp.ones(7)})
  step = opened(tmp_path)
  groups = stream.parts(step, nbytes=8192)
  assert all(sum(part.nbytes for part in group) <= 8192 for group in groups)
  cut = [part for group in groups for part in group if part.plan.name == "a"]
  assert len(cut) == 8 and all(len(g) == 1 for g in groups if g[0].plan.name == "a")
  assert [part.plan.name for part in stream.parts(step, ["c", "a"], nbytes=1 << 20)[0]] == ["c", "a"]


def test_steps_of_plain_orbax_and_none_at_all(tmp_path):
  with ocp.CheckpointManager(tmp_path) as manager:
    manager.save(0, args=ocp.args.StandardSave({"x": np.arange(9000.0), "n": 3, "none": None}))
  step = opened(tmp_path)
  got = assembled(step, stream.parts(step, nbytes=1000))
  assert got["n"] == 3 and np.array_equal(got["x"], np.arange(9000.0))
  assert list(stream.stream(step, [])) == []


def test_a_damaged_part_is_an_error_that_names_the_leaf(tmp_path):
  x = np.random.default_rng(0).standard_normal(50_000)
  with ckpt.Checkpointer(tmp_path, Config(layout={"compression": "off", "chunk_size": 80_000})) as c:
    c.save(0, {"x": x})
  file, at = damage.find_data(tmp_path / "0", x[:1000])
  step = opened(tmp_path)
  file.write_bytes(file.read_bytes()[: at + 100])
  with pytest.raises(ckpt.CorruptCheckpointError, match="x/"):
    list(stream.stream(step, stream.parts(step, nbytes=100_000)))
