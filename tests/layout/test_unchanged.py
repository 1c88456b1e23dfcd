"""Leaves that do not change are not written again, and nobody can tell from a step."""

import errno
import json
import logging
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from commands import cli
from etils import epath
from hypothesis import strategies as st
from jobs import together

import ckpt_jax as ckpt
from ckpt_jax.integrity import sums
from ckpt_jax.layout import homes, lookback, staging, unchanged
from ckpt_jax.multihost import who_wrote
from ckpt_jax.rewrite.pruning import plan_pruning
from ckpt_jax.rewrite.repack import repack_step
from ckpt_jax.rewrite.thin import thin_step
from ckpt_jax.run.journal import read_records
from ckpt_jax.save import admission, host_memory
from ckpt_jax.storage.traffic import traffic

PROGRAMS = pathlib.Path(__file__).parents[1] / "programs"


@pytest.fixture(autouse=True)
def small_homes(monkeypatch):
  monkeypatch.setattr(unchanged, "_LEAST_NBYTES", 0)
  monkeypatch.setattr(unchanged, "_LEAST_NBYTES_IN_BUCKETS", 0)
  monkeypatch.setattr(unchanged, "_LEAST_SHARE", 0.0)


def frozen(count=8, seed=0):
  rng = np.random.default_rng(seed)
  return {f"f{i}": jnp.asarray(rng.standard_normal((64, 256), dtype=np.float32)) for i in range(count)}


def again(tree):
  """The same values in other arrays, as a step of training leaves them that donates its state."""
  return jax.tree.map(lambda x: jnp.array(x, copy=True), tree)


def files(run, step):
  """The files of a step: inode, bytes."""
  found = [os.lstat(os.path.join(top, n)) for top, _, names in os.walk(f"{run}/{step}") for n in names]
  return {info.st_ino: info.st_size for info in found}


def written(run, step, before):
  """Bytes of the files that a step does not share with those before."""
  known = set().union(*(files(run, other) for other in before))
  return sum(nbytes for inode, nbytes in files(run, step).items() if inode not in known)


def restored_by_orbax(run, step):
  with ocp.CheckpointManager(run) as manager:
    return manager.restore(step, args=ocp.args.PyTreeRestore())


def bits(tree):
  return jax.tree.map(lambda x: (str(x.dtype), x.shape, np.asarray(x).tobytes()), tree)


def refused(*args):
  """In place of what links files: storage that does not, this time."""
  raise OSError(errno.EIO, "refused")


def save(run, states, config=None):
  with ckpt.Checkpointer(run, config) as c:
    for step, state in enumerate(states):
      c.save(step, state)
      c.wait()


# -- what is written


@pytest.mark.parametrize("donating", [False, True])
def test_of_a_state_of_which_a_hundredth_moves_no_more_is_written(tmp_path, donating):
  fixed = frozen(24)
  states = [
    {"frozen": again(fixed) if donating else fixed, "lora": jnp.full((64, 256), i, jnp.float32) / 4} for i in range(6)
  ]
  save(tmp_path, states)
  assert all(written(tmp_path, i, range(i)) > 24 * 2**16 for i in range(3 if donating else 2))
  for i in range(4, 6):
    assert written(tmp_path, i, range(i)) < 2**16 + 32_000  # of 1.6 MB; the rest is metadata
  assert ckpt.verify(tmp_path) == []


def test_each_step_is_whole_once_all_others_are_deleted(tmp_path):
  fixed = frozen()
  states = [{"frozen": fixed, "w": jnp.full(10, i)} for i in range(5)]
  save(tmp_path / "run", states)
  for step in range(5):
    alone = tmp_path / f"alone{step}"
    shutil.copytree(tmp_path / "run", alone, copy_function=os.link)
    for other in set(range(5)) - {step}:
      shutil.rmtree(alone / str(other))
    assert bits(restored_by_orbax(alone, step)) == bits(states[step])
    assert ckpt.verify(alone) == []


_DTYPES = [jnp.float32, jnp.bfloat16, jnp.int8, jnp.float16, jnp.complex64, jnp.uint32, jnp.bool_]


@st.composite
def _histories(draw):
  """Leaves, and for each save which of them change, which are other arrays of the same bits."""
  leaves = draw(
    st.lists(
      st.tuples(st.sampled_from(_DTYPES), st.lists(st.integers(1, 9), max_size=3).map(tuple), st.booleans()),
      min_size=1,
      max_size=6,
    )
  )
  saves = draw(st.lists(st.lists(st.sampled_from("=cn"), min_size=len(leaves), max_size=len(leaves)), max_size=6))
  return leaves, saves


