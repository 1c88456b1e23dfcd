"""Codecs: which leaf has which, every dtype bit for bit, read by plain Orbax, and damage to what they wrote."""

import json
import math
import random

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import ckpt_jax as ckpt
from ckpt_jax.config.units import is_uncompressed
from ckpt_jax.layout.codec import OFF, SHUFFLE_LIMIT, SHUFFLED, ZSTD, kind_of, set_codec
from ckpt_jax.layout.stored import stored_leaves
from ckpt_jax.rewrite.repack import repack_step
from ckpt_jax.rewrite.thin import thin_step

ANY = {"nonfinite": "ignore"}


def test_a_leafs_kind_is_its_dtype_and_what_the_optimizer_calls_it():
  f32, bf16 = np.dtype(np.float32), np.dtype(jnp.bfloat16)
  assert kind_of("params/layers_0/kernel", f32) == kind_of("w", f32) == kind_of("model.w", f32) == "float32"
  assert kind_of("opt_state/0/mu/w", f32) == kind_of("opt_state.0.mu.w", f32) == "mu float32"
  assert kind_of("params/Embed_0/embedding", bf16) == "embeddings bfloat16"
  assert kind_of("opt/0/nu/token_embed", f32) == "nu embeddings float32"
  assert kind_of("opt_state/0/count", np.dtype(np.int32)) == "optimizer int32"


def written(directory, state, compression, **layout):
  """Saves a state; the codec of each leaf."""
  with ckpt.Checkpointer(directory, {"layout": {"compression": compression, **layout}, "health": ANY}) as c:
    c.save(0, state)
  return {name: leaf.codec for name, leaf in stored_leaves(epath.Path(directory) / "0" / "default").items()}


def a_state():
  rng = np.random.default_rng(0)
  w = rng.standard_normal((64, 300), dtype=np.float32)
  on = NamedSharding(jax.make_mesh((2,), ("x",)), P("x"))
  return {
    "params": {"w": jax.device_put(w, on), "b": jnp.asarray(w[0], jnp.bfloat16), "e": {"embedding": jnp.asarray(w)}},
    "mu": {"w": jax.device_put(w, on)},
    "fp8": jnp.asarray(w[0], jnp.float8_e4m3fn),
    "host": w[1],
    "key": jax.random.key(1),
    "n": 3,
  }


def test_leaves_of_one_step_have_the_codecs_of_their_kinds(tmp_path, assert_same):
  state = a_state()
  kinds = {"float32": "zstd", "mu float32": "shuffled", "bfloat16": "shuffled", "uint32": "shuffled"}
  found = written(tmp_path, state, kinds)
  assert found == {
    "params/w": "zstd",
    "params/b": "shuffled zstd",
    "params/e/embedding": "none",
    "mu/w": "shuffled zstd",
    "fp8": "none",
    "host": "zstd",
    "key": "shuffled zstd",
    "n": "zstd",
  }
  with ckpt.Checkpointer(tmp_path) as c:
    assert_same(c.restore(like=state).state, state)


@pytest.mark.parametrize(
  ("compression", "wide", "byte"),
  [
    ("on", "shuffled zstd", "zstd"),
    ("shuffled", "shuffled zstd", "zstd"),
    ("zstd", "zstd", "zstd"),
    (False, "none", "none"),
  ],
)
@pytest.mark.parametrize("zarr3", [False, True])
def test_one_codec_for_all_in_both_versions_of_zarr(tmp_path, compression, wide, byte, zarr3):
  found = written(tmp_path, a_state(), compression, **({"target_file_size": "1MiB"} if zarr3 else {}))
  assert {found[name] for name in ("params/w", "params/b", "mu/w", "key")} == {wide}
  assert found["fp8"] == byte


DTYPES = ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "int4", "uint4", "int64", "uint8", "bool"]
DTYPES += ["complex64", "complex128"]


