"""Plans: pure decisions on profiles made by hand, their explanation, and the plan of a Checkpointer itself."""

import dataclasses
import json
import logging
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jobs import together

import ckpt_jax as ckpt
from ckpt_jax.layout import staging
from ckpt_jax.layout.link import Link
from ckpt_jax.run.steps import our_metadata
from ckpt_jax.storage.kinds import StorageKind
from ckpt_jax.storage.probe import PageCache, RangeRead, Throughput
from ckpt_jax.tuning.assumed import assumed_profile
from ckpt_jax.tuning.plan import Plan, known_profile
from ckpt_jax.tuning.profile import HostProfile, StateProfile, profile_host, profile_state
from ckpt_jax.tuning.sampling import Compressibility, Kind

GB = 10**9
RANDOM = Compressibility(0.92, 0.45e9, 0.6e9, 8 << 20)
HALF_ZEROS = Compressibility(0.23, 0.7e9, 1.2e9, 8 << 20)
HOST = HostProfile(
  cores=8, memory_nbytes=64 * GB, copy_bytes_per_s=3e9, task_s=4e-6, codecs={"zstd": RANDOM, "shuffled": RANDOM}
)
MANY_HOSTS = dataclasses.replace(HOST, processes=16, devices_per_process=4)


def big(nbytes=10 * GB, leaves=400, zstd=RANDOM, **kw):
  each = nbytes // leaves
  sizes = {"local_nbytes": nbytes, "read_nbytes": nbytes, "local_shards": leaves, "shards": leaves}
  return StateProfile(
    leaves=leaves,
    nbytes=nbytes,
    dtypes=(("float32", nbytes),),
    local_leaves=leaves,
    largest_leaf_nbytes=each,
    largest_shard_nbytes=each,
    largest_local_nbytes=each,
    kinds=(Kind("float32", nbytes, {"zstd": zstd, "shuffled": zstd}),),
    **(sizes | kw),
  )


SMALL_LEAVES = dataclasses.replace(big(200_000_000, 5000), small_leaves=5000, small_nbytes=200_000_000)


def disk(write=1e9, read=2e9):
  return dataclasses.replace(
    assumed_profile(StorageKind.LOCAL, "/data"),
    seconds=30.0,
    write=(Throughput(1, write / 2), Throughput(4, write)),
    read=(Throughput(1, read / 2), Throughput(4, read)),
    ranges=tuple(RangeRead(n, 1e-4 + n / read * 2) for n in (4096, 65536, 1 << 20, 16 << 20)),
  )


def value(plan, key):
  return plan.values[key]


# -- compression


def test_trained_weights_are_not_compressed_on_a_fast_disk():
  plan = ckpt.make_plan(big(), disk(), HOST)
  assert value(plan, "layout.compression") == "off" and plan.nbytes == 10 * GB


def test_compressible_state_is_compressed_on_a_slow_disk_and_the_plan_says_how_small_it_gets():
  plan = ckpt.make_plan(big(zstd=HALF_ZEROS), disk(write=50e6, read=50e6), HOST)
  assert value(plan, "layout.compression") == "shuffled"
  assert plan.nbytes == pytest.approx(2.3e9) and "23%" in plan.explain()


MOMENTS = StateProfile(
  leaves=90,
  nbytes=9 * GB,
  kinds=(
    Kind("float32", 3 * GB, {"zstd": RANDOM, "shuffled": Compressibility(0.84, 1e9, 3e9, 1 << 22)}),
    Kind("mu bfloat16", 3 * GB, {"zstd": RANDOM, "shuffled": Compressibility(0.68, 0.5e9, 2e9, 1 << 22)}),
    Kind("nu float32", 3 * GB, {"zstd": HALF_ZEROS, "shuffled": Compressibility(0.2, 1.5e9, 3e9, 1 << 22)}),
  ),
)


