"""Restores to accelerators, on CPU devices that count as such: batched transfers, sums in host memory, no programs."""

import collections
import concurrent.futures
import math
import threading
import time
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from damage import find_data
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from jobs import together

import ckpt_jax as ckpt
from ckpt_jax.integrity import comparison
from ckpt_jax.integrity.comparison import Verifier
from ckpt_jax.integrity.fingerprint import LeafPrint
from ckpt_jax.integrity.record import Record
from ckpt_jax.layout import placing, reading, staging

COMPILED = "/jax/core/compile/backend_compile_duration"


@pytest.fixture(autouse=True)
def as_accelerators(monkeypatch):
  monkeypatch.setattr(staging, "as_accelerators", True)


@pytest.fixture
def transfers(monkeypatch):
  """The places of each call of `jax.device_put` that sends numpy arrays."""
  found, put = [], jax.device_put

  def counted(x, device=None, **options):
    sent = [leaf for leaf in jax.tree.leaves(x) if not isinstance(leaf, jax.Array)]
    if sent:
      found.append(device)
    return put(x, device, **options)

  monkeypatch.setattr(jax, "device_put", counted)
  return found


@pytest.fixture
def programs():
  """Grows by one with each program that is compiled."""
  found = []

  def listen(event, seconds, **_):
    if event == COMPILED:
      found.append(seconds)

  jax.monitoring.register_event_duration_secs_listener(listen)
  yield found
  jax.monitoring.unregister_event_duration_listener(listen)


def state(n=30, seed=0):
  """Arrays of many shapes on one device, on two, and on two in full; in device memory and in pinned memory."""
  rng = np.random.default_rng(seed)
  mesh = jax.make_mesh((2,), ("a",))

  def put(shape, where):
    return jax.device_put(rng.standard_normal(shape, dtype=np.float32), where)

  pinned = SingleDeviceSharding(jax.devices()[1], memory_kind="pinned_host")
  one = {f"w{i}": put((8, 16 + i), SingleDeviceSharding(jax.devices()[i % 2])) for i in range(n)}
  return one | {
    "rows": put((8, 200), NamedSharding(mesh, P("a"))),
    "columns": put((8, 200), NamedSharding(mesh, P(None, "a"))),
    "both": put((4, 4), NamedSharding(mesh, P())),
    "pinned": put((64,), pinned),
    "pinned_rows": put((8, 200), NamedSharding(mesh, P("a"), memory_kind="pinned_host")),
    "half": jnp.arange(100, dtype=jnp.bfloat16),
    "four": jnp.arange(9, dtype=jnp.int4),
    "zero": jnp.float32(-0.0),
  }


def abstract(tree):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


@pytest.mark.parametrize("pack", ["off", "on"])
def test_restored_bit_for_bit_by_one_transfer_without_a_program(tmp_path, assert_same, transfers, programs, pack):
  for n in (3, 30):
    saved = state(n)
    with ckpt.Checkpointer(tmp_path / str(n), ckpt.Config(layout={"pack": pack})) as c:
      c.save(0, saved)
      c.wait()
      transfers.clear(), programs.clear()
      restored = c.restore(like=abstract(saved))
      assert not programs, "nothing is compiled, for verification or else"
      assert restored.report.verified == len(saved)
      assert len(transfers) == 1, "all in one batch, whatever the number of leaves"
    assert_same(restored.state, saved)
    assert {k: x.sharding for k, x in restored.state.items()} == {k: x.sharding for k, x in saved.items()}


def test_pinned_leaves_go_to_pinned_memory_alone(tmp_path, transfers, monkeypatch):
  saved = state()
  with ckpt.Checkpointer(tmp_path) as c:
    c.save(0, saved)
    c.wait()
    transfers.clear()
    monkeypatch.setattr(jax, "make_array_from_callback", None)
    c.restore(like=abstract(saved), only="pinned*")
  ((where, also),) = transfers
  assert {where.memory_kind, also.memory_kind} == {"pinned_host"}


