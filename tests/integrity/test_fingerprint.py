"""The sums behind fingerprints: any bit counts, its place counts, and the sharding does not."""

import itertools
import json

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401, registers the dtypes that numpy lacks
import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jobs import together

import ckpt_jax as ckpt
from ckpt_jax.integrity import sums
from ckpt_jax.integrity.fingerprint import LeafPrint, take, take_restored
from ckpt_jax.layout import staging, structure
from ckpt_jax.layout.structure import flatten

DTYPES = ["float32", "bfloat16", "float16", "int8", "int4", "uint4", "bool", "float8_e4m3fn", "complex64", "uint32"]
DTYPES += ["float64", "int64", "complex128"]
SHAPES = [(), (1,), (7,), (5, 3), (200, 3), (3, 200), (40, 3, 5), (2, 3, 300), (20000,), (3, 9000), (2, 16389), (0, 4)]


def total(array):
  return sums.tally_block(array, (0,) * array.ndim, array.shape).total


def leaf_total(leaf):
  return views({"x": leaf}).tallies(1)["x"].total


def views(state):
  return take(flatten(state))


def prints(state):
  return found_in(views(state))


def found_in(taken):
  tallies = taken.tallies(2)
  return {
    path: LeafPrint(leaf.dtype, leaf.shape, tallies[path].total, (leaf.part, tallies[path].hash))
    for path, leaf in taken.leaves.items()
  }


def random_bits(rng, shape, dtype):
  dtype = jnp.dtype(dtype)
  raw = rng.integers(0, 256, (*shape, dtype.itemsize), dtype=np.uint8)
  if dtype.name == "bool":
    return (raw[..., 0] & 1).astype(bool)
  if dtype.name in ("int4", "uint4"):
    return (raw[..., 0] & 15).view(dtype)
  return raw.view(dtype).reshape(shape)


