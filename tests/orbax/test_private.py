"""Fails loudly when a private name that orbax_private.py leans on moves."""

import datetime
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath
from orbax.checkpoint._src.multihost import multihost

import ckpt_jax as ckpt
from ckpt_jax.errors import CheckpointError
from ckpt_jax.integrity.record import RecordingHandler
from ckpt_jax.layout import handler as layout_handler
from ckpt_jax.layout import writing
from ckpt_jax.orbax import manager as manager_module
from ckpt_jax.orbax import private, saves
from ckpt_jax.orbax.manager import RunManager, end_save, forget_failure, forget_steps, leave_behind, use_deleter
from ckpt_jax.storage.paths import LiteralPath


def test_manager_says_when_a_save_has_ended_and_of_what_it_died(tmp_path, monkeypatch):
  told, ended = [], threading.Event()

  def on_end(step, error):
    told.append((step, type(error)))
    ended.set()

  with RunManager(tmp_path, lambda: [], on_end) as manager:
    manager.save(0, args=ocp.args.PyTreeSave({"x": jnp.ones(2)}))
    assert ended.wait(60)
    ended.clear()

    async def fail(self):
      raise OSError("no more room")

    with monkeypatch.context() as patch:
      patch.setattr(ocp.path.atomicity.AtomicRenameTemporaryPath, "finalize", fail)
      manager.save(1, args=ocp.args.PyTreeSave({"x": jnp.ones(2)}))
      assert ended.wait(60) and told == [(0, type(None)), (1, OSError)]
    forget_failure(manager)
    assert manager.all_steps() == [0]
    manager.save(2, args=ocp.args.PyTreeSave({"x": jnp.ones(2)}))  # does not raise what step 1 died of
  assert told[2] == (2, type(None))


def test_commit_that_runs_when_save_raises_is_waited_for(tmp_path, monkeypatch):
  ended = threading.Event()
  with RunManager(tmp_path, lambda: [], lambda step, error: ended.set()) as manager:

    def fail():
      raise ValueError("a policy that fails")

    monkeypatch.setattr(manager, "_get_old_steps_to_remove", fail)
    with pytest.raises(ValueError, match="a policy"):
      manager.save(0, args=ocp.args.PyTreeSave({"x": jnp.ones(2)}))
    assert end_save(manager, ended, 60) and not ended.is_set()
  assert (tmp_path / "0" / "_CHECKPOINT_METADATA").exists()


def test_manager_asks_us_for_its_steps_when_it_opens_and_reloads(tmp_path):
  times = [datetime.datetime(2026, 1, 1, tzinfo=datetime.timezone.utc)]
  steps = [(3, times[0])]
  with RunManager(tmp_path, lambda: steps) as manager:
    assert manager.all_steps() == [3] and manager._checkpoints[0].time == times[0]
    steps.append((7, times[0]))
    manager.reload()
    assert manager.all_steps() == [3, 7] and manager.latest_step() == 7


def test_all_that_orbax_waits_for_in_the_thread_that_opens_or_saves_goes_through_our_meeting(tmp_path, monkeypatch):
  plain, met = [], []
  monkeypatch.setattr(multihost, "should_skip_process_sync", lambda processes: plain.append(processes) or True)
  with RunManager(tmp_path, lambda: [], meet=met.append) as manager:
    opened = len(met)
    manager.save(0, args=ocp.args.PyTreeSave({"x": jnp.ones(2)}))
    manager.wait_until_finished()
  assert opened and any("CheckpointManager:save_start" in what for what in met[opened:])
  before, ours = len(plain), len(met)
  with ocp.CheckpointManager(tmp_path) as theirs:
    theirs.save(1, args=ocp.args.PyTreeSave({"x": jnp.ones(2)}))
  assert len(plain) > before and len(met) == ours


def test_coordination_service_is_where_we_look_and_asked_for_by_name():
  from jax._src import distributed

  assert distributed.global_state.client is None
  with pytest.raises(CheckpointError, match="not initialized"):
    private.coordination_service()


