"""The benchmark measures what it claims, reports what it leaves out, and the docs quote its results."""

import dataclasses
import json
import pathlib
import re
import subprocess
import sys

import commands
import psutil
import pytest

from ckpt_jax.bench import aims, report, results, suites
from ckpt_jax.bench.runner import WorkerJob, run_suite
from ckpt_jax.bench.variants import TORCH_PYTHON, VARIANTS, left_out, make_target
from ckpt_jax.errors import CheckpointError, ConfigError

ROOT = pathlib.Path(__file__).parents[2]
MACHINE = {
  "date": "2026-01-01 00:00 UTC",
  "cores": 2,
  "cpu": "x",
  "memory_nbytes": 2**30,
  "kernel": "6",
  "disk": "/dev/x ext4",
  "page_cache_dropped": True,
  "load_before": 0.0,
  "versions": {"jax": "0.10.2"},
}


def measured(variants, **overrides):
  data = {"what": "a state", "nbytes": 10**6, "leaves": 3, "rounds": 3, "machine": MACHINE, "left_out": {}}
  return data | {"variants": variants} | overrides


def cli(*arguments):
  return commands.cli("bench", *arguments)


def test_a_suite_is_measured_drawn_and_put_into_docs(tmp_path, monkeypatch):
  monkeypatch.delenv(TORCH_PYTHON, raising=False)
  page = tmp_path / "page.md"
  page.write_text("before\n<!-- bench:ratios tiny -->\nOUTDATED\n<!-- /bench -->\nafter\n")
  output, plot = tmp_path / "docs" / "b.json", tmp_path / "b.png"
  variants = "orbax,ckpt_jax,dcp,safetensors,raw"
  done = cli("tiny", "--rounds", 1, "--variants", variants, "-o", output, "--plot", plot, "--fill", page)
  assert done.returncode == 0, done.stderr
  suite = results.all_results(results.load(output))[0]
  names = {v.name for v in suite.variants}
  assert {"orbax", "ckpt_jax", "safetensors", "raw"} <= names
  assert suite.leaves == 41 and suite.nbytes == 20 * 4 * (64 * 64 + 64) + 4
  for v in suite.variants:
    assert 0 < v.median("blocking_s") <= v.median("commit_s") <= v.median("synced_s")
    assert v.median("warm_s") > 0 and v.median("files") >= 1 and v.median("stored_nbytes") > 300_000
    assert (v.median("cold_s") is not None) == suite.machine["page_cache_dropped"]
  if "dcp" not in names:
    assert "torch is not installed" in suite.left_out["torch DCP save"]
    assert "torch DCP save is left out: torch is not installed" in done.stderr
  turns = re.findall(r"tiny (\d)/1 (.+?):", done.stderr)
  warm_up, first = ([title for number, title in turns if number == n] for n in "01")
  assert sorted(warm_up) == sorted(first) and first == warm_up[1:] + warm_up[:1], "the order rotates"
  assert done.stdout.index("times faster") < done.stdout.index("seconds, median") < done.stdout.index("stored MB")
  assert (tmp_path / "b-tiny.png").read_bytes().startswith(b"\x89PNG") and not plot.exists()
  text = page.read_text()
  assert "OUTDATED" not in text and "| ckpt_jax, defaults |" in text and text.endswith("after\n")
  shown = cli("tables", output, "--json")
  assert json.loads(shown.stdout) == results.load(output)


@pytest.mark.multiprocess
def test_four_devices_of_two_processes_are_measured_together(tmp_path):
  found = run_suite(suites.SUITES["tiny-multi"], None, 1, tmp_path)
  assert set(found["variants"]) == {"orbax", "ckpt_jax"}
  assert all(len(v["synced_s"]) == 1 for v in found["variants"].values())
  assert found["variants"]["ckpt_jax"]["predicted"]["commit_s"] > 0
  assert list(tmp_path.iterdir()) == [], "what was written is removed"