def by_definition(array):
  """The formula of sums.py, one word at a time."""
  first = sums.columns_from(array.shape, array.itemsize)
  rows = int(np.prod(array.shape[:first], dtype=int))
  data = array.reshape(rows, -1).view(np.uint8)
  words = np.pad(data, ((0, 0), (0, -data.shape[1] % 8))).view(np.uint64)
  row = sums.mix(np.arange(rows), sums.ROW_SEED)
  position = np.arange(words.shape[1])
  block = sums.mix(position // sums.BLOCK, sums.BLOCK_SEED)
  low = sums.mix(position % sums.BLOCK, sums.LOW_SEED)
  high = sums.mix(position % sums.BLOCK, sums.HIGH_SEED)
  out = 0
  for r in range(rows):
    for y, h, k1, k2 in zip(words[r].tolist(), block.tolist(), low.tolist(), high.tolist(), strict=True):
      out += int(row[r]) * h * (y * k1 + (y >> 32) * k2)
  return out % 2**64


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_sum_is_the_formula_and_parts_add_up_however_they_are_cut(shape, width):
  rng = np.random.default_rng(0)
  array = random_bits(rng, shape, f"uint{8 * width}")
  want = total(array)
  if array.size:
    assert want == by_definition(array)
  for _ in range(3):
    cuts = [sorted({0, n, *rng.integers(0, n + 1, 2).tolist()}) for n in shape]
    tally = sums.Tally()
    for block in itertools.product(*[list(itertools.pairwise(c)) for c in cuts]):
      part = np.ascontiguousarray(array[tuple(slice(*b) for b in block)])
      tally.add(sums.tally_block(part, tuple(b[0] for b in block), shape))
    assert tally.total == want


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_flipped_bit_changes_the_sum(data):
  shape = data.draw(st.sampled_from([s for s in SHAPES if 0 not in s]))
  width = data.draw(st.sampled_from([1, 2, 4, 8]))
  array = random_bits(np.random.default_rng(data.draw(st.integers(0, 9))), shape, f"uint{8 * width}")
  before = total(array)
  raw = array.reshape(-1).view(np.uint8)
  raw[data.draw(st.integers(0, raw.size - 1))] ^= np.uint8(1 << data.draw(st.integers(0, 7)))
  assert total(array) != before


def test_lost_signs_swapped_rows_columns_and_leaves_are_seen():
  rng = np.random.default_rng(0)
  x = rng.standard_normal((256, 256), dtype=np.float32)
  x[:, ::2] = -0.0
  lost = np.where(
    x == 0, np.float32(0), x
  )  # an even number of signs: a plain odd-weighted sum would miss half of these
  zeros = np.zeros((64, 64), np.float32)
  changed = [lost, x[::-1].copy(), x[:, ::-1].copy(), x.T.copy(), x.reshape(-1)[::-1].reshape(x.shape).copy()]
  assert len({leaf_total(v) for v in [x, *changed]}) == 1 + len(changed)
  assert leaf_total(zeros) != leaf_total(-zeros)
  assert prints({"a": x, "b": lost}) != prints({"a": lost, "b": x})


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_of_numpy_of_one_device_and_of_shards_are_one_number(dtype):
  rng = np.random.default_rng(1)
  mesh = jax.make_mesh((2,), ("a",))
  with jax.enable_x64(True):
    # How an array lies has nothing to do with its dtype: all placements for one dtype of each kind.
    placements = [((8, 16), P("a")), ((1024, 256), P("a")), ((8, 16), P(None, "a")), ((8,), P()), ((), P())]
    for shape, spec in placements if dtype in ("float32", "bfloat16", "int4", "complex128") else placements[:2]:
      array = random_bits(rng, shape, dtype)
      sharded = jax.device_put(array, NamedSharding(mesh, spec))
      want = leaf_total(array)
      assert leaf_total(sharded) == want and leaf_total(jnp.asarray(array)) == want


def test_every_copy_is_counted_where_replicas_may_differ():
  mesh = jax.make_mesh((2,), ("a",))
  x = jax.device_put(np.arange(6.0, dtype=np.float32), NamedSharding(mesh, P()))
  once, all_copies = views({"x": x}), take_restored({"x": x}, {})
  assert all_copies.leaves["x"].copies == 2
  assert all_copies.tallies(1)["x"].total == 2 * once.tallies(1)["x"].total % 2**64


def test_all_kinds_of_leaves_have_their_own_fingerprint():
  state = {
    "key": jax.random.key(0),
    "keys": jax.random.split(jax.random.key(0), 3),
    "int": 1,
    "bool": True,
    "float": 1.0,
    "minus": -0.0,
    "zero": 0.0,
    "text": "1",
    "complex": 1j,
    "scalar": np.float32(1),
    "empty": np.zeros((0, 3), np.float32),
    "big_endian": np.arange(3, dtype=">i4"),
  }
  found = prints(state)
  assert set(found) == set(state) and len(set(found.values())) == len(state)
  assert found["big_endian"] == prints({"big_endian": np.arange(3, dtype="<i4")})["big_endian"]
  assert prints({"n": np.int32(3)}) != prints({"n": 3})
  assert found_in(take_restored({"n": np.int32(3)}, {"n": "int"})) == prints({"n": 3})


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_any_flipped_bit_changes_the_hash_and_parts_are_told_apart(data):
  shape, spec = data.draw(st.sampled_from([((8, 6), P("a")), ((4, 8), P(None, "a")), ((4000, 6), P("a")), ((8,), P())]))
  dtype = data.draw(st.sampled_from(["float32", "bfloat16", "int8", "float8_e5m2", "bool"]))
  array = random_bits(np.random.default_rng(data.draw(st.integers(0, 9))), shape, dtype)
  sharding = NamedSharding(jax.make_mesh((2,), ("a",)), spec)

  def found(x):
    (leaf,) = prints({"x": jax.device_put(x, sharding)}).values()
    return leaf.hash

  before = found(array)
  assert before[0] == sharding.shard_shape(shape)
  raw = array.copy()
  bits = raw.reshape(-1).view(np.uint8)
  bits[data.draw(st.integers(0, bits.size - 1))] ^= np.uint8(1)
  assert found(raw) != before
  if spec != P():
    axis = spec.index("a")
    swapped = np.concatenate(np.split(array, 2, axis)[::-1], axis)
    assert (found(swapped) == before) == (swapped.tobytes() == array.tobytes())


def test_leaves_are_hashed_where_they_lie_as_they_were_saved_and_summed_up_elsewhere():
  mesh = jax.make_mesh((2,), ("a",))
  place = lambda spec: NamedSharding(mesh, spec)  # noqa: E731
  x = random_bits(np.random.default_rng(0), (8, 6), "float32")
  saved = prints({"x": jax.device_put(x, place(P("a"))), "y": jnp.asarray(x), "n": 1, "z": np.complex128(1j)})
  there = {"x": jax.device_put(x, place(P("a"))), "y": jnp.asarray(x), "n": 1, "z": np.complex128(1j)}
  again = take_restored(there, {})
  assert again.in_parts_of(saved) == set(saved)
  tallies = again.tallies(1, health=False, hashed=set(saved))
  assert {path: t.hash for path, t in tallies.items()} == {path: leaf.hash[1] for path, leaf in saved.items()}
  assert not any(t.total for t in tallies.values())  # the sum, which takes five times as long, was not made
  for spec in (P(), P(None, "a")):
    other = take_restored({"x": jax.device_put(x, place(spec)), "y": x, "new": 1}, {})
    assert other.in_parts_of(saved) == {"y"}
    tallies = other.tallies(1, health=False, hashed={"y"})
    assert tallies["x"].total == saved["x"].total * other.leaves["x"].copies % 2**64 and tallies["x"].hash == 0
    assert tallies["y"].hash == saved["y"].hash[1] and tallies["y"].total == 0


def test_a_buffer_that_is_looked_at_is_not_donated_away():
  x = jax.device_put(np.arange(1 << 16, dtype=np.float32))
  want = leaf_total(x)
  taken = views({"x": x})
  y = jax.jit(lambda v: v * 0, donate_argnums=0)(x)
  jax.block_until_ready(y)
  del x
  assert taken.tallies(1)["x"].total == want


@pytest.mark.multiprocess
def test_four_processes_and_one_make_the_same_record(tmp_path):
  records = []
  for processes, devices in ((4, 1), (1, 4), (1, 2)):
    run = tmp_path / f"{processes}x{devices}"
    together("train.py", run, "save", processes=processes, devices=devices)
    item = run / "0" / "default"
    records.append(json.loads((item / "ckpt_jax.json").read_text()))
    assert not list(item.glob("ckpt_jax.process_*"))
  assert records[0]["leaves"] == records[1]["leaves"] == records[2]["leaves"]
  assert records[0]["hashes"] == records[1]["hashes"]  # of the same parts
  assert set(records[0]["hashes"]) == set(records[2]["hashes"]) == set(records[0]["leaves"])


def test_saves_and_restores_of_accelerators_make_and_check_the_same_record(tmp_path, monkeypatch):
  """What a GPU would do, on CPU devices: saves by way of pinned memory, restores summed before they leave the host."""
  mesh = jax.make_mesh((2,), ("a",))
  rng = np.random.default_rng(0)
  state = {
    "w": jax.device_put(rng.standard_normal((8, 200), dtype=np.float32), NamedSharding(mesh, P("a"))),
    "b": jnp.asarray(rng.standard_normal(30), jnp.bfloat16),
    "replicated": jax.device_put(jnp.arange(9), NamedSharding(mesh, P())),
    "key": jax.random.key(1),
    "step": 3,
  }
  with ckpt.Checkpointer(tmp_path / "host") as c:
    c.save(0, state)
  monkeypatch.setattr(staging, "as_accelerators", True)
  monkeypatch.setattr(structure, "_known", [])  # where leaves lie is known by now
  with ckpt.Checkpointer(tmp_path / "device") as c:
    c.save(0, state)
    c.wait()
    assert c.restore(like=state).report.verified == 5
    bad = state | {"b": state["b"].at[3].set(jnp.nan)}
    with pytest.raises(ckpt.UnhealthyStateError, match="b: 1"):
      c.save(1, bad)
  records = [tmp_path / side / "0" / "default" / "ckpt_jax.json" for side in ("host", "device")]
  leaves = [json.loads(file.read_text())["leaves"] for file in records]
  assert leaves[0] == leaves[1]
  hashes = [json.loads(file.read_text())["hashes"] for file in records]
  assert hashes[0] == hashes[1]
  with ckpt.Checkpointer(tmp_path / "host") as c:
    assert c.restore(like=state).report.verified == 5


@pytest.mark.parametrize("nbytes", [0, 1, 16, 128, 240, 241, 512, 1024, 4096, 10**6])
def test_both_halves_of_a_hash_are_those_of_xxh3(nbytes):
  bits = np.random.default_rng(nbytes).integers(0, 256, nbytes, np.uint8)
  for seed in (0, 5):
    low, high = sums.hash_bits(bits, seed)
    assert low == xxhash.xxh3_64_intdigest(bits.tobytes(), seed=seed)
    assert high == xxhash.xxh3_128_intdigest(bits.tobytes(), seed=seed) >> 64