def _flipped(array, rng):
  """The same array but for one bit, which may be the sign of a zero or the payload of a NaN."""
  raw = bytearray(np.asarray(array).tobytes())
  if not raw:
    return array
  if array.dtype == jnp.bool_:
    raw[0] ^= 1
  else:
    raw[rng.integers(len(raw))] ^= 1 << int(rng.integers(8))
  return jnp.asarray(np.frombuffer(bytes(raw), array.dtype).reshape(array.shape).copy())


@hypothesis.given(
  _histories(), st.integers(0, 99), st.booleans(), st.lists(st.sampled_from([2**40, 20, 100, 130, 500]), max_size=7)
)
@hypothesis.settings(max_examples=24)
def test_whatever_changes_each_step_is_bit_for_bit_what_was_saved(history, seed, accelerators, free):
  """`free`: bytes of host memory at each save; most send the state through a ring, of a few pieces of a few bytes."""
  leaves, saves = history
  rng = np.random.default_rng(seed)
  first = {}
  for i, (dtype, shape, sharded) in enumerate(leaves):
    x = jnp.asarray(rng.choice(np.array([0.0, -0.0, 1.0, np.nan], np.float32), shape)).astype(dtype)
    devices = jax.sharding.Mesh(np.array(jax.devices()), "d")
    spec = jax.sharding.PartitionSpec("d" if sharded and shape and shape[0] % 2 == 0 else None)
    first[f"x{i}"] = jax.device_put(x, jax.sharding.NamedSharding(devices, spec if shape else spec.__class__()))
  states = [first]
  for how in saves:
    last, state = states[-1], {}
    for (name, x), kind in zip(last.items(), how, strict=True):
      new = {"=": lambda x: x, "c": lambda x: _flipped(x, rng), "n": again}[kind](x)
      state[name] = new if new is x else jax.device_put(new, x.sharding)
    states.append(state)
  with tempfile.TemporaryDirectory() as run, pytest.MonkeyPatch.context() as patch:
    patch.setattr(staging, "as_accelerators", accelerators)
    patch.setattr(host_memory, "_LEAST_RING_NBYTES", 8)
    patch.setattr(host_memory, "_arena_nbytes", 0)
    patch.setattr(host_memory, "_note_arena", lambda nbytes: None)
    patch.setattr(host_memory, "available_memory", lambda: free.pop() if free else 150)
    save(run, states, {"health": {"nonfinite": "ignore"}, "timeouts": {"save": "60s"}})
    assert ckpt.verify(run) == []
    for step in range(len(states) - 1, -1, -1):
      assert bits(restored_by_orbax(run, step)) == bits(states[step])
      shutil.rmtree(f"{run}/{step}")


@pytest.mark.parametrize("half", [0, 1])
def test_half_of_a_hash_that_matches_by_chance_is_not_enough(tmp_path, monkeypatch, half):
  monkeypatch.setattr(sums, "SMALL_NBYTES", 0)
  hashed = sums.hash_bits

  def half_blind(*args):
    found = [*hashed(*args)]
    found[half] = 7
    return tuple(found)

  monkeypatch.setattr(sums, "hash_bits", half_blind)
  fixed = frozen(2)
  states = [{"frozen": again(fixed)} for _ in range(4)] + [{"frozen": again(fixed) | {"f1": fixed["f0"]}}]
  save(tmp_path, states)
  assert np.asarray(restored_by_orbax(tmp_path, 4)["frozen"]["f1"]).tobytes() == np.asarray(fixed["f0"]).tobytes()


def test_an_array_whose_memory_is_a_numpy_array_that_changes_is_written(tmp_path):
  memory = np.zeros(2**16 + 64, np.uint8)
  at = -memory.ctypes.data % 64
  memory = memory[at : at + 2**16].view(np.float32)
  shared = jax.device_put(memory, may_alias=True)
  memory[0] = 1
  assert float(shared[0]) == 1, "jax has copied it, so that there is nothing to test"
  with ckpt.Checkpointer(tmp_path) as c:
    for step in range(6):
      memory[1] = step
      c.save(step, {"w": shared})
      c.wait()
  assert [float(restored_by_orbax(tmp_path, step)["w"][1]) for step in range(6)] == [0, 1, 2, 3, 4, 5]


