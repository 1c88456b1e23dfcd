"""gs:// and s3:// against real servers: everything that works on a disk, overload, and what reaches logs."""

import collections
import json
import logging
import os
import shutil
import subprocess
import time
import urllib.parse

import flax
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from commands import cli
from etils import epath
from jobs import together

import ckpt_jax as ckpt
from ckpt_jax.bench.buckets import request_kind
from ckpt_jax.config import RetryConfig, StorageConfig
from ckpt_jax.errors import NotARunError
from ckpt_jax.inference.convert import convert
from ckpt_jax.layout import writing
from ckpt_jax.multihost import who_wrote
from ckpt_jax.observe import Restore, RetryStorm, Save, read_records
from ckpt_jax.run import steps as run
from ckpt_jax.storage import requests
from ckpt_jax.storage.clients import kvstore_spec
from ckpt_jax.storage.connect import connect
from ckpt_jax.storage.objects import BACKEND
from ckpt_jax.storage.retry import delay, max_retries

SECRET = "wJalrXUtnFEMI-secret"


@pytest.fixture(params=["gcs", "s3"])
def bucket(request, monkeypatch):
  made = request.getfixturevalue(request.param)
  if request.param == "s3":
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
  return made


def make_state(seed=0):
  rng = np.random.default_rng(seed)
  state = {f"w{i}": jnp.asarray(rng.standard_normal((64, 256), dtype=np.float32)) for i in range(20)}
  return state | {"key": jax.random.key(seed), "empty": np.zeros((0, 3)), "zero": jnp.float32(-0.0), "n": 3}


def test_save_restore_and_retention_work_as_on_a_disk(bucket, assert_same):
  states = [make_state(i) for i in range(4)]
  with ckpt.Checkpointer(bucket.url + "/a/run", {"retention": {"last": 2}}) as c:
    assert c.steps() == [] and c.latest_step() is None
    for step, state in enumerate(states):
      assert c.save(step, state, metrics={"loss": 1.0 / (step + 1)}, extras={"data": [step]})
    c.wait()
    assert c.latest_step() == 3
    assert c.storage == ("gcs" if bucket.url.startswith("gs") else "s3")
    restored = c.restore(like=states[3])
    assert_same(restored.state, states[3])
    assert restored.extras == {"data": [3]} and restored.metrics == {"loss": 0.25}
  with ckpt.Checkpointer(bucket.url + "/a/run") as again:
    assert [s.step for s in again.steps()] == [2, 3]
    assert again.restore_or_init(lambda: make_state(9)).step == 3
    with pytest.raises(ckpt.CheckpointError, match="saved already"):
      again.save(3, states[3], force=True)


def test_brackets_and_stars_in_a_key_are_no_pattern_and_deletions_spare_what_they_would_match(bucket):
  odd, others = "layers=[64]*?#%41 ü|\\", ("layers=6xyz#%41 ü|\\", "layers=[64]xyz#%41 ü|\\")
  for name in (*others, odd):
    with ckpt.Checkpointer(f"{bucket.url}/{name}/run", {"retention": {"last": 1}}) as c:
      for step in range(2):
        c.save(step, {"w": jnp.full(3, step), "name": "text"})
        c.wait()
      assert np.array_equal(c.restore().state["w"], np.ones(3))
  assert ckpt.verify(f"{bucket.url}/{odd}/run") == []
  assert sorted(p.name for p in c.directory.iterdir()) == [".ckpt_jax", "1"]
  c.directory.rmtree()
  assert not c.directory.exists()
  for name in others:
    assert [s.step for s in run.list_steps(f"{bucket.url}/{name}/run")] == [1]
  with pytest.raises(ckpt.StorageError, match="are names, not directories"):
    ckpt.Checkpointer(f"{bucket.url}/a/../run")