def test_ratio_is_orbax_median_over_the_others():
  suite = results.suite_results(
    "w1",
    measured(
      {
        "tuned": {"commit_s": [1.0, 9.0, 2.0], "cold_s": None},
        "orbax": {"commit_s": [8.0, 6.0, 7.0], "cold_s": [1.0, 1.0, 1.0]},
      }
    ),
  )
  assert [v.name for v in suite.variants] == ["orbax", "tuned"], "in the suite's order"
  assert suite.ratio("tuned", "commit_s") == 3.5
  assert suite.ratio("tuned", "commit_s", "tuned") == 1.0
  assert suite.ratio("tuned", "cold_s") is None and suite.ratio("dcp", "commit_s") is None
  assert suite.variant("tuned").metrics["commit_s"] == results.Spread(2.0, 1.0, 9.0)
  assert report.ratio_table(suite).rows[1] == ("ckpt_jax, tuned", "-", "3.50x", "-", "-", "-")


def test_aims_are_judged_by_the_worse_side():
  suite = results.suite_results(
    "compressible",
    measured(
      {
        "ckpt_jax": {"synced_s": [1.2]},
        "ckpt_jax-zstd": {"synced_s": [1.0]},
        "ckpt_jax-uncompressed": {"synced_s": [3.0]},
      }
    ),
  )
  (outcome,) = aims.outcomes([suite])
  assert outcome.ratio == pytest.approx(1 / 1.2) and not outcome.met


def test_a_suite_in_the_file_is_replaced_as_a_whole(tmp_path):
  file = tmp_path / "b.json"
  results.save(file, {"suites": {"w1": measured({"orbax": {}, "tuned": {}}), "w2": measured({"orbax": {}})}})
  results.save(file, {"suites": {"w1": measured({"orbax": {"commit_s": [1.0]}})}})
  data = results.load(file)
  assert set(data["suites"]) == {"w1", "w2"}
  assert data["suites"]["w1"]["variants"] == {"orbax": {"commit_s": [1.0]}}, "no ratio over two runs"
  assert [s.name for s in results.all_results(data)] == ["w1", "w2"]


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 0, "suites": {}}', '{"leaves": 64}'])
def test_a_file_of_something_else_is_refused_and_kept(tmp_path, text):
  file = tmp_path / "other.json"
  file.write_text(text)
  with pytest.raises(ConfigError, match=r"other\.json"):
    results.save(file, {"suites": {}})
  assert file.read_text() == text


def test_missing_peers_say_what_to_install(monkeypatch):
  tiny = suites.SUITES["tiny"]
  absent = dataclasses.replace(VARIANTS["safetensors"], package="not_there")
  assert 'pip install "ckpt_jax[bench]"' in left_out(absent, tiny)
  monkeypatch.setenv(TORCH_PYTHON, "/no/such/python")
  assert "/no/such/python" in left_out(VARIANTS["dcp"], tiny)
  monkeypatch.setenv(TORCH_PYTHON, "/bin/false")
  assert "/bin/false" in left_out(VARIANTS["dcp"], tiny)
  assert "cannot write to s3://" in left_out(VARIANTS["orbax"], suites.SUITES["bucket-s3"])
  assert left_out(VARIANTS["raw"], tiny) is None


@pytest.mark.parametrize("name", ["orbax", "ckpt_jax", "safetensors", "raw"])
def test_other_bits_than_were_saved_are_noticed(tmp_path, name):
  target = make_target(VARIANTS[name], suites.SUITES["tiny"], str(tmp_path))
  target.save(0)
  target.wait()
  restored = target.restore(0)
  assert target.same(restored)
  if name in ("safetensors", "raw"):
    changed = restored | {"l0.b": restored["l0.b"] * 1.0}
    changed["l0.b"][3] = -changed["l0.b"][3]
  else:
    leaf = restored["l0"]["b"]
    changed = restored | {"l0": restored["l0"] | {"b": leaf.at[3].set(-leaf[3])}}
  assert not target.same(changed)
  target.close()


