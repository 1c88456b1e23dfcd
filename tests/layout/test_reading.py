"""Reading: every byte right, whatever the layout, and no byte twice."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jobs import together

import ckpt_jax as ckpt
from ckpt_jax.layout import reading
from ckpt_jax.layout.description import describe_item
from ckpt_jax.layout.memory import to_be_copied, unaligned_empty
from ckpt_jax.layout.sharding import chunk_nbytes, local_regions, merge_boxes, split_box


def cells(box):
  return {tuple(a + o for (a, _), o in zip(box, at, strict=True)) for at in np.ndindex(*(b - a for a, b in box))}


@st.composite
def tiles(draw):
  """Some of the tiles of a regular grid, as the shards of an array on some of its devices are."""
  grid = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
  tile = [draw(st.integers(1, 3)) for _ in grid]
  every = [tuple((i * t, (i + 1) * t) for i, t in zip(at, tile, strict=True)) for at in np.ndindex(*grid)]
  return draw(st.lists(st.sampled_from(every), min_size=1, max_size=2 * len(every)))


@given(tiles())
@settings(max_examples=300, deadline=None)
def test_regions_hold_every_shard_once_and_nothing_else(shards):
  regions = merge_boxes(shards)
  covered = [c for r in regions for c in cells(r)]
  assert len(covered) == len(set(covered))
  assert set(covered) == set().union(*(cells(s) for s in shards))
  for shard in shards:
    assert any(cells(shard) <= cells(r) for r in regions)


def test_shards_that_tile_an_array_are_one_region():
  mesh = jax.make_mesh((2,), ("x",))
  for spec in (P("x"), P(None, "x"), P()):
    assert local_regions(NamedSharding(mesh, spec), (4, 6)) == (((0, 4), (0, 6)),)


@given(
  st.lists(st.tuples(st.integers(0, 20), st.integers(1, 20), st.integers(1, 7)), min_size=1, max_size=3),
  st.integers(1, 4000),
)
@settings(max_examples=300, deadline=None)
def test_split_reads_cover_the_box_and_stay_below_the_limit(dims, limit):
  box = tuple((a, a + n) for a, n, _ in dims)
  chunk = tuple(c for _, _, c in dims)
  parts = split_box(box, chunk, 4, limit)
  assert sorted(c for p in parts for c in cells(p)) == sorted(cells(box))
  for part in parts:
    one_chunk = all(-(-b // c) - a // c == 1 for (a, b), c in zip(part, chunk, strict=True))
    assert chunk_nbytes(part, chunk, 4) <= limit or one_chunk
  assert sum(chunk_nbytes(p, chunk, 4) for p in parts) == chunk_nbytes(box, chunk, 4), "no chunk is read twice"


def state_on(mesh, spec):
  put = lambda x, s: jax.device_put(x, NamedSharding(mesh, s))  # noqa: E731
  words = np.random.default_rng(0).integers(0, 2**32, (8, 64, 96), np.uint32)
  return {
    "f32": put(words.view(np.float32), spec),  # NaN payloads, infinities and denormals among them
    "u32": put(words, spec),
    "bf16": put(words.view(np.uint16).view(jnp.bfloat16), spec),
    "bytes": put(words.view(np.uint8), spec),
    "scalar": put(np.float32(-0.0), P()),
    "key": put(jax.random.key(5), P()),
    "host": words.view(np.float32)[0],
  }


@pytest.mark.parametrize(
  "options", [{}, {"use_zarr3": True}, {"use_ocdbt": False}, {"use_compression": False}], ids=str
)
@pytest.mark.parametrize("chunk_byte_size", [None, 10_000])
def test_what_plain_orbax_wrote_in_any_format_is_read_bitwise_on_any_sharding(
  options, chunk_byte_size, tmp_path, assert_same
):
  mesh = jax.make_mesh((2,), ("x",))
  saved = state_on(mesh, P("x"))
  saved.pop("key")  # plain Orbax leaves no note of what a key was
  args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=chunk_byte_size), saved)
  with ocp.CheckpointManager(tmp_path, item_handlers=ocp.PyTreeCheckpointHandler(**options)) as plain:
    plain.save(0, args=ocp.args.PyTreeSave(saved, save_args=args))
  with ckpt.Checkpointer(tmp_path, ckpt.Config(limits={"restore_concurrency": 100_000})) as c:
    for spec in (P("x"), P(None, None, "x"), P()):
      want = state_on(mesh, spec)
      want.pop("key")
      got = c.restore(like=want).state
      assert_same(got, want)
      assert all(
        a.sharding == b.sharding
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
        if hasattr(a, "sharding")
      )
    assert_same(c.restore().state, jax.tree.map(np.asarray, saved))


def bytes_read():
  found = ts.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
  return sum(v["value"] for m in found for v in m["values"])


def test_an_array_that_two_devices_share_is_read_once(tmp_path):
  mesh = jax.make_mesh((2,), ("x",))
  one = jax.device_put(np.arange(1 << 20, dtype=np.float32).reshape(1024, 1024), jax.devices()[0])
  with ckpt.Checkpointer(tmp_path) as c:
    c.save(0, {"w": one})
    for spec in (P("x"), P(None, "x")):
      like = {"w": jax.ShapeDtypeStruct(one.shape, one.dtype, sharding=NamedSharding(mesh, spec))}
      c.wait()
      before = bytes_read()
      c.restore(like=like)
      assert bytes_read() - before < 1.05 * one.nbytes  # Orbax reads the chunk once for each shard


def test_each_array_is_opened_once_in_a_restore(tmp_path, monkeypatch):
  state = {"w": jnp.arange(1000.0), "n": np.arange(7), "half": jnp.ones((3, 5), jnp.bfloat16)}
  opened = []
  real = reading.open_stores
  monkeypatch.setattr(reading, "open_stores", lambda info, names: opened.extend(names) or real(info, names))
  with ckpt.Checkpointer(tmp_path) as c:
    c.save(1, state)
    c.wait()
    restored = c.restore(like=state).state
  assert sorted(opened) == ["half", "n", "w"]
  jax.tree.map(np.testing.assert_array_equal, restored, state)


@pytest.mark.parametrize("options", [None, {}, {"use_zarr3": True}, {"use_ocdbt": False}], ids=str)
def test_an_item_is_described_as_orbax_handler_of_trees_does(tmp_path, options):
  state = {"w": jnp.arange(12.0).reshape(3, 4), "n": np.arange(7), "deep": [{"half": jnp.ones((3, 5), jnp.bfloat16)}]}
  state |= {"empty": {}, "none": None, "adam": (optax.EmptyState(), 3, "text"), "key": jax.random.key(0)}
  if options is None:
    with ckpt.Checkpointer(tmp_path) as c:
      c.save(1, state)
  else:
    with ocp.CheckpointManager(tmp_path, item_handlers=ocp.PyTreeCheckpointHandler(**options)) as plain:
      plain.save(1, args=ocp.args.PyTreeSave(state))
  item = epath.Path(tmp_path) / "1" / "default"
  ours = describe_item(item)
  assert ours.stores
  theirs = jax.tree.map(without_sharding, ocp.PyTreeCheckpointHandler().metadata(item).tree)
  assert ours.tree == theirs
  assert [leaf.name for leaf in jax.tree.leaves(ours.tree)] == [leaf.name for leaf in jax.tree.leaves(theirs)]
  assert {leaf.directory for leaf in jax.tree.leaves(ours.tree)} == {item}


def without_sharding(meta):
  return dataclasses.replace(meta, sharding=None) if hasattr(meta, "sharding") else meta


@pytest.mark.parametrize("is_local", [True, False])
def test_what_is_in_flight_is_bounded(is_local):
  window = reading.Window(most=1000, is_local=is_local)
  assert not window.is_full(0, 0, 5000, enough=100)  # larger than the window: read alone
  assert window.is_full(1, 900, 200, enough=100)
  assert not window.is_full(2, 90, 20, enough=100)  # two large chunks at a time
  assert window.is_full(4, 90, 20, enough=100) == is_local  # a bucket is asked for more while it is thinking
  assert window.is_full(4, 990, 20, enough=10**9)
  assert window.part(100) == (25 if is_local else 1000)


@pytest.mark.parametrize("shape", [(), (0,), (3, 5), (1 << 19,), (600_001,), (2 << 20,)])
def test_jax_copies_fresh_memory_and_whatever_is_cut_from_it(shape):
  array = unaligned_empty(shape, np.dtype(np.float32))
  array[...] = 7
  assert (array.shape, array.dtype, array.flags.writeable) == (shape, np.float32, True)
  for part in (array, array.reshape(-1)[12:]):  # the latter is aligned by chance
    part = to_be_copied(part)
    taken = jax.device_put(part)
    if part.size > 1:
      assert taken.unsafe_buffer_pointer() != part.ctypes.data
    assert (np.asarray(taken) == 7).all()


def test_replicas_of_a_restored_array_may_be_overwritten_in_place(tmp_path):
  mesh = jax.make_mesh((2,), ("x",))
  want = np.arange(1 << 16, dtype=np.float32)
  add = jax.jit(lambda x: x + 1, donate_argnums=0)
  with ckpt.Checkpointer(tmp_path) as c:
    c.save(0, {"w": jax.device_put(want, NamedSharding(mesh, P()))})
    x = c.restore(like={"w": jax.device_put(want, NamedSharding(mesh, P()))}).state["w"]
    for _ in range(3):
      x = add(x)
    for shard in x.addressable_shards:
      assert np.asarray(shard.data).tobytes() == (want + 3).tobytes()


def test_damaged_leaf_is_named(tmp_path):
  config = ckpt.Config(restore={"on_corruption": "raise"})
  with ckpt.Checkpointer(tmp_path, config) as c:
    c.save(0, {"good": jnp.ones(4), "bad": jnp.ones((512, 1024))})
  largest = max((tmp_path / "0").rglob("d/*"), key=lambda p: p.stat().st_size)
  with open(largest, "r+b") as f:
    f.truncate(1000)
  with ckpt.Checkpointer(tmp_path, config) as c, pytest.raises(ckpt.CorruptCheckpointError, match="bad"):
    c.restore(like={"good": jnp.ones(4), "bad": jnp.ones((512, 1024))})


@pytest.mark.multiprocess
def test_a_process_reads_only_what_its_devices_need(tmp_path):
  together("read_parts.py", tmp_path, processes=2)


def test_a_key_that_plain_orbax_wrote_comes_back_as_a_key_or_as_its_words(tmp_path):
  key = jax.random.key(3, impl="rbg")
  with ocp.CheckpointManager(tmp_path) as plain:
    plain.save(0, args=ocp.args.PyTreeSave({"key": key}))
  config = ckpt.Config(restore={"on_corruption": "raise"})
  with ckpt.Checkpointer(tmp_path, config) as c:
    got = c.restore(like={"key": jax.random.key(0, impl="rbg")}).state["key"]
    assert got.dtype == key.dtype and (jax.random.key_data(got) == jax.random.key_data(key)).all()
    words = c.restore(like={"key": jnp.zeros(4, jnp.uint32)}).state["key"]
    assert words.dtype == jnp.uint32 and (words == jax.random.key_data(key)).all()
    other = jax.device_put(jax.random.key(0, impl="unsafe_rbg"), jax.devices()[0])
    with pytest.raises(ckpt.StructureMismatchError, match="saved as key<rbg>, asked for key<urbg>"):
      c.restore(like={"key": other})
