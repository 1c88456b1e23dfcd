"""Orbax's PyTree handler with the layout and limits of a Config, and with our way of writing arrays."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath

from ckpt_jax.config import Config, LayoutConfig
from ckpt_jax.config.units import is_uncompressed
from ckpt_jax.layout import codec, packing, shares, writing
from ckpt_jax.layout.encoding import as_words, is_prng_key
from ckpt_jax.layout.ring import Ring
from ckpt_jax.layout.splitting import Small, split
from ckpt_jax.layout.staging import HostCopies
from ckpt_jax.layout.text import TextHandler
from ckpt_jax.layout.unchanged import Round, nothing_unchanged
from ckpt_jax.orbax import private
from ckpt_jax.orbax.format import MANIFEST, SHARDINGS, VALUES, process_database
from ckpt_jax.storage import look
from ckpt_jax.storage.objects import BACKEND
from ckpt_jax.storage.page_cache import write_behind
from ckpt_jax.storage.urls import is_object_store

_LOOK_S, _MOMENT_S = 0.2, 0.001  # between looks whether a write has died, and of such a look
_SYNCED_LAST_NBYTES = 2**27  # of a save that is synced once, before its commit
_QUEUE_S = 2.0  # the most that other work waits for the writes to be queued
_ParamInfos = Sequence[ocp.type_handlers.ParamInfo]


def pytree_handler(config: Config) -> PyTreeHandler:
  """The handler that writes the state of a step."""
  layout, limits = config.layout, config.limits
  types = ocp.type_handlers
  ours: dict[Any, Any] = {
    jax.Array: ArrayHandler(layout, direct=limits.file_io == "direct"),
    np.ndarray: NumpyHandler(layout.compression),
    str: TextHandler(),
  }
  by_type = {kind: ours.get(kind) or types.get_type_handler(kind) for kind in types.supported_types()}
  return PyTreeHandler(
    ours[jax.Array],
    pack=layout.pack == "on",
    use_compression=not is_uncompressed(layout.compression),  # of what Orbax writes: Python's numbers, casts
    # The target size of data files is honoured by zarr3 only.
    use_zarr3=layout.target_file_size != "auto",
    # Unlimited, Orbax writes in one OCDBT transaction, which keeps every chunk until the commit.
    save_concurrent_gb=_gigabytes(limits.save_concurrency),
    type_handler_registry=types.create_type_handler_registry(*by_type.items()),
  )


class PyTreeHandler(ocp.PyTreeCheckpointHandler):
  """Orbax's handler of trees, which hands small arrays to our handler of arrays if it is to pack them.

  Attributes:
    copies: of the arrays of the next state, as far as they were started before.
    unchanged: which leaves of it need not be written.
  """

  def __init__(self, arrays: ArrayHandler, *, pack: bool, **options: Any):
    super().__init__(**options)
    self.copies = HostCopies(arrays.limits)
    self.unchanged = nothing_unchanged()
    self._arrays = arrays
    self._pack = pack
    self._small: Small | None = None
    self._has_arrays = False
    private.shorten_saves(self, arrays.context)

  @classmethod
  def typestr(cls) -> str:
    return ocp.PyTreeCheckpointHandler.typestr()  # the name in the step's metadata: plain Orbax must know it

  async def async_save(self, directory: Any, item: Any = None, save_args: Any = None, args: Any = None) -> Any:
    """See Orbax's."""
    packed: Sequence[jax.Array] = []
    self._small = None
    if self._pack and not self.copies.in_turn and (parts := split(args.item)) is not None:  # slabs are read in one go
      rest, packed, self._small = parts
      args = dataclasses.replace(args, item=rest)
    leaves = jax.tree.leaves(args.item)
    self._has_arrays = any(not isinstance(leaf, str) for leaf in leaves)
    alone = jax.process_count() == 1 and all(isinstance(leaf, jax.Array | str) for leaf in leaves)
    self._arrays.prepare(packed, self._small, self.copies, self.unchanged, alone=alone)
    self.copies, self.unchanged = HostCopies(self._arrays.limits), nothing_unchanged()
    return await super().async_save(directory, item, save_args, args)

  @property
  def writes(self) -> bool:
    """Whether this process writes a part of the last tree into an OCDBT database of its own, as far as is known."""
    return self._has_arrays and (jax.process_index() == 0 or self._arrays.writes)

  @property
  def is_merged(self) -> bool:
    """Whether the last tree went straight into the item's own database, so that there is nothing to merge."""
    return self._arrays.merged

  def wait_until_queued(self) -> None:
    """Waits, in the background of a save, until enough of the arrays is on its way to keep the storage busy.

    Work that takes Python's lock before that makes the save longer; after it, hardly.
    """
    if self._arrays.writer is not None:
      self._arrays.writer.queued.wait(_QUEUE_S)

  def finalize(self, directory: epath.Path) -> None:
    """See Orbax's; merges the indexes that the processes of a packed step wrote."""
    packing.merge_parts(directory, jax.process_count())
    if self._small is not None:
      self._small.complete(directory)
    if self.is_merged:
      return  # Orbax's would look for databases to merge, and warn that there are none
    with self._arrays.behind(directory):  # Orbax has written numpy arrays and numbers
      super().finalize(directory)


