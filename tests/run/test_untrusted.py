"""What a checkpoint's JSON may hold: anything else is a CorruptCheckpointError that names the file."""

import json
import posixpath

import pytest
from etils import epath
from hypothesis import given
from hypothesis import strategies as st

from ckpt_jax.errors import CorruptCheckpointError
from ckpt_jax.run import untrusted

anything = st.recursive(
  st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
  lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
  max_leaves=10,
)
WHERE = "run/3/file"


def refused(check, data):
  """What a check says of `data`; None if it passes. Any other error than CorruptCheckpointError is raised."""
  try:
    check(data, WHERE)
  except CorruptCheckpointError as e:
    assert WHERE in str(e) and len(str(e)) < 300
    return str(e)
  return None


@given(st.text(max_size=20) | st.lists(st.sampled_from(["..", ".", "", "a", "/", "\0"]), max_size=6).map("/".join))
def test_names_that_pass_stay_in_their_directory(name):
  inside = posixpath.normpath(posixpath.join("/run/3/default", name))
  passes = untrusted.check_name(name) is None
  assert not passes or ((inside + "/").startswith("/run/3/default/") and "\0" not in name)
  if not passes:
    assert "leads out of the checkpoint" in untrusted.check_name(name)


@pytest.mark.parametrize("name", ["params", "a/b", "...", "..a", "a..", "", ".", "é/ü", "a b"])
def test_ordinary_names_pass(name):
  assert untrusted.check_name(name) is None


stamps = st.none() | st.integers(-(2**70), 2**70) | st.floats() | st.booleans() | st.text(max_size=3)
entries = st.fixed_dictionaries(
  {},
  optional={
    "key_metadata": anything | st.lists(st.fixed_dictionaries({"key": st.text(max_size=4) | stamps}), max_size=3),
    "value_metadata": anything | st.dictionaries(st.text(max_size=3), anything, max_size=2),
  },
)


@given(anything | st.fixed_dictionaries({"tree_metadata": anything | st.dictionaries(st.text(max_size=5), entries)}))
def test_trees_that_pass_have_a_name_and_a_type_for_each_leaf(data):
  if refused(untrusted.check_tree, data) is None:
    for entry in data.get("tree_metadata", {}).values():
      assert isinstance(entry["value_metadata"], dict)
      assert all(untrusted.check_name(str(key["key"])) is None for key in entry["key_metadata"])


def entry(*keys):
  return {"key_metadata": [{"key": key, "key_type": 2} for key in keys], "value_metadata": {"value_type": "jax.Array"}}


def test_sound_metadata_passes_and_what_is_wrong_is_named():
  assert refused(untrusted.check_tree, {"tree_metadata": {"('a', 0)": entry("a", 0)}}) is None
  assert "'../secret' leads out" in refused(untrusted.check_tree, {"tree_metadata": {"x": entry("../secret")}})
  deep = {"tree_metadata": {"x": entry(*["a"] * (untrusted.MAX_DEPTH + 1))}}
  assert "nested 201 deep; 200 is the limit" in refused(untrusted.check_tree, deep)
  assert "'x' has a key that is not a name" in refused(untrusted.check_tree, {"tree_metadata": {"x": entry(None)}})
  assert refused(untrusted.check_object, {"loss": 1}) is None and refused(untrusted.check_object, [1])


@given(st.lists(st.tuples(anything, st.integers(0, 16)), max_size=4))
def test_shapes_are_counted_or_refused(shapes):
  try:
    total = untrusted.claimed_bytes(shapes, WHERE)
  except CorruptCheckpointError as e:
    assert "is not the shape of an array" in str(e) and len(str(e)) < 300
  else:
    assert total >= 0 and all(isinstance(n, int) for shape, _ in shapes for n in shape)


def test_claims_beyond_any_compression_are_refused_and_small_ones_are_not():
  assert untrusted.claimed_bytes([((2, 3), 4), ((), 8), ((0, 5), 4)], WHERE) == 32
  untrusted.check_claim(untrusted.FREE_CLAIM, 0, WHERE)
  untrusted.check_claim(untrusted.FREE_CLAIM + 10 * untrusted.MAX_COMPRESSION, 10, WHERE)
  with pytest.raises(CorruptCheckpointError, match=r"claims 1 GB of arrays in files of 0\.000 MB"):
    untrusted.check_claim(untrusted.FREE_CLAIM + 10 * untrusted.MAX_COMPRESSION + 1, 10, WHERE)


@pytest.mark.parametrize(
  "content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000, b"1" * 100_000, b"nul"]
)
def test_files_that_are_no_json_are_corrupt(content, tmp_path):
  (tmp_path / "file").write_bytes(content)
  with pytest.raises(CorruptCheckpointError, match="file: not JSON"):
    untrusted.read_json(epath.Path(tmp_path / "file"))


def test_json_is_read_within_its_size_and_if_it_is_intact(tmp_path, monkeypatch):
  file = epath.Path(tmp_path / "file")
  with pytest.raises(FileNotFoundError):
    untrusted.read_json(file)
  file.write_text(json.dumps({"a": 1}))
  assert untrusted.read_json(file) == untrusted.read_json(file, lambda text: text == b'{"a": 1}') == {"a": 1}
  with pytest.raises(CorruptCheckpointError, match="its bits are not those that were written"):
    untrusted.read_json(file, lambda text: False)
  monkeypatch.setattr(untrusted, "MAX_JSON_BYTES", 7)
  with pytest.raises(CorruptCheckpointError, match="no checkpoint has as much"):
    untrusted.read_json(file)
