"""Orbax's PyTree handler with the layout and limits of a Config, and our handlers of arrays in it."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath

from ckpt_jax.config import Config, LayoutConfig, LimitsConfig
from ckpt_jax.layout import owned, packing, reading, writing
from ckpt_jax.layout.encoding import is_prng_key
from ckpt_jax.layout.sharding import Box, local_regions, shape_of, whole_box
from ckpt_jax.layout.splitting import Small, split
from ckpt_jax.layout.structure import path_name
from ckpt_jax.layout.text import TextHandler
from ckpt_jax.orbax import private
from ckpt_jax.orbax.format import SHARDINGS

# Reads in flight at a time. Enough for 10 GB/s at 100 ms a request; it bounds what TensorStore holds beside the arrays.
_READ_WINDOW = 10**9
_QUEUE_S = 2.0  # for a courtesy: storage that hangs is told of elsewhere
_ParamInfos = Sequence[ocp.type_handlers.ParamInfo]
Arrived = Callable[[str, Any], None]


def pytree_handler(config: Config, *, chunk_nbytes: int | None = None, arrived: Arrived | None = None) -> PyTreeHandler:
  """The handler that writes and reads the state of a step.

  Args:
    config: the settings.
    chunk_nbytes: bytes that may be in host memory at a time while saving, at least the largest shard; None copies all
      at once.
    arrived: told, while the others are still being read, of each array that has been: its path, and what the restore
      will give. From the thread that reads.
  """
  layout, limits = config.layout, config.limits
  by_type = handlers(config, Reads(config.limits, arrived))
  return PyTreeHandler(
    by_type[jax.Array],
    pack=layout.pack == "on" and chunk_nbytes is None,  # in chunks, Orbax writes by itself
    # Trained weights shrink by 8% under zstd and the commit takes 2.3 times as long, so auto means off.
    use_compression=layout.compression == "on",
    # The target size of data files is honoured by zarr3 only.
    use_zarr3=layout.target_file_size != "auto",
    # Unlimited, Orbax writes in one OCDBT transaction, which keeps every chunk until the commit.
    save_concurrent_gb=_gigabytes(chunk_nbytes or limits.save_concurrency),
    restore_concurrent_gb=_gigabytes(limits.restore_concurrency),
    save_device_host_concurrent_gb=_gigabytes(chunk_nbytes or "auto"),
    type_handler_registry=ocp.type_handlers.create_type_handler_registry(*by_type.items()),
  )


class PyTreeHandler(ocp.PyTreeCheckpointHandler):
  """Orbax's handler of trees, which leaves small arrays to our handler of arrays if it is to pack them."""

  def __init__(self, arrays: Any, *, pack: bool, **options: Any):
    super().__init__(**options)
    self._arrays: ArrayHandler = arrays
    self._pack = pack
    self._small: Small | None = None
    self._has_arrays = False

  @classmethod
  def typestr(cls) -> str:
    return ocp.PyTreeCheckpointHandler.typestr()  # what the step's metadata names: plain Orbax must know it

  async def async_save(self, directory: Any, item: Any = None, save_args: Any = None, args: Any = None) -> Any:
    """See Orbax's."""
    self._small = self._arrays.to_pack = None
    self._arrays.writes = False
    self._has_arrays = any(not isinstance(leaf, str) for leaf in jax.tree.leaves(args.item))
    if self._pack and (parts := split(args.item)) is not None:
      rest, arrays, self._small = parts
      args = dataclasses.replace(args, item=rest)
      self._arrays.to_pack = arrays, self._small
    return await super().async_save(directory, item, save_args, args)

  @property
  def writes(self) -> bool:
    """Whether this process writes something of the last tree into an OCDBT database of its own, as far as is known."""
    return self._has_arrays and (jax.process_index() == 0 or self._arrays.writes)

  def wait_until_queued(self) -> None:
    """Waits, in the background of a save, until enough of the arrays is on its way to keep the storage busy.

    Whatever takes Python's lock before that makes the save longer; what does after it, hardly.
    """
    self._arrays.queued.wait(_QUEUE_S)

  def finalize(self, directory: epath.Path) -> None:
    """See Orbax's; makes one index of those that the processes of a packed step wrote."""
    packing.merge_parts(directory, jax.process_count())
    if self._small is not None:
      self._small.description.complete(directory)
    super().finalize(directory)


