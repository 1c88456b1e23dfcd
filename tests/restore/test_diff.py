"""`ckpt.diff` and `ckpt-jax diff`: every leaf of two steps, against numpy, on every kind of step and storage."""

import json
import subprocess
import sys
import threading

import hypothesis
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from commands import cli
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from test_checkpointer import odd_state

import ckpt_jax as ckpt
from ckpt_jax.restore import diff as differ

DTYPES = [
  "float32",
  "float64",
  "float16",
  "bfloat16",
  "float8_e4m3fn",
  "int4",
  "int8",
  "uint32",
  "int64",
  "bool",
  "complex64",
]
ANY = {"health": {"nonfinite": "ignore"}, "layout": {"compression": "off"}}


def save(run, *states, **config):
  with ckpt.Checkpointer(run, ckpt.Config(**(ANY | config))) as c:
    for step, state in enumerate(states):
      c.save(step, state)
  return run


def by_path(found):
  return {leaf.path: leaf for leaf in found.leaves}


def test_a_step_is_the_same_as_itself_whatever_it_holds(tmp_path):
  save(tmp_path, odd_state(), odd_state())
  found = ckpt.diff(tmp_path, 0, tmp_path, 1)
  assert found.differing == () and {leaf.what for leaf in found.leaves} == {"same"}
  assert "same" in repr(found) and by_path(found)["numpy"].norm_a == pytest.approx(np.linalg.norm(np.arange(5)))


def test_structure_shapes_dtypes_text_and_keys(tmp_path):
  one = {
    "gone": jnp.ones(2),
    "w": jnp.ones((2, 3)),
    "d": jnp.ones(4),
    "key": jax.random.key(0),
    "text": "a",
    "n": 1,
    "e": jnp.ones((0, 2)),
  }
  other = {"new": jnp.ones(2), "w": jnp.ones((3, 2)), "d": jnp.ones(4, jnp.bfloat16), "key": jax.random.key(1)}
  other |= {"text": "b", "n": 2.5, "e": jnp.ones((0, 2))}
  found = by_path(ckpt.diff(save(tmp_path / "a", one), 0, save(tmp_path / "b", other), 0))
  assert {path: leaf.what for path, leaf in found.items()} == {
    "gone": "only in A",
    "new": "only in B",
    "w": "shape",
    "d": "dtype",
    "n": "dtype",
    "key": "values",
    "text": "values",
    "e": "same",
  }
  assert found["d"].differing == 0 and found["d"].cosine == pytest.approx(1) and found["w"].norm_a is None
  assert found["n"].max_abs == 1.5 and found["key"].elements == 2 and found["text"].differing == 1
  assert [leaf.what for leaf in ckpt.diff(tmp_path / "a", 0, tmp_path / "b", 0).leaves][:3] == [
    "only in A",
    "only in B",
    "shape",
  ]


def test_other_implementations_of_keys_differ_in_dtype(tmp_path):
  found = ckpt.diff(
    save(tmp_path / "a", {"k": jax.random.key(0)}), 0, save(tmp_path / "b", {"k": jax.random.key(0, impl="rbg")}), 0
  )
  assert [leaf.what for leaf in found.leaves] == ["dtype"]


values = st.sampled_from(DTYPES).flatmap(
  lambda name: hnp.array_shapes(min_dims=0, max_dims=3, max_side=4).flatmap(
    lambda shape: st.tuples(*[hnp.arrays(np.uint8, (*shape, np.dtype(name).itemsize))] * 2).map(
      lambda pair: tuple(_as(name, array) for array in pair)
    )
  )
)


def _as(name, raw):
  dtype = np.dtype(name)
  if dtype == np.bool_:
    return raw[..., 0] % 2 == 1
  if name == "int4":
    return (raw[..., 0] % 16).astype(np.int8).astype(ml_dtypes.int4)
  return raw.view(dtype)[..., 0]


@hypothesis.given(st.lists(values, min_size=1, max_size=4), st.integers(1, 5))
def test_figures_are_those_of_numpy(pairs, block):
  for a, b in pairs:
    tally = differ._Tally()
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(differ, "_BLOCK", block)
      tally.add(a, b)
    got = tally.figures()
    kind = np.complex128 if a.dtype.kind == "c" else np.float64
    with np.errstate(all="ignore"):
      x, y = a.astype(kind).reshape(-1), b.astype(kind).reshape(-1)
      apart = np.abs(x - y)
      apart[(x == y) | (np.isnan(x) & np.isnan(y))] = 0
      apart[np.isnan(apart)] = np.inf
      raw = [np.ascontiguousarray(v).reshape(-1).view(np.uint8).reshape(v.size, -1) for v in (a, b)]
      assert got["differing"] == (raw[0] != raw[1]).any(axis=1).sum() and got["elements"] == a.size
      assert got["max_abs"] == pytest.approx(apart.max(initial=0), nan_ok=True)
      assert got["max_rel"] >= 0 and (got["max_rel"] <= 2.000001 or np.isinf(got["max_rel"]))
      assert got["norm_a"] == pytest.approx(np.linalg.norm(x), nan_ok=True)
      assert got["norm_b"] == pytest.approx(np.linalg.norm(y), nan_ok=True)
      assert got["norm_diff"] == pytest.approx(np.linalg.norm(apart), nan_ok=True)


