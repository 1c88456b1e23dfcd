"""Packing: small leaves in slabs, the same tree and the same bits."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from commands import cli
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jobs import together

import ckpt_jax as ckpt
from ckpt_jax.layout import contents, packing
from ckpt_jax.layout.packing import SlabBytes, gather, lay_out, needed
from ckpt_jax.layout.ring import Values
from ckpt_jax.multihost import who_wrote
from ckpt_jax.run import steps as runs

ODD = {"nonfinite": "ignore"}
PACKED = ckpt.Config(layout={"pack": "on"}, health=ODD)


@st.composite
def arrays_in_pieces(draw):
  """Arrays of odd dtypes, cut into rows that several processes hold."""
  arrays = {}
  for i in range(draw(st.integers(1, 5))):
    shape = tuple(draw(st.lists(st.integers(1, 6), max_size=3)))
    dtype = draw(st.sampled_from(["float32", "bfloat16", "int8", "float8_e4m3fn", "uint64", "bool"]))
    words = np.random.default_rng(draw(st.integers(0, 99))).integers(0, 256, math.prod(shape) * 8, np.uint8)
    value = words[: math.prod(shape) * jnp.dtype(dtype).itemsize]
    if dtype == "bool":
      value = value & 1
    arrays[f"a{i}"] = value.view(jnp.dtype(dtype)).reshape(shape)
  return arrays, draw(st.integers(1, 3))


@given(arrays_in_pieces())
@settings(max_examples=150, deadline=None)
def test_any_arrays_in_any_pieces_come_back_bitwise(case):
  arrays, processes = case
  index, slabs = {}, {}
  for process in range(processes):
    mine = {}
    for name, value in arrays.items():
      if not value.shape:
        parts = [((), value)] if process == 0 else []
      else:
        cut = [len(value) * p // processes for p in (process, process + 1)]
        box = (tuple(cut), *((0, n) for n in value.shape[1:]))
        parts = [(box, value[cut[0] : cut[1]])] if cut[0] < cut[1] else []
      mine[name] = (value.dtype, value.shape, parts)
    slab = lay_out(process, {n: (dtype, shape, [box for box, _ in p]) for n, (dtype, shape, p) in mine.items()})
    pieces = [Values(data) for _, _, parts in mine.values() for _, data in parts]
    for name, packed in slab.index.items():
      before = index[name].pieces if name in index else ()
      index[name] = packing.Packed(packed.dtype, packed.shape, before + packed.pieces)
    slabs[process] = SlabBytes(slab.chunk_nbytes)
    for start, nbytes, chunk in slab.chunks(pieces, lambda n=slab.chunk_nbytes: np.empty(n, np.uint8)):
      slabs[process].add(start, chunk[:nbytes])
    assert all(p.offset % 64 == 0 for packed in slab.index.values() for p in packed.pieces)
  for name, value in arrays.items():
    whole = tuple((0, n) for n in value.shape)
    assert list(needed(index[name], [whole]))
    got = gather(index[name], whole, slabs)
    assert (got.dtype, got.shape, got.tobytes()) == (value.dtype, value.shape, value.tobytes())


SPREAD = P("x")


def mixed_state(mesh, spec=SPREAD):
  rng = np.random.default_rng(1)
  put = lambda x: jax.device_put(x, NamedSharding(mesh, spec))  # noqa: E731
  state = {f"small{i}": put(rng.standard_normal((8, 6), np.float32)) for i in range(20)}
  return state | {
    "bf16": jax.device_put(jnp.full((4, 2), -0.0, jnp.bfloat16), NamedSharding(mesh, spec)),
    "int4": jnp.arange(-8, 8, dtype=jnp.int4),
    "uint4": jnp.arange(16, dtype=jnp.uint4),
    "nan": jnp.asarray(np.array([0x7FC00123, 1], np.uint32).view(np.float32)),
    "key": jax.random.key(7),
    "words": jnp.arange(4, dtype=jnp.uint32),
    "scalar": jnp.float32(3),
    "big": jax.device_put(np.arange(1 << 19, dtype=np.float32).reshape(512, 1024), NamedSharding(mesh, spec)),
    "step": 3,
    "text": "hello",
    "host": np.arange(7),
    "empty": jnp.zeros((0, 3)),
    "nothing": None,
  }


def stored_names(run, step=0):
  """Arrays of the step's database."""
  import tensorstore as ts

  path = str(run / str(step) / "default") + "/"
  store = ts.KvStore.open({"driver": "ocdbt", "base": {"driver": "file", "path": path}}).result()
  return {key.decode().removesuffix("/.zarray") for key in store.list().result() if key.endswith(b".zarray")}


