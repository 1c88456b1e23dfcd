"""Durations, sizes, shares and counts in both directions: text that people write, and text that people read."""

import hypothesis
import hypothesis.strategies as st
import pytest

import ckpt_jax as ckpt
from ckpt_jax.config import parse_bytes, parse_duration, parse_share
from ckpt_jax.config.units import duration_text, size_text


@pytest.mark.parametrize(
  ("text", "seconds"),
  [
    (600, 600),
    ("90", 90),
    ("90s", 90),
    ("10 m", 600),
    ("1h30m", 5400),
    ("2d 6h", 194400),
    ("1.5W", 907200),
    ("2e1ms", 0.02),
  ],
)
def test_durations(text, seconds):
  assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize(
  ("text", "nbytes"),
  [
    (7, 7),
    ("7b", 7),
    ("512MiB", 512 << 20),
    ("2 TiB", 2 << 40),
    ("1.5GB", 1_500_000_000),
    ("1e3", 1000),
    ("3PiB", 3 << 50),
  ],
)
def test_sizes(text, nbytes):
  assert parse_bytes(text) == nbytes and isinstance(parse_bytes(text), int)


def test_shares():
  assert parse_share("1%") == parse_share(0.01) == parse_share(" 1 % ") == 0.01


@pytest.mark.parametrize("parse", [parse_duration, parse_bytes, parse_share])
@pytest.mark.parametrize(
  "value", [None, True, "", "x", "-1", "1 parsec", "1h 2", "%", [1], 0, -1, float("nan"), float("inf"), 10**400]
)
def test_nonsense_is_refused_with_what_to_write(parse, value):
  with pytest.raises(ValueError, match=r"write |out of range"):
    parse(value)


@hypothesis.given(st.one_of(st.text(max_size=12), st.floats(), st.integers(), st.booleans(), st.none()))
def test_whatever_comes_in_is_a_positive_number_or_a_value_error(value):
  for parse in (parse_duration, parse_bytes, parse_share):
    try:
      assert 0 < parse(value) < 2**63
    except ValueError as e:
      assert type(e) is ValueError and repr(value) in str(e)


@pytest.mark.parametrize(
  ("nbytes", "text"),
  [
    (0, "0 B"),
    (1023, "1023 B"),
    (1024, "1.0 KiB"),
    (1.5 * 2**30, "1.5 GiB"),
    (782 * 2**30, "782.0 GiB"),
    (2**50, "1024.0 TiB"),
    (-2048, "-2.0 KiB"),
  ],
)
def test_sizes_for_people(nbytes, text):
  assert size_text(nbytes) == text


@pytest.mark.parametrize(
  ("seconds", "text"),
  [
    (0, "0 ms"),
    (0.0123, "12.3 ms"),
    (1, "1 s"),
    (119, "119 s"),
    (120, "2 min"),
    (5400, "90 min"),
    (7200, "2 h"),
    (172800, "2 d"),
  ],
)
def test_durations_for_people(seconds, text):
  assert duration_text(seconds) == text


def test_counts_are_whole_numbers_in_any_spelling(tmp_path):
  (tmp_path / "a.yaml").write_text("schedule: {every_steps: 1e3, last: 0}\nlimits: {file_io_concurrency: '8'}")
  config = ckpt.load_config(tmp_path / "a.yaml")
  assert (config.schedule.every_steps, config.schedule.last, config.limits.file_io_concurrency) == (1000, 0, 8)
  for wrong in (0, -1, 2.5, 3.0, True, "many", float("inf"), None):
    with pytest.raises(ckpt.ConfigError, match="is no count; write a whole number from 1, or auto"):
      ckpt.Config(limits={"file_io_concurrency": wrong})