def test_a_process_that_fails_is_reported_with_its_output(tmp_path):
  nameless = dataclasses.replace(suites.SUITES["tiny"], name="no-such-suite")
  job = WorkerJob(nameless, VARIANTS["raw"], str(tmp_path), {})
  try:
    with pytest.raises(CheckpointError, match=r"(?s)no-such-suite, raw.*ended while asked to make.*KeyError"):
      job.receive("make its state", 60)
  finally:
    job.stop()
  blocked = tmp_path / "0"
  blocked.write_text("in the way")
  job = WorkerJob(suites.SUITES["tiny"], VARIANTS["raw"], str(tmp_path), {})
  try:
    job.receive("make its state", 60)
    with pytest.raises(CheckpointError, match="cannot save: FileExistsError"):
      job.ask("save", step=0)
  finally:
    job.stop()


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["w1", "w9"], "no suite 'w9'"),
    (["suites", "tiny", "--variants", "dpc"], "no variant 'dpc'"),
    (["bukcet"], "did you mean bucket?"),
    (["tables", __file__], "not JSON"),
  ],
)
def test_wrong_usage_exits_2(arguments, message):
  done = cli(*arguments)
  assert done.returncode == 2 and message in " ".join(done.stderr.split()), done.stderr


def test_groups_name_their_suites_once():
  assert [s.name for s in suites.chosen_suites(["bucket", "w1", "bucket-gs"])] == ["bucket-gs", "bucket-s3", "w1"]


@pytest.mark.parametrize("name", list(suites.SUITES))
def test_suites_have_the_sizes_of_their_descriptions(name):
  suite = suites.SUITES[name]
  if suite.name in ("w1", "w3"):  # a gigabyte each; the second is the first's state
    assert suite.make is suites.SUITES["w1"].make
    return
  state = dict(suites.leaves(suites.state_of(suite)))
  again = dict(suites.leaves(suites.state_of(suite)))
  assert all((again[k] == v).all() for k, v in state.items()), "the same bits for every variant"
  megabytes = sum(x.nbytes for x in state.values()) / 1e6
  stated = re.search(r"([\d.]+) MB", suite.what)
  assert stated is None or float(stated[1]) == pytest.approx(megabytes, rel=0.01)
  count = re.search(r"([\d,]+) leaves", suite.what)
  assert count is None or int(count[1].replace(",", "")) == len(state)


def test_a_run_that_is_ended_leaves_nothing_behind(tmp_path):
  command = [
    sys.executable,
    "-m",
    "ckpt_jax",
    "bench",
    "tiny",
    "--rounds",
    "1000",
    "--variants",
    "raw",
    "--dir",
    tmp_path,
  ]
  with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as run:
    for line in run.stderr:
      if line.startswith("tiny 1/1000"):
        break
    workers = psutil.Process(run.pid).children(recursive=True)
    assert workers
    run.terminate()
    assert run.wait(60) == 143
  assert psutil.wait_procs(workers, timeout=30)[1] == []
  assert list(tmp_path.iterdir()) == []


def test_docs_show_a_picture_of_every_suite():
  found = results.all_results(results.load(ROOT / "docs" / "bench.json"))
  shown = re.findall(r"\(bench-([\w-]+)\.png\)", (ROOT / "docs" / "benchmarks.md").read_text())
  drawn = sorted(p.stem.removeprefix("bench-") for p in (ROOT / "docs").glob("bench-*.png"))
  assert sorted(shown) == sorted(s.name for s in found) == drawn


@pytest.mark.parametrize("page", ["docs/benchmarks.md", "README.md"])
def test_docs_quote_the_committed_results(page):
  text = (ROOT / page).read_text()
  found = results.all_results(results.load(ROOT / "docs" / "bench.json"))
  assert "<!-- bench:" in text
  assert report.fill(text, found, page) == text, "run ckpt-jax bench tables docs/bench.json --fill " + page
