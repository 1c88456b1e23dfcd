"""`ckpt.verify` and `ckpt-jax verify`, `rollback`: reads everything, names leaf and file, changes nothing."""

import json
import random

import damage
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from commands import cli
from etils import epath

import ckpt_jax as ckpt
from ckpt_jax.integrity import databases
from ckpt_jax.restore import verify as verification


def snapshot(run):
  return {str(p.relative_to(run)): p.read_bytes() for p in run.rglob("*") if p.is_file()}


def test_sound_steps_have_no_findings_and_are_not_touched(tmp_path):
  damage.save(tmp_path)
  before = snapshot(tmp_path)
  assert ckpt.verify(tmp_path) == []
  (first, second) = verification.verdicts(tmp_path)
  assert first.fingerprints == first.leaves == 8 and second.how_far == "all bits compared with what training held"
  assert snapshot(tmp_path) == before


def test_a_flipped_bit_is_found_with_step_leaf_and_file(tmp_path):
  damage.save(tmp_path)
  file, _ = damage.find_data(tmp_path / "1", damage.state(1)["params"]["w"].addressable_shards[0].data)
  damage.damage_params(tmp_path, 1)
  (finding,) = ckpt.verify(tmp_path)
  assert (finding.step, finding.kind, finding.leaf) == (1, "data", "params/w")
  assert str(file.relative_to(tmp_path / "1")) in finding.file.split(", ")
  assert ckpt.verify(tmp_path, 0) == [] and ckpt.verify(tmp_path, 1) == [finding]


@pytest.mark.parametrize("kind", [damage.flip, damage.truncate, damage.remove])
def test_damage_to_any_file_of_the_step_is_found(tmp_path, kind):
  damage.save(tmp_path, [0])
  rng = random.Random(kind.__name__)
  item = epath.Path(tmp_path / "0" / "default")
  used = {file for leaf in ("params.w", "params.b", "host") for file in databases.files_of(item, leaf)}
  assert used
  missed = set()
  for file in damage.files(tmp_path / "0"):
    original = file.read_bytes()
    if not original and kind is not damage.remove:
      continue
    kind(file, rng)
    if not ckpt.verify(tmp_path, 0):
      missed.add(str(file.relative_to(tmp_path / "0")))
    file.write_bytes(original)
  # Orbax's own part of this file says nothing of the state: timestamps, handler names. Markers count by being there.
  if kind is not damage.remove:
    missed -= {"_CHECKPOINT_METADATA", *(m for m in missed if m.endswith("commit_success.txt"))}
  # Each process leaves nodes of earlier generations of its database, which nothing refers to.
  old_nodes = {m for m in missed if "/ocdbt.process_0/d/" in m and m.removeprefix("default/") not in used}
  assert missed == old_nodes
  assert ckpt.verify(tmp_path) == []


def test_large_leaves_are_read_in_blocks_and_small_ones_in_groups(tmp_path, monkeypatch):
  monkeypatch.setattr(verification, "_GROUP_NBYTES", 3000)
  monkeypatch.setattr(verification, "_BLOCK_NBYTES", 5000)
  damage.save(tmp_path, [1], layout={"compression": "on", "chunk_size": 20_000})
  (verdict,) = verification.verdicts(tmp_path)
  assert verdict.findings == ()
  with ckpt.Checkpointer(tmp_path) as c:
    x = np.random.default_rng(0).standard_normal((3, 70, 50)).astype(jnp.bfloat16)
    c.save(2, {"cube": jnp.asarray(x), "c": jnp.asarray(np.full(900, 1j, np.complex64))})
  assert ckpt.verify(tmp_path, 2) == []
  file, at = damage.find_data(tmp_path / "2", x)
  data = bytearray(file.read_bytes())
  data[at + 7001] ^= 64
  file.write_bytes(data)
  assert [f.leaf for f in ckpt.verify(tmp_path, 2)] == ["cube"]


def test_plain_orbax_is_checked_as_far_as_it_goes_and_it_says_how_far(tmp_path):
  with ocp.CheckpointManager(tmp_path) as manager:
    manager.save(0, args=ocp.args.PyTreeSave({"x": np.arange(3), "y": jax.random.normal(jax.random.key(0), 9000)}))
  (verdict,) = verification.verdicts(tmp_path)
  assert verdict.findings == () and verdict.fingerprints == 0 and "no fingerprints" in verdict.how_far
  for file in damage.files(tmp_path / "0"):
    if file.parent.name == "d" and file.stat().st_size > 10000:
      file.unlink()
  assert "y" in {f.leaf for f in ckpt.verify(tmp_path)}


def test_thinned_steps_are_verified_with_the_fingerprints_of_the_original(tmp_path):
  from ckpt_jax.rewrite.thin import thin_step

  damage.save(tmp_path)
  thin_step(ckpt.Checkpointer(tmp_path).directory, 0, ("params",))
  verdict = next(verification.verdicts(tmp_path, 0))
  assert verdict.findings == () and verdict.fingerprints == 3


def test_the_command_prints_what_is_wrong_and_exits_1(tmp_path):
  damage.save(tmp_path)
  assert cli("verify", tmp_path).returncode == 0
  damage.damage_params(tmp_path, 1)
  done = cli("verify", tmp_path, 1)
  assert done.returncode == 1 and "params/w" in done.stdout and "ocdbt.process_0/d/" in done.stdout
  verdicts = json.loads(cli("verify", tmp_path, "--json").stdout)
  assert [len(v["findings"]) for v in verdicts] == [0, 1] and verdicts[1]["findings"][0]["leaf"] == "params/w"
  assert cli("verify", tmp_path, 7).returncode == 1
  assert cli("verify").returncode == 2


def test_the_rollback_command_sets_newer_steps_aside(tmp_path):
  damage.save(tmp_path, range(3))
  done = cli("rollback", tmp_path, 1)
  assert done.returncode == 0 and "newer steps: 2" in done.stdout
  assert ckpt.Checkpointer(tmp_path).latest_step() == 1
  assert cli("rollback", tmp_path, 5).returncode == 1
  assert json.loads(cli("rollback", tmp_path, 0, "--delete", "--yes", "--json").stdout) == {
    "step": 0,
    "deleted": [1, 2],
  }