@given(
  dtype=st.sampled_from(DTYPES),
  shape=hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=40),
  compression=st.sampled_from(["shuffled", "zstd"]),
  zarr3=st.booleans(),
  data=st.data(),
)
@settings(max_examples=25)
def test_every_dtype_and_shape_comes_back_bit_for_bit(dtype, shape, compression, zarr3, data, tmp_path_factory):
  run = tmp_path_factory.mktemp("run")
  dtype = np.dtype(jnp.dtype(dtype))
  few = data.draw(st.binary(min_size=16, max_size=400))  # repeated: what a codec is made for
  raw = np.frombuffer((few * math.prod((*shape, 16)))[: math.prod(shape) * dtype.itemsize], np.uint8)
  raw = raw & {"bool": 1, "int4": 7, "uint4": 7}.get(dtype.name, 255)  # else no value
  array = raw.view(dtype).reshape(shape)  # NaN payloads, denormals, -0.0
  state = {"mu": {"w": array}, "other": jnp.ones(3)}
  if jnp.dtype(dtype).itemsize <= 4:
    state["w"] = jnp.asarray(array)
  written(run, state, compression, **({"target_file_size": "1MiB"} if zarr3 else {}))
  with ckpt.Checkpointer(run) as c:
    got = c.restore(like=state).state
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(state), strict=True):
    assert (a.dtype, a.shape, np.asarray(a).tobytes()) == (b.dtype, b.shape, np.asarray(b).tobytes())


def readable_by_orbax():
  state = a_state()
  return {name: state[name] for name in ("params", "mu", "fp8", "n")}


@pytest.mark.parametrize("layout", [{}, {"target_file_size": "1MiB"}, {"chunk_size": "20kB"}], ids=str)
def test_plain_orbax_reads_a_step_of_several_codecs(tmp_path, layout, assert_same):
  state = readable_by_orbax()
  found = written(tmp_path, state, {"float32": "shuffled", "bfloat16": "zstd", "mu float32": "shuffled"}, **layout)
  assert {*found.values()} == {"shuffled zstd", "zstd", "none"}
  args = ocp.args.PyTreeRestore(state, restore_args=ocp.checkpoint_utils.construct_restore_args(state))
  with ocp.CheckpointManager(tmp_path, item_handlers=ocp.PyTreeCheckpointHandler()) as plain:
    assert_same(plain.restore(0, args=args), state)