def test_a_job_that_goes_on_links_what_the_last_one_has_written(tmp_path):
  fixed = frozen()
  save(tmp_path, [{"frozen": fixed, "w": jnp.full(10, step)} for step in range(2)])
  for step in range(2, 7):  # a new job each time
    with ckpt.Checkpointer(tmp_path) as c:
      like = {"frozen": again(fixed), "w": jnp.full(10, step)}
      c.save(step, (c.restore(like=like).state if step % 2 else like) | {"w": jnp.full(10, step)})
  assert [written(tmp_path, step, range(step)) > 2**18 for step in range(7)] == [True] * 2 + [False] * 5
  assert ckpt.verify(tmp_path) == []


@pytest.mark.parametrize("name", ["../../../../etc/passwd", "/etc/passwd", "d/../../x"])
def test_a_note_that_names_files_elsewhere_is_not_believed(tmp_path, name):
  save(tmp_path, [{"frozen": frozen()}] * 3)
  note = next((tmp_path / "2").rglob(homes.FILE))
  data = json.loads(note.read_bytes())
  data.pop("seal")
  (home,) = data["homes"].values()
  home["files"][name] = [1, 1]
  note.write_text(json.dumps(data))
  assert homes.read_homes(epath.Path(note.parent)) == {}
  save_again = {"frozen": frozen()}
  with ckpt.Checkpointer(tmp_path) as c:
    c.save(3, save_again)
  assert written(tmp_path, 3, range(3)) > 8 * 2**16


def test_who_and_the_records_say_what_was_not_written(tmp_path):
  fixed = frozen()
  save(tmp_path, [{"frozen": fixed, "w": jnp.full(10, i)} for i in range(4)])
  (of,) = who_wrote(tmp_path, 3).processes
  assert (of.nbytes, of.unchanged_nbytes) == (8 * 2**16 + 40, 8 * 2**16)
  assert "unchanged" in who_wrote(tmp_path, 3).table() and "unchanged" not in who_wrote(tmp_path, 1).table()
  saves = [event for event in read_records(tmp_path).events if event.kind == "save"]
  assert [event.unchanged_nbytes for event in saves] == [0, 0, 8 * 2**16, 8 * 2**16]
  assert [event.processes[0].nbytes_unchanged for event in saves] == [0, 0, 8 * 2**16, 8 * 2**16]


def test_off_writes_everything(tmp_path):
  fixed = frozen()
  save(tmp_path, [{"frozen": fixed}] * 4, {"layout": {"unchanged": "off"}})
  assert all(written(tmp_path, i, range(i)) > 8 * 2**16 for i in range(4))


def test_leaves_that_change_together_with_frozen_ones_leave_their_home(tmp_path):
  fixed = frozen(8)
  states = [{"frozen": fixed}] * 4
  states += [{"frozen": fixed | {"f0": fixed["f0"] + i}} for i in (1, 2)]  # 7 of 8 are still of use
  states += [{"frozen": fixed | {f"f{k}": fixed[f"f{k}"] + i for k in range(4)}} for i in (3, 4, 5)]
  save(tmp_path, states)
  sizes = [round(written(tmp_path, i, range(i)) / 2**16) for i in range(len(states))]
  assert sizes == [8, 8, 0, 0, 1, 1, 8, 4, 4]  # half of a home is not linked: what is left of it gets a new one
  for step, state in enumerate(states):
    assert bits(restored_by_orbax(tmp_path, step)) == bits(state)


def test_what_many_steps_share_is_written_anew(tmp_path, monkeypatch):
  monkeypatch.setattr(unchanged, "LONGEST", 3)
  fixed = frozen(4)
  save(tmp_path, [{"frozen": fixed}] * 9)
  assert [written(tmp_path, i, range(i)) > 2**18 for i in range(9)] == [i in (0, 1, 4, 7) for i in range(9)]


def test_another_codec_is_written_and_then_kept(tmp_path):
  fixed = frozen(4)
  with ckpt.Checkpointer(tmp_path) as c:
    for step, on in enumerate(["off", "off", "off", "on", "on"]):
      c.close()
      c = ckpt.Checkpointer(tmp_path, {"layout": {"compression": on}})
      c.save(step, {"frozen": fixed})
      c.wait()
    c.close()
  assert ckpt.verify(tmp_path) == []