@dataclasses.dataclass(frozen=True)
class Reads:
  """What the handlers of arrays share when they read.

  Attributes:
    limits: the settings.
    arrived: see `pytree_handler`.
    stores: arrays of the item, by name, that are open already.
  """

  limits: LimitsConfig
  arrived: Arrived | None = None
  stores: Mapping[str, ts.TensorStore] = dataclasses.field(default_factory=dict)

  def window(self, info: ocp.type_handlers.ParamInfo) -> reading.Window:
    """How much of an item is read at a time."""
    given = (_READ_WINDOW, _number(self.limits.restore_concurrency), _number(self.limits.host_memory))
    return reading.window_of(info.parent_dir, min(n for n in given if n is not None))

  def open(self, infos: _ParamInfos) -> list[ts.TensorStore]:
    """The arrays' stores."""
    missing = [info for info in infos if info.name not in self.stores]
    opened = reading.open_stores(missing, limited_context(self.limits, missing[0])) if missing else []
    stores = {**self.stores, **{info.name: store for info, store in zip(missing, opened, strict=True)}}
    return [stores[info.name] for info in infos]

  def tell(self, info: ocp.type_handlers.ParamInfo, value: Any) -> None:
    """Says that an array is there."""
    if self.arrived is not None:
      self.arrived(path_name(info.keypath), value)


def handlers(config: Config, reads: Reads | None = None) -> dict[Any, ocp.type_handlers.TypeHandler]:
  """Handlers by the type of what they write and read: ours for arrays, Orbax's for the rest.

  Ours describe arrays that lie in slabs, and leave it to `layout.direct` to read them.
  """
  reads = reads or Reads(config.limits)
  ours: dict[Any, ocp.type_handlers.TypeHandler] = {
    jax.Array: ArrayHandler(config.layout, reads),
    np.ndarray: NumpyHandler(reads),
    str: TextHandler(),
  }
  types = ocp.type_handlers
  return {kind: ours.get(kind) or types.get_type_handler(kind) for kind in types.supported_types()}