def test_python_still_lets_us_run_before_executors_shut_down():
  assert callable(threading._register_atexit)


def test_names_that_make_s3_possible_are_where_we_replace_them():
  from etils.epath import backend, gpath
  from orbax.checkpoint._src.path import gcs_utils
  from orbax.checkpoint._src.serialization import tensorstore_utils

  from ckpt_jax.storage.connect import connect
  from ckpt_jax.storage.objects import ObjectBackend

  connect("s3://bucket/run")
  for module, name in (
    (gcs_utils, "is_gcs_path"),
    (gcs_utils, "is_hierarchical_namespace_enabled"),
    (gcs_utils, "get_kvstore_for_gcs"),
    (tensorstore_utils, "_use_gcs_driver"),
    (tensorstore_utils, "_normalize_path"),
    (gpath, "_is_tf_installed"),
  ):
    assert getattr(module, name).__module__.startswith("ckpt_jax"), name
  assert isinstance(gpath._PREFIX_TO_BACKEND["s3"], ObjectBackend)
  assert backend.fsspec_backend in gpath._GCS_BACKENDS
  spec = tensorstore_utils.build_kvstore_tspec("s3://bucket/run/1/default", "w", use_ocdbt=True)
  assert spec["driver"] == "ocdbt" and spec["base"]["driver"] == "s3" and spec["base"]["bucket"] == "bucket"


def test_managers_deleter_and_step_list_are_where_we_look(tmp_path):
  asked = []

  class Deleter:
    def delete(self, step):
      asked.append(step)

    def delete_steps(self, steps):
      asked.extend(steps)

    def close(self):
      asked.append("close")

  with ocp.CheckpointManager(tmp_path, options=ocp.CheckpointManagerOptions(max_to_keep=1)) as manager:
    use_deleter(manager, Deleter())
    for step in range(3):
      manager.save(step, args=ocp.args.PyTreeSave({"x": jnp.ones(2)}))
    manager.wait_until_finished()
    assert asked == [0, 1] and (tmp_path / "0").exists()
    manager.reload()
    forget_steps(manager, {0, 1})
    assert manager.all_steps() == [2]
  assert asked[-1] == "close"


def test_array_metadata_store_tells_prng_keys_from_words(tmp_path):
  import jax

  from ckpt_jax.layout.description import prng_keys

  store = private.array_metadata_store()
  handler = ocp.type_handlers.ArrayHandler(array_metadata_store=store)
  registry = ocp.type_handlers.create_type_handler_registry((jax.Array, handler))
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(type_handler_registry=registry)) as c:
    c.save(tmp_path / "a", {"key": jax.random.key(0), "words": jnp.zeros(2, jnp.uint32)})
  assert (tmp_path / "a" / "array_metadatas").is_dir()
  assert prng_keys(epath.Path(tmp_path / "a")) == {"key": "threefry2x32"}


def test_threads_of_a_save_are_where_we_wait_for_them_and_leave_them(tmp_path, monkeypatch):
  with ocp.CheckpointManager(tmp_path) as manager:
    manager.save(0, args=ocp.args.PyTreeSave({"x": jnp.ones(2)}))
    saving, finalizing = manager._checkpointer._async_manager._thread, manager._finalize_thread.get()
    assert isinstance(saving, threading.Thread) and isinstance(finalizing, threading.Thread)
    monkeypatch.setattr(manager_module, "_left_behind", [])
    leave_behind(manager, [threading.current_thread()])
    assert manager_module._left_behind == [finalizing, saving, threading.current_thread()]


