"""Restores by many processes: bit for bit under every strategy, each byte read once, and nobody waits in silence."""

import pathlib
import re
import signal

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jobs import together

from ckpt_jax.multihost import launch, who_wrote
from ckpt_jax.restore import choice as choosing
from ckpt_jax.restore import fetch
from ckpt_jax.restore.leaf import LeafPlan
from ckpt_jax.restore.meshes import spread_spec
from ckpt_jax.restore.strategies import STRATEGIES, Replica, Route, Spread, Strategy, Totals, Whole, plan_routes, totals

PROGRAMS = pathlib.Path(__file__).parents[1] / "programs"
multiprocess = pytest.mark.multiprocess


@multiprocess
def test_random_states_come_back_bit_for_bit_on_any_number_of_processes(tmp_path):
  together("reshard.py", tmp_path, "save", 0, 3, processes=2)
  together("reshard.py", tmp_path, "save", 3, 2, processes=4)
  together("reshard.py", tmp_path, "save", 5, 1, processes=1)
  for processes in (4, 2, 1):
    together("reshard.py", tmp_path, "direct,gather,broadcast", 0, 6, processes=processes)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  run = tmp_path_factory.mktemp("restores")
  together("restores.py", run, "save", processes=4)
  return run


@multiprocess
def test_gather_and_broadcast_read_each_byte_once(saved):
  results = together("restores.py", saved, "count", processes=4)
  nbytes = 6 * 256 * 4096 * 4 + 20 * 40 * 4
  read = {}
  for result in results:
    for strategy, count in re.findall(r"read (\w+) (\d+)", result.log):
      read.setdefault(strategy, []).append(int(count))
  assert sum(read["direct"]) > 3.9 * nbytes
  assert sum(read["gather"]) < 1.05 * nbytes + 4 * 60_000, read  # and the metadata, by each
  assert sum(read["broadcast"]) < 1.05 * nbytes + 4 * 60_000, read
  assert max(read["gather"]) < 0.3 * nbytes
  assert max(read["broadcast"]) > 0.9 * nbytes


@multiprocess
def test_resharding_reads_only_the_bytes_needed(tmp_path):
  nbytes = 4 * 512 * 2048 * 4
  for processes in (4, 2):  # saved by four, in four chunks an array
    read = {}
    for result in together("restores.py", tmp_path / "run", "reshard", processes=processes):
      for what, count in re.findall(r"read (\w+) (\d+)", result.log):
        read.setdefault(what, []).append(int(count))
    assert max(read["rows"]) < 1.05 * nbytes / processes + 60_000, read
    # Each process wants a part of every chunk: gathered, each chunk is read once all the same.
    assert sum(read["columns"]) < 1.05 * nbytes + processes * 60_000, read


@multiprocess
def test_collectives_move_unsigned_words_only(tmp_path):
  together("restores.py", tmp_path, "words", processes=2)


@multiprocess
def test_process_that_does_not_come_is_named(saved):
  together("restores.py", saved, "absent", processes=4)


@multiprocess
def test_process_whose_storage_hangs_is_named(saved):
  together("restores.py", saved, "slow_reader", processes=2)


@multiprocess
def test_exchange_that_hangs_ends_with_an_error(saved):
  results = launch([str(PROGRAMS / "restores.py"), str(saved), "stuck_exchange"], processes=2, timeout=300)
  # Whichever leaves first takes the other with it, as jax's coordination service does: by an abort.
  assert {r.returncode for r in results} <= {1, -signal.SIGABRT}, results
  assert all("raised" in r.log and "the exchange of part" in r.log for r in results), results


@multiprocess
def test_problem_on_one_process_is_the_same_error_on_all(saved):
  results = together("restores.py", saved, "unreadable", processes=2)
  raised = [re.findall(r"raised .*", r.log) for r in results]
  assert raised[0] == raised[1] and len(raised[0]) == 5


@multiprocess
def test_no_process_reads_anothers_shards_on_save_and_shares_are_equal(tmp_path):
  results = together("train.py", tmp_path / "run", "reads", processes=4)
  report = who_wrote(tmp_path / "run", 0)
  shares = [p.nbytes for p in report.processes]
  assert len(shares) == 4 and max(shares) < 1.1 * min(shares) and not report.overlaps, report.table()
  for result in results:
    assert int(re.search(r"read (\d+)", result.log)[1]) < 0.25 * min(shares), result.log


