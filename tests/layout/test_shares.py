"""The write plan: every process its even share, every byte written once, in whole chunks, the same on all processes."""

import itertools
import math

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jobs import together

import ckpt_jax as ckpt
from ckpt_jax import multihost
from ckpt_jax.layout.sharding import box_of, intersection, shape_of
from ckpt_jax.layout.shares import WHOLE, Limits, held, nbytes_by_process, share_out

SIZES = st.one_of(st.sampled_from([1, 2, 3, 5, 7]), st.integers(1, 50), st.integers(50, 600))


def on(axes, spec, shape, devices_per_process=1, itemsize=4):
  mesh = AbstractMesh(tuple(axes.values()), tuple(axes))
  processes = tuple(i // devices_per_process for i in range(math.prod(axes.values())))
  return held(shape, itemsize, NamedSharding(mesh, P(*spec)), processes)


@st.composite
def states(draw):
  """Arrays on a mesh of 2 to 16 replicas, some of them sharded, and how many devices a process has."""
  axes = {"data": draw(st.integers(2, 16)), "model": draw(st.sampled_from([1, 2, 4]))}
  devices = draw(st.sampled_from([1, axes["model"]]))
  arrays = []
  for shape in draw(st.lists(st.lists(SIZES, max_size=4), min_size=1, max_size=12)):
    while math.prod(shape) > 10**7:
      shape = shape[1:]
    spec = [None] * len(shape)
    if shape and draw(st.booleans()):
      axis = draw(st.integers(0, len(shape) - 1))
      shape[axis] *= axes["model"]
      spec[axis] = "model"
    arrays.append(on(axes, spec, tuple(shape), devices, draw(st.sampled_from([1, 2, 4]))))
  return arrays


def is_aligned(box, chunks, shape):
  return all(a % c == 0 and (b % c == 0 or b == n) for (a, b), c, n in zip(box, chunks, shape, strict=True))


@given(states(), st.booleans())
@settings(max_examples=200, deadline=None)
def test_parts_cover_each_array_once_in_whole_chunks_that_their_process_holds(arrays, divide):
  for array, share in zip(arrays, share_out(arrays, Limits(divide=divide)), strict=True):
    boxes = [box for _, box in share.parts]
    assert sum(math.prod(shape_of(box)) for box in boxes) == math.prod(array.shape)
    assert array.shape == () or not any(intersection(a, b) for a, b in itertools.combinations(boxes, 2))
    assert all(is_aligned(box, share.chunks, array.shape) for box in boxes)
    for process, box in share.parts:
      (holders,) = [some for shard, some in array.shards if intersection(box, shard) == box]
      assert process in holders


@given(states())
@settings(max_examples=300, deadline=None)
def test_the_most_that_a_process_writes_is_hardly_more_than_the_mean(arrays):
  nbytes = list(nbytes_by_process(arrays, share_out(arrays)).values())
  assert max(nbytes) <= 1.05 * sum(nbytes) / len(nbytes) + 4096


@pytest.mark.parametrize("replicas", range(2, 17))
def test_replicas_that_divide_no_axis_write_even_shares_in_few_chunks(replicas):
  array = on({"data": replicas}, [None, None], (1024, 512))
  (share,) = share_out([array])
  written = nbytes_by_process([array], [share])
  assert max(written.values()) <= 1.05 * array.nbytes / replicas
  chunks = math.prod(-(-n // c) for n, c in zip(array.shape, share.chunks, strict=True))
  assert len(share.parts) == replicas and chunks <= 16, "of 128 KiB"


def test_small_arrays_are_dealt_out_whole_and_what_is_written_besides_counts():
  arrays = [on({"data": 4}, [None], (500,)) for _ in range(1000)]
  shares = share_out(arrays)
  assert all(len(share.parts) == 1 for share in shares)
  assert set(nbytes_by_process(arrays, shares).values()) == {500_000}
  assert nbytes_by_process(arrays, share_out(arrays, WHOLE, {0: 10**9}))[0] == 0


def test_704_processes_of_8_devices_are_planned_without_having_them():
  axes = {"data": 11, "fsdp": 512}
  arrays = [on(axes, ["fsdp"], s, 8, 2) for s in [(4096, 11008), (11264, 4096), (50176, 1024)] for _ in range(4)]
  arrays += [on(axes, [None], (4096,), 8, 2)] * 8
  nbytes = nbytes_by_process(arrays, share_out(arrays))
  assert len(nbytes) == 704 and sum(nbytes.values()) == sum(array.nbytes for array in arrays)
  assert max(nbytes.values()) <= 1.05 * sum(nbytes.values()) / 704


@pytest.mark.parametrize("spec", [P(), P("x"), P(None, "x"), P(None, ("x", "y"))])
def test_an_abstract_mesh_is_planned_as_the_mesh_of_the_devices(spec):
  mesh = jax.make_mesh((2, 1), ("x", "y"))
  real = NamedSharding(mesh, spec)
  abstract = held((4, 6), 4, NamedSharding(AbstractMesh((2, 1), ("x", "y")), spec), (0, 0))
  assert abstract.shards == held((4, 6), 4, real).shards
  boxes = {box_of(index, (4, 6)) for index in real.devices_indices_map((4, 6)).values()}
  assert {box for box, _ in abstract.shards} == boxes


def test_a_sharding_that_does_not_divide_an_array_is_refused():
  with pytest.raises(ValueError, match="axis 0"):
    on({"data": 3}, ["data"], (10,))


@pytest.mark.multiprocess
def test_who_shows_even_shares_for_any_number_of_processes(tmp_path, assert_same):
  together("shares.py", tmp_path, processes=7, devices=1)
  for n in (3, 5, 6, 7):
    report = multihost.who_wrote(tmp_path / str(n), 0)
    written = [p.nbytes for p in report.processes if p.nbytes > 10_000]
    assert report.overlaps == {} and len(written) == n
    assert max(written) <= 1.05 * sum(written) / n, report.table()
    with ckpt.Checkpointer(tmp_path / str(n)) as c:
      ours = c.restore(only="w").state
    args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), ours)
    with ocp.CheckpointManager(tmp_path / str(n)) as plain:
      theirs = plain.restore(0, args=ocp.args.PyTreeRestore(ours, restore_args=args, partial_restore=True))
    assert_same(theirs, ours)
    assert ckpt.verify(tmp_path / str(n)) == []