def test_plain_orbax_and_we_read_shuffled_arrays_without_ocdbt(tmp_path, assert_same):
  state = {"w": jnp.asarray(np.random.default_rng(0).standard_normal((300, 200), dtype=np.float32))}
  with ocp.CheckpointManager(tmp_path, item_handlers=ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as plain:
    plain.save(0, args=ocp.args.PyTreeSave(state))
    plain.wait_until_finished()
    zarr = tmp_path / "0" / "default" / "w" / ".zarray"
    metadata = json.loads(zarr.read_text())
    set_codec(metadata, SHUFFLED, 4)
    spec = {"driver": "zarr", "kvstore": f"file://{zarr.parent}/", "metadata": metadata}
    ts.open(spec, create=True, delete_existing=True).result().write(np.asarray(state["w"])).result()
    assert_same(plain.restore(0, args=ocp.args.PyTreeRestore(state)), state)
  with ckpt.Checkpointer(tmp_path) as c:
    assert_same(c.restore(like=state).state, state)


@given(itemsize=st.sampled_from([2, 4, 8, 16]), rows=st.integers(1, 2**16), over=st.integers(-3, 3))
def test_chunks_beyond_the_limit_of_the_codec_get_zstd(itemsize, rows, over):
  columns = SHUFFLE_LIMIT // (rows * itemsize) + over
  two = {"shape": [rows, columns], "chunks": [rows, columns], "compressor": None}
  set_codec(two, SHUFFLED, itemsize)
  fits = rows * columns * itemsize <= SHUFFLE_LIMIT
  assert two["compressor"]["id"] == ("blosc" if fits else "zstd")
  inner = {"name": "sharding_indexed", "configuration": {"codecs": [{"name": "bytes"}, {"name": "zstd"}]}}
  three = {"chunk_grid": {"configuration": {"chunk_shape": (rows, columns)}}, "codecs": [inner]}
  set_codec(three, SHUFFLED, itemsize)
  assert inner["configuration"]["codecs"][1:] == [
    {"name": name, "configuration": inner["configuration"]["codecs"][1]["configuration"]}
    for name in ("blosc" if fits else "zstd",)
  ]
  set_codec(three, OFF, itemsize)
  assert inner["configuration"]["codecs"] == [{"name": "bytes"}]


def test_shuffled_numbers_take_less_than_zstd_leaves_of_them():
  numbers = np.random.default_rng(0).standard_normal(1 << 18, dtype=np.float32)
  stored = {}
  for name in (OFF, ZSTD, SHUFFLED):
    metadata = {"shape": [1 << 18], "chunks": [1 << 18], "dtype": "<f4", "compressor": None}
    set_codec(metadata, name, 4)
    spec = {"driver": "zarr", "kvstore": {"driver": "memory"}, "metadata": metadata}
    store = ts.open(spec, create=True).result()
    store.write(numbers).result()
    assert store.read().result().tobytes() == numbers.tobytes()
    stored[name] = len(store.kvstore.read("0").result().value) / numbers.nbytes
  # Without the size of the blocks nothing would be gained over zstd.
  assert stored[SHUFFLED] < 0.86 < 0.91 < stored[ZSTD] < stored[OFF] == 1


def test_flipped_bits_of_compressed_data_never_pass_and_never_crash(tmp_path, assert_same):
  rng = random.Random(0)
  state = {"w": jnp.asarray(np.random.default_rng(0).standard_normal((256, 256), dtype=np.float32))}
  assert written(tmp_path, state, "shuffled") == {"w": "shuffled zstd"}
  (file,) = (p for p in (tmp_path / "0" / "default").rglob("d/*") if p.stat().st_size > 100_000)
  whole, raised = file.read_bytes(), 0
  # c-blosc's header: versions, flags, size of a number, bytes, bytes of a block, compressed bytes; offsets of blocks.
  header = whole.index(state["w"].nbytes.to_bytes(4, "little")) - 4
  with ckpt.Checkpointer(tmp_path, {"restore": {"on_corruption": "raise"}}) as c:
    for at in [*range(header, header + 20), *(rng.randrange(len(whole)) for _ in range(5))]:
      data = bytearray(whole)
      data[at] ^= 1 << rng.randrange(8)
      file.write_bytes(data)
      try:
        assert_same(c.restore(0, like=state).state, state)
      except ckpt.CorruptCheckpointError as e:
        raised += 1
        assert "w" in str(e)
    assert raised >= 15
    assert ckpt.verify(tmp_path, 0)
    file.write_bytes(whole)
    assert_same(c.restore(0, like=state).state, state)


@pytest.mark.parametrize("pack", ["on", "off"])
def test_codecs_with_small_arrays_packed(tmp_path, pack, assert_same):
  state = a_state()
  found = written(tmp_path, state, {"mu float32": "shuffled"}, pack=pack)
  assert found["mu/w"] == ("packed" if pack == "on" else "shuffled zstd")
  with ckpt.Checkpointer(tmp_path) as c:
    assert_same(c.restore(like=state).state, state)


@pytest.mark.parametrize("compression", ["shuffled", "off"])
def test_rewritten_steps_keep_their_codecs(tmp_path, compression, assert_same):
  state = a_state()
  before = written(tmp_path, state, compression)
  slab = before | {name: "packed" for name in ("params/w", "params/b", "params/e/embedding", "mu/w", "fp8", "host")}
  for pack, after in ((True, slab), (False, before)):
    repack_step(epath.Path(tmp_path), 0, pack=pack)
    found = {name: leaf.codec for name, leaf in stored_leaves(epath.Path(tmp_path) / "0" / "default").items()}
    assert found | {"host": ""} == after | {"host": ""}  # which Orbax wrote
    with ckpt.Checkpointer(tmp_path) as c:
      assert_same(c.restore(like=state).state, state)
  thin_step(epath.Path(tmp_path), 0, ["params"])
  found = {name: leaf.codec for name, leaf in stored_leaves(epath.Path(tmp_path) / "0" / "default").items()}
  assert found == {name: codec for name, codec in before.items() if name.startswith("params")}


def test_wrong_codec_is_refused_with_the_nearest_name():
  with pytest.raises(
    ckpt.ConfigError, match="'shufled' is not one of auto, on, off, zstd, shuffled; did you mean shuf"
  ):
    ckpt.Config(layout={"compression": "shufled"})
  with pytest.raises(ckpt.ConfigError, match="'auto' is not one of off, zstd, shuffled"):
    ckpt.Config(layout={"compression": {"mu float32": "auto"}})
  assert ckpt.Config(layout={"compression": {"mu float32": False}}).layout.compression == {"mu float32": "off"}
  assert is_uncompressed({}) and is_uncompressed("auto") and not is_uncompressed({"a": "zstd"})