class ArrayHandler(ocp.type_handlers.ArrayHandler):
  """Orbax's handler of jax arrays, with reads that go once through each region of the process (see `reading`).

  What few leaves ask for goes Orbax's way: PRNG keys, memory layouts, padding and truncating, shardings from the file.
  """

  def __init__(self, layout: LayoutConfig, reads: Reads):
    self._reads = reads
    # Without one Orbax writes no array_metadatas, and forgets which arrays are PRNG keys.
    self._store = private.array_metadata_store()
    super().__init__(
      use_replica_parallel={"on": True, "off": False, "auto": None}[layout.replica_parallel],
      min_slice_bytes_for_replica_parallel=_number(layout.min_slice_for_replica_parallel),
      array_metadata_store=self._store,
    )
    self.to_pack: tuple[Sequence[jax.Array], Small] | None = None  # what the next call of `serialize` puts into a slab
    self._memory = writing.SlabMemory()
    self.writes = False
    self.queued = threading.Event()
    self.queued.set()
    self._chunk_nbytes = _number(layout.chunk_size)
    self._slice_nbytes = _number(layout.min_slice_for_replica_parallel)

  async def serialize(
    self, values: Sequence[jax.Array], infos: _ParamInfos, args: Sequence[ocp.SaveArgs] | None = None
  ) -> Sequence[ocp.future.Future]:
    """See Orbax's ArrayHandler. Returns once nothing that happens to the values matters any more."""
    args = args or [ocp.SaveArgs()] * len(values)
    packed, small = self.to_pack or ([], None)
    self.to_pack, self.writes = None, False
    private.check_input_arguments(values, infos, args)
    if self._chunk_nbytes is not None:
      args = [
        arg if arg.chunk_byte_size else dataclasses.replace(arg, chunk_byte_size=self._chunk_nbytes) for arg in args
      ]
    chunked = getattr(infos[0].device_host_byte_limiter, "max_bytes", None) is not None
    if chunked or not infos[0].is_ocdbt_checkpoint or any(arg.dtype is not None for arg in args):
      assert small is None
      return await super().serialize(values, infos, args)  # type: ignore[arg-type]
    impls = {info.name: str(jax.random.key_impl(v)) for v, info in zip(values, infos, strict=True) if is_prng_key(v)}
    arrays = [jax.random.key_data(v) if is_prng_key(v) else v for v in values]
    written = writing.on_host(
      arrays, infos, args, replica_parallel=private.uses_replica_parallel(self), slice_nbytes=self._slice_nbytes
    )
    pieces = writing.small_on_host(packed, small.turns) if small else []
    self.writes = any(array.pieces for array in written) or bool(small and small.slab.nbytes)
    if jax.process_count() == 1:
      written = [writing.joined(array) for array in written]
    self.queued = threading.Event()
    shardings = {info.name: array.sharding for info, array in zip(infos, arrays, strict=True)}
    save = self._write(written, pieces, small, shardings, impls)
    return [ocp.future.CommitFutureAwaitingContractedSignals(save, name="ckpt_jax_arrays")]

  async def _write(
    self,
    written: Sequence[writing.Written],
    pieces: Sequence[np.ndarray],
    small: Small | None,
    shardings: Mapping[str, jax.sharding.Sharding],
    impls: dict[str, str],
  ) -> None:
    for array in written:
      await array.info.await_path_creation()
    first, process = written[0].info, jax.process_index()
    item = first.parent_dir
    specs = writing.Specs(process)
    chunks = [writing.chunk_shape(array, specs) for array in written]
    stop, queued = threading.Event(), self.queued

    def write() -> None:
      try:
        writing.write(
          written,
          small.slab if small else None,
          pieces,
          specs,
          compressed=bool(first.use_compression),
          context=first.ts_context,  # two contexts would be two databases that do not know of each other
          process=process,
          window=getattr(first.byte_limiter, "max_bytes", None),
          stop=stop,
          queued=queued,
          memory=self._memory,
        )
      finally:
        queued.set()

    bulk = asyncio.ensure_future(asyncio.to_thread(write))
    try:
      await asyncio.to_thread(queued.wait, _QUEUE_S)  # see PyTreeHandler.wait_until_queued
      if small is not None:
        packing.write_part(item, process, small.slab)
      if process == 0:
        _write_shardings(item, private.shardings_json(shardings), small.shardings_json if small else "{}")
      await private.write_array_metadatas(self._store, item, written, chunks, impls)
      if small is not None:
        _ = small.description.entries  # made here, where nobody waits for them
      await bulk
    except BaseException:
      stop.set()
      await asyncio.wait([bulk])  # nothing may write there once the save counts as ended
      _ = bulk.cancelled() or bulk.exception()  # which asyncio would tell of
      raise

  async def deserialize(self, infos: _ParamInfos, args: Sequence[Any] | None = None) -> Sequence[jax.Array]:
    """See Orbax's ArrayHandler; the arrays that it takes over are read without one Python task a shard."""
    if args is None:
      return await super().deserialize(infos, args)
    private.check_input_arguments(infos, args)
    shardings = {i: s for i, arg in enumerate(args) if (s := _sharding(arg)) is not None}
    plain = list(shardings)
    found: dict[int, jax.Array] = {}
    if plain:
      window = self._reads.window(infos[0])
      opened = self._reads.open([infos[i] for i in plain])
      stores = [reading.as_dtype(store, args[i].dtype) for store, i in zip(opened, plain, strict=True)]
      rows = list(zip(plain, stores, strict=True))
      if any(store.dtype.name == "uint32" for store in stores):  # the words of a PRNG key are asked for as words too
        keys = await private.prng_key_names(self._store, infos[0].parent_dir)
        rows = [(i, store) for i, store in rows if infos[i].name not in keys]
      for i, store in rows:
        reading.check_shape(infos[i].name, tuple(store.shape), args[i].global_shape)
      boxes = {i: local_regions(shardings[i], tuple(store.shape)) for i, store in rows}
      own = _own({i: (boxes[i], store.dtype.numpy_dtype, shardings[i]) for i, store in rows})
      requests = {
        reading.Request(infos[i].name, store, boxes[i], (own[i][1],) if i in own else None): i for i, store in rows
      }
      staged = 0
      for request, arrays in reading.read(list(requests), window):
        i, store = requests[request], request.store
        if i in own:
          found[i] = reading.placed(tuple(store.shape), own.pop(i)[0], shardings[i])
        else:
          regions = dict(zip(request.boxes, arrays, strict=True))
          found[i] = reading.to_jax(tuple(store.shape), shardings[i], regions, store.dtype.numpy_dtype)
          staged += sum(array.nbytes for array in arrays)
        self._reads.tell(infos[i], found[i])
        if staged > window.most:  # an accelerator copies behind our back, out of these arrays
          jax.block_until_ready(list(found.values()))
          staged = 0
    rest = [i for i in range(len(args)) if i not in found]
    if rest:
      others = await super().deserialize([infos[i] for i in rest], [args[i] for i in rest])
      found.update(zip(rest, others, strict=True))
    return [found[i] for i in range(len(args))]

  async def metadata(self, infos: _ParamInfos) -> Sequence[ocp.metadata.ArrayMetadata]:
    """Shapes, dtypes and chunks; the sharding that a leaf was saved with is left out."""
    return _metadata(infos)