def test_a_pinned_leaf_that_changes_its_type_is_computed_in_device_memory_and_comes_back_pinned(tmp_path, transfers):
  pinned = NamedSharding(jax.make_mesh((2,), ("a",)), P("a"), memory_kind="pinned_host")
  x = np.arange(8)
  saved = {n: jax.device_put(x.astype(n), pinned) for n in ("float32", "bfloat16", "uint4")}
  with ckpt.Checkpointer(tmp_path) as c:
    c.save(0, saved)
    c.wait()
    transfers.clear()
    like = abstract(saved) | {"float32": jax.ShapeDtypeStruct((8,), jnp.float16, sharding=pinned)}
    restored = c.restore(like=like, cast=True)
  ((*places,),) = transfers
  assert sorted(where.memory_kind for where in places) == ["device", "device", "pinned_host"]
  assert all(leaf.sharding == pinned for leaf in restored.state.values()) and restored.report.verified == 3
  assert {n: str(leaf.dtype) for n, leaf in restored.state.items()} == {n: n for n in saved} | {"float32": "float16"}
  assert all(np.array_equal(np.asarray(leaf).astype(int), x) for leaf in restored.state.values())


def test_leaves_wanted_nowhere_in_particular_are_sent_with_the_others_and_not_committed(tmp_path, transfers):
  saved = state()
  with ckpt.Checkpointer(tmp_path) as c:
    c.save(0, saved)
    c.wait()
    transfers.clear()
    like = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in saved.items()}
    restored = c.restore(like=like).state
  assert len(transfers) == 1
  assert not any(x.committed for x in restored.values())
  assert {x.sharding for x in restored.values()} == {SingleDeviceSharding(jax.devices()[0])}


def test_a_cast_and_a_key_come_back_as_they_are_wanted(tmp_path, assert_same):
  mesh = jax.make_mesh((2,), ("a",))
  with ckpt.Checkpointer(tmp_path) as c:
    c.save(0, {"w": jnp.arange(8.0), "key": jax.random.key(3), "n": 7, "wide": np.float64(2.5)})
    rows = NamedSharding(mesh, P("a"))
    like = {
      "w": jax.ShapeDtypeStruct((8,), jnp.bfloat16, sharding=rows),
      "key": jax.random.key(0),
      "n": jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, P())),
      "wide": jnp.float32(0),
    }
    restored = c.restore(like=like, cast=True)
  assert restored.report.verified == 4
  want = {"w": jax.device_put(jnp.arange(8, dtype=jnp.bfloat16), rows), "key": jax.random.key(3)}
  assert_same({k: restored.state[k] for k in want}, want)
  assert restored.state["n"].sharding == like["n"].sharding and int(restored.state["n"]) == 7
  assert float(restored.state["wide"]) == 2.5


@pytest.mark.parametrize("cores", [1, 8])
@pytest.mark.parametrize("spec", [P("a"), P(None, "a"), P()])
def test_a_flipped_bit_is_found_in_host_memory_whatever_the_mesh(tmp_path, monkeypatch, spec, cores):
  monkeypatch.setattr(comparison, "usable_cores", lambda: cores)
  saved = state(2)
  with ckpt.Checkpointer(tmp_path) as c:
    c.save(0, saved)
    c.save(1, saved)
    c.wait()
    file, at = find_data(tmp_path / "1", saved["rows"])
    data = bytearray(file.read_bytes())
    data[at + 100] ^= 4
    file.write_bytes(data)
    like = abstract(saved)
    like["rows"] = jax.ShapeDtypeStruct(
      (8, 200), jnp.float32, sharding=NamedSharding(saved["rows"].sharding.mesh, spec)
    )
    restored = c.restore(like=like)
  assert restored.step == 0 and restored.report.quarantined


