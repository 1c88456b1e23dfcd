"""Saves of states that do not fit into host memory, from CPU devices that count as accelerators and from CPUs."""

import pathlib
import signal
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import ckpt_jax as ckpt
from ckpt_jax.errors import CheckpointError
from ckpt_jax.layout import staging
from ckpt_jax.layout.ring import Late, Ring
from ckpt_jax.layout.sharding import merge_boxes, whole_box
from ckpt_jax.layout.staging import HostCopies


@pytest.fixture
def held(monkeypatch):
  """CPU devices count as accelerators; yields the most bytes that were in a ring at a time, by limit."""
  monkeypatch.setattr(staging, "as_accelerators", True)
  return watched(monkeypatch)


def watched(monkeypatch):
  most, following = {}, Ring._next

  def look(ring):
    wave = following(ring)
    if ring.limit is not None:
      most[ring.limit] = max(most.get(ring.limit, 0), ring._held)
    return wave

  monkeypatch.setattr(Ring, "_next", look)
  return most


def state(seed=0):
  """8 MB, of which one leaf is half."""
  rng = np.random.default_rng(seed)
  mesh = jax.make_mesh((2,), ("a",))
  made = {f"w{i}": jnp.asarray(rng.standard_normal((64, 512), dtype=np.float32)) for i in range(20)}
  made["large"] = jnp.asarray(rng.standard_normal((1024, 1024), dtype=np.float32))
  made["split"] = jax.device_put(rng.standard_normal((512, 512), dtype=np.float32), NamedSharding(mesh, P("a")))
  made["both"] = jax.device_put(rng.standard_normal((256, 256), dtype=np.float32), NamedSharding(mesh, P()))
  return made | {"q": jnp.arange(9, dtype=jnp.int4), "key": jax.random.key(seed), "step": 3}


LIMIT = {"limits": {"host_memory": "4MB"}}


@pytest.mark.parametrize("layout", [{}, {"compression": "on"}, {"pack": "on"}, {"replica_parallel": "off"}])
def test_a_state_larger_than_host_memory_is_saved_in_turns(tmp_path, held, assert_same, layout):
  with ckpt.Checkpointer(tmp_path, LIMIT | {"layout": layout}) as c:
    for step in range(2):
      c.save(step, state(step))
    c.wait()
    for step in range(2):
      assert_same(c.restore(step, like=state(step)).state, state(step))
  assert ckpt.verify(tmp_path) == []
  assert held.keys() == {2_000_000} and 1_000_000 < held[2_000_000] <= 2_000_000


def test_on_a_cpu_too(tmp_path, monkeypatch, assert_same):
  held = watched(monkeypatch)
  with ckpt.Checkpointer(tmp_path, LIMIT) as c:
    c.save(0, state())
    assert c.latest_step() == 0, "what is in memory only once is not given back before it is written"
    assert_same(c.restore(0, like=state()).state, state())
  assert held[2_000_000] <= 2_000_000


def test_training_may_donate_what_went_through_the_ring(tmp_path, held, assert_same):
  update = jax.jit(lambda x: jax.tree.map(lambda leaf: leaf * 2, x), donate_argnums=0)
  arrays = {name: leaf for name, leaf in state().items() if name.startswith("w")}
  want = jax.tree.map(np.asarray, jax.tree.map(jnp.copy, arrays))
  with ckpt.Checkpointer(tmp_path, {"limits": {"host_memory": "1MB"}}) as c:
    c.save(0, arrays)
    update(arrays)
    assert arrays["w1"].is_deleted()
    c.wait()
    assert_same(c.restore(0).state, want)
  assert list(held) == [1 << 20]


def test_a_second_save_through_the_ring_compiles_nothing(tmp_path, held):
  compiled = []

  def listen(event, seconds, **about):
    if "backend_compile" in event:
      compiled.append(about)

  states = [jax.block_until_ready(state(i)) for i in range(3)]
  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    with ckpt.Checkpointer(tmp_path, LIMIT) as c:
      c.save(0, states[0])
      c.wait()
      assert len(compiled) <= 3, "slices of `large` alone, and what jax needs to read a key"
      compiled.clear()
      c.save(1, states[1])
      c.save(2, states[2])
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)
  assert compiled == []


@pytest.mark.parametrize("part", ["written", "summed"])
def test_a_failure_ends_a_save_that_waits_for_the_ring(tmp_path, held, monkeypatch, part):
  from ckpt_jax.integrity import health, sums
  from ckpt_jax.layout.writing import Writer

  def fails(*args, **kwargs):
    raise OSError("no luck")

  monkeypatch.setattr(health, "BEFORE_SAVE_NBYTES", 0)
  with ckpt.Checkpointer(tmp_path, LIMIT) as c:
    c.save(0, {"w": jnp.ones(3)})
    c.wait()
    with monkeypatch.context() as m:
      m.setattr(*((Writer, "_await_window") if part == "written" else (sums, "tally_block")), fails)
      with pytest.raises(ckpt.SaveFailedError, match="no luck"):
        c.save(1, state())
        c.wait()
    assert c.latest_step() == 0
    c.save(2, state())
  assert [s.step for s in ckpt.Checkpointer(tmp_path).steps()] == [0, 2]