class NumpyHandler(ocp.type_handlers.NumpyHandler):
  """Orbax's handler of numpy arrays, with reads as in ArrayHandler."""

  def __init__(self, reads: Reads):
    super().__init__()
    self._reads = reads

  async def deserialize(self, infos: _ParamInfos, args: Sequence[Any] | None = None) -> Sequence[np.ndarray]:
    """See Orbax's NumpyHandler. The arrays own their memory."""
    dtypes = [getattr(arg, "dtype", None) for arg in args or [None] * len(infos)]
    requests = {
      reading.Request(info.name, reading.as_dtype(store, dtype), (whole_box(store.shape),)): info
      for info, dtype, store in zip(infos, dtypes, self._reads.open(infos), strict=True)
    }
    found = {}
    for request, arrays in reading.read(list(requests), self._reads.window(infos[0])):
      info = requests[request]
      found[info.name] = arrays[0]
      self._reads.tell(info, arrays[0])
    return [found[info.name] for info in infos]

  async def metadata(self, infos: _ParamInfos) -> Sequence[ocp.metadata.ArrayMetadata]:
    """Shapes, dtypes and chunks."""
    return _metadata(infos)


def _write_shardings(item: epath.Path, *objects: str) -> None:
  entries = ", ".join(text[1:-1] for text in objects if text != "{}")
  if entries:
    (item / SHARDINGS).write_text(f"{{{entries}}}")


def _metadata(infos: _ParamInfos) -> list[ocp.metadata.ArrayMetadata]:
  index = packing.read_index(infos[0].parent_dir)
  alone = [info for info in infos if info.name not in index]
  stores = reading.open_stores(alone, infos[0].ts_context) if alone else []
  by_name = {info.name: store for info, store in zip(alone, stores, strict=True)}
  return [
    describe_array(info.name, info.parent_dir, index.get(info.name) or by_name[info.name], info.write_shape)
    for info in infos
  ]


