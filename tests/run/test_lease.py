"""One writer a run, real processes included: who may write, and when a dead owner's claim is void."""

import dataclasses
import gc
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time
import weakref

import jax.numpy as jnp
import pytest
from etils import epath
from hypothesis import given
from hypothesis import strategies as st

import ckpt_jax as ckpt
from ckpt_jax.run import lease as lease_lib
from ckpt_jax.run.lease import Holder, Lease, judge, parse

WRITER = """
import sys, time, jax.numpy as jnp, ckpt_jax as ckpt
c = ckpt.Checkpointer(sys.argv[1])
c.save(0, {"x": jnp.arange(4.0)})
c.wait()
print("saved", flush=True)
time.sleep(600)
"""
STATE = {"x": jnp.arange(4.0)}


@pytest.fixture(scope="module")
def other_job(tmp_path_factory):
  """A run, and the process that holds its lease and lives on."""
  run = tmp_path_factory.mktemp("other") / "run"
  with subprocess.Popen([sys.executable, "-c", WRITER, run], stdout=subprocess.PIPE, text=True) as process:
    assert process.stdout.readline() == "saved\n"
    yield run, process
    process.kill()


def a_holder(**changes):
  me = Holder("me", "here", "boot 1", 7, "100", "/run", 5, 1, 10.0, 0.0)
  return dataclasses.replace(me, **changes)


def test_second_job_is_refused_before_it_writes_and_told_who_where_and_what_to_do(other_job):
  run, process = other_job
  before = sorted(p for p in run.rglob("*") if "lease" not in p.name)
  with ckpt.Checkpointer(run) as c:
    assert c.restore().step == 0, "reading needs no lease"
    with pytest.raises(ckpt.StorageError) as e:
      c.save(1, STATE)
  assert f"process {process.pid} on host {os.uname().nodename}" in str(e.value)
  assert " ago)" in str(e.value) and "directory of its own" in str(e.value)
  assert sorted(p for p in run.rglob("*") if "lease" not in p.name) == before


def test_closing_gives_the_lease_back(tmp_path):
  with ckpt.Checkpointer(tmp_path) as c:
    c.save(0, STATE)
    assert not parse((tmp_path / ".ckpt_jax" / "lease").read_bytes()).released
  assert parse((tmp_path / ".ckpt_jax" / "lease").read_bytes()).released


def test_dropped_checkpointer_does_not_hold_the_run_for_ever(tmp_path):
  c = ckpt.Checkpointer(tmp_path)
  c.save(0, STATE)
  gone = weakref.ref(c)
  gc.disable()  # nothing here may depend on when it runs
  try:
    del c
    assert gone() is None
    with ckpt.Checkpointer(tmp_path) as again:
      assert again.save(1, STATE)
      again.wait()
      assert [s.step for s in again.steps()] == [0, 1]
  finally:
    gc.enable()


def test_lease_of_an_owner_that_this_process_has_lost_is_free(tmp_path):
  lost = Lease(epath.Path(tmp_path))
  lost.acquire()
  del lease_lib._here[lost._me.owner]  # as if it had been collected without a word
  Lease(epath.Path(tmp_path)).acquire(wait=0)


def test_reader_leaves_no_trace(tmp_path):
  with ckpt.Checkpointer(tmp_path) as c:
    c.save(0, STATE)
  (tmp_path / ".ckpt_jax" / "lease").unlink()
  with ckpt.Checkpointer(tmp_path) as c:
    c.restore()
  assert not (tmp_path / ".ckpt_jax" / "lease").exists()


def test_copied_run_is_free_although_the_original_is_being_written(other_job, tmp_path):
  shutil.copytree(other_job[0], tmp_path / "copy")
  with ckpt.Checkpointer(tmp_path / "copy") as c:
    assert c.restore().step == 0
    assert c.save(1, STATE)


def test_owner_killed_on_this_host_is_replaced_at_once(other_job):
  run, process = other_job
  process.kill()
  process.wait()
  started = time.monotonic()
  with ckpt.Checkpointer(run, {"timeouts": {"lease": "1h"}}) as c:
    c.save(1, STATE)
    c.wait()
    assert [s.step for s in c.steps()] == [0, 1]
  assert time.monotonic() - started < 600, "an hour without a heartbeat was not waited for"


def elsewhere(lease, **changes):
  """Makes the holder one of another host."""
  file = pathlib.Path(lease)
  file.write_text(json.dumps(json.loads(file.read_text()) | {"boot": "another", "host": "far", **changes}))


def test_owner_on_another_host_is_alive_while_its_heartbeat_changes_whatever_the_clocks_say(tmp_path):
  owner = Lease(epath.Path(tmp_path), patience=1.0)
  owner.acquire()
  with owner._lock:  # its heartbeat stops; we beat for it, with a clock that is a year off
    file = tmp_path / ".ckpt_jax" / "lease"
    other = Lease(epath.Path(tmp_path), patience=1.0)
    elsewhere(file, since=time.time() + 365 * 86400, interval=0.1)
    assert other.look() == "elsewhere"
    elsewhere(file, beat=json.loads(file.read_text())["beat"] + 1)
    assert other.look() == "alive"
    with pytest.raises(ckpt.StorageError, match="on host far"):
      for beat in range(10**6):
        elsewhere(file, beat=beat)
        other.acquire(wait=0.2)