class ArrayHandler(ocp.type_handlers.ArrayHandler):
  """Orbax's handler of jax arrays, which writes them by `writing`; reading is the business of `values`.

  Attributes:
    limits: of the division among processes.
    writes: whether this process writes a part of the last arrays.
    merged: whether it writes them into the item's own database.
    writer: of the last arrays; None if Orbax wrote them.
  """

  def __init__(self, layout: LayoutConfig, *, direct: bool = False):
    # Without one Orbax writes no array_metadatas, and forgets which arrays are PRNG keys.
    self._store = private.array_metadata_store()
    self._chunk_nbytes = _number(layout.chunk_size)
    super().__init__(
      use_replica_parallel={"on": True, "off": False, "auto": None}[layout.replica_parallel],
      min_slice_bytes_for_replica_parallel=_number(layout.min_slice_for_replica_parallel),
      array_metadata_store=self._store,
    )
    self.limits = shares.Limits.of(layout)
    self._compression = layout.compression
    self._direct = direct
    self.writes = self.merged = False
    self.writer: writing.Writer | None = None
    self._memory = packing.SlabMemory()
    self.prepare([], None, HostCopies(), nothing_unchanged())

  def prepare(
    self,
    packed: Sequence[jax.Array],
    small: Small | None,
    copies: HostCopies,
    unchanged: Round,
    *,
    alone: bool = False,
  ) -> None:
    """Says what belongs to the next call of `serialize` and Orbax does not pass on.

    Args:
      packed, small: arrays that go into a slab, and their places.
      copies: of the arrays, as far as they were started before.
      unchanged: which of them need not be written.
      alone: whether no other process, and no other handler, writes into a database of the item.
    """
    self._packed, self._small, self._copies, self._unchanged = packed, small, copies, unchanged
    self._alone, self.writes, self.merged, self.writer = alone, False, False, None

  async def serialize(
    self, values: Sequence[jax.Array], infos: _ParamInfos, args: Sequence[ocp.SaveArgs] | None = None
  ) -> Sequence[ocp.future.Future]:
    """Starts to write arrays. Returns once training may overwrite them.

    It differs from Orbax's own in what follows; what is stored is an item that plain Orbax reads, but for 4.
      1. On a CPU no array is copied: views of jax's memory keep it from being reused. From an accelerator all are
         copied to pinned memory in one transfer, which the write waits for, not training (see `staging`).
      2. Arrays are opened through one key-value store, and all writes are queued from one thread under one limit of
         bytes, where Orbax runs a chain of asyncio tasks for each shard.
      3. All processes write as much, whatever the number of replicas (`shares`). Chunks are cut so that other meshes
         can read them, and the pieces of a small array that one process alone holds are stored as one.
      4. Arrays that `prepare` announced are written side by side into a slab (see `packing`).
      5. Each array has the codec of its kind (`codec`), where Orbax knows zstd or none, for all.
      6. The shardings and the array metadata are each written as one file in one go.
      7. With `limits.file_io: direct` what is written leaves the page cache meanwhile (`storage.page_cache`).
      8. Arrays that have not changed since the last step are not written again (`unchanged`).
      9. A failed write is waited for before the error is raised: nothing is written once a save counts as ended.
      10. What one process writes to a bucket goes straight into the item's own database: a merge takes six requests,
         one after the other.
    Items without OCDBT and casts go through Orbax's.
    """
    args = args or [ocp.SaveArgs()] * len(values)
    packed, small, copies, unchanged = self._packed, self._small, self._copies, self._unchanged
    alone = self._alone
    self.prepare([], None, HostCopies(), nothing_unchanged())
    private.check_input_arguments(values, infos, args)
    if self._chunk_nbytes is not None:
      args = [
        arg if arg.chunk_byte_size else dataclasses.replace(arg, chunk_byte_size=self._chunk_nbytes) for arg in args
      ]
    first = infos[0]
    if not first.is_ocdbt_checkpoint or any(arg.dtype is not None for arg in args):
      assert small is None
      return await super().serialize(values, infos, args)  # type: ignore[arg-type]
    impls = {info.name: str(jax.random.key_impl(v)) for v, info in zip(values, infos, strict=True) if is_prng_key(v)}
    arrays = [as_words(v) for v in values]
    written = writing.on_host(arrays, infos, args, copies, self._compression)
    pieces = writing.small_on_host(shares.slices(packed, shares.WHOLE), copies) if small else []
    copies.settled()
    unchanged.named([info.name for info in infos], values)
    unchanged.written = written if jax.process_count() > 1 else ()
    self.writes = any(array.pieces for array in written) or bool(small and small.slab.nbytes)
    # Homes of what does not change are in the database of a process.
    self.merged = alone and is_object_store(first.parent_dir) and unchanged.is_plain(written)
    self.writer = writing.Writer(
      first.ts_context,  # two contexts would be two databases that do not know of each other
      _window(first, copies.ring.limit),
      process=None if self.merged else jax.process_index(),
      compressed=bool(first.use_compression),
      memory=self._memory,
      direct=self._direct,
      batches=is_object_store(first.parent_dir) and copies.ring.limit is None,
    )
    shardings = {info.name: array.sharding for info, array in zip(infos, arrays, strict=True)}
    write = functools.partial(unchanged.write, self.writer, written, small.slab if small else None, pieces)
    save = functools.partial(self._write, self.writer, copies.ring, write, written, small, shardings, impls)
    return [_described(save)]

  def context(self, of: ts.Context) -> ts.Context:
    """In which arrays are opened instead of Orbax's context.

    TensorStore syncs each file, its directory and the manifest whenever it commits to a database: some 40 times for a
    save of a few MB. Where only little is written, by one process, it need not: that process syncs all of it before the
    commit (`storage.durable.seal`). Of more the syncs stay, since they hold the writer back to the disk's speed, and
    report an error of the disk however late the kernel gets to it.
    """
    coming = self._unchanged.coming
    if not self._direct or jax.process_count() > 1 or coming is None or coming > _SYNCED_LAST_NBYTES:
      return of
    return ts.Context({"file_io_sync": False}, parent=of)

  def behind(self, item: epath.Path) -> contextlib.AbstractContextManager[None]:
    """Within it, what this process writes of an item leaves the page cache, if it is to."""
    if not self._direct:
      return contextlib.nullcontext()
    return write_behind(item / process_database(jax.process_index()) / VALUES)

  async def _write(
    self,
    writer: writing.Writer,
    ring: Ring,
    write: Callable[[epath.Path], None],
    written: Sequence[writing.Written],
    small: Small | None,
    shardings: Mapping[str, jax.sharding.Sharding],
    impls: dict[str, str],
    described: _Described,
  ) -> None:
    await written[0].info.await_path_creation()
    item, process = written[0].info.parent_dir, jax.process_index()
    if process:
      await asyncio.to_thread(look.wait_for_other_host, item)
    for array in written:  # waiting for each costs 12 us in Python 3.11
      array.info.parent_dir = item
    chunks = [writer.chunk_shape(array) for array in written]
    bulk = asyncio.ensure_future(asyncio.to_thread(write, item))
    try:
      await asyncio.to_thread(writer.queued.wait, _QUEUE_S)  # see PyTreeHandler.wait_until_queued
      if small is not None:
        packing.write_part(item, process, small.slab)
      if process == 0:
        _write_shardings(item, private.shardings_json(shardings), small.shardings_json if small else "{}")
      await private.write_array_metadatas(self._store, item, written, chunks, impls)
      described.done.set()
      if small is not None:
        _ = small.entries  # made here, where nobody waits for them
      await bulk
      if self.merged:
        BACKEND.wrote(item / MANIFEST)
    except BaseException as e:
      writer.stop.set()
      ring.close(e)
      await asyncio.wait([bulk])
      _ = bulk.cancelled() or bulk.exception()  # else asyncio would log it
      raise