# -- what is in the way


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.ENOENT, errno.EIO])
def test_where_links_are_refused_everything_is_written_and_the_reason_logged_once(tmp_path, monkeypatch, caplog, code):
  def refuse(source, target):
    raise OSError(code, os.strerror(code), source)

  monkeypatch.setattr(os, "link", refuse)
  fixed = frozen()
  with caplog.at_level(logging.INFO, "ckpt_jax.layout"):
    save(tmp_path, [{"frozen": fixed, "w": jnp.full(10, i)} for i in range(6)])
  assert all(written(tmp_path, i, range(i)) > 8 * 2**16 for i in range(6))
  assert len([r for r in caplog.records if "written again" in r.message]) == 1
  assert ckpt.verify(tmp_path) == []


@pytest.mark.parametrize("how", ["overwrite", "truncate", "remove"])
def test_a_file_that_is_not_as_it_was_written_is_not_linked(tmp_path, how):
  fixed = frozen()
  with ckpt.Checkpointer(tmp_path) as c:
    for step in range(3):
      c.save(step, {"frozen": fixed})
      c.wait()
    shared = max((tmp_path / "2").rglob("unchanged.*/d/*"), key=lambda file: file.stat().st_size)
    content = bytearray(shared.read_bytes())
    content[1000] ^= 1
    if how == "remove":
      shared.unlink()
    else:
      shared.write_bytes(content if how == "overwrite" else content[:-1])
    c.save(3, {"frozen": fixed})
    c.wait()
    assert c.restore(3).report is not None
  assert bits(restored_by_orbax(tmp_path, 3)) == bits({"frozen": fixed})
  found = {f.step for f in ckpt.verify(tmp_path)}
  assert found == ({2} if how == "remove" else {1, 2})  # hard links are one file


def test_what_shares_files_with_a_step_in_quarantine_is_not_linked_on(tmp_path):
  fixed = frozen()
  states = [{"frozen": fixed, "w": jnp.full(10, i)} for i in range(5)]
  save(tmp_path, states[:4])
  shared = max((tmp_path / "2").rglob("unchanged.*/d/*"), key=lambda file: file.stat().st_size)
  before = os.stat(shared)
  content = bytearray(shared.read_bytes())
  content[1000] ^= 1
  with open(shared, "r+b") as file:
    file.write(content)
  os.utime(shared, ns=(before.st_atime_ns, before.st_mtime_ns))  # as rot does it
  with ckpt.Checkpointer(tmp_path) as c:
    assert c.restore().step == 0  # the only one that does not share it
    assert [s.step for s in c.steps()] == [0]
    for step in (1, 2, 3):
      c.save(step, states[step])
    c.wait()
  assert ckpt.verify(tmp_path) == []


@pytest.mark.parametrize("limit", ["auto", "100KiB"])  # the second sends all through a ring
@pytest.mark.parametrize("links", [1, 3, -1])
def test_a_process_killed_between_links_and_commit_leaves_whole_steps(tmp_path, links, limit):
  command = [sys.executable, str(PROGRAMS / "killed_between_links.py"), str(tmp_path), str(links), limit]
  done = subprocess.run(command, capture_output=True, text=True, timeout=120)
  assert done.returncode == -signal.SIGKILL, done.stderr
  with ckpt.Checkpointer(tmp_path) as c:
    assert [s.step for s in c.steps()] == [0, 1, 2]
    c.save(3, c.restore().state)
  assert not list(tmp_path.glob("*tmp*"))
  assert ckpt.verify(tmp_path) == []
  assert np.asarray(restored_by_orbax(tmp_path, 2)["frozen"]["f7"]).tobytes() == np.full((64, 256), 7, "f4").tobytes()


def test_a_save_needs_room_for_what_it_writes(tmp_path, monkeypatch):
  fixed = frozen(128)  # 8 MiB
  free = [2**40]
  monkeypatch.setattr(admission, "free_bytes", lambda _: free[0])
  for config in ({}, {"layout": {"unchanged": "off"}}):
    with ckpt.Checkpointer(tmp_path / str(bool(config)), config) as c:
      for step in range(3):
        c.save(step, {"frozen": fixed})
      c.wait()
      free[0] = 4 * 2**20
      if config:
        with pytest.raises(ckpt.OutOfSpaceError):
          c.save(3, {"frozen": fixed})
      else:
        c.save(3, {"frozen": fixed})
      c.wait()
      free[0] = 2**40


