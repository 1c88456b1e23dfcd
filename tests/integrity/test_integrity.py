"""Damage of every kind in every file of a step: found, named, and gone back from; nothing is deleted."""

import json
import random
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from damage import damage_params, files, flip, remove, save, state, truncate, zero
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jobs import together

import ckpt_jax as ckpt
from ckpt_jax.integrity import comparison
from ckpt_jax.integrity.fingerprint import LeafPrint, take_restored
from ckpt_jax.integrity.record import Record
from ckpt_jax.restore.verify import verify


def restored_right(run, assert_same):
  """The step that came back, after checking that it is bit for bit the one that was saved, extras and metrics too."""
  with ckpt.Checkpointer(run) as c:
    got = c.restore_or_init(lambda: state(0))
  assert_same(got.state, state(got.step))
  assert got.extras == {"batch": got.step * 1000} and got.metrics == {"loss": got.step / 4}
  return got


@pytest.mark.parametrize("compression", ["off", "on"])
@pytest.mark.parametrize("damage", [flip, truncate, zero, remove])
def test_damage_to_any_file_is_harmless_or_found_and_gone_back_from(tmp_path, damage, compression, assert_same):
  original = tmp_path / "original"
  save(original, layout={"compression": compression})
  rng = random.Random(f"{damage.__name__} {compression}")
  steps = []
  for i, file in enumerate(files(original / "1")):
    run = tmp_path / f"run{i}"
    shutil.copytree(original, run)
    target = run / file.relative_to(original)
    if target.stat().st_size == 0:
      continue
    before = target.read_bytes()
    damage(target, rng)
    if target.exists() and target.read_bytes() == before:
      continue  # zeros written over zeros
    got = restored_right(run, assert_same)
    steps.append(got.step)
    if got.step == 0:
      assert list(got.report.quarantined) == [1]
      kept = next(p for p in (run / ".ckpt_jax" / "quarantine").iterdir() if p.is_dir())
      assert len(files(kept)) == len(files(original / "1")) - (damage is remove), "quarantine keeps everything"
    shutil.rmtree(run)
  assert 0 in steps


@pytest.mark.parametrize("of_the_other", ["_CHECKPOINT_METADATA", "default", "default/ckpt_jax.json"])
def test_what_was_put_into_a_step_from_another_one_is_found_and_gone_back_from(tmp_path, assert_same, of_the_other):
  save(tmp_path)
  old, new = tmp_path / "0" / of_the_other, tmp_path / "1" / of_the_other
  if old.is_dir():
    shutil.rmtree(new)
    shutil.copytree(old, new)
  else:
    shutil.copy(old, new)
  assert any("not of the save" in str(finding) for finding in verify(tmp_path, 1))
  assert restored_right(tmp_path, assert_same).step == 0


def test_step_that_was_renamed_or_copied_as_a_whole_is_sound_and_has_the_number_of_its_name(tmp_path, assert_same):
  save(tmp_path)
  (tmp_path / "1").rename(tmp_path / "7")
  shutil.copytree(tmp_path / "0", tmp_path / "3")
  assert verify(tmp_path) == []
  with ckpt.Checkpointer(tmp_path) as c:
    assert [s.step for s in c.steps()] == [0, 3, 7]
    for step, of in ((7, 1), (3, 0)):
      got = c.restore(step=step)
      assert (got.step, got.next_step, got.extras) == (step, step + 1, {"batch": of * 1000})
      assert_same(c.restore(step=step, like=state(of)).state, state(of))


def test_damage_is_found_where_leaves_are_hashed_and_where_they_are_summed_up(tmp_path):
  save(tmp_path)
  damage_params(tmp_path, 1)
  likes = [state(1), state(1)]
  likes[1]["params"]["w"] = jnp.asarray(np.asarray(likes[1]["params"]["w"]))  # in one part: two were saved
  with ckpt.Checkpointer(tmp_path) as c:
    for like in likes:
      with pytest.raises(ckpt.CorruptCheckpointError, match="1 leaf is not what was saved: params/w"):
        c.restore(1, like=like)
      assert c.restore(0, like=like).report.verified == 8