def describe_array(
  name: str, item: epath.Path, found: packing.Packed | ts.TensorStore, write_shape: Any
) -> ocp.metadata.ArrayMetadata:
  """Orbax's description of an array.

  Args:
    name: its name in the database.
    item: the directory of its item.
    found: where it lies in slabs, or its open store.
    write_shape: of the pieces in which it was written, if that is known.
  """
  if isinstance(found, packing.Packed):
    shape, dtype, chunk = found.shape, packing.dtype_of(found.dtype), found.shape
  else:
    shape, dtype = found.shape, np.dtype(found.dtype.numpy_dtype)
    chunk = found.chunk_layout.read_chunk_template.shape
  storage = ocp.metadata.StorageMetadata(chunk_shape=chunk, write_shape=write_shape)
  return ocp.metadata.ArrayMetadata(name=name, directory=item, shape=shape, dtype=dtype, sharding=None, storage=storage)


def _own(
  rows: Mapping[int, tuple[tuple[Box, ...], np.dtype, jax.sharding.Sharding]],
) -> dict[int, tuple[jax.Array, np.ndarray]]:
  """Arrays to read into, and their memory, for the large ones of which this process holds one part, on a CPU device.

  Args:
    rows: the parts that this process holds of each array, its dtype, and where it goes.
  """
  kinds = {i: (shape_of(boxes[0]), dtype) for i, (boxes, dtype, _) in rows.items() if len(boxes) == 1}
  devices: dict[jax.Device, list[int]] = {}
  for i in kinds:
    if (device := owned.cpu_of(rows[i][2])) is not None:
      devices.setdefault(device, []).append(i)
  found: dict[int, tuple[jax.Array, np.ndarray]] = {}
  for device, mine in devices.items():
    chosen = [mine[j] for j in owned.large([kinds[i] for i in mine])]
    if chosen and (made := owned.make([kinds[i] for i in chosen], device)) is not None:
      found |= dict(zip(chosen, made, strict=True))
  return found


def _sharding(arg: Any) -> jax.sharding.Sharding | None:
  """The sharding that is asked for, if the leaf asks for nothing that only Orbax's own way of reading has."""
  if type(arg) is not ocp.ArrayRestoreArgs or not arg.strict or is_prng_key(arg):
    return None
  if arg.mesh is not None and arg.mesh_axes is not None:
    return jax.sharding.NamedSharding(arg.mesh, arg.mesh_axes)
  return arg.sharding if isinstance(arg.sharding, jax.sharding.Sharding) else None


def limited_context(limits: LimitsConfig, info: ocp.type_handlers.ParamInfo) -> ts.Context:
  """TensorStore's resources for an item, as `limits` say."""
  if limits.file_io_concurrency == "auto" and limits.data_copy_concurrency == "auto":
    return info.ts_context  # Orbax makes one for each save and restore
  # Fresh each time: one that outlives a step has answered NOT_FOUND for the step that replaced it.
  return private.tensorstore_context(
    use_ocdbt=bool(info.is_ocdbt_checkpoint),
    file_io_concurrency_limit=_number(limits.file_io_concurrency),
    data_copy_concurrency_limit=_number(limits.data_copy_concurrency),
  )


def _number(value: int | str) -> int | None:
  return None if isinstance(value, str) else value


def _gigabytes(limit: int | str) -> Any:
  # Orbax documents whole gigabytes, multiplies by 10**9 and takes a fraction as well.
  return None if isinstance(limit, str) else limit / 1e9


def target_file_size(config: Config) -> int | None:
  """Bytes of an OCDBT data file; None leaves it to Orbax."""
  size = config.layout.target_file_size
  return None if isinstance(size, str) else size