def test_each_kind_of_leaf_is_compressed_from_the_bandwidth_on_where_it_pays():
  chosen = {}
  for write in (100e6, 1e9, 2e9, 3e9, 50e9):
    plan = ckpt.make_plan(MOMENTS, disk(write, 2 * write), HOST)
    found = value(plan, "layout.compression")
    chosen[write] = 3 if found == "shuffled" else 0 if found == "off" else len(found)
    assert plan.config.layout.compression == found  # a mapping goes through a configuration too
    for kind in MOMENTS.kinds:
      assert f"{kind.codecs['shuffled'].ratio:.0%} of {kind.name} (3 GB)" in plan.explain()
  assert sorted(chosen.values(), reverse=True) == [*chosen.values()]
  assert chosen[100e6] == 3 and chosen[50e9] == 0 and {1, 2} & {*chosen.values()}
  partly = ckpt.make_plan(MOMENTS, disk(3e9, 6e9), HOST)
  assert value(partly, "layout.compression") == {"nu float32": "shuffled"} and partly.nbytes == pytest.approx(6.6e9)


def test_codecs_pay_where_there_are_threads_for_them():
  few, many = (dataclasses.replace(HOST, cores=cores) for cores in (1, 64))
  plans = [ckpt.make_plan(MOMENTS, disk(1e9, 2e9), dataclasses.replace(host)) for host in (few, many)]
  assert plans[1].nbytes < plans[0].nbytes
  one_piece = dataclasses.replace(MOMENTS, local_shards=1)  # which one thread compresses
  assert ckpt.make_plan(one_piece, disk(1e9, 2e9), many).nbytes == plans[0].nbytes


def test_chunks_of_a_compressed_state_are_work_for_all_threads_and_below_the_limit_of_the_codec():
  huge = dataclasses.replace(MOMENTS, largest_leaf_nbytes=3 * GB, largest_shard_nbytes=3 * GB)
  assert value(ckpt.make_plan(huge, disk(50e9, 50e9), HOST), "layout.chunk_size") == 256 << 20  # for its readers
  for written in ("auto", "on", "zstd"):
    plan = ckpt.make_plan(huge, disk(50e6, 50e6), HOST, {"layout": {"compression": written}})
    assert value(plan, "layout.chunk_size") == 64 << 20


@given(
  ratio=st.floats(0.01, 1.0),
  zstd=st.floats(5e7, 5e9),
  write=st.floats(1e7, 1e10),
  read=st.floats(1e7, 1e10),
  cores=st.integers(1, 64),
)
def test_compression_never_loses_ten_percent_to_either_fixed_choice(ratio, zstd, write, read, cores):
  state = big(zstd=Compressibility(ratio, zstd, 2 * zstd, 1 << 20))
  host = dataclasses.replace(HOST, cores=cores)
  times = [
    (p.commit_s + p.restore_s)
    for p in (
      ckpt.make_plan(state, disk(write, read), host, {"layout": {"compression": c}}) for c in ("auto", "on", "off")
    )
  ]
  assert times[0] <= 1.101 * min(times[1:]) or times[0] <= min(times[1:]) / 0.899


def test_state_without_values_counts_as_incompressible_and_the_plan_says_so():
  state = jax.eval_shape(lambda: {"w": jnp.zeros((4096, 4096))})
  plan = ckpt.make_plan(state, disk(), HOST)
  assert value(plan, "layout.compression") == "off" and "no values to try" in plan.explain()


@pytest.mark.parametrize("leaf", [jnp.zeros((0,)), np.zeros((2, 0)), np.int8(1), np.float32(1), "text", 1, jnp.int4(1)])
def test_empty_arrays_scalars_and_text_leave_the_rest_its_plan(leaf):
  assert ckpt.make_plan({"odd": leaf}, "local").values["layout.pack"] == "off"
  assert ckpt.make_plan({"odd": leaf, "w": jnp.ones(8)}, "local").values["layout.pack"] == "off"


def test_burst_of_a_disk_that_was_measured_quickly_is_not_taken_for_its_speed():
  thorough = ckpt.make_plan(big(), disk(), HOST)
  quick = ckpt.make_plan(big(), dataclasses.replace(disk(), seconds=0.5), HOST)
  assert quick.commit_s > 1.2 * thorough.commit_s and quick.restore_s > 1.2 * thorough.restore_s


# -- layout


def test_bucket_gets_objects_and_chunks_for_all_its_streams():
  plan = ckpt.make_plan(big(4 * GB, 4), "gcs", HOST)
  streams = StorageKind.GCS.traits.parallelism
  assert streams / 2 <= 4 * GB / value(plan, "layout.target_file_size") <= streams
  assert value(plan, "layout.chunk_size") * 4 <= GB
  # A chunk is worth its request.
  assert value(plan, "layout.chunk_size") >= 8 * assumed_profile(StorageKind.GCS).knee_nbytes