def test_64_bit_integers_are_compared_exactly():
  tally = differ._Tally()
  tally.add(np.array([2**62, -(2**63)]), np.array([2**62 + 1, -(2**63)]))
  assert tally.figures()["max_abs"] == 1 and tally.figures()["differing"] == 1


def test_signs_of_zero_and_payloads_of_nan_are_bits_that_differ(tmp_path):
  a = np.array([0.0, 1.0, np.nan, np.nan, np.inf], np.float32)
  b = a.copy()
  b[0], b[3] = -0.0, 2.0
  b[2:3] = np.array([0x7FC00001], np.uint32).view(np.float32)
  (leaf,) = ckpt.diff(save(tmp_path / "a", {"x": a}), 0, save(tmp_path / "b", {"x": b}), 0).leaves
  assert leaf.differing == 3 and leaf.max_abs == leaf.max_rel == leaf.change == np.inf and leaf.cosine is None


@pytest.mark.parametrize("chunks", [(8_192, 8_192), (8_192, 100_000), (None, 4_096)])
def test_large_leaves_are_compared_by_parts_whatever_their_chunks(tmp_path, monkeypatch, chunks):
  monkeypatch.setattr(differ, "_GROUP_NBYTES", 20_000)
  rng = np.random.default_rng(0)
  a = {"x": rng.standard_normal((300, 70)), "small": jnp.ones(9)}
  b = {"x": a["x"].copy(), "small": jnp.ones(9)}
  b["x"][299, 69] += 0.25
  b["x"][17, 3] = 0
  for name, state, chunk in zip("ab", (a, b), chunks, strict=True):
    save(tmp_path / name, state, layout={"compression": "off"} | ({"chunk_size": chunk} if chunk else {}))
  found = ckpt.diff(tmp_path / "a", 0, tmp_path / "b", 0)
  (leaf,) = found.differing
  assert leaf.path == "x" and leaf.elements == 21_000 and leaf.differing == 2
  assert leaf.max_abs == pytest.approx(max(0.25, abs(a["x"][17, 3]))) and leaf.norm_a == pytest.approx(
    np.linalg.norm(a["x"])
  )
  assert leaf.norm_diff == pytest.approx(np.linalg.norm(a["x"] - b["x"]))


def test_packed_steps_and_plain_orbax(tmp_path):
  state = {"a": jnp.arange(9.0), "b": {"c": jnp.ones((3, 3), jnp.bfloat16)}, "n": 3}
  save(tmp_path / "packed", state, layout={"pack": "on"})
  with ocp.CheckpointManager(tmp_path / "orbax") as manager:
    manager.save(7, args=ocp.args.StandardSave(state | {"a": jnp.arange(9.0).at[4].set(0)}))
  found = ckpt.diff(tmp_path / "packed", 0, tmp_path / "orbax", 7)
  assert [leaf.path for leaf in found.differing] == ["a"] and found.differing[0].max_abs == 4


def test_buckets_beside_a_disk(tmp_path, gcs, s3):
  state = {"w": jnp.arange(30.0), "key": jax.random.key(0)}
  for run in (tmp_path / "r", f"{gcs.url}/r", f"{s3.url}/r"):
    save(run, state, {"w": state["w"].at[3].set(0), "key": jax.random.key(0)})
  assert ckpt.diff(f"{gcs.url}/r", 0, f"{s3.url}/r", 0).differing == ()
  assert [leaf.path for leaf in ckpt.diff(f"{s3.url}/r", 1, tmp_path / "r", 0).differing] == ["w"]


def test_only_some_leaves(tmp_path):
  save(tmp_path, {"params": {"a": jnp.ones(2), "b": jnp.ones(2)}, "opt": jnp.ones(2)})
  assert [x.path for x in ckpt.diff(tmp_path, 0, tmp_path, 0, only="params").leaves] == ["params/a", "params/b"]
  with pytest.raises(ckpt.StructureMismatchError, match="did you mean 'params'"):
    ckpt.diff(tmp_path, 0, tmp_path, 0, only="param")
  done = cli("diff", f"{tmp_path}@0", "@0", "--only", "param")
  assert done.returncode == 2 and "did you mean 'params'" in done.stderr