def test_a_changed_record_is_found_by_its_seal_and_one_of_an_older_version_needs_none(tmp_path):
  save(tmp_path)
  record = tmp_path / "1" / "default" / "ckpt_jax.json"
  whole = record.read_bytes()
  data = json.loads(whole)
  with ckpt.Checkpointer(tmp_path) as c:
    part, number = data["hashes"]["params/w"]
    other = f"{int(number, 16) ^ 1:016x}"
    record.write_bytes(whole.replace(number.encode(), other.encode()))
    with pytest.raises(ckpt.CorruptCheckpointError, match=r"ckpt_jax\.json: its bits are not those"):
      c.restore(1, like=state(1))
    assert part == [32, 300] and any("ckpt_jax.json" in str(finding) for finding in verify(tmp_path, 1))
    older = {key: value for key, value in data.items() if key not in ("seal", "hashes")}
    record.write_text(json.dumps(older))
    assert c.restore(1, like=state(1)).report.verified == 8
    damage_params(tmp_path, 1)
    with pytest.raises(ckpt.CorruptCheckpointError, match="params/w"):
      c.restore(1, like=state(1))


def test_a_step_asked_for_by_number_is_never_replaced_and_the_leaf_is_named(tmp_path):
  save(tmp_path)
  damage_params(tmp_path, 1)
  with ckpt.Checkpointer(tmp_path) as c:
    with pytest.raises(ckpt.CorruptCheckpointError, match="1 leaf is not what was saved: params/w"):
      c.restore(1, like=state(1))
    assert c.latest_step() == 1
  with ckpt.Checkpointer(tmp_path, {"restore": {"on_corruption": "raise"}}) as c:
    with pytest.raises(ckpt.CorruptCheckpointError, match="params/w"):
      c.restore(like=state(1))
    assert c.latest_step() == 1


@pytest.mark.parametrize("only", ["params", "step", "key"])
def test_a_partial_restore_checks_what_it_reads_and_no_more(tmp_path, only):
  save(tmp_path)
  damage_params(tmp_path, 1)
  with ckpt.Checkpointer(tmp_path) as c:
    if only == "params":
      with pytest.raises(ckpt.CorruptCheckpointError, match="params/w"):
        c.restore(1, only=only)
    else:
      assert c.restore(1, only=only).report.verified == 1


def test_without_like_and_on_another_mesh_the_same_is_found(tmp_path):
  save(tmp_path)
  mesh = jax.make_mesh((2,), ("a",))
  like = state(1)
  like["params"]["w"] = jax.ShapeDtypeStruct((64, 300), jnp.float32, sharding=NamedSharding(mesh, P(None, "a")))
  like["params"]["b"] = jax.ShapeDtypeStruct((30,), jnp.bfloat16, sharding=NamedSharding(mesh, P()))
  with ckpt.Checkpointer(tmp_path) as c:
    assert c.restore(1, like=like).report.verified == c.restore(1).report.verified == 8
    damage_params(tmp_path, 1)
    for tree in (like, None):
      with pytest.raises(ckpt.CorruptCheckpointError, match="params/w"):
        c.restore(1, like=tree)


def test_verify_off_restores_what_is_there_and_says_so(tmp_path):
  save(tmp_path)
  damage_params(tmp_path, 1)
  with ckpt.Checkpointer(tmp_path, {"restore": {"verify": False}}) as c:
    report = c.restore(like=state(1)).report
  assert report.verified == 0 and report.unverified == "restore.verify is off"


def test_a_step_of_plain_orbax_is_restored_unverified_and_the_report_says_so(tmp_path):
  with ocp.CheckpointManager(tmp_path) as manager:
    manager.save(0, args=ocp.args.PyTreeSave({"x": np.arange(3)}))
  with ckpt.Checkpointer(tmp_path) as c:
    report = c.restore().report
  assert report.verified == 0 and report.unverified == "the step has no fingerprints"


def test_a_like_that_does_not_fit_is_no_corruption(tmp_path):
  save(tmp_path)
  with ckpt.Checkpointer(tmp_path) as c:
    with pytest.raises(ckpt.StructureMismatchError):
      c.restore(like={"other": 1})
    assert [s.step for s in c.steps()] == [0, 1]


def test_where_no_step_can_be_read_nothing_is_touched_and_training_does_not_start_at_0(tmp_path):
  save(tmp_path)
  for step in (0, 1):
    damage_params(tmp_path, step)
  with ckpt.Checkpointer(tmp_path) as c:
    with pytest.raises(ckpt.CorruptCheckpointError, match=r"none of the steps \[1, 0\]"):
      c.restore_or_init(lambda: state(0))
    assert [s.step for s in c.steps()] == [0, 1]