def test_prune_counts_what_deleting_frees(tmp_path):
  fixed = frozen()
  save(tmp_path, [{"frozen": fixed, "w": jnp.full(10, i)} for i in range(5)])
  whole = 8 * 2**16
  small = plan_pruning(epath.Path(tmp_path), ckpt.policies.Retention(last=2))
  assert small.removed == [0, 1, 2]
  assert abs(small.freed_nbytes() - whole) < 20_000  # step 0 alone is not linked
  assert small.kept_nbytes < whole + 20_000
  rest = plan_pruning(epath.Path(tmp_path), ckpt.policies.Retention(last=1))
  assert abs(rest.freed_nbytes() - whole) < 20_000


@pytest.mark.parametrize(("wholes", "left"), [(3, [0, 1, 2, 3, 4, 5]), (1.5, [1, 2, 3, 4, 5])])
def test_a_budget_counts_what_steps_share_once(tmp_path, wholes, left):
  fixed, budget = frozen(), int(wholes * 8 * 2**16)
  states = [{"frozen": fixed, "w": jnp.full(10, i)} for i in range(6)]
  save(tmp_path / "live", states, {"retention": {"budget": budget}})
  assert [s.step for s in ckpt.Checkpointer(tmp_path / "live").steps()] == left
  save(tmp_path / "by_hand", states)
  assert plan_pruning(epath.Path(tmp_path / "by_hand"), ckpt.policies.Retention(budget=budget)).removed == (
    [] if wholes == 3 else [0]
  )
  text = cli("ls", tmp_path / "by_hand").stdout
  assert text.count("shared with others") == 5, text  # 0 has written it with the others


def test_a_thinned_step_still_shares_what_does_not_change(tmp_path):
  fixed = frozen()
  states = [{"params": {"frozen": fixed, "w": jnp.full(10, i)}, "opt": jnp.full(50_000, i)} for i in range(5)]
  save(tmp_path, states)
  for step in (0, 2, 3):
    assert thin_step(epath.Path(tmp_path), step, ["params"])
  assert written(tmp_path, 3, [1, 2, 4]) < 20_000
  shutil.rmtree(tmp_path / "1")
  shutil.rmtree(tmp_path / "4")
  for step in (0, 2, 3):
    assert bits(restored_by_orbax(tmp_path, step)) == bits({"params": states[step]["params"]})
  assert ckpt.verify(tmp_path) == []
  assert repack_step(epath.Path(tmp_path), 3, pack=True) and repack_step(epath.Path(tmp_path), 3, pack=False)
  assert bits(restored_by_orbax(tmp_path, 3)) == bits({"params": states[3]["params"]})


# -- from accelerators


@pytest.fixture
def sent(monkeypatch):
  """Bytes that are copied from devices, which count as accelerators."""
  monkeypatch.setattr(staging, "as_accelerators", True)
  counted, send = [], staging._send

  def counting(copies):
    counted.append(sum(copy.source[copy.cut or ...].nbytes for copy in copies))
    send(copies)

  monkeypatch.setattr(staging, "_send", counting)
  return counted


@pytest.mark.parametrize("nonfinite", ["refuse", "ignore"])
def test_the_same_array_of_an_accelerator_is_not_even_copied(tmp_path, sent, nonfinite):
  fixed = jax.device_put(frozen())
  states = [{"frozen": fixed, "w": jax.device_put(jnp.full(10, i, jnp.int32))} for i in range(6)]
  copied = []
  with ckpt.Checkpointer(tmp_path, {"health": {"nonfinite": nonfinite}}) as c:
    for step, state in enumerate(states):
      sent.clear()
      c.save(step, state)
      c.wait()
      copied.append(sum(sent))
    norms = [c.restore(step).report for step in range(6)]
    assert len(norms) == 6
  whole = 8 * 2**16 + 40
  assert copied == [whole, whole, whole, 40, 40, 40]  # the first links prove that there are links
  assert ckpt.verify(tmp_path) == []
  records = [json.loads((tmp_path / str(i) / "default" / "ckpt_jax.json").read_text()) for i in range(6)]
  assert len({json.dumps(record["health"]["norms"]["frozen"]) for record in records}) == 1
  for step, state in enumerate(states):
    assert bits(restored_by_orbax(tmp_path, step)) == bits(state)