def test_plain_orbax_reads_what_was_written(bucket):
  state = {"w": jnp.arange(6.0)}
  with ckpt.Checkpointer(bucket.url + "/run") as c:
    c.save(7, state)
  with ocp.CheckpointManager(bucket.url + "/run") as manager:
    assert manager.latest_step() == 7
    assert np.array_equal(manager.restore(7, args=ocp.args.PyTreeRestore(state))["w"], state["w"])


def test_arrays_of_one_process_need_no_merge_and_plain_orbax_reads_them(bucket, assert_same):
  run, state = bucket.url + "/run", {k: v for k, v in make_state().items() if isinstance(v, jax.Array)}
  with ckpt.Checkpointer(run) as c:
    for step in range(3):
      bucket.proxy.reset()
      c.save(step, state)
      c.wait()
    assert sum(bucket.proxy.requests.values()) <= 32, bucket.proxy.lines
    assert_same(c.restore(like=state).state, state)
    assert not any("ocdbt.process_" in key for key in BACKEND.tree(c.directory / "2"))
  plain = epath.Path(run) / "2" / "default"
  words = {k: jax.random.key_data(v) if k == "key" else v for k, v in state.items()}
  with ocp.PyTreeCheckpointer() as checkpointer:
    found = checkpointer.restore(plain, restore_args=ocp.checkpoint_utils.construct_restore_args(words))
  assert_same({k: v for k, v in found.items() if k != "key"}, {k: v for k, v in state.items() if k != "key"})
  assert [p.process for p in who_wrote(run, 2).processes] == [0] and not ckpt.verify(run)


def test_small_files_of_a_step_are_written_before_its_marker(s3):  # requests to gs:// do not say for which object
  delayed = ("_sharding", "array_metadatas", "_METADATA", "metrics/metrics", "_CHECKPOINT_METADATA", "default/commit")
  s3.proxy.delayed = lambda method, path: any(d in urllib.parse.unquote(path) for d in delayed)
  s3.proxy.delay = 0.3
  with ckpt.Checkpointer(s3.url + "/run") as c:
    c.save(1, make_state())
    c.wait()
    keys = [urllib.parse.unquote(line) for line in s3.proxy.lines if line.startswith("write")]
    listed = BACKEND.tree(c.directory / "1")
  last = max(i for i, key in enumerate(keys) if "run/1/commit_success.txt" in key)
  assert all(i < last for i, key in enumerate(keys) if "run/1/" in key and i != last), keys
  # At its beginning, and with all that is known in the end, though Orbax writes it three times.
  assert sum("run/1/_CHECKPOINT_METADATA" in key for key in keys) == 2
  assert {"commit_success.txt", "default/_sharding", "metrics/metrics", "_CHECKPOINT_METADATA"} <= listed.keys()


def test_what_is_written_again_in_a_claimed_place_goes_out_once_after_the_first_and_before_the_marker(s3):
  step = epath.Path(s3.url) / "again" / "1"
  connect(s3.url)
  with BACKEND.claim(step):
    s3.proxy.delay = 0.3
    for content in ("first", "second", "third"):
      (step / "note").write_text(content)
      assert (step / "note").read_text() == content
    (step / "commit_success.txt").write_text("")
    writes = [line.rpartition("/")[2] for line in s3.proxy.lines if line.startswith("write")]
  assert writes == ["note", "note", "commit_success.txt"] and (step / "note").read_text() == "third"
  with BACKEND.claim(step):
    for content in ("fourth", "fifth"):
      (step / "note").write_text(content)
    step.rmtree()
  assert not BACKEND.tree(step), "what is held back does not come back"


def test_small_bodies_do_not_wait_for_leave_to_be_sent(s3, monkeypatch):
  from aiobotocore.httpsession import AIOHTTPSession

  asked, send = {}, AIOHTTPSession.send

  async def sent(self, request):
    asked[request.method, request.url.rpartition("/")[2]] = "Expect" in request.headers
    return await send(self, request)

  monkeypatch.setattr(AIOHTTPSession, "send", sent)
  connect(s3.url)
  for name, nbytes in {"small": 100, "large": 2**20}.items():
    requests.store(f"{s3.url}/{name}", bytes(nbytes))
    assert len((epath.Path(s3.url) / name).read_bytes()) == nbytes
  assert not asked["PUT", "small"] and asked["PUT", "large"]


