"""Saves from accelerators, on CPU devices that count as such: one transfer to pinned memory, no array kept."""

import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jobs import together

import ckpt_jax as ckpt
from ckpt_jax import multihost
from ckpt_jax.layout import staging
from ckpt_jax.layout.staging import HostCopies


@pytest.fixture
def accelerators(monkeypatch):
  """CPU devices count as accelerators; yields the number of arrays of each transfer to pinned memory."""
  monkeypatch.setattr(staging, "as_accelerators", True)
  transfers, put = [], jax.device_put

  def counted(x, device=None, **options):
    kinds = {getattr(s, "memory_kind", None) for s in device} if isinstance(device, list) else set()
    if "pinned_host" in kinds:
      transfers.append(len(x))
    return put(x, device, **options)

  monkeypatch.setattr(jax, "device_put", counted)
  return transfers


def state(seed=0, n=20):
  rng = np.random.default_rng(seed)
  mesh = jax.make_mesh((2,), ("a",))
  made = {f"w{i}": jnp.asarray(rng.standard_normal((8, 16), dtype=np.float32)) for i in range(n)}
  split = jax.device_put(rng.standard_normal((8, 200), dtype=np.float32), NamedSharding(mesh, P("a")))
  both = jax.device_put(rng.standard_normal((4, 4), dtype=np.float32), NamedSharding(mesh, P()))
  put = jax.device_put(rng.standard_normal(5, dtype=np.float32), jax.devices()[1])
  odd = {"q": jnp.arange(9, dtype=jnp.int4), "f": jnp.ones(3, jnp.float8_e4m3fn), "c": jnp.ones(2, jnp.complex64)}
  return (
    made
    | odd
    | {"split": split, "both": both, "put": put, "key": jax.random.key(seed), "step": 3, "empty": jnp.zeros((0, 2))}
  )


@pytest.mark.parametrize("pack", ["off", "on"])
@pytest.mark.parametrize("replica_parallel", ["off", "on"])
def test_saved_from_pinned_memory_and_restored_bit_for_bit(tmp_path, accelerators, assert_same, pack, replica_parallel):
  layout = {"pack": pack, "replica_parallel": replica_parallel}
  with ckpt.Checkpointer(tmp_path, ckpt.Config(layout=layout)) as c:
    for step in range(3):
      c.save(step, state(step))
    c.wait()
    for step in range(3):
      assert_same(c.restore(step, like=state(step)).state, state(step))
  assert ckpt.verify(tmp_path) == []


def test_a_save_is_one_transfer_whatever_the_number_of_leaves(tmp_path, accelerators):
  with ckpt.Checkpointer(tmp_path) as c:
    for n in (5, 50):
      held = state(n=n)
      accelerators.clear()
      c.save(n, held)
      c.wait()
      assert accelerators == [n + 8], (
        "also three odd ones, `put`, the split one from two devices, the replicated one, a key"
      )


def test_no_value_is_fetched_from_a_device_but_in_the_transfer(tmp_path, accelerators, monkeypatch):
  fetched, asarray = [], np.asarray

  def noted(values, *args, **options):
    if isinstance(values, jax.Array) and values.sharding.memory_kind == "device":
      fetched.append(values.shape)
    return asarray(values, *args, **options)

  held = state(n=50)
  monkeypatch.setattr(np, "asarray", noted)
  for limits in ({}, {"host_memory": "20KB"}):
    with ckpt.Checkpointer(tmp_path / str(limits), {"limits": limits}) as c:
      c.save(0, held, metrics={"loss": jnp.float32(1)})
      c.wait()
  assert fetched == [()] * 2, "the metric of each"


def test_without_pinned_memory_left_the_error_names_the_variable_and_the_way_out(tmp_path, accelerators, monkeypatch):
  put = jax.device_put

  def full(x, device=None, **options):
    if isinstance(device, list):
      raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of host memory")
    return put(x, device, **options)

  held = state()
  with ckpt.Checkpointer(tmp_path) as c:
    with monkeypatch.context() as m:
      m.setattr(jax, "device_put", full)
      with pytest.raises(ckpt.CheckpointError, match=f"{staging.PINNED_LIMIT} allows it 64.0 GiB.*limits.host_memory"):
        c.save(0, held)
    c.save(0, held)
  assert ckpt.verify(tmp_path) == []


def test_training_may_donate_the_state_right_after_a_save(tmp_path, accelerators, assert_same):
  update = jax.jit(lambda x: jax.tree.map(lambda leaf: leaf * 2, x), donate_argnums=0)
  held = {f"w{i}": jnp.full((64, 64), float(i)) for i in range(10)}
  want = jax.tree.map(np.asarray, jax.tree.map(jnp.copy, held))
  with ckpt.Checkpointer(tmp_path) as c:
    c.save(0, held)
    after = update(held)
    assert held["w1"].is_deleted(), "nothing of ours holds the buffers"
    c.wait()
    assert_same(c.restore(0).state, want)
  assert float(after["w3"][0, 0]) == 6