def test_what_was_donated_on_an_accelerator_is_copied_and_not_written(tmp_path, sent):
  fixed = frozen()
  states = [jax.device_put({"frozen": again(fixed), "w": jnp.full(10, i, jnp.int32)}) for i in range(6)]
  copied = []
  with ckpt.Checkpointer(tmp_path) as c:
    for step, state in enumerate(states):
      sent.clear()
      c.save(step, state)
      c.wait()
      copied.append(sum(sent))
  assert copied == [8 * 2**16 + 40] * 6
  assert all(written(tmp_path, step, range(step)) < 2**16 for step in range(3, 6))
  assert ckpt.verify(tmp_path) == []
  records = [json.loads((tmp_path / str(i) / "default" / "ckpt_jax.json").read_text()) for i in range(6)]
  assert len({json.dumps([r["leaves"]["frozen/f0"], r["hashes"]["frozen/f0"]]) for r in records}) == 1


def test_an_array_that_was_not_copied_is_copied_after_all_if_links_fail(tmp_path, sent, monkeypatch):
  fixed = jax.device_put(frozen())
  with ckpt.Checkpointer(tmp_path) as c:
    for step in range(4):
      c.save(step, {"frozen": fixed})
      c.wait()
    monkeypatch.setattr(unchanged, "clone", refused)
    sent.clear()
    c.save(4, {"frozen": fixed})
    c.wait()
    assert sum(sent) == 8 * 2**16
    jax.tree.map(lambda x: x.delete(), fixed)
  assert ckpt.verify(tmp_path) == []


# -- through a ring


RING = {"limits": {"host_memory": "2MB"}}  # of 1 MiB, with pieces of half of it


def large(count=8, seed=0):
  """More than 4 MiB, of which one leaf is stored in more than one piece under `RING` alone."""
  rng = np.random.default_rng(seed)
  devices = jax.sharding.Mesh(np.array(jax.devices()), "d")
  split = jax.sharding.NamedSharding(devices, jax.sharding.PartitionSpec("d"))
  made = {f"f{i}": jnp.asarray(rng.standard_normal((128, 512), dtype=np.float32)) for i in range(count)}
  made["large"] = jnp.asarray(rng.standard_normal((512, 1024), dtype=np.float32))
  return made | {"split": jax.device_put(rng.standard_normal((256, 512), dtype=np.float32), split)}


def moving(step):
  """What does not fit into `RING` either, and moves."""
  return {f"m{i}": jax.device_put(jnp.full((256, 512), step + i, jnp.float32)) for i in range(6)}


WHOLE = 8 * 2**18 + 2**21 + 2**19
MOVING = 6 * 2**19


@pytest.mark.parametrize("nonfinite", ["refuse", "ignore"])
@pytest.mark.parametrize("donating", [False, True])
def test_what_does_not_change_is_not_written_though_the_rest_goes_through_a_ring(tmp_path, sent, donating, nonfinite):
  fixed = jax.device_put(large())
  states = [{"frozen": again(fixed) if donating else fixed, "lora": moving(i)} for i in range(7)]
  copied = []
  with ckpt.Checkpointer(tmp_path, RING | {"health": {"nonfinite": nonfinite}}) as c:
    for step, state in enumerate(states):
      sent.clear()
      c.save(step, state)
      c.wait()
      copied.append(sum(sent))
  twice = 2 if nonfinite == "refuse" else 1  # health is looked at before the save
  if donating:
    assert copied[5:] == [twice * MOVING + WHOLE] * 2, "what is hashed and found to be the same is not sent again"
  else:
    assert copied[3:] == [twice * MOVING] * 4
  for step in range(4, 7):
    assert written(tmp_path, step, range(step)) < MOVING + 2**16
  assert ckpt.verify(tmp_path) == []
  for step, state in enumerate(states):
    assert bits(restored_by_orbax(tmp_path, step)) == bits(state)
  records = [json.loads((tmp_path / str(i) / "default" / "ckpt_jax.json").read_text()) for i in range(7)]
  assert len({json.dumps([r["health"]["norms"]["frozen"], r["leaves"]["frozen/large"]]) for r in records}) == 1
  saves = [event for event in read_records(tmp_path).events if event.kind == "save"]
  assert [event.unchanged_nbytes for event in saves[4:]] == [WHOLE] * 3


def test_a_ring_on_a_cpu_links_too_what_is_read_and_found_to_be_the_same(tmp_path):
  fixed = large()
  states = [{"frozen": again(fixed), "lora": moving(i)} for i in range(6)]
  save(tmp_path, states, RING)
  for step in range(3, 6):
    assert written(tmp_path, step, range(step)) < MOVING + 2**16
    assert bits(restored_by_orbax(tmp_path, step)) == bits(states[step])
  assert ckpt.verify(tmp_path) == []