def test_disk_gets_orbax_own_files_and_whole_shards():
  plan = ckpt.make_plan(big(), disk(), HOST)
  assert value(plan, "layout.target_file_size") == value(plan, "layout.chunk_size") == "auto"


def test_thousands_of_small_leaves_are_recommended_for_packing_but_packed_only_if_allowed():
  plan = ckpt.make_plan(SMALL_LEAVES, disk(), HOST)
  assert value(plan, "layout.pack") == "off" and "`on` is recommended" in plan.explain()
  allowed = ckpt.make_plan(SMALL_LEAVES, disk(), HOST, {"layout": {"pack": "auto"}})
  assert value(allowed, "layout.pack") == "on"
  assert allowed.commit_s < plan.commit_s and allowed.restore_s < plan.restore_s
  assert value(ckpt.make_plan(big(), disk(), HOST, {"layout": {"pack": "auto"}}), "layout.pack") == "off"


def test_replicas_write_a_part_each_but_no_crumbs():
  replicated = big(read_nbytes=160 * GB)
  plan = ckpt.make_plan(replicated, "lustre", MANY_HOSTS)
  assert value(plan, "layout.replica_parallel") == "on"
  assert 0 < value(plan, "layout.min_slice_for_replica_parallel") <= 64 * 1024
  assert "16.0 copies" in plan.explain()


def test_chunks_are_cut_for_other_meshes_while_that_costs_little():
  cut = big(across_nbytes=10 * GB, across_chunks=40_000, resharding=1.0, resharding_whole=16.0)
  plan = ckpt.make_plan(cut, "lustre", MANY_HOSTS)
  assert value(plan, "layout.reshard") == "on"
  assert "reads 1.00 times what it needs instead of 16.00" in plan.explain()
  crumbs = dataclasses.replace(cut, across_chunks=10**8)
  assert value(ckpt.make_plan(crumbs, "lustre", MANY_HOSTS), "layout.reshard") == "off"
  assert value(ckpt.make_plan(big(), "lustre", HOST), "layout.reshard") == "auto"


def test_commit_is_by_rename_on_disks_and_by_marker_on_buckets():
  def commit(kind):
    return next(c.value for c in ckpt.make_plan(big(), kind, HOST).choices if c.key == "commit")

  assert [commit(k) for k in ("local", "nfs", "gcs", "s3", "bucket_mount")] == ["rename", "rename"] + ["marker"] * 3


def test_quick_probe_of_a_far_bucket_does_not_make_large_reads_look_like_many_small_ones():
  # 0.4 s were enough for one stream and the two smallest requests.
  storage = dataclasses.replace(
    assumed_profile(StorageKind.GCS, "gs://bucket/run"),
    seconds=0.8,
    write=(Throughput(1, 60e6),),
    read=(Throughput(1, 75e6),),
    ranges=(RangeRead(4096, 0.033), RangeRead(16384, 0.033)),
  )
  plan = ckpt.make_plan(big(268_000_000, 64), storage, HOST)
  assert plan.restore_s == pytest.approx(268 / 75, rel=0.3)
  assert 16 << 20 <= value(plan, "layout.target_file_size") <= 64 << 20


# -- limits