def test_owner_on_another_host_is_dead_once_its_heartbeat_stands_still(tmp_path):
  owner = Lease(epath.Path(tmp_path), patience=0.5)
  owner.acquire()
  with owner._lock:
    elsewhere(tmp_path / ".ckpt_jax" / "lease", interval=0.1)
    other = Lease(epath.Path(tmp_path), patience=0.5)
    started = time.monotonic()
    other.acquire()
    assert 0.4 < time.monotonic() - started < 300
  with pytest.raises(ckpt.StorageError, match="has taken this run over"):
    owner.renew()
  with pytest.raises(ckpt.StorageError, match="has taken this run over"):
    owner.acquire()
  other.release()


def test_owner_that_beats_more_slowly_than_we_have_patience_for_is_dead_after_three_beats_and_waited_for(tmp_path):
  owner = Lease(epath.Path(tmp_path))
  owner.acquire()
  with owner._lock:
    elsewhere(tmp_path / ".ckpt_jax" / "lease", interval=2)
    other = Lease(epath.Path(tmp_path), patience=0.1)
    with pytest.raises(ckpt.StorageError, match=r"on host far.*after 6 s without a heartbeat"):
      other.acquire(wait=0.2)
    other.acquire()
    assert other.held
    elsewhere(tmp_path / ".ckpt_jax" / "lease", interval=1e300)
    with pytest.raises(ckpt.StorageError, match="after 100 s without a heartbeat"):
      Lease(epath.Path(tmp_path), patience=0.1).acquire(wait=0)
    other.held = False


def test_of_many_that_ask_at_once_one_gets_it(tmp_path):
  import threading

  leases = [Lease(epath.Path(tmp_path)) for _ in range(8)]
  refused = []

  def ask(lease):
    try:
      lease.acquire(wait=0)
    except ckpt.StorageError as e:
      refused.append(e)

  threads = [threading.Thread(target=ask, args=(lease,)) for lease in leases]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert sum(lease.held for lease in leases) == 1 and len(refused) == 7
  for lease in leases:
    lease.release()


def test_lease_works_on_a_bucket(s3):
  with ckpt.Checkpointer(s3.url + "/run") as c:
    c.save(0, STATE)
    c.wait()
    with pytest.raises(ckpt.StorageError, match="another job"):
      Lease(c.directory).acquire(wait=0)
  with ckpt.Checkpointer(s3.url + "/run") as third:
    assert third.save(1, STATE)


def test_deleted_run_does_not_come_back_by_a_heartbeat(tmp_path):
  lease = Lease(epath.Path(tmp_path / "run"))
  lease.acquire()
  shutil.rmtree(tmp_path / "run")
  lease.renew(create=False)
  assert not (tmp_path / "run").exists()
  lease.release()


def test_a_lease_with_a_field_of_a_newer_version_is_somebodys():
  holder = Holder("owner", "host", "boot", 7, "1", "/run", 3, 1, 10.0, 0.0, saving=(1, 2))
  assert parse(json.dumps(dataclasses.asdict(holder) | {"later": 1}).encode()) == holder
  assert parse(json.dumps(dataclasses.asdict(holder) | {"pid": "7"}).encode()) is None


@given(
  st.binary(max_size=200)
  | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(lambda v: json.dumps(v).encode())
)
def test_garbage_in_a_lease_file_is_nobody(data):
  assert parse(data) is None


@pytest.mark.parametrize(
  ("holder", "verdict"),
  [
    (None, "free"),
    (a_holder(released=True), "free"),
    (a_holder(owner="other"), "alive"),
    (a_holder(owner="other", started="99"), "dead"),
    (a_holder(owner="other", pid=8), "dead"),
    (a_holder(owner="other", boot="boot 2"), "elsewhere"),
    (a_holder(owner="other", place="/mnt/run"), "alive"),
    (a_holder(owner="other", place="/original", inode=6), "free"),
  ],
)
def test_verdict_follows_from_process_host_and_place(holder, verdict):
  assert judge(holder, a_holder(), lambda pid: "100" if pid == 7 else None) == verdict


def test_a_killed_process_that_nobody_has_waited_for_is_dead():
  child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
  assert lease_lib._start_of(child.pid) is not None
  child.kill()
  os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
  assert lease_lib._start_of(child.pid) is None
  child.wait()


def test_lease_given_back_while_storage_cannot_be_written_is_free_in_this_process(tmp_path):
  directory = epath.Path(tmp_path / "run")
  old = Lease(directory)
  old.acquire()
  (tmp_path / "run").rename(tmp_path / "away")
  (tmp_path / "run").write_text("in the way")
  old.release()
  (tmp_path / "run").unlink()
  (tmp_path / "away").rename(tmp_path / "run")
  new = Lease(directory)
  new.acquire(wait=0)
  assert new.held and not old.held
  new.release()
  old.acquire(wait=0)
  assert old.held, "one that was given back can be taken again"
  with pytest.raises(ckpt.StorageError, match="another job writes"):
    new.acquire(wait=0)
  old.release()
