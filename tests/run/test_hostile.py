"""Checkpoints that somebody else made, to harm or by accident: right bits, or one of three errors, in bounded time."""

import copy
import json
import os
import pathlib
import pickle
import shutil
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ckpt_jax as ckpt

STATE = {
  "params": {"w": jnp.arange(12.0).reshape(3, 4), "b": jnp.full(3, -0.0)},
  "key": jax.random.key(1),
  "empty": np.zeros((0, 2)),
  "n": 3,
  "name": "run",
}
EXAMPLES = int(os.environ.get("CKPT_JAX_FUZZ", "60"))  # a campaign has thousands
CLEAN = (ckpt.CorruptCheckpointError, ckpt.StructureMismatchError, ckpt.NoCheckpointError)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
  run = tmp_path_factory.mktemp("corpus") / "run"
  with ckpt.Checkpointer(run) as c:
    c.save(3, STATE, metrics={"loss": 0.5}, extras={"seen": [1, 2]})
  return run


def bits(tree):
  leaves = jax.tree.leaves(tree)
  return [
    (np.asarray(jax.random.key_data(x)) if str(getattr(x, "dtype", "")).startswith("key<") else np.asarray(x)).tobytes()
    for x in leaves
  ]


def open_and_restore(run, *likes):
  """What happened in each restore: `right`, or the name of a clean error. Anything else is raised."""
  started = time.process_time()
  found = []
  with ckpt.Checkpointer(run, {"restore": {"on_corruption": "raise"}}) as c:
    for like in likes:
      try:
        c.latest_step()
        got = c.restore(like=like)
        assert bits(got.state) == bits(STATE), "restored with wrong bits"
        assert got.metrics == {"loss": 0.5} and got.extras == {"seen": [1, 2]}
        found.append("right")
      except CLEAN as e:
        found.append(type(e).__name__)
  assert time.process_time() - started < 20
  return found


def altered(corpus, target, file, content):
  shutil.rmtree(target, ignore_errors=True)
  shutil.copytree(corpus, target)
  path = target / "3" / file
  path.unlink()
  path.write_bytes(content)
  return target


JSONS = ["_CHECKPOINT_METADATA", "default/_METADATA", "default/_sharding", "metrics/metrics"]
ABSURD = [
  b"",
  b"{",
  b"null",
  b"[]",
  b"[" * 100_000,
  b'{"a":' * 100_000,
  b'{"tree_metadata": {}}',
  b"1" * 100_000,
  b"\xff\xfe\x00",
  b'{"commit_timestamp_nsecs": 1e999, "init_timestamp_nsecs": "soon", "custom_metadata": 7, "item_handlers": [[]]}',
]


@pytest.mark.parametrize("file", JSONS)
def test_absurd_metadata_is_corrupt_and_nothing_else(file, corpus, tmp_path):
  # Orbax's file of metrics is for Orbax: ours are in the step's own metadata, under its seal.
  want = "right" if file == "metrics/metrics" else "CorruptCheckpointError"
  for content in ABSURD:
    run = altered(corpus, tmp_path / "run", file, content)
    assert open_and_restore(run, None, STATE) == [want, want], content[:20]


values = st.recursive(
  st.none()
  | st.booleans()
  | st.integers(-(2**70), 2**70)
  | st.floats()
  | st.sampled_from(
    ["", "..", "../../etc/passwd", "/etc/passwd", "jax.Array", "np.ndarray", "int", "Dict", "key<fry>", "float4"]
  ),
  lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
  max_leaves=6,
)


def places(data, at=()):
  """Paths of all values in a JSON."""
  yield at
  items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
  for key, value in items:
    yield from places(value, (*at, key))