@pytest.mark.parametrize("memory", [1, 16, 1024])
@pytest.mark.parametrize("leaves", [1, 100])
def test_concurrency_holds_the_largest_array_and_otherwise_a_share_of_memory(memory, leaves):
  host = dataclasses.replace(HOST, memory_nbytes=memory * GB)
  plan = ckpt.make_plan(big(8 * GB, leaves), disk(), host)
  for key in ("limits.save_concurrency", "limits.restore_concurrency"):
    assert value(plan, key) >= 8 * GB // leaves
    assert value(plan, key) <= max(memory * GB // 8, 8 * GB // leaves)


def test_threads_follow_the_cores_and_the_streams_of_the_storage():
  plan = ckpt.make_plan(big(), disk(), dataclasses.replace(HOST, cores=3))
  assert value(plan, "limits.data_copy_concurrency") == 3
  threads = [value(ckpt.make_plan(big(), kind, HOST), "limits.file_io_concurrency") for kind in ("local", "s3")]
  streams = [kind.traits.parallelism for kind in (StorageKind.LOCAL, StorageKind.S3)]
  assert threads[0] < threads[1] and all(t >= s for t, s in zip(threads, streams, strict=True))


def test_timeouts_grow_with_the_state_and_never_get_short():
  assert value(ckpt.make_plan(big(), disk(), HOST), "timeouts.save") == ckpt.Config().timeouts.save_s
  plan = ckpt.make_plan(big(1000 * GB), disk(write=1e8, read=1e8), HOST)
  assert value(plan, "timeouts.save") >= 20 * plan.commit_s and value(plan, "timeouts.restore") >= 20 * plan.restore_s


# -- predictions


def test_storage_of_half_the_speed_and_twice_the_bytes_cost_twice_the_time():
  slow = disk(50e6, 50e6)
  plan = ckpt.make_plan(big(), slow, HOST)
  assert plan.commit_s == pytest.approx(200, rel=0.1) and plan.restore_s == pytest.approx(200, rel=0.1)
  assert ckpt.make_plan(big(20 * GB, 800), slow, HOST).commit_s == pytest.approx(2 * plan.commit_s, rel=0.1)


def test_many_hosts_each_write_their_share_and_direct_reads_cost_every_copy():
  shared = dataclasses.replace(disk(1e8, 1e8), kind=StorageKind.NFS)
  one = ckpt.make_plan(big(), shared, HOST)
  many = ckpt.make_plan(big(read_nbytes=160 * GB), shared, MANY_HOSTS)
  assert many.commit_s < one.commit_s / 8
  assert many.restore_s > 0.8 * one.restore_s


def test_slower_interpreter_pays_more_for_leaves():
  slow = dataclasses.replace(HOST, task_s=10 * HOST.task_s)
  assert ckpt.make_plan(SMALL_LEAVES, disk(), slow).commit_s > 3 * ckpt.make_plan(SMALL_LEAVES, disk(), HOST).commit_s


@given(
  nbytes=st.integers(1, 10**14),
  leaves=st.integers(1, 10**5),
  kind=st.sampled_from(list(StorageKind)),
  processes=st.integers(1, 4096),
  memory=st.integers(10**8, 10**13),
)
@settings(deadline=None)
def test_any_profile_gets_a_valid_config_and_finite_predictions(nbytes, leaves, kind, processes, memory):
  host = dataclasses.replace(HOST, processes=processes, memory_nbytes=memory)
  plan = ckpt.make_plan(big(max(nbytes, leaves), leaves), kind, host)
  assert ckpt.Config(**plan.config.to_dict()) == plan.config
  for name in ("blocking_s", "commit_s", "restore_s", "nbytes", "files", "requests", "peak_host_bytes"):
    assert 0 < getattr(plan, name) < float("inf")
  assert plan.blocking_s < plan.commit_s


# -- the user


def test_what_the_user_set_wins_and_is_marked_as_such():
  mine = {
    "layout": {"compression": "on", "chunk_size": "32MiB"},
    "limits": {"save_concurrency": "5GB", "file_io_concurrency": 7},
    "timeouts": {"save": "2h"},
  }
  plan = ckpt.make_plan(big(), disk(), HOST, mine)
  config = plan.apply(ckpt.Config(**mine))
  assert config.layout.compression == "on" and config.layout.chunk_size == 32 << 20
  assert config.limits.save_concurrency == 5 * GB and config.limits.file_io_concurrency == 7
  assert config.timeouts.save == 7200 and config.limits.restore_concurrency != "auto"
  assert plan.explain().count("set by you") == 5
  # Also where the plan was made without knowing.
  unaware = ckpt.make_plan(big(), disk(), HOST)
  assert unaware.apply(ckpt.Config(layout={"compression": "on"})).layout.compression == "on"


def test_explanation_has_a_line_for_each_choice_with_value_figures_and_orbax_default():
  plan = ckpt.make_plan(SMALL_LEAVES, disk(), HOST)
  lines = plan.explain().splitlines()
  for choice in plan.choices:
    line = next(x for x in lines if x.startswith(f"{choice.key}: "))
    assert choice.text in line and ". Orbax: " in line and choice.reason in line
  assert "assumed" not in plan.explain() and "assumed" in ckpt.make_plan(SMALL_LEAVES, "gcs", HOST).explain()


def test_plan_is_the_same_after_json():
  plan = ckpt.make_plan(SMALL_LEAVES, disk(), HOST)
  assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
  with pytest.raises(dataclasses.FrozenInstanceError):
    plan.commit_s = 1


# -- page cache


def cached(write=1e9, write_behind=1.5e9):
  return dataclasses.replace(disk(), page_cache=PageCache(write, write_behind, 2e9, 2e9))


@pytest.mark.parametrize(
  ("state", "storage", "expected", "reason"),
  [
    (big(), disk(), "direct", "10 GB of page cache"),
    (big(), disk(), "direct", "not measured"),
    (big(), disk(), "direct", "reads it from the disk in 5 s"),
    (big(), cached(), "direct", "1.5 GB/s past it, 1 GB/s through it"),
    (big(), cached(write_behind=0.8e9), "buffered", "slower here"),
    (big(200_000_000), disk(), "buffered", "200 MB take little memory"),
    (big(), "tmpfs", "buffered", "memory"),
    (big(), "network_disk", "buffered", "from the disk"),
    (big(), "nfs", "buffered", "servers"),
    (big(), "s3", "buffered", "not in the page cache"),
    (big(), "bucket_mount", "buffered", "not in the page cache"),
  ],
)
def test_large_steps_go_past_the_page_cache_of_a_disk_that_is_no_slower_for_it(state, storage, expected, reason):
  plan = ckpt.make_plan(state, storage, HOST)
  (choice,) = [c for c in plan.choices if c.key == "limits.file_io"]
  assert choice.value == expected and reason in choice.reason
  asked = ckpt.make_plan(state, storage, HOST, {"limits": {"file_io": "direct"}})
  assert value(asked, "limits.file_io") == "direct"


# -- profiles


def test_state_profile_counts_shards_copies_and_small_leaves():
  mesh = Mesh(np.array(jax.devices()), ("d",))
  put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))  # noqa: E731
  state = {
    "sharded": put(jnp.ones((512, 1024)), "d"),
    "replicated": put(jnp.ones((512, 1024))),
    "small": jnp.ones((10,), jnp.bfloat16),
    "key": jax.random.key(0),
    "n": 3,
  }
  p = profile_state(state)
  assert (p.leaves, p.shards, p.nbytes) == (4, 5, 2 * 2097152 + 20 + 8)
  assert p.local_nbytes == p.read_nbytes == p.nbytes and p.copies == pytest.approx(1.5, rel=1e-3)
  assert p.largest_shard_nbytes == p.largest_leaf_nbytes == 2097152 and p.small_leaves == 2
  abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state["sharded"])
  assert profile_state(abstract).shards == 2 and not profile_state(abstract).kinds


