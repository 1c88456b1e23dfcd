"""What is measured once is kept for later processes of this host."""

import pytest

from ckpt_jax.storage import cache


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  return tmp_path / "cache"


def test_measurement_comes_back_for_its_kind_and_key_alone():
  cache.remember("host", "8 cores", {"speed": 1.5})
  assert cache.recall("host", "8 cores") == {"speed": 1.5}
  assert cache.recall("host", "16 cores") is None and cache.recall("storage", "8 cores") is None


def test_cache_is_in_the_home_directory_unless_the_variable_names_another(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", "")
  monkeypatch.setenv("HOME", str(tmp_path))
  cache.remember("host", "key", {})
  assert [p.parent.name for p in (tmp_path / ".cache" / "ckpt_jax").glob("*/host-*.json")] == ["profiles"]


@pytest.mark.parametrize("content", ["", "{", "[1]", "\udcff"])
def test_damaged_file_counts_as_none_and_is_replaced(content, home):
  cache.remember("host", "key", {"a": 1})
  (file,) = home.rglob("*.json")
  file.write_text(content, errors="surrogateescape")
  assert cache.recall("host", "key") is None
  cache.remember("host", "key", {"a": 2})
  assert cache.recall("host", "key") == {"a": 2}


def test_home_that_cannot_be_written_costs_only_the_memory(tmp_path, monkeypatch, caplog):
  (tmp_path / "file").write_text("")
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
  with caplog.at_level("INFO", "ckpt_jax"):
    cache.remember("host", "key", {"a": 1})
  assert cache.recall("host", "key") is None and "the measurement of the host is not kept" in caplog.text