def test_a_job_that_goes_on_through_a_ring_links_what_the_last_one_has_written(tmp_path, sent):
  fixed = large()
  states = [{"frozen": jax.device_put(again(fixed)), "lora": moving(step)} for step in range(7)]
  save(tmp_path, states[:3], RING)
  for step in range(3, 7):  # a new job each time
    with ckpt.Checkpointer(tmp_path, RING) as c:
      c.save(step, states[step])
  assert [written(tmp_path, step, range(step)) > WHOLE for step in range(7)] == [True] * 3 + [False] * 4
  records = [json.loads((tmp_path / str(i) / "default" / "ckpt_jax.json").read_text()) for i in range(7)]
  assert len({json.dumps([r["health"]["norms"]["frozen"], r["leaves"]["frozen/split"]]) for r in records}) == 1
  assert ckpt.verify(tmp_path) == []


@pytest.mark.parametrize("accelerators", [False, True])
@pytest.mark.parametrize("failing", [2, 3, 4])
def test_what_cannot_be_linked_after_all_goes_through_the_ring(tmp_path, monkeypatch, failing, accelerators):
  monkeypatch.setattr(staging, "as_accelerators", accelerators)
  fixed = jax.device_put(large())
  states = [{"frozen": fixed, "lora": moving(i)} for i in range(7)]
  with ckpt.Checkpointer(tmp_path, RING | {"timeouts": {"save": "60s"}}) as c:
    for step, state in enumerate(states):
      with monkeypatch.context() as patch:
        if step == failing:
          patch.setattr(unchanged, "clone", refused)
        c.save(step, state)
        c.wait()
  assert [step for step in range(7) if written(tmp_path, step, range(step)) > WHOLE] == [0, 1, failing]
  for step, state in enumerate(states):
    assert bits(restored_by_orbax(tmp_path, step)) == bits(state)
  assert ckpt.verify(tmp_path) == []


@pytest.mark.parametrize(
  "config, made, beside",
  [
    pytest.param({}, frozen, lambda step: {}, id="whole"),
    pytest.param(RING | {"timeouts": {"save": "60s"}}, large, lambda step: {"lora": moving(step)}, id="ring"),
  ],
)
def test_if_training_has_donated_what_was_left_out_the_save_fails_and_the_next_one_writes_it(
  tmp_path, sent, monkeypatch, config, made, beside
):
  fixed = jax.device_put(made())
  with ckpt.Checkpointer(tmp_path, config) as c:
    for step in range(4):
      c.save(step, {"frozen": fixed} | beside(step))
      c.wait()

    def donated_meanwhile(*args):
      jax.tree.map(lambda x: x.delete(), fixed)
      refused()

    with monkeypatch.context() as patch:
      patch.setattr(unchanged, "clone", donated_meanwhile)
      with pytest.raises(ckpt.SaveFailedError, match="has not changed, so that it was not copied"):
        c.save(4, {"frozen": fixed} | beside(4))
        c.wait()
    c.save(5, {"frozen": jax.device_put(made())} | beside(5))
    c.wait()
    assert [s.step for s in c.steps()] == [0, 1, 2, 3, 5]
  assert ckpt.verify(tmp_path) == []


def test_a_leaf_whose_halves_change_places_is_not_taken_for_what_it_was(tmp_path, sent):
  fixed = large()
  states = [{"frozen": jax.device_put(again(fixed)), "lora": moving(i)} for i in range(6)]
  states[5]["frozen"]["large"] = jnp.roll(fixed["large"], 256, axis=0)  # by pieces of the ring
  save(tmp_path, states, RING)
  assert written(tmp_path, 5, range(5)) > MOVING + 2**21
  assert bits(restored_by_orbax(tmp_path, 5)) == bits(states[5])


# -- elsewhere