def ratios(state, codec="zstd"):
  return {kind.name: kind.codecs[codec].ratio for kind in profile_state(state).kinds}


def test_sampled_ratio_is_that_of_the_whole_state():
  rng = np.random.default_rng(0)
  noise = rng.standard_normal((16, 2**18), dtype=np.float32)
  halves = {str(i): jnp.asarray(x if i % 2 else np.zeros_like(x)) for i, x in enumerate(noise)}
  assert ratios(halves)["float32"] == pytest.approx(0.46, abs=0.05)
  assert ratios({"w": noise})["float32"] == pytest.approx(0.92, abs=0.02)
  assert ratios({"w": noise}, "shuffled")["float32"] == pytest.approx(0.84, abs=0.02)
  started = time.process_time()
  (kind,) = profile_state({"w": np.zeros((2**28,), np.uint8)}).kinds
  assert kind.codecs["zstd"].sampled_nbytes <= 8 << 20 and "shuffled" not in kind.codecs
  assert time.process_time() - started < 1


@pytest.mark.parametrize("rows", [1, 24, 37, 100, 500])
def test_pieces_of_unequal_size_do_not_flatter_the_ratio(rows):
  rng = np.random.default_rng(0)
  mesh = Mesh(np.array(jax.devices()), ("d",))
  split = NamedSharding(mesh, PartitionSpec("d"))
  state = {f"w{i}": rng.standard_normal((2 * rows, 768), dtype=np.float32) for i in range(20)}
  state["embedding"] = rng.standard_normal((4096, 768), dtype=np.float32)
  placed = jax.tree.map(lambda x: jax.device_put(x, split), state)
  for s in (state, placed):
    assert [*ratios(s).values()] == pytest.approx([0.925] * len(ratios(s)), abs=0.01)


