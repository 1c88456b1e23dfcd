"""What an error of someone else is reported as: its root cause, without secrets; and whether storage was to blame."""

import errno
import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt_jax import failures
from ckpt_jax.errors import CheckpointError, StorageError

VARIABLES = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID")
KEYS = st.text("abcdefghijklmnopqrstuvwxyz0123456789+/", min_size=16, max_size=40)


def chain(*errors, by="cause"):
  """The first of `errors`, raised because of the second, and so on."""
  for outer, inner in itertools.pairwise(errors):
    if by == "cause":
      outer.__cause__ = inner
    else:
      outer.__context__ = inner
  return errors[0]


@given(st.lists(KEYS, min_size=3, max_size=3, unique=True), st.lists(st.sampled_from([0, 1, 2, "text ", "a=b&"])))
def test_no_value_of_a_credential_variable_is_left_in_a_text(values, parts):
  text = "".join(values[part] if isinstance(part, int) else part for part in parts)
  with pytest.MonkeyPatch.context() as patch:
    for name, value in zip(VARIABLES, values, strict=True):
      patch.setenv(name, value)
    left = failures.without_secrets(text)
  assert not any(value in left for value in values)
  assert left.count("text ") == parts.count("text ")


@pytest.mark.parametrize(
  ("text", "secret", "kept"),
  [
    ("GET https://b.s3/k?X-Amz-Signature=5e17c2&x=1 failed", "5e17c2", "&x=1 failed"),
    ("https://b.s3/k?X-Amz-Credential=AKIA123%2Fus-east-1&x=1", "AKIA123", "https://b.s3/k?"),
    ("https://b.s3/k?X-Amz-Security-Token=IQoJb3 x", "IQoJb3", " x"),
    ("https://storage.googleapis.com/b/k?X-Goog-Signature=0a1b2c", "0a1b2c", "googleapis.com/b/k"),
    ("https://www.googleapis.com/upload?access_token=ya29.a0Af", "ya29", "/upload"),
    ("<Error><AWSAccessKeyId>AKIA123</AWSAccessKeyId><Code>403</Code></Error>", "AKIA123", "<Code>403</Code>"),
    ("header Authorization: Bearer ya29.a0Af-_x refused", "ya29", "refused"),
    ("{'Authorization': 'Bearer ya29.a0Af'}, 403", "ya29", "403"),
    ("AWS4-HMAC-SHA256 Credential=AKIA123/20260101/us, Signature=5e17c2", "5e17c2", "AWS4-HMAC-SHA256"),
    ("AWS4-HMAC-SHA256 Credential=AKIA123/20260101/us, Signature=5e17c2", "AKIA123", "AWS4-HMAC-SHA256"),
    ("x-amz-security-token: IQoJb3", "IQoJb3", "x-amz-security-token"),
    ("cannot reach https://me:hunter2@minio:9000/b", "hunter2", "minio:9000/b"),
  ],
)
def test_what_signs_a_request_is_struck_out_and_the_rest_stays(text, secret, kept):
  left = failures.without_secrets(text)
  assert secret not in left and kept in left
  assert failures.without_secrets(left) == left


@pytest.mark.parametrize("text", ["signature mismatch of step 3", "gs://bucket/run@3: 403", "bearer of bad news", ""])
def test_text_without_a_secret_stays_as_it_is(text):
  assert failures.without_secrets(text) == text


def test_an_unset_or_tiny_variable_strikes_nothing_out(monkeypatch):
  monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
  monkeypatch.setenv("AWS_SESSION_TOKEN", "")
  monkeypatch.delenv("AWS_SECRET_ACCESS_KEY", raising=False)
  assert failures.without_secrets("a bad day") == "a bad day"


def test_storage_errors_names_the_place_and_keeps_the_cause_but_no_secret(monkeypatch):
  monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI")
  with (
    pytest.raises(StorageError, match=r"cannot open the run: .*no permission") as e,
    failures.storage_errors("cannot open the run"),
  ):
    raise PermissionError(errno.EACCES, "Permission denied", "/run")
  assert isinstance(e.value.__cause__, PermissionError)
  with pytest.raises(StorageError) as e, failures.storage_errors("s3://bucket"):
    raise OSError("refused wJalrXUtnFEMI")
  assert str(e.value) == "s3://bucket: refused <AWS_SECRET_ACCESS_KEY>"
  with pytest.raises(ValueError, match=r"^mine$"), failures.storage_errors("s3://bucket"):
    raise ValueError("mine")


@given(st.lists(st.sampled_from(["cause", "context"]), max_size=6))
def test_root_cause_is_the_innermost_message(links):
  root = error = ValueError("the disk is on fire")
  for i, link in enumerate(links):
    error = chain(RuntimeError(f"task {i} failed"), error, by=link)
  assert failures.root_cause(error) == "the disk is on fire"
  assert failures.root_cause(root) == "the disk is on fire"


def test_root_cause_is_what_a_traceback_would_show():
  """An exception raised `from None` hides what came before, here too."""
  try:
    try:
      json.loads("{")
    except ValueError:
      raise CheckpointError("run/3: not JSON") from None
  except CheckpointError as e:
    assert failures.root_cause(e) == "run/3: not JSON"


def test_root_cause_is_one_short_line_that_names_file_and_reason():
  text = "Error reading /run/3/d/abc:\n  line two " + "x" * 2000 + " NOT_FOUND [source locations='a.cc:1\nb.cc:2']"
  found = failures.root_cause(RuntimeError(text))
  assert found.startswith("Error reading /run/3/d/abc: line two") and found.endswith("NOT_FOUND")
  assert "\n" not in found and len(found) < 520
  assert failures.root_cause(chain(RuntimeError("outer"), TimeoutError())) == "TimeoutError"
  hint = failures.root_cause(ValueError("Requested more bytes than we reserved space for"))
  assert "raise the limit above it" in hint


ALL = (failures.is_unreachable, failures.is_out_of_space, failures.is_timeout)


@pytest.mark.parametrize("by", ["cause", "context"])
@pytest.mark.parametrize(
  ("error", "kinds"),
  [
    (OSError(errno.ENOSPC, "x"), {failures.is_unreachable, failures.is_out_of_space}),
    (OSError(errno.EDQUOT, "x"), {failures.is_unreachable, failures.is_out_of_space}),
    (RuntimeError("RESOURCE_EXHAUSTED: No space left on device"), {failures.is_unreachable, failures.is_out_of_space}),
    (TimeoutError("x"), {failures.is_unreachable, failures.is_timeout}),
    (PermissionError("x"), {failures.is_unreachable}),
    (StorageError("x"), {failures.is_unreachable}),
    (RuntimeError("UNAVAILABLE: 503 slow down"), {failures.is_unreachable}),
    (FileNotFoundError(errno.ENOENT, "x"), set()),
    (ValueError("checksum mismatch"), set()),
    (ValueError("an array named UNAVAILABLE_SLOTS"), set()),
  ],
)
def test_kind_of_a_failure_is_found_below_what_wraps_it(error, kinds, by):
  outer = chain(RuntimeError("save failed"), ValueError("task failed"), error, by=by)
  assert {kind for kind in ALL if kind(outer)} == kinds
  assert not any(kind(None) for kind in ALL)


def test_errors_that_caused_each_other_end_the_search():
  """Two threads that raise each other's error make a circle; Python itself stops at it when it prints."""
  first, second = ValueError("first"), ValueError("second")
  chain(first, second, first)
  assert failures.root_cause(first) in ("first", "second")
  assert not any(kind(first) for kind in ALL)