def test_a_run_whose_only_steps_lost_their_metadata_does_not_start_at_0(tmp_path):
  save(tmp_path, [5])
  (tmp_path / "5" / "_CHECKPOINT_METADATA").unlink()
  (tmp_path / "5" / "default" / "_METADATA").unlink()
  with ckpt.Checkpointer(tmp_path) as c:
    assert c.latest_step() is None
    with pytest.raises(ckpt.CorruptCheckpointError, match="its metadata files are gone"):
      c.restore_or_init(lambda: state(0))


def test_a_run_whose_steps_are_all_in_quarantine_does_not_start_at_0(tmp_path):
  save(tmp_path)
  damage_params(tmp_path, 1)
  with ckpt.Checkpointer(tmp_path) as c:
    assert c.restore(like=state(0)).step == 0
  shutil.rmtree(tmp_path / "0")
  quarantined = pytest.raises(ckpt.CorruptCheckpointError, match=r"steps \[1\] are in quarantine")
  with ckpt.Checkpointer(tmp_path) as c, quarantined:
    c.restore_or_init(lambda: pytest.fail("started afresh"))


def test_foreign_and_empty_directories_are_neither_steps_nor_damage(tmp_path):
  (tmp_path / "4").mkdir()
  (tmp_path / "6" / "notes").mkdir(parents=True)
  (tmp_path / "6" / "notes" / "a.txt").write_text("mine")
  with ckpt.Checkpointer(tmp_path) as c:
    assert c.restore_or_init(lambda: {"x": jnp.zeros(2)}).step is None


def test_after_a_fallback_the_number_can_be_saved_again(tmp_path, assert_same):
  save(tmp_path)
  damage_params(tmp_path, 1)
  with ckpt.Checkpointer(tmp_path) as c:
    got = c.restore_or_init(lambda: state(0))
    assert got.next_step == 1 and c.save(1, state(1), metrics={"loss": 0.25}, extras={"batch": 1000})
    c.wait()
    assert [s.step for s in c.steps()] == [0, 1]
  assert restored_right(tmp_path, assert_same).step == 1


def test_changed_extras_and_metrics_are_found(tmp_path, assert_same):
  save(tmp_path)
  file = tmp_path / "1" / "_CHECKPOINT_METADATA"
  text = file.read_text()
  assert '"batch": 1000' in text
  file.write_text(text.replace('"batch": 1000', '"batch": 1001'))
  assert restored_right(tmp_path, assert_same).step == 0


def test_directory_in_place_of_the_metrics_is_found(tmp_path, assert_same):
  save(tmp_path)
  (file := tmp_path / "1" / "metrics" / "metrics").unlink()
  file.mkdir()
  assert {(f.step, f.kind) for f in ckpt.verify(tmp_path)} == {(1, "metadata")}
  assert restored_right(tmp_path, assert_same).step == 1  # the step's own JSON holds them too


def test_healthy_goes_back_behind_an_explosion(tmp_path):
  with ckpt.Checkpointer(tmp_path, {"health": {"nonfinite": "tag"}}) as c:
    for step, value in enumerate([1.0, 2.0, np.nan, np.inf]):
      c.save(step, {"w": jnp.full(4, value)})
    c.wait()
    assert c.restore().step == 3
    assert c.restore(healthy=True).step == 1


def test_rollback_makes_an_older_step_the_newest_and_keeps_the_newer_ones_until_told(tmp_path):
  keep_all = {"retention": {"last": None}}
  save(tmp_path, range(4), **keep_all)
  with ckpt.Checkpointer(tmp_path, keep_all) as c:
    assert c.rollback(1) == [2, 3]
    assert c.latest_step() == 1 and c.restore(like=state(0)).step == 1
    aside = tmp_path / ".ckpt_jax" / "set_aside"
    assert sorted(p.name.split("-")[0] for p in aside.iterdir() if p.is_dir()) == ["2", "3"]
    assert c.save(2, state(7))
    c.wait()
    assert [s.step for s in c.steps()] == [0, 1, 2]
    c.pin(2)
    with pytest.raises(ckpt.CheckpointError, match="pinned"):
      c.rollback(0, delete=True)
    c.unpin(2)
    assert c.rollback(0, delete=True) == [1, 2, 3]
    assert [s.step for s in c.steps()] == [0] and not list(aside.iterdir())
    with pytest.raises(ckpt.NoCheckpointError):
      c.rollback(3)