def test_host_is_measured_once_and_remembered(monkeypatch, tmp_path):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  first = profile_host()
  assert (
    first.copy_bytes_per_s > 1e8
    and 1e-7 < first.task_s < 1e-3
    and 0.8 < first.codecs["shuffled"].ratio < first.codecs["zstd"].ratio <= 1
  )
  monkeypatch.setattr("ckpt_jax.tuning.profile._measure_host", lambda: pytest.fail("measured again"))
  assert profile_host() == first


# -- the Checkpointer's own plan


@pytest.fixture
def fresh_cache(monkeypatch, tmp_path):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def noise_state(nbytes=48 << 20):
  rng = np.random.default_rng(0)
  return {f"w{i}": jnp.asarray(rng.standard_normal(nbytes // 16 // 4, dtype=np.float32)) for i in range(16)}


def test_checkpointer_without_config_measures_quickly_plans_and_says_so_once(
  fresh_cache, tmp_path, caplog, assert_same
):
  state = noise_state()
  with caplog.at_level(logging.INFO, logger="ckpt_jax.tuning"), ckpt.Checkpointer(tmp_path / "run") as c:
    assert not c.plan and "not made yet" in repr(c.plan) and "layout.compression" in c.plan.explain()
    c.save(0, state)
    c.wait()
    plan = c.plan
    assert plan.storage.seconds  # measured, not assumed
    chosen = plan.values["layout.compression"]
    assert chosen in ("off", "shuffled")  # by the speed of this disk now
    c.save(1, state)
    assert c.plan.values == plan.values
    assert_same(c.restore(like=state).state, state)
    assert our_metadata(c.directory / "1")["config"]["layout"]["compression"] == chosen  # not auto
  logged = [r for r in caplog.records if "plan for" in r.message]
  assert len(logged) == 1 and f"compression {chosen}" in logged[0].message
  assert known_profile(tmp_path / "run").seconds > 0  # the next Checkpointer need not measure
  assert [p.name for p in (tmp_path / "run").iterdir() if "probe" in p.name] == []


def test_small_state_is_planned_without_measuring_storage(fresh_cache, tmp_path):
  with ckpt.Checkpointer(tmp_path / "run") as c:
    c.save(0, {"w": jnp.ones(1000)})
    assert "assumed" in c.plan.explain() and c.plan.values["layout.compression"] == "off"


def test_save_goes_on_without_a_plan_where_none_can_be_made(fresh_cache, tmp_path, caplog, monkeypatch, assert_same):
  def fails():
    raise OSError("no clock")

  monkeypatch.setattr("ckpt_jax.tuning.planner.profile_host", fails)
  state = {"w": jnp.ones(1000)}
  with ckpt.Checkpointer(tmp_path / "run") as c:
    c.save(0, state)
    assert not c.plan and "plan: could not be made (OSError: no clock)" in c.plan.explain()
    assert_same(c.restore(like=state).state, state)
  assert "no plan could be made (OSError: no clock)" in caplog.text


def test_moments_that_were_zeros_at_first_are_sampled_again(fresh_cache, tmp_path):
  state = noise_state()
  zeros = jax.tree.map(jnp.zeros_like, state)
  mine = {"layout": {"compression": "auto"}}
  with ckpt.Checkpointer(tmp_path / "run", mine) as c:
    c.save(0, zeros)
    first = max(kind.codecs["zstd"].ratio for kind in c.plan.state.kinds)
    donated = jax.tree.map(jnp.copy, state)
    c.save(1, donated)  # samples, and leaves the work to a thread
    jax.tree.map(lambda x: x.delete(), donated)
    assert max(kind.codecs["zstd"].ratio for kind in c.plan.state.kinds) == first
    c.save(2, state)
    assert first < 0.1 and min(kind.codecs["zstd"].ratio for kind in c.plan.state.kinds) > 0.8


def test_users_values_win_in_the_checkpointer(fresh_cache, tmp_path):
  zeros = jax.tree.map(jnp.zeros_like, noise_state())
  with ckpt.Checkpointer(tmp_path / "run", {"layout": {"compression": "off"}}) as c:
    c.save(0, zeros)
    c.wait()
    assert c.plan.values["layout.compression"] == "off"
  stored = sum(f.stat().st_size for f in (tmp_path / "run").rglob("*") if f.is_file())
  assert stored > 48 << 20


@pytest.mark.multiprocess
def test_all_processes_have_the_plan_of_the_first(fresh_cache, tmp_path):
  results = together("plans.py", tmp_path / "run", processes=2)
  plans = [json.loads(re.search(r"PLAN(\{.*\})", r.log)[1]) for r in results]
  assert {p.pop("process") for p in plans} == {0, 1} and plans[0] == plans[1]
  assert plans[0]["values"]["layout.replica_parallel"] == "on" and plans[0]["state"] == 12 << 22
  assert known_profile(tmp_path / "run").seconds > 0


# -- accelerators

LINK = Link(to_pinned=50e9, to_pageable=2e9, from_pageable=25e9, first_pinned=2e9, put_s=36e-6)
ON_GPU = dataclasses.replace(big(), accelerator_nbytes=10 * GB, accelerator_shards=400)
GPU_HOST = dataclasses.replace(HOST, link=LINK)


def test_a_save_from_accelerators_blocks_for_the_dispatch_and_the_plan_says_what_the_snapshot_costs():
  there, here = ckpt.make_plan(ON_GPU, disk(), GPU_HOST), ckpt.make_plan(big(), disk(), HOST)
  assert there.snapshot_s == pytest.approx(0.2) and there.pinned_bytes == 10 * GB
  assert there.blocking_s - here.blocking_s == pytest.approx(400 * 36e-6)
  assert there.commit_s - here.commit_s == pytest.approx(0.2)
  assert "snapshot: into 10 GB of pinned host memory in 200 ms at 50 GB/s" in there.explain()
  assert "; 5 s the first time, which pins the memory" in there.explain()
  assert (here.snapshot_s, here.pinned_bytes) == (0, 0) and "snapshot" not in here.explain()
  orbax = float(re.search(r"plain Orbax with its defaults: blocks ([0-9.]+) s", there.explain())[1])
  assert orbax > 5, "which waits for ordinary memory"
  assert Plan.from_dict(json.loads(json.dumps(there.to_dict()))) == there


def test_a_slow_link_bounds_a_restore_and_ordinary_memory_is_taken_where_it_is_faster():
  slow = dataclasses.replace(LINK, from_pageable=1e9, to_pinned=1e9)
  plan = ckpt.make_plan(ON_GPU, disk(read=4e9), dataclasses.replace(HOST, link=slow))
  assert plan.restore_s == pytest.approx(10) and plan.pinned_bytes == 0
  assert "snapshot: into ordinary host memory in 5 s at 2 GB/s" in plan.explain()


@pytest.mark.parametrize("limit, waits", [(64, False), (8, True)])
def test_the_plan_names_the_limit_of_pinned_memory(limit, waits):
  text = ckpt.make_plan(ON_GPU, disk(), dataclasses.replace(GPU_HOST, pinned_limit=limit * GB)).explain()
  assert f"XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB allows {limit} GB" in text and ("training waits" in text) == waits


def test_an_unmeasured_link_is_assumed_and_replicas_divide_the_snapshot():
  assert "snapshot: 2 s, assumed" in ckpt.make_plan(ON_GPU, disk(), HOST).explain()
  two = dataclasses.replace(ON_GPU, read_nbytes=20 * GB)
  assert ckpt.make_plan(two, disk(), GPU_HOST).pinned_bytes == 5 * GB


def test_profiles_know_what_belongs_to_accelerators_and_sampling_leaves_no_copy_in_the_state(monkeypatch):
  mesh = jax.make_mesh((2,), ("a",))
  pinned = NamedSharding(mesh, PartitionSpec("a"), memory_kind="pinned_host")
  state = {
    "w": jax.device_put(np.zeros((64, 1024), np.float32), NamedSharding(mesh, PartitionSpec("a"))),
    "m": jax.device_put(np.zeros((64, 1024), np.float32), pinned),
    "host": np.zeros(10, np.float32),
  }
  on_host = profile_state(state)
  assert on_host.accelerator_nbytes == 0 and profile_host().link is None
  monkeypatch.setattr(staging, "as_accelerators", True)
  profile = profile_state(state)
  assert profile.accelerator_nbytes == 2 * 64 * 1024 * 4 and profile.accelerator_shards == 4
  assert [k.codecs["zstd"].ratio for k in profile.kinds] == [k.codecs["zstd"].ratio for k in on_host.kinds]
  assert all(x._npy_value is None for x in (state["w"], state["m"]))
  assert profile_host().link.to_pageable > 0
