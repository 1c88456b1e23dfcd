"""Orbax's PyTree handler with the layout and limits of a Config, and our handlers of arrays in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from ckpt_jax import orbax_private
from ckpt_jax.config import Config, LimitsConfig
from ckpt_jax.layout import reading
from ckpt_jax.layout.encoding import is_prng_key
from ckpt_jax.layout.sharding import local_regions

# Reads in flight at a time. Enough for 10 GB/s at 100 ms a request; it bounds what TensorStore holds beside the arrays.
_READ_WINDOW = 10**9
_ParamInfos = Sequence[ocp.type_handlers.ParamInfo]


def pytree_handler(config: Config, *, chunk_nbytes: int | None = None) -> ocp.PyTreeCheckpointHandler:
  """The handler that writes and reads the state of a step.

  Args:
    config: the settings.
    chunk_nbytes: bytes that may be in host memory at a time while saving, at least the largest shard; None copies all
      at once.
  """
  layout, limits = config.layout, config.limits
  return ocp.PyTreeCheckpointHandler(
    # Trained weights shrink by 8% under zstd and the commit takes 2.3 times as long, so auto means off.
    use_compression=layout.compression == "on",
    # The target size of data files is honoured by zarr3 only.
    use_zarr3=layout.target_file_size != "auto",
    # Unlimited, Orbax writes in one OCDBT transaction, which keeps every chunk until the commit.
    save_concurrent_gb=_gigabytes(chunk_nbytes or limits.save_concurrency),
    restore_concurrent_gb=_gigabytes(limits.restore_concurrency),
    save_device_host_concurrent_gb=_gigabytes(chunk_nbytes or "auto"),
    type_handler_registry=_registry(config),
  )


def _registry(config: Config) -> ocp.type_handlers.TypeHandlerRegistry:
  ours: dict[Any, ocp.type_handlers.TypeHandler] = {
    jax.Array: ArrayHandler(config),
    np.ndarray: NumpyHandler(config.limits),
  }
  return ocp.type_handlers.create_type_handler_registry(
    *(
      (kind, ours.get(kind) or ocp.type_handlers.get_type_handler(kind)) for kind in ocp.type_handlers.supported_types()
    )
  )


class ArrayHandler(ocp.type_handlers.ArrayHandler):
  """Orbax's handler of jax arrays, with reads that go once through each region of the process (see `reading`).

  What few leaves ask for goes Orbax's way: PRNG keys, memory layouts, padding and truncating, shardings from the file.
  """

  def __init__(self, config: Config):
    layout = config.layout
    self._limits = config.limits
    # Without one Orbax writes no array_metadatas, and forgets which arrays are PRNG keys.
    self._store = orbax_private.array_metadata_store()
    slice_nbytes = layout.min_slice_for_replica_parallel
    super().__init__(
      use_replica_parallel={"on": True, "off": False, "auto": None}[layout.replica_parallel],
      min_slice_bytes_for_replica_parallel=None if isinstance(slice_nbytes, str) else slice_nbytes,
      array_metadata_store=self._store,
    )

  async def deserialize(self, infos: _ParamInfos, args: Sequence[Any] | None = None) -> Sequence[jax.Array]:
    """See Orbax's ArrayHandler; the arrays that it takes over are read without one Python task a shard."""
    if args is None:
      return await super().deserialize(infos, args)
    ocp.type_handlers.check_input_arguments(infos, args)
    shardings = {i: s for i, arg in enumerate(args) if (s := _sharding(arg)) is not None}
    plain = list(shardings)
    found: dict[int, jax.Array] = {}
    if plain:
      context = _context(self._limits, infos[0])
      stores = reading.open_stores([infos[i] for i in plain], [args[i].dtype for i in plain], context)
      rows = list(zip(plain, stores, strict=True))
      if any(store.dtype.name == "uint32" for store in stores):  # the words of a PRNG key are asked for as words too
        keys = await orbax_private.prng_key_names(self._store, infos[0].parent_dir)
        rows = [(i, store) for i, store in rows if infos[i].name not in keys]
      for i, store in rows:
        reading.check_shape(infos[i].name, tuple(store.shape), args[i].global_shape)
      requests = [
        reading.Request(infos[i].name, store, local_regions(shardings[i], tuple(store.shape))) for i, store in rows
      ]
      staged = 0
      for request, arrays, (i, store) in zip(
        requests, reading.read(requests, _window(self._limits)), rows, strict=True
      ):
        regions = dict(zip(request.boxes, arrays, strict=True))
        found[i] = reading.to_jax(tuple(store.shape), shardings[i], regions, store.dtype.numpy_dtype)
        staged += sum(array.nbytes for array in arrays)
        if staged > _window(self._limits):  # an accelerator copies behind our back, out of these arrays
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

  def __init__(self, limits: LimitsConfig):
    super().__init__()
    self._limits = limits

  async def deserialize(self, infos: _ParamInfos, args: Sequence[Any] | None = None) -> Sequence[np.ndarray]:
    """See Orbax's NumpyHandler. The arrays own their memory, aligned so that jax on CPU can take it over."""
    dtypes = [getattr(arg, "dtype", None) for arg in args or [None] * len(infos)]
    stores = reading.open_stores(infos, dtypes, _context(self._limits, infos[0]))
    requests = [
      reading.Request(info.name, store, (tuple((0, n) for n in store.shape),))
      for info, store in zip(infos, stores, strict=True)
    ]
    return [arrays[0] for arrays in reading.read(requests, _window(self._limits))]

  async def metadata(self, infos: _ParamInfos) -> Sequence[ocp.metadata.ArrayMetadata]:
    """Shapes, dtypes and chunks."""
    return _metadata(infos)