@pytest.mark.parametrize("pack", ["off", "on"])
def test_many_arrays_go_to_a_bucket_in_few_transactions_however_they_are_cut(bucket, assert_same, monkeypatch, pack):
  monkeypatch.setattr(writing, "_FIRST_ARRAYS", 3)
  monkeypatch.setattr(writing, "_TOGETHER_NBYTES", 2**20)
  mesh = jax.make_mesh((2,), ("x",))
  rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
  large = jax.device_put(np.arange(2**20, dtype=np.float32).reshape(64, -1), rows)  # a piece is a transaction
  state = make_state() | {"large": large, "whole": jnp.arange(2**19, dtype=jnp.float32), "scalar": jnp.int8(-1)}
  with ckpt.Checkpointer(bucket.url + "/run", {"layout": {"pack": pack, "compression": "off"}}) as c:
    c.save(1, state)
    c.wait()
    manifests = [line for line in bucket.proxy.lines if line.startswith("write") and "manifest.ocdbt" in line]
    assert_same(c.restore(like=state).state, state)
  if bucket.url.startswith("s3"):  # requests to gs:// do not say for which object
    assert 3 <= len(manifests) <= 14, manifests
  assert not ckpt.verify(bucket.url + "/run")
  if pack == "off":
    plain = {k: x for k, x in state.items() if isinstance(x, jax.Array) and x.dtype == np.float32}
    with ocp.CheckpointManager(bucket.url + "/run") as manager:
      found = manager.restore(1, args=ocp.args.PyTreeRestore())
    assert_same({k: jnp.asarray(found[k]) for k in plain}, plain)


@pytest.mark.parametrize("lost", ["default/_sharding", "metrics/metrics", "default/ckpt_jax.json"])
def test_step_of_which_a_small_file_cannot_be_written_is_not_committed_and_leaves_nothing(s3, lost):
  with ckpt.Checkpointer(s3.url + "/run", {"storage": {"retry": {"deadline": "1s"}}}) as c:
    c.save(1, make_state())
    c.wait()
    s3.proxy.reset()
    s3.proxy.fails = lambda method, path: f"run/2/{lost}" in urllib.parse.unquote(path)
    s3.proxy.fail_share = 1.0
    c.save(2, make_state(1))
    with pytest.raises(ckpt.SaveFailedError, match=lost):
      c.wait()
    written = [urllib.parse.unquote(line) for line in s3.proxy.lines if line.startswith("write")]
    assert any(f"run/2/{lost}" in line for line in written) and not any("run/2/commit_success" in w for w in written)
    assert not BACKEND.tree(c.directory / "2"), "cleared, and nothing came after"
    s3.proxy.fail_share = 0.0
    c.save(2, make_state(1))
    c.wait()
    assert [s.step for s in c.steps()] == [1, 2]


def test_run_may_be_the_bucket_itself(bucket):
  for step in (1, 2):
    with ckpt.Checkpointer(bucket.url) as c:
      assert c.restore_or_init(lambda: {"w": jnp.zeros(3)}).next_step == (0 if step == 1 else 2)
      c.save(step, {"w": jnp.full(3, step, jnp.float32)})
  assert [s.step for s in run.list_steps(bucket.url)] == [1, 2]
  assert ckpt.verify(bucket.url) == []


def test_step_without_its_commit_marker_is_no_step(bucket):
  with ckpt.Checkpointer(bucket.url + "/run") as c:
    for step in (1, 2):
      c.save(step, {"w": jnp.ones(3)})
    c.wait()
    (c.directory / "2" / "commit_success.txt").unlink()
    assert [s.step for s in c.steps()] == [1]
  with ckpt.Checkpointer(bucket.url + "/run") as c:
    assert c.restore().step == 1