# -- decisions


class Device:
  """Enough of a jax device to make a mesh of many hosts."""

  platform = device_kind = "cpu"

  def __init__(self, id, process_index):
    self.id, self.process_index = id, process_index
    self.client = jax.devices()[0].client

  def __repr__(self):
    return f"d{self.id}"


def mesh(*shape, names=("data", "fsdp", "tensor"), per_process=1):
  n = int(np.prod(shape))
  return Mesh(np.array([Device(i, i // per_process) for i in range(n)]).reshape(shape), names[: len(shape)])


def leaf(shape, sharding, chunk=None, dtype="float32", name="w"):
  return LeafPlan(name, shape, np.dtype(dtype), chunk, None, None, None, None, sharding)


def test_spread_refines_the_target_where_chunks_allow():
  m = mesh(4, 2)
  assert spread_spec((64, 64), (8, 64), m, P("fsdp", None)) == P(("fsdp", "data"), None)
  assert spread_spec((64, 64), (16, 32), m, P("fsdp", None)) is not None
  assert spread_spec((64, 64), (16, 32), m, P(None, "fsdp")) == P("data", "fsdp")
  assert spread_spec((7, 64), (7, 8), m, P()) == P(None, ("data", "fsdp"))


def test_array_that_no_axis_divides_by_whole_chunks_is_read_by_one():
  m = mesh(4, 2)
  assert spread_spec((7, 9), (7, 9), m, P()) is None
  assert spread_spec((64, 64), (64, 64), m, P("fsdp")) is None
  big = leaf((1024, 1024), NamedSharding(m, P("fsdp")), (1024, 1024))
  (route,) = plan_routes([big], "gather", processes=8)
  assert isinstance(route, Whole) and route.read_nbytes == big.nbytes
  assert plan_routes([big], "direct", processes=8)[0].read_nbytes == 8 * big.nbytes


def test_whole_arrays_are_shared_out_evenly():
  m = mesh(4)
  leaves = [leaf((1001, 1003), NamedSharding(m, P()), (1001, 1003), name=f"w{i}") for i in range(8)]
  routes = plan_routes(leaves, "gather", processes=4)
  assert sorted(r.owner for r in routes) == [0, 0, 1, 1, 2, 2, 3, 3]
  assert totals(routes).read_nbytes == sum(x.nbytes for x in leaves)


def test_devices_of_one_process_need_not_divide_what_it_reads_once():
  m = mesh(4, 2, per_process=2)
  assert spread_spec((64, 64), (16, 64), m, P()) == P("data", None)


def test_sharded_array_without_replicas_goes_direct():
  m = mesh(8)
  x = leaf((1024, 1024), NamedSharding(m, P("data")), (128, 1024))
  for strategy in ("gather", "broadcast"):
    assert plan_routes([x], strategy, processes=8)[0].moves is False


def test_tiny_arrays_are_read_by_all_while_that_costs_little():
  m = mesh(4)
  big = leaf((4096, 1024), NamedSharding(m, P()), (1024, 1024))
  tiny = [leaf((10,), NamedSharding(m, P()), (10,), name=f"b{i}") for i in range(20)]
  routes = plan_routes([big, *tiny], "gather", processes=4)
  assert [type(r) for r in routes] == [Spread] + [Route] * 20
  routes = plan_routes(tiny, "gather", processes=4)  # nothing else there to hide behind
  assert {type(r) for r in routes} == {Whole}
  assert totals(routes).read_nbytes < 1.05 * sum(x.nbytes for x in tiny)


def test_broadcast_reads_on_the_first_replica_only():
  m = mesh(4, 2)
  x = leaf((1024, 1024), NamedSharding(m, P("fsdp")), (512, 1024))
  (route,) = plan_routes([x], "broadcast", processes=8)
  assert isinstance(route, Replica) and route.read_nbytes == x.nbytes and route.most_nbytes == x.nbytes / 2


def test_new_strategy_needs_only_a_route(monkeypatch):
  class OneReader(Strategy):
    def route(self, plan, sharding, loads):
      return Whole(plan=plan, owner=0, read_nbytes=plan.nbytes, most_nbytes=plan.nbytes)

  monkeypatch.setitem(STRATEGIES, "one reader", OneReader())
  shared, divided = (leaf((1024, 1024), NamedSharding(mesh(4), spec), (256, 1024)) for spec in (P(), P("data")))
  routes = plan_routes([shared, divided], "one reader", processes=4)
  assert [type(r) for r in routes] == [Whole, Route]
  assert totals(routes).read_nbytes == shared.nbytes + divided.nbytes


def test_parts_stay_below_the_bound_and_hold_every_leaf_once():
  m = mesh(4)
  leaves = [leaf((1024, 256 * (1 + i % 3)), NamedSharding(m, P()), (256, 256), name=f"w{i}") for i in range(40)]
  routes = plan_routes([*leaves, leaf((8,), None, name="host")], "gather", processes=4)
  for bound in (1, 4 * 2**20, 2**40):
    parts = fetch.divide(routes, bound)
    for part in parts[:-1]:
      assert sum(r.plan.nbytes for r in part) <= max(bound, 3 * 2**20)
    assert sorted(r.plan.name for part in parts for r in part) == sorted(r.plan.name for r in routes)
    assert not fetch.moves(parts[-1])


COPIES = {
  "direct": Totals(400e6, 100e6, 0),
  "gather": Totals(100e6, 25e6, 75e6),
  "broadcast": Totals(100e6, 100e6, 200e6),
}
NO_COMPILE = dict.fromkeys(COPIES, 0.0)


def speeds(storage, scales=False, one_host=False, network=1e9):
  return choosing.Speeds(storage, scales, one_host, network, "test")


def test_auto_gathers_from_slow_shared_storage_and_says_why():
  choice = choosing.choose(COPIES, 100e6, speeds(50e6), NO_COMPILE)
  assert choice.strategy == "gather"
  assert choice.predicted["direct"] == pytest.approx(8.0) and choice.predicted["gather"] < 2.2
  assert "4.00 copies" in choice.why and "50 MB/s in all" in choice.why


def test_auto_reads_direct_where_nothing_is_to_be_gained():
  assert choosing.choose(COPIES, 100e6, speeds(2e9, one_host=True), NO_COMPILE).strategy == "direct"
  assert choosing.choose(COPIES, 100e6, speeds(50e6, network=5e6), NO_COMPILE).strategy == "direct"
  one = {**COPIES, "direct": Totals(100e6, 25e6, 0)}
  assert "read once anyway" in choosing.choose(one, 100e6, speeds(50e6), NO_COMPILE).why


def test_auto_counts_what_is_still_to_be_compiled():
  slow = {"direct": 0.0, "gather": 30.0, "broadcast": 30.0}
  assert choosing.choose(COPIES, 100e6, speeds(50e6), slow).strategy == "direct"


def test_what_several_readers_saw_tells_whether_storage_grows_with_them():
  from ckpt_jax.tuning.assumed import assumed_profile

  bucket = assumed_profile(choosing.StorageKind.GCS)
  one = bucket.read_bytes_per_s
  assert choosing.speeds(bucket, None).scales
  fixed = choosing.speeds(bucket, None, choosing.Readers(4, one))
  assert not fixed.scales and fixed.storage == one and "4 readers" in fixed.source
  assert choosing.speeds(bucket, None, choosing.Readers(4, 3.5 * one)).scales


def test_what_a_restore_saw_is_kept_unless_it_tells_nothing(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  choosing.see_readers(str(tmp_path), 4, 1e6, 10.0)
  choosing.see_readers(str(tmp_path), 4, 1e9, 0.1)
  assert choosing.seen_readers(str(tmp_path)) is None
  choosing.see_readers(str(tmp_path), 4, 1e9, 10.0)
  assert choosing.seen_readers(str(tmp_path)) == choosing.Readers(4, 1e8)


def test_storage_that_grows_with_its_readers_is_predicted_so():
  choice = choosing.choose(COPIES, 100e6, speeds(50e6, scales=True), NO_COMPILE)
  assert choice.predicted["direct"] == pytest.approx(2.0) and choice.predicted["gather"] < 0.7
