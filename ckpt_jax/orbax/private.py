"""Private and deprecated names of Orbax, jax, epath and Python, each with the reason.

With `manager` and `saves` the only files that touch any; tests/orbax/test_private.py fails when one of them moves, and
tests/orbax/test_door.py when another file uses one.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import threading
from collections.abc import Callable, Mapping
from typing import Any

import orbax.checkpoint as ocp
from jax._src import distributed

from ckpt_jax.errors import CheckpointError

# Why here: deprecated in `ocp.type_handlers` ("don't use unless you know what you're doing"), and there is no other way
# to open and write arrays exactly where Orbax's ArrayHandler does.
check_input_arguments = ocp.type_handlers.check_input_arguments
tensorstore_context = ocp.type_handlers.get_ts_context
tensorstore_read_spec = ocp.type_handlers.get_json_tspec_read
tensorstore_write_spec = ocp.type_handlers.get_json_tspec_write


def coordination_service() -> Any:
  """The client of the service that `jax.distributed.initialize()` started: a key-value store of the whole job.

  Why private: jax has public barriers and collectives, but none that reports a process as failed, or names a missing
  one. Orbax uses the same object (`multihost.get_jax_distributed_client`).

  Raises:
    CheckpointError: if jax.distributed was not initialized.
  """
  client = distributed.global_state.client
  if client is None:
    raise CheckpointError(
      "jax.distributed is not initialized; call ckpt_jax.multihost.initialize() first", topic="starting-processes"
    )
  return client


def is_empty_node(node: Any) -> bool:
  """Whether Orbax keeps a node of a tree as an empty one: None, {}, a namedtuple or dataclass without fields.

  Why private: both must agree on what is empty; jax's own function for it is private too.
  """
  from orbax.checkpoint._src.tree import utils

  return utils.is_empty_node(node)


def array_metadata_store() -> Any:
  """A store for the `array_metadatas` of a step, to give to an ArrayHandler.

  Why private: `ocp.type_handlers.ArrayHandler(array_metadata_store=...)` is public, the only class that it takes is
  not; without one nothing records which arrays are PRNG keys, nor the shapes that were written.
  """
  from orbax.checkpoint._src.metadata import array_metadata_store as stores

  return stores.Store()


async def write_array_metadatas(store: Any, item_dir: Any, arrays: Any, chunks: Any, impls: dict[str, str]) -> None:
  """Notes shapes, chunks and PRNG implementations as Orbax's own ArrayHandler does; it demands them on commit.

  Why private: the class of the notes is not public either.

  Args:
    arrays, chunks: `layout.writing.Written`s, and the chunk shape of each.
    impls: of those that are the words of PRNG keys.
  """
  import jax
  from orbax.checkpoint._src.metadata import array_metadata

  notes = [
    array_metadata.ArrayMetadata(
      param_name=a.info.name,
      shape=a.shape,
      dtype=a.dtype,
      write_shape=a.write_shape,
      chunk_shape=chunk,
      use_ocdbt=True,
      use_zarr3=bool(a.info.use_zarr3),
      ext_metadata={array_metadata.RANDOM_KEY_IMPL: impls[a.info.name]} if a.info.name in impls else None,
    )
    for a, chunk in zip(arrays, chunks, strict=True)
  ]
  await store.write(checkpoint_dir=item_dir, array_metadatas=notes, process_index=jax.process_index())


def shorten_saves(handler: Any, context: Callable[[Any], Any]) -> None:
  """Has an ocp.PyTreeCheckpointHandler write `_METADATA` while the arrays are written, and open those in a context.

  Why private: Orbax writes the file when the last array is in storage, although all that it says was known before (9 ms
  for 256 leaves, 0.2 s for 5,000), and makes a new context for each save, without asking.

  Args:
    handler: its futures of arrays may have a future `described`, of their `array_metadatas`, which are read for it.
    context: returns the TensorStore context to use, of Orbax's.
  """
  inner = handler._handler_impl  # pylint: disable=protected-access
  param_infos, write_metadata = inner._get_param_infos, inner._write_metadata_after_commits

  def in_context(*args: Any, **options: Any) -> Any:
    import jax

    infos = param_infos(*args, **options)
    found: Any = None
    for info in jax.tree.leaves(infos):
      found = found or context(info.ts_context)
      info.ts_context = found
    return infos

  async def once_described(commit_futures: Any, **options: Any) -> None:
    await write_metadata([getattr(future, "described", future) for future in commit_futures], **options)

  inner._get_param_infos = in_context
  inner._write_metadata_after_commits = once_described


def shardings_json(shardings: Mapping[str, Any]) -> str:
  """The content of an item's `_sharding` file, from which plain Orbax restores without shardings as an argument.

  Why private: the text of a sharding is Orbax's own. Orbax writes the file array by array through TensorStore's json
  driver, half a millisecond each. `shardings` are by the names of the arrays in the database.
  """
  from orbax.checkpoint._src.metadata import sharding as metadata

  texts: dict[Any, str | None] = {}
  found = {}
  for name, sharding in shardings.items():
    if sharding not in texts:
      described = metadata.from_jax_sharding(sharding)
      texts[sharding] = None if described is None else described.to_serialized_string()
    if texts[sharding] is not None:
      found[base64.urlsafe_b64encode(name.encode()).decode()] = texts[sharding]
  return json.dumps(found)


def rename_by(path: Any, rename: Callable[[], None]) -> None:
  """Has `finalize` of an AtomicRenameTemporaryPath call `rename`, in a thread, in place of its own rename.

  Why private: files must be synced after Orbax has written the last of them and before the rename, and `finalize` has
  no hook between the two; but it leaves the rename to its snapshot, if it has one (on file systems with snapshots).
  """

  class Renaming:
    async def replace_source(self) -> None:
      await asyncio.to_thread(rename)

  path._snapshot = Renaming()  # pylint: disable=protected-access


def array_as(array: Any, *, weak: bool, committed: bool) -> Any:
  """The buffers of a jax array as one that gives way to the types of others, as Python numbers do, or to other devices.

  It is then weakly typed (`weak`), or does not stay on its devices, whatever it is used with (not `committed`).

  Why private: jax makes weakly typed arrays of Python numbers only, and uncommitted ones of what it puts on the default
  device itself; its own function that keeps the bits (`lax._convert_element_type`) is private too, and compiles a
  program for each kind.
  """
  one = len(array.sharding.device_set) == 1
  shards = [array] if one else [shard.data for shard in array.addressable_shards]
  aval = array.aval.update(weak_type=True) if weak else array.aval
  return type(array)(aval, array.sharding, shards, committed=committed, _skip_checks=one)


def before_executors_shut_down(callback: Callable[[], None]) -> None:
  """Runs `callback` when the interpreter ends, while threads can still be started.

  Why private: `atexit` runs after `concurrent.futures` refuses new work, so a background write that still has work to
  submit fails there (a script without close() committed nothing, 3 of 3). CPython offers no public hook that is
  earlier; `concurrent.futures.thread` itself uses this one (python/cpython#86128).
  """
  threading._register_atexit(callback)  # type: ignore[attr-defined]  # pylint: disable=protected-access


_taught = False


def teach_object_stores(backend: Any, kvstore_spec: Callable[[str], dict[str, Any]]) -> None:
  """Lets Orbax read and write s3:// as it does gs://, both with our clients. Does so once in a process.

  `backend` is epath's back end for both, `kvstore_spec` makes TensorStore's JSON of a URL.

  Why private: Orbax takes every path for a local one but gs:// (google/orbax#2739 is open). All its decisions about
  object stores (commit by marker file instead of rename, size of data files, how to delete, which TensorStore driver)
  hang on the functions replaced here. epath has a table of back ends and no way to register one; with TensorFlow
  installed it would use that, without our retries and without S3.
  """
  global _taught
  if _taught:
    return
  from etils.epath import gpath
  from orbax.checkpoint._src.path import gcs_utils
  from orbax.checkpoint._src.serialization import tensorstore_utils

  schemes = ("gs://", "s3://")
  has_folders = gcs_utils.is_hierarchical_namespace_enabled

  def is_remote(path: Any) -> bool:
    text = path.as_posix() if hasattr(path, "as_posix") else os.fspath(path)
    return text.startswith(schemes)

  def normalized(path: str) -> str:
    scheme, found, rest = str(path).partition("://")
    return f"{scheme}://{os.path.normpath(rest)}" if found else os.path.normpath(path)

  def hierarchical(path: Any) -> bool:
    # Asks Google's own client, which needs a project and a permission (storage.buckets.get) that nothing else needs.
    if not str(path).startswith("gs://") or "STORAGE_EMULATOR_HOST" in os.environ:
      return False
    try:
      return bool(has_folders(path))
    except Exception:  # whatever it lacks: a bucket that is used flat works, hierarchical or not
      return False

  gcs_utils.is_gcs_path = is_remote
  gcs_utils.is_hierarchical_namespace_enabled = hierarchical
  gcs_utils.get_kvstore_for_gcs = kvstore_spec
  tensorstore_utils._use_gcs_driver = is_remote
  tensorstore_utils._normalize_path = normalized
  gpath._PREFIX_TO_BACKEND["gs"] = gpath._PREFIX_TO_BACKEND["s3"] = backend
  gpath._GCS_BACKENDS = gpath._GCS_BACKENDS | {backend}
  gpath._is_tf_installed = lambda: False
  _taught = True
