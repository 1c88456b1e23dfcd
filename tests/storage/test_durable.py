"""Modes and syncing of the files under a directory."""

import os
import stat

import pytest

from ckpt_jax.storage.durable import Sealing, restrict, seal, sync_directory, sync_file


def test_file_that_cannot_be_synced_fails_the_seal(tmp_path, monkeypatch):
  (tmp_path / "a").write_text("x")
  seal(str(tmp_path), Sealing())

  def broken(_):
    raise OSError(5, "Input/output error")

  monkeypatch.setattr(os, "fsync", broken)
  with pytest.raises(OSError, match="Input/output error"):
    seal(str(tmp_path), Sealing())
  monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(22, "Invalid argument")))
  sync_directory(str(tmp_path))  # SMB and some FUSE mounts know no such thing
  with pytest.raises(OSError):
    sync_file(str(tmp_path / "a"))


def mode_of(path):
  return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize(("mode", "directory"), [(0o640, 0o750), (0o644, 0o755), (0o600, 0o700), (None, None)])
def test_directories_can_be_entered_by_all_who_may_read(mode, directory):
  assert Sealing(mode=mode).directory_mode == directory


def test_mode_is_set_and_set_group_id_stays(tmp_path):
  (tmp_path / "step").mkdir()
  (tmp_path / "step" / "a").write_text("x")
  os.chmod(tmp_path / "step", 0o2777)
  seal(str(tmp_path / "step"), Sealing(mode=0o640))
  assert (mode_of(tmp_path / "step" / "a"), mode_of(tmp_path / "step")) == (0o640, 0o2750)


def test_without_a_mode_only_the_world_loses_writing(tmp_path):
  (tmp_path / "a").write_text("x")
  for before, after in ((0o666, 0o664), (0o640, 0o640), (0o4757, 0o4755)):
    os.chmod(tmp_path / "a", before)
    restrict(str(tmp_path / "a"), None)
    assert mode_of(tmp_path / "a") == after


def test_links_are_not_followed_out_of_the_run(tmp_path):
  (tmp_path / "target").write_text("x")
  os.chmod(tmp_path / "target", 0o666)
  os.symlink(tmp_path / "target", tmp_path / "link")
  restrict(str(tmp_path / "link"), 0o600)
  assert mode_of(tmp_path / "target") == 0o666


def test_sealing_syncs_each_file_and_directory_once(tmp_path, monkeypatch):
  folder = tmp_path / "step"
  (folder / "item").mkdir(parents=True)
  for i in range(12):
    (folder / "item" / str(i)).write_bytes(bytes(2000))
  synced = []
  monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.readlink(f"/proc/self/fd/{descriptor}")))
  seal(str(folder), Sealing())
  assert sorted(synced) == sorted(map(str, [folder, *folder.rglob("*")]))
