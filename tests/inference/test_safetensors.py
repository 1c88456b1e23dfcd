"""Safetensors files of any program into trees of jax."""

import json
import struct

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jobs import together

import ckpt_jax as ckpt
from ckpt_jax.inference import rename
from ckpt_jax.storage import ranges


@pytest.mark.multiprocess
def test_four_processes_read_one_copy_in_all_and_each_gets_what_it_holds(tmp_path):
  rng = np.random.default_rng(0)
  arrays = {n: rng.standard_normal((512, 1024), dtype=np.float32) for n in ("rows", "columns", "both", "replicated")}
  arrays["turned"] = rng.standard_normal((256, 512), dtype=np.float32)
  for name, array in arrays.items():
    np.save(tmp_path / f"{name}.npy", array)
  files = {n: a for n, a in arrays.items() if n != "turned"} | {
    "other.turned": np.ascontiguousarray(arrays["turned"].T)
  }
  safetensors.numpy.save_file(files, tmp_path / "weights.safetensors")
  size = (tmp_path / "weights.safetensors").stat().st_size
  results = together("imports.py", tmp_path, processes=4)
  read = [int(r.log.split()[-1]) for r in results]
  assert sum(read) < 1.03 * size and max(read) < 0.4 * size, (read, size)


def test_one_process_reads_each_byte_once_and_none_that_nobody_wants(tmp_path, monkeypatch):
  read = []
  into = ranges.Ranges.into
  monkeypatch.setattr(
    ranges.Ranges, "into", lambda self, m, name, start: (read.append((start, m.nbytes)), into(self, m, name, start))
  )
  arrays = {name: np.arange(1 << 20, dtype=np.float32).reshape(2048, 512) + i for i, name in enumerate("ab")}
  safetensors.numpy.save_file(arrays, tmp_path / "model.safetensors")
  sharding = NamedSharding(jax.make_mesh((2,), ("x",)), P("x"))
  like = {name: jax.ShapeDtypeStruct((2048, 512), jnp.float32, sharding=sharding) for name in "ab"}
  got = ckpt.load_safetensors(tmp_path / "model.safetensors", like=like)
  assert all(np.asarray(got[n]).tobytes() == arrays[n].tobytes() and got[n].sharding == sharding for n in "ab")
  assert sum(nbytes for _, nbytes in read) <= (tmp_path / "model.safetensors").stat().st_size + 1  # the last byte twice
  assert max(nbytes for _, nbytes in read) <= 1 << 20


def test_dtypes_shapes_and_bits_survive(tmp_path):
  kinds = [np.bool_, np.uint8, np.int8, np.int16, np.uint16, np.float16, ml_dtypes.bfloat16, np.int32, np.float32]
  kinds += [ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, np.int64, np.float64]
  rng = np.random.default_rng(0)
  arrays = {}
  for kind in kinds:
    dtype = np.dtype(kind)
    bits = rng.integers(0, 2 if dtype.kind == "b" else 256, (3, 5, dtype.itemsize), dtype=np.uint8)
    arrays[f"m.{dtype.name}"] = bits.view(dtype)[..., 0] if dtype.itemsize > 1 else bits.view(dtype)[..., 0].copy()
    arrays[f"z.{dtype.name}"] = np.array(bits.reshape(-1)[: dtype.itemsize].view(dtype)[0])
  arrays["empty.x"] = np.zeros((0, 7), np.float32)
  safetensors.numpy.save_file(arrays, tmp_path / "model.safetensors")
  got = ckpt.load_safetensors(tmp_path)
  for name, array in arrays.items():
    top, last = name.split(".")
    found = got[top][last]
    assert (found.dtype, found.shape, found.tobytes()) == (array.dtype, array.shape, array.tobytes()), name