def test_ending_a_save_ends_its_own_threads_alone_and_leaves_no_coroutine_behind(recwarn):
  from orbax.checkpoint._src.futures import future, synchronization

  begun = []

  async def part(name):
    begun.append(name)

  signal = synchronization.HandlerAwaitableSignal.STEP_DIRECTORY_CREATION
  ours, theirs = saves.Operation("ours"), saves.Operation("theirs")
  for operation in (ours, theirs):
    with operation.begun():
      future.AwaitableSignalsContract.add_to_awaitable_signals_contract([signal])
      ocp.future.CommitFutureAwaitingContractedSignals(part(operation.name))
    assert len(operation.threads) == 1
  assert ours.end(60) and not ours.threads
  assert len(theirs.threads) == 1 and not begun
  future.set_signals([signal], operation_id=theirs.name)
  threading.Thread.join(theirs.threads[0], 60)
  assert begun == [theirs.name]
  import gc

  gc.collect()
  assert not [w for w in recwarn if "never awaited" in str(w.message)]


def test_plain_orbax_counts_its_saves_as_ever_and_does_not_see_ours(tmp_path):
  from orbax.checkpoint._src.futures.synchronization import OperationIdGenerator as Ids

  operation = saves.Operation("ours")
  first = Ids.next_operation_id()
  with operation.begun():
    Ids.next_operation_id()
    assert Ids.get_current_operation_id() == operation.name
  assert Ids.get_current_operation_id() == str(first) and Ids.next_operation_id() == first + 1
  with ocp.CheckpointManager(tmp_path) as manager, operation.begun():
    manager.save(0, args=ocp.args.PyTreeSave({"x": jnp.ones(2), "s": "text"}))
    assert {t._operation_id for t in operation._threads} == {operation.name}
  assert (tmp_path / "0" / "_CHECKPOINT_METADATA").exists()


def test_temporary_paths_tell_their_store_and_are_chosen_by_an_option(tmp_path):
  made = []

  class Told(ocp.path.atomicity.AtomicRenameTemporaryPath):
    def __init__(self, temporary, final, *, checkpoint_metadata_store=None, **options):
      super().__init__(temporary, final, checkpoint_metadata_store=checkpoint_metadata_store, **options)
      made.append((final.name, checkpoint_metadata_store is not None))

  options = ocp.CheckpointManagerOptions(temporary_path_class=Told)
  with ocp.CheckpointManager(tmp_path, options=options) as manager:
    manager.save(0, args=ocp.args.PyTreeSave({"x": jnp.ones(2)}))
  assert ("0", True) in made and ("default", False) in made


def test_what_we_write_beside_arrays_is_what_orbax_writes(tmp_path):
  import json

  import jax
  from jax.sharding import NamedSharding, PartitionSpec

  from ckpt_jax.config import Config
  from ckpt_jax.layout.handler import pytree_handler

  mesh = jax.make_mesh((2,), ("x",))
  state = {
    "replicated": jax.device_put(np.ones((4, 4), np.float32), NamedSharding(mesh, PartitionSpec())),
    "key": jax.random.key(1),
    "one": jnp.ones(3),
  }
  for name, handler in (
    ("theirs", ocp.PyTreeCheckpointHandler(use_compression=False)),
    ("ours", pytree_handler(Config())),
  ):
    directory = epath.Path(tmp_path / name)
    directory.mkdir()
    handler.save(directory, args=ocp.args.PyTreeSave(state))
    handler.finalize(directory)
  for file in ("_sharding", "_METADATA", "array_metadatas/process_0"):
    theirs, ours = (json.loads((tmp_path / name / file).read_text()) for name in ("theirs", "ours"))
    if file != "_sharding":  # one chunk a process, where Orbax has one a device
      theirs, ours = (json.loads(json.dumps(x).replace("[4, 4]", "[2, 4]")) for x in (theirs, ours))
    assert ours == theirs, file


def test_an_array_made_weakly_typed_is_the_same_array_but_for_that():
  mesh = jax.make_mesh((2,), ("x",))
  spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
  for array in (jnp.arange(4.0), jax.device_put(jnp.arange(4), jax.devices()[1]), jax.device_put(jnp.ones(2), spread)):
    weak = private.array_as(array, weak=True, committed=array.committed)
    assert weak.weak_type and not array.weak_type and weak.tolist() == array.tolist()
    assert (weak.sharding, weak.committed, weak.dtype) == (array.sharding, array.committed, array.dtype)
    with jax.numpy_dtype_promotion("standard"):
      assert jax.jit(lambda x: x * jnp.bfloat16(1))(weak.astype(jnp.float32)).dtype == jnp.float32
      if array.dtype == jnp.float32:  # jit sees the type too, and not only Python
        assert jax.jit(lambda x: x * jnp.bfloat16(1))(weak).dtype == jnp.bfloat16
        assert jax.jit(lambda x: x * jnp.bfloat16(1))(array).dtype == jnp.float32