def test_nothing_keeps_the_state_while_it_is_written(tmp_path, accelerators, monkeypatch):
  from ckpt_jax.save import commit

  held = {f"w{i}": jnp.full((64, 64), float(i)) for i in range(4)}
  alive = [weakref.ref(leaf) for leaf in held.values()]
  seen, seal = [], commit.seal

  def look(top, how):
    gc.collect()
    seen.extend(ref() is not None for ref in alive)
    seal(top, how)

  monkeypatch.setattr(commit, "seal", look)
  with ckpt.Checkpointer(tmp_path) as c:
    c.save(0, held)
    assert all(leaf._npy_value is None for leaf in held.values()), "no host copy in the user's arrays"
    del held
    c.wait()
  assert seen == [False] * 4


def test_an_unhealthy_state_is_refused_from_pinned_memory_too(tmp_path, accelerators):
  with ckpt.Checkpointer(tmp_path) as c:
    c.save(0, {"w": jnp.ones(4)})
    with pytest.raises(ckpt.UnhealthyStateError, match="w: 1"):
      c.save(1, {"w": jnp.ones(4).at[2].set(jnp.nan)})


def test_devices_take_turns_to_send_what_several_hold(accelerators):
  mesh = jax.make_mesh((2,), ("a",))
  arrays = [jax.device_put(jnp.full(8, i), NamedSharding(mesh, P())) for i in range(4)]
  copies = HostCopies()
  copies.stage(arrays)
  assert accelerators == [4]
  sent = [copies.of(x.addressable_shards[1].data)() for x in arrays]
  assert [int(x[0]) for x in sent] == [0, 1, 2, 3]
  copies.stage(arrays)
  assert accelerators == [4], "nothing is sent twice"


@pytest.fixture
def pinned_by_user():
  sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
  return {f"o{i}": jax.device_put(np.full((64, 64), float(i), np.float32), sharding) for i in range(4)}


@pytest.mark.parametrize("accelerators_too", [False, True])
@pytest.mark.parametrize("limit", ["auto", "64KiB"])
def test_an_update_that_donates_offloaded_leaves_does_not_reach_what_is_saved(
  tmp_path, monkeypatch, assert_same, pinned_by_user, accelerators_too, limit
):
  monkeypatch.setattr(staging, "as_accelerators", accelerators_too)
  want = {name: np.array(leaf) for name, leaf in pinned_by_user.items()}
  sharding = pinned_by_user["o0"].sharding
  update = jax.jit(lambda x: jax.tree.map(lambda leaf: leaf * 2 + 1, x), donate_argnums=0, out_shardings=sharding)
  jax.block_until_ready(update({name: jax.device_put(x + 1, sharding) for name, x in want.items()}))
  with ckpt.Checkpointer(tmp_path, {"limits": {"host_memory": limit}}) as c:
    c.save(0, pinned_by_user)
    after = jax.block_until_ready(update(pinned_by_user))
    c.wait()
    assert_same(c.restore(0).state, want)
  assert float(after["o3"][0, 0]) == 7


def test_where_there_is_no_pinned_memory_copies_are_in_ordinary_memory(
  tmp_path, accelerators, monkeypatch, assert_same
):
  monkeypatch.setattr(staging, "has_pinned", lambda device: False)
  for step, limits in enumerate(({}, {"host_memory": "1MB"})):
    held = state(step) | {"large": jnp.ones((1024, 1024))}
    with ckpt.Checkpointer(tmp_path, {"limits": limits}) as c:
      c.save(step, held)
      assert all(getattr(leaf, "_npy_value", None) is None for leaf in held.values()), "no copy in the user's arrays"
      c.wait()
      assert_same(c.restore(step, like=held).state, held)
  assert accelerators == []


def test_a_view_of_an_array_on_a_cpu_is_made_once():
  copies = HostCopies()
  arrays = [jnp.arange(5.0), jnp.ones(3, jnp.bfloat16)]
  found = [copies.of(x)() for x in arrays]
  assert all(copies.of(x)() is view for x, view in zip(arrays, found, strict=True))
  assert found[0].tolist() == [0, 1, 2, 3, 4] and found[1].tolist() == [1, 1, 1]
  assert HostCopies().of(arrays[0])() is not found[0]


@pytest.mark.multiprocess
@pytest.mark.parametrize("pack", ["off", "on"])
@pytest.mark.parametrize(("replica_parallel", "limit"), [("off", "auto"), ("on", "auto"), ("on", "1MB")])
def test_processes_save_their_shards_from_pinned_memory(tmp_path, pack, replica_parallel, limit):
  together("accelerators.py", tmp_path, pack, replica_parallel, limit, processes=4)
  assert ckpt.verify(tmp_path) == []
  report = multihost.who_wrote(tmp_path, 0)
  assert report.overlaps == {} and len(report.processes) == 4
