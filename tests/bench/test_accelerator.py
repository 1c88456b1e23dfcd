"""The benchmark of accelerators, on CPU devices that stand in for them: small states, real saves and restores."""

import json

import jax
import pytest
from commands import cli

from ckpt_jax.bench import accelerator, accelerator_worker
from ckpt_jax.bench.accelerator import ORBAX, OURS, UNVERIFIED
from ckpt_jax.bench.accelerator_worker import Work
from ckpt_jax.layout import staging


@pytest.fixture
def quick(monkeypatch):
  monkeypatch.setattr(staging, "as_accelerators", True)
  monkeypatch.setattr(accelerator_worker.Training, "__init__", lambda self: setattr(self, "alone_s", 1.0))
  monkeypatch.setattr(
    accelerator_worker.Training, "steps", lambda self, is_over: next(2.0 for _ in iter(int, 1) if is_over())
  )


@pytest.mark.parametrize("side", [ORBAX, OURS])
def test_a_side_saves_donates_and_restores_every_bit(tmp_path, quick, side):
  work = Work("saves", side, str(tmp_path), nbytes=2_000_000, repeats=1)
  found = accelerator_worker.saves(work)
  assert len(found["saves"]) == 2
  for save in found["saves"]:
    assert 0 < save["blocking_s"] <= save["donated_s"] and save["blocking_s"] <= save["commit_s"]
    assert save["slowdown"] == 2.0
  back = accelerator_worker.restores(Work("restores", side, str(tmp_path), nbytes=2_000_000, repeats=1))
  assert back["bitwise"] and len(back["seconds"]) == 2


def test_the_state_has_the_size_that_is_asked_for():
  for nbytes in (20_000_000, 300_000_000, 2_950_000_000):
    leaves = jax.tree.leaves(accelerator_worker.shapes(nbytes))
    assert sum(x.size * x.dtype.itemsize for x in leaves) == pytest.approx(nbytes, rel=0.2)
  assert len(leaves) == 901


def saves(blocking, commit):
  one = {"blocking_s": blocking, "donated_s": blocking, "commit_s": commit, "slowdown": 1.0}
  return {"saves": [{**one, "blocking_s": 9.0}, one, one], "update_s": 0.1, "rss": 5, "pinned": 3}


def test_aims_compare_medians_of_both_sides_and_skip_what_was_not_measured():
  raw = {
    f"saves: {ORBAX}": [saves(0.5, 3.0), saves(0.7, 3.0), saves(0.6, 3.0)],
    f"saves: {OURS}": [saves(0.06, 2.0)],
    f"restores: {OURS}": [{"seconds": [1.0, 0.44], "rss": 1}],
    f"restores: {UNVERIFIED}": [{"seconds": [1.0, 0.4], "rss": 1}],
  }
  medians = accelerator.summary(raw)
  assert medians[ORBAX]["blocking_s"] == 0.6 and medians[ORBAX]["first_blocking_s"] == 9.0
  found = {aim.what: (aim.measured, aim.met) for aim in accelerator.aims(medians)}
  assert found["blocking over Orbax's"] == (pytest.approx(0.1), True)
  assert found["commit over Orbax's"] == (pytest.approx(2 / 3), False)
  assert found["verified restore over unverified"] == (pytest.approx(1.1), True)
  assert not any("limits" in what or "restore over Orbax" in what for what in found)


def test_what_fails_is_reported_and_the_rest_is_measured(tmp_path, monkeypatch):
  extent = accelerator.Extent(1_000_000, rounds=1, sides=("nobody",))
  kept = []
  found = accelerator.run(extent, str(tmp_path), lambda line: None, kept.append)
  assert len(kept) == 2 and kept[0]["failed"], "what a run that is cut off leaves behind"
  assert len(found["failed"]) == 1 and "saves: nobody: exit code 1: " in found["failed"][0]
  assert "KeyError: 'nobody'" in found["failed"][0] and list(tmp_path.iterdir()) == []


def test_a_state_that_does_not_fit_is_refused_before_anything_runs(tmp_path):
  done = cli("bench", "accelerator", "--dir", str(tmp_path), "--size", "900TB")
  assert done.returncode == 1 and "choose --dir or a smaller --size" in done.stderr


def test_the_tables_show_every_side(tmp_path):
  medians = accelerator.summary({f"saves: {OURS}": [saves(0.06, 2.0)]})
  found = {"nbytes": 10**9, "machine": {"device": "H200", "devices": 1, "leaves": 901}, "medians": medians}
  first, second = accelerator.tables(
    json.loads(json.dumps({**found, "aims": [vars(a) for a in accelerator.aims(medians)]}))
  )
  assert "H200" in first.title and first.header == ("", OURS)
  assert ("save blocks, s", "0.060") in first.rows and second.rows[0][-1] == "yes"