def test_commands_work_on_buckets(bucket):
  with ckpt.Checkpointer(bucket.url + "/run") as c:
    c.save(5, make_state(), metrics={"loss": 0.5})
  listed = cli("ls", bucket.url + "/run", "--json")
  assert listed.returncode == 0, listed.stderr
  assert [s["step"] for s in json.loads(listed.stdout)] == [5]
  shown = cli("show", bucket.url + "/run", "--json")
  assert shown.returncode == 0 and len(json.loads(shown.stdout)["leaves"]) == 24, shown.stderr
  assert cli("who", bucket.url + "/run", "5").returncode == 0
  empty = cli("ls", bucket.url + "/nothing")
  assert empty.returncode == 1 and "no committed checkpoint" in empty.stderr
  nowhere = cli("ls", bucket.url.replace("bucket", "no-such-bucket") + "/run")
  assert nowhere.returncode == 1 and "no-such-bucket" in nowhere.stderr


@pytest.mark.multiprocess
def test_processes_share_a_bucket(bucket):
  run = bucket.url + "/run"
  for mode, processes in (("save", 2), ("restore", 1), ("restore", 2)):
    together("train.py", run, mode, processes=processes)
  report = who_wrote(run, 0)
  assert [p.process for p in report.processes] == [0, 1] and report.overlaps == {}


def test_every_fifth_request_failing_changes_nothing_but_the_time(bucket, assert_same):
  with ckpt.Checkpointer(bucket.url + "/run", {"retention": {"last": 2}}) as c:
    c.save(0, make_state())  # connections and compiled functions
    c.wait()
    bucket.proxy.fail_share = 0.2
    for step in (1, 2):
      bucket.proxy.fail_status = 503 if step % 2 else 429
      state = make_state(step)
      c.save(step, state)
      c.wait()
      for _ in range(3):  # one in fourteen meets no failure
        assert_same(c.restore(like=state).state, state)
    assert bucket.proxy.failed > 10
    refused = collections.Counter()

    def three_times(method, path):
      refused[path.partition("?")[0]] += 1  # TensorStore's queries are never the same
      return refused[path.partition("?")[0]] <= 3

    bucket.proxy.fail_share, bucket.proxy.fails = 1.0, three_times  # 20% of so few requests are no storm
    assert_same(c.restore(like=state).state, state)
  events = read_records(bucket.url + "/run").events
  retried = {e.kind for e in events if isinstance(e, (Save, Restore, RetryStorm)) and e.retries}
  assert retried == {"save", "restore", "retry_storm"}
  assert [s.step for s in c.steps()] == [1, 2]


def test_store_that_refuses_everything_is_an_error_within_the_deadline_and_loses_nothing(bucket):
  config = {"storage": {"retry": {"deadline": "1s", "max_delay": "500ms"}}}
  with ckpt.Checkpointer(bucket.url + "/run", config) as c:
    c.save(1, make_state(1))
    c.wait()
    bucket.proxy.fail_share = 1.0
    started = time.monotonic()
    with pytest.raises((ckpt.StorageError, ckpt.SaveFailedError), match=r"503|UNAVAILABLE|gave up"):
      c.save(2, make_state(2))
      c.wait()
    with pytest.raises(ckpt.StorageError, match=r"503|UNAVAILABLE|gave up"):
      c.restore(like=make_state(1))
    with pytest.raises(ckpt.StorageError, match="gave up"):
      ckpt.Checkpointer(bucket.url + "/run", config)
    assert time.monotonic() - started < 120, "three times the default deadline of 60 s"
    bucket.proxy.fail_share = 0.0
    assert [s.step for s in c.steps()] == [1]
    assert c.save(2, make_state(2))
    c.wait()
    assert c.latest_step() == 2