class _Described:
  """Orbax's future of the notes on arrays that are being written.

  Attributes:
    done: set once they are there.
    arrays: the future of the arrays.
  """

  def __init__(self) -> None:
    self.done = threading.Event()
    self.arrays: Any = None

  def result(self, timeout: float | None = None) -> None:
    """Waits for the notes; raises what the arrays died of, if they did before."""
    before: TimeoutError | None = None
    while not self.done.wait(_LOOK_S):
      try:
        self.arrays.result(_MOMENT_S)
        return
      except TimeoutError as e:  # its own, or that of which the arrays died: the same one each time
        if e is before:
          raise
        before = e


def _described(save: Callable[[_Described], Any]) -> ocp.future.Future:
  """Starts to save arrays. Returns Orbax's future of them, with that of their notes as `described`."""
  described = _Described()
  arrays: Any = ocp.future.CommitFutureAwaitingContractedSignals(save(described), name="ckpt_jax_arrays")
  arrays.described, described.arrays = described, arrays
  return arrays


class NumpyHandler(ocp.type_handlers.NumpyHandler):
  """Orbax's handler of numpy arrays, which knows one codec; here it depends on the array whether it is used."""

  def __init__(self, compression: codec.Compression):
    super().__init__()
    self._compression = compression

  async def serialize(
    self, values: Sequence[np.ndarray], infos: _ParamInfos, args: Sequence[ocp.SaveArgs] | None = None
  ) -> Sequence[ocp.future.Future]:
    """See Orbax's."""
    codecs = [codec.codec_of(self._compression, info.name, v.dtype) for v, info in zip(values, infos, strict=True)]
    infos = [info.replace(use_compression=c != codec.OFF) for info, c in zip(infos, codecs, strict=True)]
    return await super().serialize(values, infos, args)


def _window(info: ocp.type_handlers.ParamInfo, limit: int | None) -> int | None:
  """Bytes of arrays in flight at a time, which a ring's `limit` bounds too; None for one transaction."""
  return min([n for n in (getattr(info.byte_limiter, "max_bytes", None), limit) if n is not None], default=None)


def _write_shardings(item: epath.Path, *objects: str) -> None:
  entries = ", ".join(text[1:-1] for text in objects if text != "{}")
  if entries:
    (item / SHARDINGS).write_text(f"{{{entries}}}")


def _number(value: int | str) -> int | None:
  return None if isinstance(value, str) else value


def _gigabytes(limit: int | str) -> Any:
  # Orbax documents whole gigabytes, multiplies by 10**9 and takes a fraction as well.
  return None if isinstance(limit, str) else limit / 1e9


def target_file_size(config: Config) -> int | None:
  """Bytes of an OCDBT data file; None leaves it to Orbax."""
  return _number(config.layout.target_file_size)
