"""What is missing and what cannot be read are told apart."""

import os

import pytest
from etils import epath

from ckpt_jax.errors import StorageError
from ckpt_jax.storage import look


def test_what_is_missing_is_no_error_or_a_missing_file(tmp_path):
  (tmp_path / "file").write_bytes(b"abc")
  for missing in (epath.Path(tmp_path / "none"), epath.Path(tmp_path / "file" / "below")):
    assert not look.exists(missing) and not look.is_dir(missing) and look.names(missing) == []
    for read in (look.read_bytes, look.file_nbytes):
      with pytest.raises(FileNotFoundError):
        read(missing)
  with pytest.raises(FileNotFoundError):
    look.read_bytes(epath.Path(tmp_path))


def test_what_cannot_be_read_is_a_storage_error_that_names_it(tmp_path):
  loop = epath.Path(tmp_path / "loop")
  os.symlink(loop, loop)
  for operation in (look.exists, look.is_dir, look.names, look.read_bytes, look.file_nbytes):
    with pytest.raises(StorageError, match=r"loop: cannot be read"):
      operation(loop)
  with pytest.raises(StorageError, match="cannot be read"):
    look.read_through(epath.Path(tmp_path / "none"), 10)


def test_files_are_found_in_all_depths_and_read_to_their_end(tmp_path):
  for name in ("b", "a/c", "a/d/e"):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_bytes(bytes(25))
  found = look.files_below(epath.Path(tmp_path))
  assert [str(file.relative_to(tmp_path)) for file in found] == ["a/c", "a/d/e", "b"]
  assert [look.read_through(file, 10) for file in found] == [25] * 3
  assert look.read_bytes(found[0], 3) == bytes(3) and look.file_nbytes(found[0]) == 25