def test_missing_bucket_is_a_storage_error(bucket):
  scheme = bucket.url.partition("://")[0]
  with pytest.raises(ckpt.StorageError, match="nowhere"):
    ckpt.Checkpointer(f"{scheme}://nowhere-bucket/run", {"storage": {"retry": {"deadline": "1s"}}})


def test_one_save_one_restore_and_one_open_stay_within_their_requests(bucket):
  state = make_state()
  # Old steps stay: their deletion, in the background, would be counted or not as the threads happen to run.
  with ckpt.Checkpointer(bucket.url + "/run", {"retention": {"last": 5}}) as c:
    for step in range(3):
      bucket.proxy.reset()
      c.save(step, state)
      c.wait()
    saved = sum(bucket.proxy.requests.values())
    bucket.proxy.reset()
    c.restore(like=state)
    restored = sum(bucket.proxy.requests.values())
  bucket.proxy.reset()
  with ckpt.Checkpointer(bucket.url + "/run"):
    opened = sum(bucket.proxy.requests.values())
  # docs/bucket.json has raw Orbax's beside them: about twice as many. One request looks for another writer.
  # What fits into the window is one transaction; else OCDBT would write its tree in up to six rounds of four requests.
  assert saved <= 55 and restored <= 20 and opened <= 1 + 1 + 2 * 3, (saved, restored, opened)


def test_training_does_not_wait_for_a_look_at_the_place_of_a_step(bucket):
  with ckpt.Checkpointer(bucket.url + "/run", {"storage": {"retry": {"deadline": "1s"}}}) as c:
    c.save(1, make_state())
    c.wait()
    bucket.proxy.fails = lambda method, path: "prefix=run/2/" in urllib.parse.unquote(path)
    bucket.proxy.fail_share = 1.0
    assert c.save(2, make_state())
    with pytest.raises(ckpt.SaveFailedError):
      c.wait()
    bucket.proxy.fail_share = 0.0
    assert c.save(2, make_state())
    c.wait()
    assert [s.step for s in c.steps()] == [1, 2]


def test_a_large_data_file_is_read_in_several_ranges(bucket, assert_same):
  state = {f"w{i}": jnp.full((2**18,), i, jnp.float32) for i in range(40)}
  with ckpt.Checkpointer(bucket.url + "/run", {"layout": {"compression": "off"}}) as c:
    c.save(0, state)
    c.wait()
    bucket.proxy.reset()
    assert_same(c.restore(like=state).state, state)
  ranges = [line for line in bucket.proxy.lines if line.startswith("read") and "/d/" in urllib.parse.unquote(line)]
  assert 3 <= len(ranges) < 40, "42 MB in requests of 16 MiB or little more, of several arrays each"


def test_in_a_snapshot_each_object_is_requested_once_and_a_missing_one_never(bucket):
  connect(bucket.url)
  run = epath.Path(bucket.url + "/run")
  (run / "1" / "note").write_text("one")
  bucket.proxy.reset()
  with BACKEND.snapshot(run), BACKEND.snapshot(run / "1"):
    assert [(run / "1" / "note").read_text() for _ in range(2)] == ["one", "one"]
    with pytest.raises(FileNotFoundError):
      (run / "1" / "other").read_text()
  assert sum(bucket.proxy.requests.values()) == 2, bucket.proxy.lines  # a listing and a read
  (run / "1" / "note").write_text("two")
  assert (run / "1" / "note").read_text() == "two"


def test_credentials_appear_nowhere(bucket, caplog):
  if not bucket.url.startswith("s3"):
    pytest.skip("the emulated GCS takes none")
  with caplog.at_level(logging.DEBUG, "ckpt_jax"):
    with ckpt.Checkpointer(bucket.url + "/run", {"storage": {"retry": {"deadline": "1s"}}}) as c:
      c.save(1, make_state())
      c.wait()
      text = "".join(p.read_text() for p in (c.directory / "1").iterdir() if not p.is_dir())
      bucket.proxy.fail_share = 1.0
      with pytest.raises(ckpt.CheckpointError) as failed:
        c.restore()
      bucket.proxy.fail_share = 0.0
    shown = cli("show", bucket.url + "/run", "--json")
  assert SECRET not in caplog.text + text + str(failed.value) + shown.stdout + shown.stderr + str(c.config.to_dict())