def test_what_is_in_host_memory_stays_within_the_limit(tmp_path, monkeypatch, assert_same):
  """Counted: memory that reads fill, until the last one who needs it is gone; TensorStore's own is as much again."""
  limit = 4 << 20
  saved = {f"w{i}": jax.random.normal(jax.random.key(i), (64, 1024 + i % 3)) for i in range(100)}
  live, most = collections.Counter(), []
  empty = reading.unaligned_empty

  def counted(shape, dtype):
    array = empty(shape, dtype)
    nbytes = math.prod(shape) * dtype.itemsize
    live["nbytes"] += nbytes
    weakref.finalize(array.base if array.base is not None else array, live.subtract, {"nbytes": nbytes})
    most.append(live["nbytes"])
    return array

  with ckpt.Checkpointer(tmp_path, ckpt.Config(limits={"host_memory": limit})) as c:
    c.save(0, saved)
    c.wait()
    monkeypatch.setattr(reading, "unaligned_empty", counted)
    restored = c.restore(like=abstract(saved)).state
  assert_same(restored, saved)
  assert sum(x.nbytes for x in saved.values()) > 6 * limit
  assert len(most) == 100 and max(most) < 0.6 * limit, "reads take a fifth, two batches an eighth each, sums another"
  assert live["nbytes"] == 0


def test_threads_that_sum_hold_no_more_than_their_share(monkeypatch):
  monkeypatch.setattr(comparison, "usable_cores", lambda: 8)
  monkeypatch.setattr(comparison, "_BUNCH_NBYTES", 1)  # each leaf by itself
  leaves = {str(i): np.full(1000, i, np.int8) for i in range(50)}
  prints = {path: LeafPrint("int8", (1000,), 0) for path in leaves}
  verifier = Verifier(Record(prints, {}, {}), host_memory=8 * 3000)
  held, most = set(), []
  sums = verifier._sums

  def watched(taken, hashed):
    found = sums(taken, hashed)
    most.append(len(held))
    held.difference_update(taken.leaves)
    return found

  verifier._sums = watched
  for path, leaf in leaves.items():
    held.add(path)
    verifier(path, leaf)
  verifier._pool.shutdown()
  assert max(most) <= 4 and len(most) == 50, "three wait, and one is handed over"


def test_a_reader_that_waits_for_room_ends_when_the_restore_is_given_up(monkeypatch):
  monkeypatch.setattr(comparison, "usable_cores", lambda: 8)
  monkeypatch.setattr(comparison, "_BUNCH_NBYTES", 1)
  verifier = Verifier(Record({}, {}, {}), host_memory=8)
  verifier._pool._max_workers = 1
  begun, over = threading.Event(), threading.Event()
  verifier._sums = lambda taken, hashed: begun.set() or over.wait() or {}
  for _ in range(2):
    verifier._waiting.append((verifier._pool.submit(verifier._sums, None, None), 1))
  begun.wait()
  verifier._waiting.popleft()  # which runs; the other is still to begin
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    reading = pool.submit(verifier, "w", np.zeros(8, np.int8))
    while verifier._waiting:  # until the reader waits
      time.sleep(0.001)
    verifier.stop()
    over.set()
    with pytest.raises(concurrent.futures.CancelledError):
      reading.result(timeout=60)


def test_a_batch_is_filled_while_the_one_before_is_sent(monkeypatch):
  events = []
  ready = jax.block_until_ready
  monkeypatch.setattr(jax, "block_until_ready", lambda x: events.append(("arrived", len(x))) or ready(x))
  place = placing.place
  monkeypatch.setattr(placing, "place", lambda arrays: events.append(("sent", len(arrays))) or place(arrays))
  where = SingleDeviceSharding(jax.devices()[0])
  transfers = placing.Transfers(100)
  got = []
  for i in range(10):
    got += transfers.add(str(i), placing.Unplaced.whole(np.full(16, i, np.int32), where))  # 64 bytes
  got += transfers.send()
  assert events == [("arrived", 0), *[("sent", 2), ("arrived", 2)] * 5, ("sent", 0)]
  assert [(path, int(x[0])) for path, x in got] == [(str(i), i) for i in range(10)]


@pytest.mark.multiprocess
def test_processes_restore_by_all_strategies_and_verify_without_programs(tmp_path):
  together("accelerator_restores.py", tmp_path, processes=4)