def test_every_difference_from_like_is_named_and_casts_must_be_allowed(tmp_path):
  safetensors.numpy.save_file(
    {"a.w": np.ones((2, 3), np.float32), "b": np.ones(2, np.float32)}, tmp_path / "m.safetensors"
  )
  like = {"a": {"w": jax.ShapeDtypeStruct((3, 2), jnp.float32)}, "c": jax.ShapeDtypeStruct((2,), jnp.float32)}
  with pytest.raises(ckpt.StructureMismatchError, match=r"(?s)3 differences.*a/w.*saved as float32\[2, 3\].*c: not in"):
    ckpt.load_safetensors(tmp_path, like=like)
  like = {"a": {"w": jax.ShapeDtypeStruct((2, 3), jnp.bfloat16)}, "b": jax.ShapeDtypeStruct((2,), jnp.float32)}
  with pytest.raises(ckpt.StructureMismatchError, match="asked for bfloat16"):
    ckpt.load_safetensors(tmp_path, like=like)
  assert ckpt.load_safetensors(tmp_path, like=like, cast=True)["a"]["w"].dtype == jnp.bfloat16


def broken(name, change):
  return pytest.param(change, id=name)


def header(data, change):
  (length,) = struct.unpack("<Q", data[:8])
  found = json.loads(data[8 : 8 + length])
  change(found)
  text = json.dumps(found).encode()
  return struct.pack("<Q", len(text)) + text + data[8 + length :]


@pytest.mark.parametrize(
  "change",
  [
    broken("no safetensors", lambda data: b"hello"),
    broken("empty", lambda data: b""),
    broken("endless header", lambda data: b"\xff" * 8 + data[8:]),
    broken("no JSON", lambda data: data[:8] + b"?" + data[9:]),
    broken("unknown dtype", lambda data: header(data, lambda h: h["a"].update(dtype="F7"))),
    broken("wrong size", lambda data: header(data, lambda h: h["a"].update(shape=[4, 4]))),
    broken("negative", lambda data: header(data, lambda h: h["a"].update(data_offsets=[-8, 16]))),
    broken("cut short", lambda data: data[:-4]),
  ],
)
def test_damaged_files_are_reported(tmp_path, change):
  file = tmp_path / "model.safetensors"
  safetensors.numpy.save_file({"a": np.ones((2, 3), np.float32)}, file)
  file.write_bytes(change(file.read_bytes()))
  with pytest.raises(ckpt.CorruptCheckpointError, match=r"model\.safetensors|a:"):
    ckpt.load_safetensors(tmp_path)


def test_missing_files_are_named(tmp_path):
  with pytest.raises(ckpt.NoCheckpointError, match="neither"):
    ckpt.load_safetensors(tmp_path)
  (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
  with pytest.raises((ckpt.NoCheckpointError, ckpt.CorruptCheckpointError), match=r"gone\.safetensors"):
    ckpt.load_safetensors(tmp_path)
  (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../elsewhere.safetensors"}}')
  with pytest.raises(ckpt.CorruptCheckpointError, match="weight_map"):
    ckpt.load_safetensors(tmp_path)
  with pytest.raises(ckpt.NoCheckpointError, match="no export"):
    ckpt.load_quantized(tmp_path)


segments = st.from_regex(r"[a-z0-9_]{1,4}", fullmatch=True)


@given(st.lists(segments, min_size=1, max_size=4), st.data())
def test_rules_lead_back(path, data):
  rules = rename.rules({"a/*/b": "x.*.y:T", "deep/**": "model.**", "*/kernel": "*.weight"})
  path = data.draw(st.sampled_from(["/".join(path), f"a/{path[0]}/b", "deep/" + "/".join(path), f"{path[0]}/kernel"]))
  named = rename.named(path, rules)
  back = rename.path_of(named.name, rules)
  if not named.name.startswith(("x.", "model.")) and not named.name.endswith(".weight"):
    assert named.name == path.replace("/", ".")
  assert rename.named(back.name, rules).name == named.name
  assert "/" not in named.name


@pytest.mark.parametrize(
  ("rules", "match"),
  [(["a"], "PATH=NAME"), ({"a/*": "b"}, "the same stars"), ({"*/**": "**.*"}, "same order"), ({"a": ""}, "needed")],
)
def test_rules_that_make_no_sense_are_refused(rules, match):
  with pytest.raises(ckpt.ConfigError, match=match):
    rename.rules(rules)