def test_options_reach_tensorstore_and_contradictions_are_refused(monkeypatch):
  for name in ("AWS_ENDPOINT_URL", "AWS_PROFILE", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ACCESS_KEY_ID"):
    monkeypatch.delenv(name, raising=False)
  options = StorageConfig(endpoint="https://minio:9000", region="eu-north1", anonymous=True, requests=7)
  connect("s3://options-bucket/run", options)
  spec = kvstore_spec("s3://options-bucket/run/")
  assert spec["endpoint"] == "https://minio:9000" and spec["aws_region"] == "eu-north1" and spec["path"] == "run/"
  assert spec["aws_credentials"] == {"type": "anonymous"} and spec["s3_request_concurrency"] == {"limit": 7}
  monkeypatch.setenv("AWS_ENDPOINT_URL", "http://store:1234")
  monkeypatch.setenv("AWS_REGION", "us-west-2")
  spec = kvstore_spec("s3://other-bucket/run")
  assert spec["endpoint"] == "http://store:1234" and spec["aws_region"] == "us-west-2"
  for bad, message in (
    (StorageConfig(endpoint="minio:9000"), "expected http"),
    (StorageConfig(endpoint="https://user:pw@minio"), "credentials"),
    (StorageConfig(endpoint="https://minio", path_style=False), "path_style"),
    (StorageConfig(profile="a", anonymous=True), "exclude"),
  ):
    with pytest.raises(ckpt.ConfigError, match=message) as refused:
      connect("s3://bad-bucket/run", bad)
    assert "pw" not in str(refused.value)
  with pytest.raises(ckpt.ConfigError, match="profile"):
    connect("s3://p-bucket/run", StorageConfig(profile="not-there"))
    kvstore_spec("s3://p-bucket/run")


def test_waits_between_retries_grow_to_their_cap_and_fit_the_deadline():
  retry = RetryConfig(initial_delay=0.1, max_delay=2.0, deadline=20.0)
  for attempt in range(40):
    assert 0 <= delay(retry, attempt) <= min(2.0, 0.1 * 2**attempt)
  longest = sum(min(2.0, 0.1 * 2**n) for n in range(max_retries(retry)))
  assert 20 <= longest < 22


@pytest.mark.parametrize(
  ("method", "path", "kind"),
  [
    ("GET", "/storage/v1/b/bucket/o?prefix=run/", "list"),
    ("GET", "/storage/v1/b/bucket/o/run%2F1", "head"),
    ("GET", "/storage/v1/b/bucket/o/run%2F1?alt=media", "read"),
    ("POST", "/upload/storage/v1/b/bucket/o?uploadType=media&name=x", "write"),
    ("GET", "/bucket?list-type=2&prefix=run", "list"),
    ("HEAD", "/bucket/key", "head"),
    ("POST", "/bucket?delete", "delete"),
    ("PUT", "/bucket/key", "write"),
  ],
)
def test_requests_are_counted_by_kind(method, path, kind):
  assert request_kind(method, path) == kind


@pytest.mark.skipif(shutil.which("s3fs") is None or not os.path.exists("/dev/fuse"), reason="needs s3fs and FUSE")
def test_mounted_bucket_works_with_a_warning_that_names_its_url(s3, tmp_path, caplog):
  password = tmp_path / "password"
  password.write_text("testing:testing")
  password.chmod(0o600)
  mount = tmp_path / "mount"
  mount.mkdir()
  options = f"url={s3.endpoint},use_path_request_style,passwd_file={password}"
  subprocess.run(["s3fs", "bucket", str(mount), "-o", options], check=True, timeout=60)
  try:
    assert ckpt.detect(mount / "run") == "bucket_mount"
    # FUSE may refuse O_DIRECT, and what was asked for is then read and written all the same.
    config = {"limits": {"file_io": "direct"}}
    with caplog.at_level(logging.WARNING, "ckpt_jax"), ckpt.Checkpointer(mount / "run", config) as c:
      c.save(0, {"w": jnp.arange(2**18)})
      c.wait()
      assert np.array_equal(c.restore().state["w"], np.arange(2**18))
    assert "bucket mounted as a file system; s3://" in caplog.text
  finally:
    subprocess.run(["umount", str(mount)], check=True, timeout=60)


def test_size_of_a_step_of_plain_orbax_in_a_bucket_is_that_of_its_objects(bucket):
  connect(bucket.url)
  with ocp.CheckpointManager(f"{bucket.url}/run") as manager:
    manager.save(0, args=ocp.args.PyTreeSave({"x": jnp.arange(1000.0)}))
  (step,) = run.list_steps(f"{bucket.url}/run")
  assert step.nbytes > 1000


def test_what_other_programs_left_in_a_bucket_is_read_continued_or_named(bucket):
  state = {"w": jnp.full(3, 12, jnp.float32)}
  url = bucket.url + "/a"
  with ckpt.Checkpointer(url + "/new") as c:  # connects Orbax to the bucket, as s3:// needs it
    assert c.restore_or_init(lambda: state).next_step == 0
  with ocp.CheckpointManager(url + "/old", options=ocp.CheckpointManagerOptions(step_prefix="ckpt")) as manager:
    manager.save(12, args=ocp.args.Composite(model=ocp.args.StandardSave(state), data=ocp.args.JsonSave({"at": 3})))
  with ckpt.Checkpointer(url + "/old", {"retention": {"last": 2}}) as c:
    restored = c.restore_or_init(lambda: {"w": jnp.zeros(3)})
    assert (restored.next_step, restored.state["w"][0]) == (13, 12)
    for step in (13, 14):
      c.save(step, {"w": jnp.full(3, step, jnp.float32)})
      c.wait()
    assert [s.step for s in c.steps()] == [13, 14]
  assert ckpt.verify(url + "/old") == []
  with ocp.CheckpointManager(url + "/old", options=ocp.CheckpointManagerOptions(step_prefix="ckpt")) as manager:
    found = manager.restore(14, args=ocp.args.Composite(model=ocp.args.PyTreeRestore(state)))
  assert found["model"]["w"][0] == 14
  (run.run_directory(url + "/flax") / "checkpoint_7").write_bytes(flax.serialization.to_bytes(state))
  refused = {"": "holds runs", "/old/ckpt_14": "step 14 of the run", "/flax": "ckpt-jax convert"}
  for path, why in refused.items():
    with pytest.raises(NotARunError, match=why):
      ckpt.Checkpointer(url + path)
  assert [one.step for one in convert(url + "/flax", url + "/converted")] == [7]
  with ckpt.Checkpointer(url + "/converted") as c:
    assert c.restore().state["w"].tolist() == [12, 12, 12]


def test_claimed_place_is_listed_once_and_knows_what_this_process_adds(bucket):
  step = epath.Path(bucket.url) / "claimed" / "1"
  connect(bucket.url)
  with BACKEND.claim(step):
    bucket.proxy.reset()
    assert not step.exists() and not (step / "default").exists()
    (step / "default").mkdir(parents=True)
    assert (step / "default").is_dir() and not (step / "default" / "file").exists()
    with pytest.raises(FileNotFoundError):
      (step / "default" / "file").unlink()
    assert not bucket.proxy.requests
    (step / "default" / "file").write_text("x")
    assert (step / "default" / "file").exists() and [p.name for p in (step / "default").iterdir()] == ["file"]
    assert bucket.proxy.requests.keys() <= {"write"}
    BACKEND.end_claim(step / "default")
    assert [p.name for p in (step / "default").iterdir()] == ["file"]
    assert bucket.proxy.requests["list"] == 1