def replaced(data, at, value, remove):
  data = copy.deepcopy(data)
  if not at:
    return value
  parent = data
  for key in at[:-1]:
    parent = parent[key]
  if remove:
    del parent[at[-1]]
  else:
    parent[at[-1]] = value
  return data


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_change_of_a_metadata_file_is_harmless_or_told(data, corpus, tmp_path):
  files = [f for f in JSONS if (corpus / "3" / f).exists()]
  files += [str(p.relative_to(corpus / "3")) for p in (corpus / "3" / "default").rglob("*") if p.suffix == ".json"]
  files += [str(p.relative_to(corpus / "3")) for p in (corpus / "3" / "default" / "array_metadatas").iterdir()]
  file = data.draw(st.sampled_from(sorted(set(files))))
  before = json.loads((corpus / "3" / file).read_bytes())
  at = data.draw(st.sampled_from(list(places(before))))
  after = replaced(before, at, data.draw(values), bool(at) and data.draw(st.booleans()))
  like = data.draw(st.sampled_from([None, STATE]))
  open_and_restore(altered(corpus, tmp_path / "run", file, json.dumps(after).encode()), like)


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_change_of_any_file_is_harmless_or_told(data, corpus, tmp_path):
  files = sorted(str(p.relative_to(corpus / "3")) for p in (corpus / "3").rglob("*") if p.is_file())
  file = data.draw(st.sampled_from(files))
  content = bytearray((corpus / "3" / file).read_bytes())
  what = data.draw(st.sampled_from(["flip", "cut", "zero", "insert", "replace"]))
  at = data.draw(st.integers(0, max(0, len(content) - 1)))
  if what == "flip" and content:
    content[at] ^= 1 << data.draw(st.integers(0, 7))
  elif what == "cut":
    del content[at:]
  elif what == "zero":
    content[at : at + 64] = bytes(len(content[at : at + 64]))
  elif what == "insert":
    content[at:at] = data.draw(st.binary(max_size=32))
  else:
    content = bytearray(data.draw(st.binary(max_size=200)))
  like = data.draw(st.sampled_from([None, STATE]))
  open_and_restore(altered(corpus, tmp_path / "run", file, bytes(content)), like)


def test_names_that_lead_out_of_the_checkpoint_are_refused(corpus, tmp_path):
  for name in ("..", "../../../secret", "/etc/passwd", "a/../../b", "a\0b"):
    tree = json.loads((corpus / "3" / "default" / "_METADATA").read_text())
    entries = tree["tree_metadata"]
    some = next(k for k in entries if "params" in k)
    entry = entries.pop(some)
    entry["key_metadata"][0]["key"] = name
    entries[str((name, *[k["key"] for k in entry["key_metadata"][1:]]))] = entry
    run = altered(corpus, tmp_path / "run", "default/_METADATA", json.dumps(tree).encode())
    assert open_and_restore(run, None) == ["CorruptCheckpointError"]


@pytest.mark.parametrize("name", ["..", "a/../../b", "/abs"])
def test_such_names_are_not_saved_either(name, tmp_path):
  with ckpt.Checkpointer(tmp_path) as c, pytest.raises(ckpt.CheckpointError, match="leads out of the checkpoint"):
    c.save(0, {name: jnp.ones(2)})


def test_nothing_is_unpickled_or_run_while_a_checkpoint_is_read(corpus, tmp_path):
  run = tmp_path / "run"
  shutil.copytree(corpus, run)

  class Evil:
    def __reduce__(self):
      return (os.system, (f"touch {tmp_path}/pwned",))

  for name in ("checkpoint", "default/aggregate", "default/state.pkl", "_METADATA.pkl"):
    (run / "3" / name).write_bytes(pickle.dumps(Evil()))
  seen = []
  watching = [True]

  def audit(event, args):
    if watching[0] and event in ("pickle.find_class", "os.system", "subprocess.Popen", "marshal.loads"):
      seen.append((event, args))

  sys.addaudithook(audit)
  with ckpt.Checkpointer(run) as c:
    c.restore(like=STATE)
    c.restore()
  watching[0] = False
  assert not [s for s in seen if s[0] != "marshal.loads"]
  assert not pathlib.Path(tmp_path / "pwned").exists()


def test_shapes_that_the_files_cannot_hold_are_refused_before_memory_is_taken(tmp_path):
  """Zeros are never stored by plain TensorStore, so a few bytes can claim terabytes."""
  import tensorstore as ts

  with ckpt.Checkpointer(tmp_path) as c:
    c.save(0, {"w": jnp.zeros((4, 4))})
  item = tmp_path / "0" / "default"
  store = ts.KvStore.open({"driver": "ocdbt", "base": f"file://{item}/"}).result()
  key = next(k for k in store.list().result() if k.endswith(b".zarray"))
  meta = json.loads(store.read(key).result().value)
  meta["shape"], meta["chunks"] = [1 << 20, 1 << 20], [1 << 20, 1 << 20]
  store.write(key, json.dumps(meta).encode()).result()
  config = {"restore": {"on_corruption": "raise", "verify": False}}
  with (
    ckpt.Checkpointer(tmp_path, config) as c,
    pytest.raises(ckpt.CorruptCheckpointError, match=r"claims .* in files"),
  ):
    c.restore()
