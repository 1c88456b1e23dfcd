"""Digests in the JSON of a step: they survive a rewrite by Orbax, and no change of what they cover."""

import copy
import json

from hypothesis import given
from hypothesis import strategies as st

from ckpt_jax.run import checksums

values = st.recursive(
  st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=8),
  lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
  max_leaves=8,
)
names = st.text(min_size=1, max_size=5).filter(lambda name: name not in ("digest", "seal"))
objects = st.dictionaries(names, values, min_size=1, max_size=4)


@given(objects, st.randoms())
def test_digest_holds_however_the_json_is_written_again(data, random):
  entries = list(checksums.with_digest(data).items())
  random.shuffle(entries)
  for indent in (None, 2):
    again = json.loads(json.dumps(dict(entries), indent=indent))
    assert checksums.is_intact(again)
    assert {k: v for k, v in again.items() if k in data} == data


@given(objects, values, st.data())
def test_any_other_value_key_or_missing_entry_breaks_the_digest(data, other, draw):
  digested = checksums.with_digest(data)
  key = draw.draw(st.sampled_from(sorted(data)))
  without = {k: v for k, v in digested.items() if k != key}
  assert not checksums.is_intact(without)
  assert not checksums.is_intact(digested | {key + "x": other})
  if json.dumps(other) != json.dumps(data[key]):
    assert not checksums.is_intact(digested | {key: other})


def test_data_is_not_changed_and_without_a_digest_it_is_intact():
  data = {"nbytes": 8, "extras": [1, {"a": None}]}
  before = copy.deepcopy(data)
  digested = checksums.with_digest(data)
  assert data == before and digested.keys() - data.keys() == {"digest"}
  assert checksums.is_intact(data) and checksums.is_intact({}) and not checksums.is_intact({"digest": "0" * 16})


@given(objects, st.data())
def test_any_flipped_bit_or_lost_end_of_a_file_with_a_digest_is_found(data, draw):
  whole = checksums.with_file_digest(json.dumps(data))
  assert checksums.is_intact_file(whole)
  assert {k: v for k, v in json.loads(whole).items() if k in data} == data
  at = draw.draw(st.integers(0, len(whole) - 1))
  flipped = bytearray(whole)
  flipped[at] ^= 1 << draw.draw(st.integers(0, 7))
  assert found_out(bytes(flipped), data)
  assert found_out(whole[:at], data)
  assert found_out(whole[:at] + bytes(len(whole) - at), data)


def found_out(content, data):
  """Whether a reader refuses it. A file without a digest is one of an older version; its entries must be the same."""
  try:
    read = json.loads(content)
  except ValueError:
    return True
  return not checksums.is_intact_file(content) or (isinstance(read, dict) and data.items() <= read.items())


def test_files_of_older_versions_have_no_digest():
  assert checksums.is_intact_file(b'{"leaves": {}}') and checksums.is_intact_file(b"")


def test_text_that_looks_like_a_digest_gets_one_too():
  text = json.dumps({"a": ', "seal": "0123456789abcdef"}'})
  whole = checksums.with_file_digest(text)
  assert checksums.is_intact_file(whole) and json.loads(whole).items() >= json.loads(text).items()
  assert not checksums.is_intact_file(whole.replace(b'"}', b'0"}'))