def test_metrics_extras_and_containers_are_compared_too(tmp_path):
  with ckpt.Checkpointer(tmp_path) as c:
    c.save(0, {"x": (jnp.ones(2), {}), "y": {}}, metrics={"loss": 1, "old": 2.0}, extras={"data": {"at": [1, 2]}})
    c.save(
      1, {"x": [jnp.ones(2), {}], "y": {}}, metrics={"loss": 1.0, "nan": 0}, extras={"data": {"at": [1, 3]}, "n": None}
    )
  found = ckpt.diff(tmp_path, 0, tmp_path, 1)
  assert not found.differing and not found.same and ckpt.diff(tmp_path, 1, tmp_path, 1).same
  assert [str(other) for other in found.beside][:5] == [
    "metrics/loss: 1 -> 1.0",
    "metrics/old: 2.0 only in A",
    "extras/data/at/1: 2 -> 3",
    "metrics/nan: 0 only in B",
    "extras/n: null only in B",
  ]
  assert ckpt.diff(tmp_path, 0, tmp_path, 1, only="x").same
  done = cli("diff", f"{tmp_path}@0", "@1")
  assert done.returncode == 1 and "1 leaf: 1 same; 3 of the metrics differ; 2 of the extras differ" in done.stdout
  assert "extras/data/at/1: 2 -> 3" in done.stdout


def test_types_of_containers_are_compared(tmp_path):
  save(tmp_path, {"a": [jnp.ones(2)], "b": {}}, {"a": {"0": jnp.ones(2)}, "b": {}, "c": {}})
  beside = {other.path: (other.what, other.a, other.b) for other in ckpt.diff(tmp_path, 0, tmp_path, 1).beside}
  assert beside == {
    "containers/a": ("values", "list", "dict"),
    "containers/c": ("only in B", None, "dict"),
  }


def test_progress_counts_the_bytes_of_both_steps(tmp_path, monkeypatch):
  save(tmp_path, {"x": jnp.ones(100_000)}, {"x": jnp.zeros(100_000)})
  seen, reported = [], threading.Event()

  def on_progress(progress):
    seen.append(progress)
    reported.set()

  monkeypatch.setattr(differ._Tally, "add", lambda *_: reported.wait(60))  # long enough to be worth a report
  ckpt.diff(tmp_path, 0, tmp_path, 1, on_progress=on_progress)
  assert seen[-1].finished and seen[-1].done == seen[-1].total == 800_000


def test_what_cannot_be_compared_is_an_error(tmp_path):
  save(tmp_path, {"x": jnp.ones(2)})
  with pytest.raises(ckpt.NoCheckpointError, match="committed steps: 0"):
    ckpt.diff(tmp_path, 0, tmp_path, 5)


def test_memory_is_bounded_by_the_parts(tmp_path):
  big = jnp.asarray(np.random.default_rng(0).standard_normal((32, 1 << 20), np.float32))
  save(tmp_path, {"x": big}, {"x": big + 1}, layout={"compression": "off", "chunk_size": "1MiB"})
  program = """
import resource, sys
import ckpt_jax as ckpt
from ckpt_jax.restore import diff

diff._GROUP_NBYTES = 4 << 20
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
(leaf,) = ckpt.diff(sys.argv[1], 0, sys.argv[1], 1).differing
print(leaf.differing, 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""
  done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
  differing, more = map(int, done.stdout.split())
  assert differing > 0.99 * big.size and more < 0.8 * big.nbytes, f"{more:,} bytes for two steps of {big.nbytes:,}"


# -- the command


def test_diff_exits_with_1_if_steps_differ_and_prints_the_leaf_that_changed_most_first(tmp_path):
  save(tmp_path, {"a": jnp.ones(4), "b": jnp.ones(4)}, {"a": jnp.full(4, 1.1), "b": jnp.full(4, 9.0)})
  done = cli("diff", f"{tmp_path}@0", "@1")
  assert (
    done.returncode == 1
    and done.stdout.index("│ b ") < done.stdout.index("│ a ")
    and "2 differ in values" in done.stdout
  )
  same = cli("diff", f"{tmp_path}@0", f"{tmp_path}@0", "--all")
  assert same.returncode == 0 and "2 leaves: 2 same" in same.stdout and "│ a " in same.stdout
  found = json.loads(cli("diff", f"{tmp_path}@0", "@1", "--json").stdout)
  assert found["same"] is False and found["leaves"][0]["path"] == "b" and found["leaves"][0]["max_abs"] == 8


def test_diff_shows_itself_in_a_notebook(tmp_path):
  save(tmp_path, {"<a>": jnp.ones(4)}, {"<a>": jnp.ones(5)})
  html = ckpt.diff(tmp_path, 0, tmp_path, 1)._repr_html_()
  assert "&lt;a&gt;" in html and "[4] -&gt; [5]" in html


@pytest.mark.parametrize(
  ("arguments", "code"), [(["x", "y"], 2), (["RUN@0"], 2), (["RUN@0", "RUN@1"], 1), (["RUN@0", "@7"], 1)]
)
def test_wrong_usage_and_missing_steps(tmp_path, arguments, code):
  save(tmp_path, {"a": jnp.ones(4)})
  done = cli("diff", *(argument.replace("RUN", str(tmp_path)) for argument in arguments))
  assert done.returncode == code and done.stderr