def test_packed_state_is_the_same_state_in_fewer_arrays(tmp_path, assert_same):
  mesh = jax.make_mesh((2,), ("x",))
  state = mixed_state(mesh)
  with ckpt.Checkpointer(tmp_path, PACKED) as c:
    c.save(0, state)
    c.wait()
    names = stored_names(tmp_path)
    assert "big" in names and "key" in names and packing.slab_name(0) in names
    assert not any(name.startswith("small") for name in names)
    assert_same(c.restore(like=state).state, state)
  with ckpt.Checkpointer(tmp_path) as c:  # what a step is says the step, not the configuration
    for spec in (P("x"), P(None, "x"), P()):
      want = mixed_state(mesh, spec)
      got = c.restore(like=want).state
      assert_same(got, want)
      assert got["small3"].sharding == want["small3"].sharding
    found = c.restore().state
    assert found["small3"].tobytes() == np.asarray(state["small3"]).tobytes() and found["step"] == 3
    part = c.restore(only="small3", like={"small3": state["small3"]}).state
    assert_same(part, {"small3": state["small3"]})


def test_packed_leaves_are_shown_as_they_are(tmp_path):
  mesh = jax.make_mesh((2,), ("x",))
  for name, config in (("plain", ckpt.Config(health=ODD)), ("packed", PACKED)):
    with ckpt.Checkpointer(tmp_path / name, config) as c:
      c.save(0, mixed_state(mesh))
  plain, packed = (contents.describe(tmp_path / name).leaves for name in ("plain", "packed"))
  assert plain == packed


def test_chunks_go_through_the_same_memory_within_a_save_and_from_one_to_the_next(tmp_path, monkeypatch):
  made = []
  fresh = packing.fresh
  monkeypatch.setattr(packing, "_CHUNK_NBYTES", 4096)
  monkeypatch.setattr(packing, "_SLAB_NBYTES", 3 * 4096)
  monkeypatch.setattr(packing, "fresh", lambda nbytes: made.append(nbytes) or fresh(nbytes))

  def state(step):
    return {f"x{i}": np.random.default_rng((step, i)).standard_normal((7, 30), np.float32) for i in range(100)}

  with ckpt.Checkpointer(tmp_path, {"layout": {"pack": "on"}, "limits": {"save_concurrency": "1GB"}}) as c:
    for step in range(3):
      c.save(step, jax.tree.map(jnp.asarray, state(step)))
      c.wait()
    assert 1 <= len(made) <= 3  # for 3 times 21 chunks
    for step in range(3):
      got = c.restore(step).state
      assert all(got[name].tobytes() == value.tobytes() for name, value in state(step).items())


def test_reading_one_packed_leaf_reads_a_part_of_the_slab(tmp_path):
  import tensorstore as ts

  def bytes_read():
    found = ts.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
    return sum(v["value"] for m in found for v in m["values"])

  state = {f"x{i}": jnp.full((100, 1000), i, jnp.float32) for i in range(100)}  # 40 MB
  with ckpt.Checkpointer(tmp_path, PACKED) as c:
    c.save(0, state)
    c.wait()
    before = bytes_read()
    got = c.restore(only="x50", like={"x50": state["x50"]}).state["x50"]
    assert float(got[0, 0]) == 50 and bytes_read() - before < 10e6


def test_damaged_index_is_told(tmp_path):
  config = ckpt.Config(layout={"pack": "on"}, restore={"on_corruption": "raise"})
  state = {"a": jnp.arange(8.0), "b": jnp.ones(8)}
  with ckpt.Checkpointer(tmp_path, config) as c:
    c.save(0, state)
  file = tmp_path / "0" / "default" / packing.PACK_INDEX
  file.write_text(file.read_text()[:-5])
  with ckpt.Checkpointer(tmp_path, config) as c, pytest.raises(ckpt.CorruptCheckpointError, match="index"):
    c.restore(like=state)


def test_index_of_a_later_version_is_no_damage(tmp_path):
  index = epath.Path(tmp_path) / packing.PACK_INDEX
  index.write_text(json.dumps({"format": 2, "leaves": {"w": "whatever that version writes"}}))
  with pytest.raises(ckpt.CheckpointError, match="a later ckpt_jax wrote") as e:
    packing.read_index(epath.Path(tmp_path))
  assert not isinstance(e.value, ckpt.CorruptCheckpointError)