def test_orbax_keeps_the_class_of_the_paths_that_it_is_given(tmp_path, monkeypatch):
  # Else it finds nothing by a pattern where the path itself looks like one: see storage.paths.LiteralPath.
  seen = []
  finalize = RecordingHandler.finalize

  def look(self, directory):
    seen.append(type(directory))
    finalize(self, directory)

  monkeypatch.setattr(RecordingHandler, "finalize", look)
  with ckpt.Checkpointer(tmp_path) as c:
    c.save(0, {"x": jnp.ones(2)})
  assert seen == [LiteralPath] and issubclass(LiteralPath, type(epath.Path("/")))


def test_orbax_leaves_the_rename_of_a_step_to_us_after_its_last_write(tmp_path):
  import asyncio

  path = ocp.path.atomicity.AtomicRenameTemporaryPath.from_final(epath.Path(tmp_path) / "0")
  asyncio.run(path.create())
  seen = []

  def rename():
    seen.extend(sorted(p.name for p in path.get().iterdir()))
    path.get().rename(path.get_final())

  private.rename_by(path, rename)
  asyncio.run(path.finalize())
  assert "commit_success.txt" in seen and (tmp_path / "0" / "commit_success.txt").exists()


def test_deprecated_functions_are_still_there():
  context = private.tensorstore_context(use_ocdbt=True, file_io_concurrency_limit=7)
  assert context.spec.to_json()["file_io_concurrency"] == {"limit": 7}
  with pytest.raises(ValueError, match="mismatch"):
    private.check_input_arguments([1], [])
  assert callable(private.tensorstore_read_spec) and callable(private.tensorstore_write_spec)


def test_metadata_is_written_while_arrays_are(tmp_path, monkeypatch):
  write, there = writing.Writer.write, []

  def late(self, *args):
    deadline = time.monotonic() + 60
    while not there and time.monotonic() < deadline:
      there.extend(tmp_path.rglob("_METADATA"))
      time.sleep(0.01)
    write(self, *args)

  monkeypatch.setattr(writing.Writer, "write", late)
  with ckpt.Checkpointer(tmp_path) as c:
    c.save(0, {"x": jnp.ones(4), "n": np.ones(3)})
  assert there and ckpt.verify(tmp_path) == []


def test_what_arrays_die_of_before_they_are_described_is_raised(tmp_path, monkeypatch):
  async def refuse(*args):
    raise OSError("no notes today")

  monkeypatch.setattr(private, "write_array_metadatas", refuse)
  c = ckpt.Checkpointer(tmp_path)
  with pytest.raises(ckpt.SaveFailedError, match="no notes today"):
    c.save(0, {"x": jnp.ones(4)})
    c.wait()
  c.close()


@pytest.mark.parametrize(("file_io", "most"), [("direct", 2**20), ("direct", 15), ("buffered", 2**20)])
def test_of_a_small_save_past_the_page_cache_tensorstore_syncs_nothing(tmp_path, monkeypatch, file_io, most):
  monkeypatch.setattr(layout_handler, "_SYNCED_LAST_NBYTES", most)
  seen, write = [], writing.Writer.write

  def noted(self, arrays, *args):
    seen.extend(array.info.ts_context.spec.to_json().get("file_io_sync", True) for array in arrays)
    write(self, arrays, *args)

  monkeypatch.setattr(writing.Writer, "write", noted)
  with ckpt.Checkpointer(tmp_path, {"limits": {"file_io": file_io}}) as c:
    c.save(0, {"x": jnp.ones(4)})
  assert seen == [(file_io, most) != ("direct", 2**20)]
