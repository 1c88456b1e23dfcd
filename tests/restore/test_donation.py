"""Restored arrays are jax's own: a step that is given them to keep overwrites them in place."""

import collections
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import ckpt_jax as ckpt
from ckpt_jax.layout import owned

KINDS = ("float32", "bfloat16", "float16", "float8_e4m3fn", "int8", "uint32", "bool", "complex64", "int4")


def state():
  words = np.random.default_rng(0).integers(0, 2**32, (16, 8), np.uint32)
  made = {name: words.view(jnp.dtype(name)) for name in KINDS if name not in ("bool", "int4", "float8_e4m3fn")}
  made |= {"bool": words > 2**31, "int4": (words & 7).astype(jnp.int4), "row": words.view(np.float32)[:2, :6]}
  made |= {"float8_e4m3fn": (words & 0x77).astype(np.uint8).view(jnp.float8_e4m3fn), "one": np.float32(-0.0)}
  return jax.tree.map(jnp.asarray, made | {"nothing": np.zeros((0, 4), np.float32)})


def placed(sharding):
  alone = NamedSharding(sharding.mesh, P()) if isinstance(sharding, NamedSharding) else sharding
  return {n: jax.device_put(x, sharding if x.ndim else alone) for n, x in state().items()}


def abstract(x):
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding if x.committed else None)


def two():
  return Mesh(np.array(jax.devices()), ("x",))


PLACES = {
  "the default device": lambda: None,
  "another device": lambda: jax.sharding.SingleDeviceSharding(jax.devices()[1]),
  "a mesh of one device": lambda: NamedSharding(Mesh(np.array(jax.devices()[1:]), ("x",)), P("x")),
  "divided": lambda: NamedSharding(two(), P("x")),
  "divided by columns": lambda: NamedSharding(two(), P(None, "x")),
  "replicas": lambda: NamedSharding(two(), P()),
}


def pointers(tree):
  """Of each buffer that is worth giving away; jax keeps a copy of single numbers of its own anyway."""
  return [s.data.unsafe_buffer_pointer() for x in jax.tree.leaves(tree) if x.size > 1 for s in x.addressable_shards]


@pytest.fixture
def eager_memory(monkeypatch):
  """Arrays of any size are read straight into jax's memory, as large ones are."""
  monkeypatch.setattr(owned, "_LARGE_NBYTES", 1)
  monkeypatch.setattr(owned, "_WORTH_NBYTES", 1)
  made = []
  real = owned.make
  monkeypatch.setattr(owned, "make", lambda kinds, device: made.append(kinds) or real(kinds, device))
  return made


@pytest.mark.parametrize("pack", ["on", "off"])
@pytest.mark.parametrize("place", PLACES)
def test_every_buffer_is_given_away_in_place(place, pack, eager_memory, tmp_path, assert_same):
  want = placed(PLACES[place]())
  keep = jax.jit(lambda tree: jax.tree.map(lambda x: x[::-1] if x.ndim else x, tree), donate_argnums=0)
  config = ckpt.Config(layout={"pack": pack}, health={"nonfinite": "ignore"})
  with ckpt.Checkpointer(tmp_path, config) as c:
    c.save(0, want)
    c.wait()
    for like in (want, jax.tree.map(abstract, want)):
      restored = c.restore(like=like)
      got = restored.state
      assert_same(got, want)
      assert restored.report.verified == len(want)
      before = pointers(got)
      kept = keep(got)
      assert pointers(kept) == before
      assert_same(kept, jax.tree.map(lambda x: x[::-1] if x.ndim else x, want))
  assert bool(eager_memory) == ("device" in place)


def test_without_that_part_of_jax_arrays_are_copied_and_given_away_all_the_same(
  eager_memory, monkeypatch, tmp_path, assert_same
):
  monkeypatch.setitem(sys.modules, "jax.experimental.buffer_callback", None)
  owned._program.cache_clear()
  want = {"w": jnp.arange(5000.0), "v": jnp.arange(7000)}
  with ckpt.Checkpointer(tmp_path) as c:
    c.save(0, want)
    got = c.restore_or_init(lambda: want).state
  assert eager_memory
  assert_same(got, want)
  before = pointers(got)
  assert pointers(jax.jit(lambda t: jax.tree.map(lambda x: x + 1, t), donate_argnums=0)(got)) == before


def test_arrays_that_are_given_no_place_come_back_free_for_jit_to_move_them(eager_memory, tmp_path):
  want = {"w": jnp.arange(5000.0), "n": jnp.int32(3), "weak": jnp.broadcast_to(jnp.asarray(0.5), (300,))}
  with ckpt.Checkpointer(tmp_path) as c:
    c.save(0, want)
    got = c.restore(like=want).state
    assert eager_memory and not any(x.committed for x in got.values())
    assert [x.weak_type for x in got.values()] == [x.weak_type for x in want.values()]
    elsewhere = jax.device_put(jnp.ones(5000), jax.devices()[1])
    assert (got["w"] + elsewhere).devices() == {jax.devices()[1]}
    with jax.default_device(jax.devices()[1]):
      assert c.restore(like=want).state["w"].devices() == {jax.devices()[1]}


def test_what_a_restore_gave_stays_what_it_is_when_the_next_one_comes(eager_memory, tmp_path):
  with ckpt.Checkpointer(tmp_path) as c:
    for step in range(3):
      c.save(step, {"w": jnp.full(5000, step)})
      c.wait()
    got = [c.restore(step, like={"w": jnp.full(5000, 0)}).state["w"] for step in range(3)]
  assert [(int(x[0]), int(x[-1])) for x in got] == [(0, 0), (1, 1), (2, 2)]
  assert len(set(pointers(got))) == 3


@pytest.mark.parametrize("counts", [{"a": 1}, {"a": 603}, {"a": 36, "b": 36, "c": 3, "d": 1}, {"a": 7, "b": 11}])
def test_arrays_of_a_model_are_made_by_small_programs_run_often(counts):
  made = collections.Counter()
  compiled = 0
  for times, some in owned.in_rounds(counts):
    compiled += len(some)
    for kind in some:
      made[kind] += times
  assert made == counts
  assert compiled <= min(sum(counts.values()), 100)


def test_first_step_after_a_restore_needs_the_state_once(tmp_path):
  program = pathlib.Path(__file__).parents[1] / "programs" / "donate.py"
  # Some 20 MB of 201, of which 32 MiB may be on their way. On a busy machine the allocator now and then gives memory
  # back right before the measurement and takes it again within, so the least of a few runs counts.
  least = 1.0
  for attempt in range(3):
    done = subprocess.run(
      [sys.executable, str(program), str(tmp_path / str(attempt))],
      capture_output=True,
      text=True,
      timeout=240,
      check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["donated"] == 96
    least = min(least, max(found["restoring"], found["stepping"]) / found["state"])
    if least < 0.35:
      return
  assert least < 0.35, found