@pytest.mark.multiprocess
def test_processes_pack_what_they_own_and_any_number_restores(tmp_path):
  for mode, processes in (("save", 4), ("restore", 2), ("restore", 4)):
    together("pack.py", tmp_path, mode, processes=processes)
  report = who_wrote(tmp_path, 0)
  assert report.overlaps == {} and len(report.processes) == 4
  assert min(p.nbytes for p in report.processes) > 0.2 * report.nbytes


def repack(run, pack):
  done = cli("repack", run, 0, "--pack", pack)
  assert done.returncode == 0, done.stderr
  return done.stdout


def test_repacked_step_is_an_ordinary_orbax_checkpoint_and_back(tmp_path, assert_same):
  mesh = jax.make_mesh((2,), ("x",))
  state = mixed_state(mesh)
  with ckpt.Checkpointer(tmp_path, PACKED) as c:
    c.save(0, state, metrics={"loss": 1.5}, extras={"data": 3})
  (before,) = runs.list_steps(tmp_path)
  assert "moved 26 arrays out of slabs" in repack(tmp_path, "off")
  assert "nothing to do" in repack(tmp_path, "off")
  assert not (tmp_path / "0" / "default" / packing.PACK_INDEX).exists()
  assert runs.list_steps(tmp_path) == [before]
  plain = {k: v for k, v in state.items() if k not in ("uint4", "empty")}  # ours alone can hold these
  with ocp.CheckpointManager(tmp_path) as manager:
    args = ocp.args.PyTreeRestore(
      plain, restore_args=ocp.checkpoint_utils.construct_restore_args(plain), partial_restore=True
    )
    assert_same(manager.restore(0, args=args), plain)
  for pack in ("on", "off"):
    with ckpt.Checkpointer(tmp_path) as c:
      got = c.restore(like=state)
    assert_same(got.state, state)
    assert got.metrics == {"loss": 1.5} and got.extras == {"data": 3}
    repack(tmp_path, pack)
  assert ckpt.verify(tmp_path, 0) == []


def test_step_of_plain_orbax_can_be_packed(tmp_path, assert_same):
  state = {"a": jnp.arange(8.0), "b": {"c": jnp.ones((3, 2), jnp.bfloat16)}, "big": jnp.zeros((600, 600))}
  with ocp.CheckpointManager(tmp_path) as plain:
    plain.save(0, args=ocp.args.PyTreeSave(state))
  assert "moved 2 arrays" in repack(tmp_path, "on")
  with ckpt.Checkpointer(tmp_path) as c:
    assert_same(c.restore(like=state).state, state)


def test_repacking_that_fails_leaves_the_step_as_it_was(tmp_path, monkeypatch, assert_same):
  from ckpt_jax.rewrite import repack as repacking

  state = {"a": jnp.arange(8.0), "b": jnp.arange(7.0)}
  with ckpt.Checkpointer(tmp_path, PACKED) as c:
    c.save(0, state)
  real = repacking._values
  monkeypatch.setattr(
    repacking,
    "_values",
    lambda item, names: {n: v + (".ckpt_jax" in str(item.info.parent_dir)) for n, v in real(item, names).items()},
  )
  done = cli("repack", tmp_path, 0, "--pack", "off")
  assert done.returncode == 1 and "b reads back differently" in done.stderr
  monkeypatch.undo()
  assert (tmp_path / "0" / "default" / packing.PACK_INDEX).exists()
  with ckpt.Checkpointer(tmp_path) as c:
    assert_same(c.restore(like=state).state, state)


def test_packed_step_can_be_thinned(tmp_path, assert_same):
  from ckpt_jax.rewrite.thin import thin_step

  state = {"params": {"a": jnp.arange(8.0), "b": jnp.ones((3, 2))}, "opt": {"mu": jnp.zeros(9)}, "n": 1}
  with ckpt.Checkpointer(tmp_path, PACKED) as c:
    c.save(0, state)
    c.wait()
    assert thin_step(runs.run_directory(tmp_path), 0, ["params"])
    assert_same(c.restore(0, like={"params": state["params"]}).state, {"params": state["params"]})
  assert ckpt.verify(tmp_path, 0) == []