@pytest.mark.parametrize("limit", ["auto", "100KiB"])
@pytest.mark.parametrize("how", ["same", "donate"])
def test_four_processes_link_their_shares_and_write_them_on_another_mesh(tmp_path, how, limit):
  results = together("unchanged.py", tmp_path, how, limit, processes=4)
  sizes = json.loads(next(line for line in results[0].log.splitlines() if line.startswith("[1")))
  whole = 8 * 128 * 256 * 4
  settled = 3 if how == "donate" else 2  # by then leaves are in homes, which the next step links
  assert min(sizes[: settled - 1]) > whole and sizes[5] > whole / 2, sizes
  assert max(sizes[settled + 1 : 5]) < whole / 10, sizes
  with ocp.CheckpointManager(tmp_path) as manager:  # on one device: the mesh is not here
    as_numpy = {"frozen": {f"f{i}": ocp.RestoreArgs(np.ndarray) for i in range(8)}, "lora": ocp.RestoreArgs(np.ndarray)}
    found = [manager.restore(step, args=ocp.args.PyTreeRestore(restore_args=as_numpy)) for step in range(8)]
  assert all(np.all(state["lora"] == step) for step, state in enumerate(found))
  assert len({str(bits(state["frozen"])) for state in found}) == 1
  assert ckpt.verify(tmp_path) == []


@pytest.mark.parametrize("kind", ["s3", "gcs"])
def test_a_bucket_copies_for_itself(kind, request):
  bucket = request.getfixturevalue(kind)
  run = f"{bucket.url}/run"
  fixed = frozen()
  sent = []
  with ckpt.Checkpointer(run, {"retention": {"last": 1}}) as c:
    for step in range(5):
      before = traffic()
      c.save(step, {"frozen": fixed, "w": jnp.full(10, step)})
      c.wait()
      sent.append(traffic().since(before))
  assert all(of.nbytes_written > 8 * 2**16 for of in sent[:2])
  assert all(of.nbytes_written < 2**16 and of.nbytes_read < 2**16 for of in sent[2:])
  with ckpt.Checkpointer(run) as c:
    assert [s.step for s in c.steps()] == [4]
    assert bits(c.restore(like={"frozen": fixed, "w": jnp.full(10, 4)}).state) == bits(
      {"frozen": fixed, "w": jnp.full(10, 4)}
    )
  assert ckpt.verify(run) == []


def _after_look(c):
  """Waits until what is read ahead has arrived, as it has once training is under way."""
  c._saver._unchanged._before._found[1].result(60)


@pytest.mark.parametrize("kind", ["s3", "gcs"])
def test_a_job_that_goes_on_in_a_bucket_has_it_copy_what_the_last_one_has_written(kind, request):
  bucket = request.getfixturevalue(kind)
  run = f"{bucket.url}/run"
  fixed = frozen()
  states = [{"frozen": fixed, "w": jnp.full(10, step)} for step in range(7)]
  save(run, states[:3])
  sent = []
  for step in range(3, 6):  # a new job each time
    with ckpt.Checkpointer(run) as c:
      assert c.restore_or_init(lambda: states[0]).step == step - 1
      _after_look(c)
      before = traffic()
      c.save(step, states[step])
      c.wait()
      sent.append(traffic().since(before).nbytes_written)
  assert all(nbytes < 2**16 for nbytes in sent), sent
  with ckpt.Checkpointer(run) as c:
    assert bits(c.restore(like=states[5]).state) == bits(states[5])
  assert ckpt.verify(run) == []


def test_an_object_that_was_written_after_its_step_was_committed_is_not_copied(gcs):
  run = f"{gcs.url}/run"
  states = [{"frozen": frozen(), "w": jnp.full(10, step)} for step in range(4)]
  save(run, states[:3])
  inside = epath.Path(run) / "2" / "default" / "ocdbt.process_0" / "unchanged.1" / "d"
  file = next(iter(inside.iterdir()))
  time.sleep(1.1)  # the times of objects are in seconds, or finer
  file.write_bytes(file.read_bytes())
  with ckpt.Checkpointer(run) as c:
    c.restore_or_init(lambda: states[0])
    _after_look(c)
    before = traffic()
    c.save(3, states[3])
    c.wait()
    assert traffic().since(before).nbytes_written > 8 * 2**16


def test_a_first_save_does_not_wait_for_a_bucket_that_is_slow_to_say_what_it_has(s3, monkeypatch):
  run = f"{s3.url}/run"
  states = [{"frozen": frozen(), "w": jnp.full(10, step)} for step in range(4)]
  save(run, states[:3])
  goes_on, read = threading.Event(), lookback.read_homes
  monkeypatch.setattr(lookback, "read_homes", lambda database: goes_on.wait(60) and read(database))
  with ckpt.Checkpointer(run) as c:
    c.restore_or_init(lambda: states[0])
    c.save(3, states[3])
    c.wait()
    assert not goes_on.is_set()
    goes_on.set()
  with ckpt.Checkpointer(run) as c:
    assert bits(c.restore(like=states[3]).state) == bits(states[3])