def test_what_was_set_aside_comes_back_by_moving_it(tmp_path, assert_same):
  save(tmp_path)
  with ckpt.Checkpointer(tmp_path) as c:
    c.rollback(0)
  (there,) = [p for p in (tmp_path / ".ckpt_jax" / "set_aside").iterdir() if p.is_dir()]
  there.rename(tmp_path / "1")
  assert restored_right(tmp_path, assert_same).step == 1


def test_what_happened_is_logged_and_noted_beside_the_step(tmp_path, caplog):
  save(tmp_path)
  damage_params(tmp_path, 1)
  with ckpt.Checkpointer(tmp_path) as c:
    got = c.restore(like=state(0))
  assert "params/w" in got.report.quarantined[1]
  assert "restored step 0 in place of 1" in caplog.text
  (note,) = (tmp_path / ".ckpt_jax" / "quarantine").glob("*.json")
  assert "params/w" in json.loads(note.read_text())["reason"]


def test_a_wrong_leaf_between_storage_and_training_is_found(tmp_path, monkeypatch):
  save(tmp_path)
  monkeypatch.setattr(comparison.Verifier, "__call__", swapped(comparison.Verifier.__call__))
  with ckpt.Checkpointer(tmp_path) as c, pytest.raises(ckpt.CorruptCheckpointError, match="host"):
    c.restore(1, like=state(1))


def swapped(original):
  return lambda self, path, value: original(self, path, value[::-1] if path == "host" else value)


@pytest.mark.multiprocess
def test_four_processes_saved_one_bit_flips_and_two_processes_agree_on_the_older_step(tmp_path):
  together("fallback.py", tmp_path, "save", processes=4)
  biggest = max((f for f in files(tmp_path / "1") if f.parent.name == "d"), key=lambda f: f.stat().st_size)
  data = bytearray(biggest.read_bytes())
  data[len(data) // 2] ^= 1
  biggest.write_bytes(data)
  for processes in (2, 1):
    copy = tmp_path / f"copy{processes}"
    shutil.copytree(tmp_path, copy, ignore=shutil.ignore_patterns("copy*"))
    results = together("fallback.py", copy, "restore", processes=processes)
    assert all("restored step 0 quarantined [1]" in r.log for r in results), results[0].log


class Alone:
  """The waits of a job of one process."""

  def meet(self, what, error=None, text="", combine=list):
    if error is not None:
      raise error
    return combine([text])


@pytest.mark.parametrize("bunch_nbytes", [1, 1 << 20])
def test_of_a_leaf_that_arrives_twice_the_later_counts_and_all_that_differ_are_named(monkeypatch, bunch_nbytes):
  monkeypatch.setattr(comparison, "_BUNCH_NBYTES", bunch_nbytes)  # each leaf by itself, or all at once
  right = {f"x{i}": np.arange(i, i + 40_000, dtype=np.float32) for i in range(12)}
  taken = take_restored(right, {})
  tallies = taken.tallies(1)
  leaves = {p: LeafPrint(leaf.dtype, leaf.shape, tallies[p].total) for p, leaf in taken.leaves.items()}
  record = Record(leaves, {}, {})

  def verified(*delivered):
    verifier = comparison.Verifier(record)
    for path, value in delivered:
      verifier(path, value)
    try:
      return verifier.finish("step 7", Alone())
    finally:
      verifier.stop()

  wrong = {path: -value for path, value in right.items()}
  assert verified(*wrong.items(), *right.items()) == 12
  with pytest.raises(ckpt.CorruptCheckpointError, match=r"step 7: 12 leaves are not what was saved: x0, .* and 2 more"):
    verified(*right.items(), *wrong.items())
  with pytest.raises(ckpt.CorruptCheckpointError, match="1 leaf is not what was saved: new"):
    verified(("new", right["x0"]))
  with pytest.raises(ckpt.CorruptCheckpointError, match="1 leaf is not what was saved: x1"):
    verified(("x1", right["x1"].astype(np.float64)))