def _metadata(infos: _ParamInfos) -> list[ocp.metadata.ArrayMetadata]:
  stores = reading.open_stores(infos, [None] * len(infos), infos[0].ts_context)
  return [
    ocp.metadata.ArrayMetadata(
      name=info.name,
      directory=info.parent_dir,
      shape=store.shape,
      dtype=np.dtype(store.dtype.numpy_dtype),
      sharding=None,
      storage=ocp.metadata.StorageMetadata(
        chunk_shape=store.chunk_layout.read_chunk_template.shape, write_shape=info.write_shape
      ),
    )
    for info, store in zip(infos, stores, strict=True)
  ]


def _sharding(arg: Any) -> jax.sharding.Sharding | None:
  """The sharding that is asked for, if the leaf asks for nothing that only Orbax's own way of reading has."""
  if type(arg) is not ocp.ArrayRestoreArgs or not arg.strict or is_prng_key(arg):
    return None
  if arg.mesh is not None and arg.mesh_axes is not None:
    return jax.sharding.NamedSharding(arg.mesh, arg.mesh_axes)
  return arg.sharding if isinstance(arg.sharding, jax.sharding.Sharding) else None


def _context(limits: LimitsConfig, info: ocp.type_handlers.ParamInfo) -> ts.Context:
  if limits.file_io_concurrency == "auto" and limits.data_copy_concurrency == "auto":
    return info.ts_context  # Orbax makes one for each save and restore
  # Fresh each time: one that outlives a step has answered NOT_FOUND for the step that replaced it.
  return ocp.type_handlers.get_ts_context(
    use_ocdbt=bool(info.is_ocdbt_checkpoint),
    file_io_concurrency_limit=_number(limits.file_io_concurrency),
    data_copy_concurrency_limit=_number(limits.data_copy_concurrency),
  )


def _window(limits: LimitsConfig) -> int:
  """Bytes of reads in flight at a time."""
  return min(
    n for n in (_READ_WINDOW, _number(limits.restore_concurrency), _number(limits.host_memory)) if n is not None
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