def test_a_process_killed_between_two_waves_leaves_no_step(tmp_path, assert_same):
  program = pathlib.Path(__file__).parents[1] / "programs" / "killed_in_ring.py"
  done = subprocess.run([sys.executable, str(program), str(tmp_path)], capture_output=True, text=True, timeout=120)
  assert done.returncode == -signal.SIGKILL, done.stderr
  with ckpt.Checkpointer(tmp_path) as c:
    assert [s.step for s in c.steps()] == [0]
    state = c.restore().state
    assert float(state["x7"][3, 3]) == 7
    c.save(1, state)
  assert ckpt.verify(tmp_path) == []


def test_an_unhealthy_state_is_found_wave_by_wave(tmp_path, held):
  bad = state() | {"w3": jnp.full((64, 512), jnp.nan)}
  with ckpt.Checkpointer(tmp_path, LIMIT) as c, pytest.raises(ckpt.UnhealthyStateError, match="w3: 32768"):
    c.save(0, bad)
  with ckpt.Checkpointer(tmp_path, LIMIT | {"health": {"nonfinite": "tag"}}) as c:
    c.save(0, bad)
    c.wait()
    assert [s.healthy for s in c.steps()] == [False]


def test_xlas_own_limit_sends_a_state_through_the_ring(tmp_path, held, monkeypatch, caplog, assert_same):
  monkeypatch.setenv(staging.PINNED_LIMIT, "0")
  with caplog.at_level("WARNING"), ckpt.Checkpointer(tmp_path) as c:
    c.save(0, state())
    assert_same(c.restore(0, like=state()).state, state())
  assert staging.PINNED_LIMIT in caplog.text and list(held) == [1 << 20]
  monkeypatch.setenv(staging.PINNED_LIMIT, "64GB")
  with ckpt.Checkpointer(tmp_path) as c, pytest.raises(ckpt.ConfigError, match="'64GB'"):
    c.save(1, state())


@given(st.lists(st.integers(1, 12), min_size=1, max_size=3), st.integers(16, 2000), st.sampled_from(["f4", "i1"]))
def test_pieces_cover_an_array_once_and_fit_into_the_ring(shape, limit, dtype):
  values = np.arange(np.prod(shape)).astype(dtype).reshape(shape)
  array = jnp.asarray(values)
  copies = HostCopies(limit=limit)
  chunks, _, pieces = copies.pieces(array)
  out = np.zeros_like(values)
  reading = sorted(pieces, key=lambda piece: piece[1].turn)
  for box, piece in reading:
    index = tuple(slice(a, b) for a, b in box)
    assert piece().nbytes <= max(limit // 2, values.itemsize) and not out[index].any()
    assert all(a % c == 0 and (b % c == 0 or b == n) for (a, b), c, n in zip(box, chunks, shape, strict=True))
    out[index] = piece()
    piece.done()
  np.testing.assert_array_equal(out, values)
  assert merge_boxes([box for box, _ in pieces]) == (whole_box(values.shape),)
  assert copies.ring.wait_until_sent(0)


def test_a_wave_counts_as_sent_once_its_transfer_is_dispatched(monkeypatch):
  dispatching, dispatched = threading.Event(), threading.Event()

  def slowly(copies):
    if copies[0].turn > 0:
      dispatching.set()
      assert dispatched.wait(60)
    for copy in copies:
      copy.found = np.asarray(copy.source)

  ring = Ring(slowly, 10)
  first, second = (ring.add(jnp.ones(2), None, 8) for _ in range(2))
  first.begin()
  ring.start()
  other = threading.Thread(target=first.done)
  other.start()
  assert dispatching.wait(60) and not ring.wait_until_sent(0), "an update that donates the array must wait"
  dispatched.set()
  other.join()
  assert ring.wait_until_sent(0) and second().tolist() == [1, 1]


def test_readers_of_a_ring_wait_for_each_other_and_no_longer_than_it_is_open():
  copies = HostCopies(limit=400)
  arrays = [jnp.full(10, i) for i in range(30)]
  copies.stage(arrays)
  first, second = ([copies.pieces(x).pieces[0][1] for x in arrays] for _ in range(2))
  assert first[0].is_sent and not first[-1].is_sent and not copies.ring.wait_until_sent(0)

  def read(pieces):
    for i, piece in enumerate(pieces):
      assert piece()[0] == i
      piece.done()

  other = threading.Thread(target=read, args=(second,))
  other.start()
  read(first)
  other.join()
  assert copies.ring.wait_until_sent(0)
  more = HostCopies(limit=40)
  more.stage(arrays)
  last = more.pieces(arrays[-1]).pieces[0][1]
  more.ring.close()
  with pytest.raises(CheckpointError, match="given up"):
    last()


def test_late_pieces_come_behind_the_others_and_one_that_is_gone_is_an_error_wherever_it_was_to_be_sent():
  def send(copies):
    for copy in copies:
      copy.found = np.asarray(copy.source)

  ring = Ring(send, 16)
  arrays = [jnp.full(2, i) for i in range(4)]  # 8 bytes each
  first = [ring.add(x, None, 8) for x in arrays[:2]]
  for copy in first:
    copy.begin()
  ring.start()
  late = [Late(ring, x, None, 8) for x in arrays[2:]]
  assert not late[0].is_sent, "there is no room for it"
  first[0].done()
  assert late[0].is_sent and late[0]().tolist() == [2, 2]
  assert not late[1].is_sent
  arrays[3].delete()
  with pytest.raises(CheckpointError, match="has not changed, so that it was not copied"):
    first[1].done()
  with pytest.raises(CheckpointError, match="given up") as error:
    late[1]()
  assert "donated" in str(error.value.__cause__)
