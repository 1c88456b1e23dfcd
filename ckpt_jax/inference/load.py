"""Loads exports and safetensors files: whole, or straight onto a mesh, reading only the bytes that are needed."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import math
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from ckpt_jax.config import Config, LimitsConfig
from ckpt_jax.config.arguments import checked
from ckpt_jax.config.units import one_of
from ckpt_jax.errors import (
  CheckpointError,
  ConfigError,
  CorruptCheckpointError,
  NoCheckpointError,
  StructureMismatchError,
)
from ckpt_jax.inference import rename as renaming
from ckpt_jax.inference.files import DTYPES, INDEX, SCALE, VALUES
from ckpt_jax.inference.quantize import QuantizedArray, unpacked_int4
from ckpt_jax.integrity.exported import read_export
from ckpt_jax.job.rendezvous import Rendezvous
from ckpt_jax.job.waits import Together
from ckpt_jax.layout.contents import leaf_infos
from ckpt_jax.layout.description import ItemDescription, item_info
from ckpt_jax.layout.structure import path_name
from ckpt_jax.restore.leaf import AS_SAVED
from ckpt_jax.restore.like import is_held_by_jax
from ckpt_jax.restore.meshes import axes_by_dim
from ckpt_jax.restore.read import Reading, RestoreRequest, fetch_state, plan_reading
from ckpt_jax.restore.step import Step
from ckpt_jax.restore.strategies import STRATEGIES
from ckpt_jax.run import untrusted
from ckpt_jax.run.steps import run_directory
from ckpt_jax.storage import look
from ckpt_jax.storage.ranges import Ranges
from ckpt_jax.storage.urls import is_object_store

PyTree = Any
_MOST_HEADER = 100 << 20  # bytes, as the safetensors library allows
_SINGLE = "model.safetensors"
# Bytes of one read. Each process reads whole rows of a leaf, so that storage sees few and long ranges.
_LOCAL_NBYTES, _REMOTE_NBYTES = 1 << 20, 8 << 20
_readers = concurrent.futures.ThreadPoolExecutor(32, "ckpt_jax-ranges")


@dataclasses.dataclass(frozen=True)
class _Entry:
  """An array in a file: its dtype, its shape, and where its bytes begin."""

  file: str
  dtype: np.dtype
  shape: tuple[int, ...]
  start: int


def load_safetensors(
  path: str | os.PathLike[str],
  like: PyTree | None = None,
  rename: renaming.Rules = (),
  *,
  cast: bool | Mapping[str, Any] | None = None,
  strategy: str = "gather",
) -> PyTree:
  """Reads safetensors files into a tree, sharded as `like` is.

  All processes of a job call it alike. Together they read each byte once, and exchange what their devices need.

  Args:
    path: a file, or a directory with `model.safetensors.index.json` or one file: a path, gs:// or s3://.
    like: the tree wanted: arrays, or `jax.ShapeDtypeStruct`s with shardings. Default: nested dicts of numpy arrays.
    rename: the rules of the export, see `inference.rename`: from the paths of `like` to the names in the files.
    cast: as for `Checkpointer.restore`: True allows another floating-point type in `like`.
    strategy: as `restore.strategy`; `direct` reads on each process what its devices need.

  Raises:
    NoCheckpointError: if there are no such files.
    CorruptCheckpointError: if one is damaged.
    StructureMismatchError: listing every difference between `like` and the files.
  """
  checked("strategy", one_of, strategy, ("auto", *STRATEGIES))
  config = Config()
  source = _SafetensorsFiles(run_directory(path), renaming.rules(rename))
  together = Together(Rendezvous(f"load {source}"), config.timeouts.restore_s)
  reading = plan_reading(source, RestoreRequest(like=like, cast=cast))
  return fetch_state(source, reading, config, together, strategy)[0]


def load_quantized(path: str | os.PathLike[str], like: PyTree | None = None, *, strategy: str = "gather") -> PyTree:
  """An export as jax arrays, in the containers of the step it was made from.

  A quantised matrix comes as a `QuantizedArray`: integers and scales, ready for `x @ w`. `dequantize` turns all of them
  into plain arrays. Exports that are not quantised load as well. All processes of a job call it alike.

  Args:
    path: what `export` wrote, in either format.
    like: the parameters as they were trained, arrays or `jax.ShapeDtypeStruct`s: integers and scales are sharded as
      these are, as far as their axes can be divided so; dtypes do not matter. Default: all on the default device.
    strategy: as for `load_safetensors`.

  Raises:
    NoCheckpointError: if there is no export.
    CorruptCheckpointError: if it is damaged.
    StructureMismatchError: if `like` has other leaves, or other shapes.
  """
  checked("strategy", one_of, strategy, ("auto", *STRATEGIES))
  directory = run_directory(path)
  known = read_export(directory)
  if known is None:
    raise NoCheckpointError(
      f"{directory}: no export; ckpt_jax.load_safetensors loads files of other programs", topic="export-and-safetensors"
    )
  is_orbax = known.about["format"] == "orbax"
  turned = [renaming.Rule(n.replace(".", "/"), n, True) for n, leaf in known.leaves.items() if leaf.get("transposed")]
  source = Step(directory, Config()) if is_orbax else _SafetensorsFiles(directory, turned)
  shardings = _shardings(known.leaves, like, str(directory))
  stored = {name: leaf["path"] if is_orbax else name.replace(".", "/") for name, leaf in known.leaves.items()}
  plans = []
  for name, leaf in known.leaves.items():
    for one in [f"{stored[name]}/{part}" for part in (VALUES, SCALE)] if "bits" in leaf else [stored[name]]:
      wanted = _wanted(tuple(source.meta[one].shape), source.meta[one].dtype, shardings.get(name))
      plans.append(source.plan(one, wanted))
  config = Config()
  together = Together(Rendezvous(f"load {directory}"), config.timeouts.restore_s)
  found = fetch_state(source, Reading(plans, {}, {}, dict), config, together, strategy)[0]

  def loaded(name: str) -> Any:
    leaf, place = known.leaves[name], stored[name]
    if "bits" not in leaf:
      return jnp.asarray(found[place])
    integers, scale = found[f"{place}/{VALUES}"], found[f"{place}/{SCALE}"]
    if leaf["bits"] == 4:
      shape = tuple(leaf["shape"])
      target = _wanted(shape, np.dtype(np.int8), shardings.get(name)).sharding
      integers = jax.jit(unpacked_int4, static_argnums=1, out_shardings=target)(integers, shape[-1])
    return QuantizedArray(integers, scale, leaf["axis"])

  return jax.tree.map(loaded, known.tree)


def _shardings(leaves: dict[str, dict[str, Any]], like: PyTree | None, where: str) -> dict[str, Any]:
  """The sharding that `like` asks for, by the name of the leaf."""
  if like is None:
    return {}
  wanted = {path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(like)[0]}
  there = {leaf["path"]: tuple(leaf["shape"]) for leaf in leaves.values()}
  differing = [
    f"{path}: exported {there.get(path, 'not at all')}, asked for {getattr(wanted.get(path), 'shape', 'not at all')}"
    for path in sorted(there.keys() | wanted.keys())
    if path not in wanted or path not in there or tuple(wanted[path].shape) != there[path]
  ]
  if differing:
    raise StructureMismatchError(f"{where} does not fit like=; nothing was read:\n  " + "\n  ".join(differing[:20]))
  return {name: wanted[leaf["path"]].sharding for name, leaf in leaves.items()}


def _wanted(shape: tuple[int, ...], dtype: Any, sharding: Any) -> Any:
  """An array as it is to be read: sharded by `sharding`, which may be meant for another shape of as many axes."""
  if not is_held_by_jax(dtype):
    return AS_SAVED
  if isinstance(sharding, NamedSharding):
    axes = axes_by_dim(sharding.spec, len(shape))
    fits = [n % math.prod(sharding.mesh.shape[a] for a in names) == 0 for n, names in zip(shape, axes, strict=True)]
    spec = [names or None if fit else None for names, fit in zip(axes, fits, strict=True)]
    sharding = NamedSharding(sharding.mesh, PartitionSpec(*spec), memory_kind=sharding.memory_kind)
  return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


class _SafetensorsFiles(Step):
  """Safetensors files as an item of a step, so that everything that reads a step reads them.

  Each array is a virtual one of TensorStore, whose chunks are ranges of the file.
  """

  def __init__(self, path: epath.Path, rules: list[renaming.Rule]):
    self.directory = self.item_dir = directory = path if _is_directory(path) else path.parent
    self.ours, self.notes, self.thinned, self.item_name = {}, {}, None, ""  # nothing of ours is known of them
    self._weak = None
    self._config = Config()
    self._path = path
    ranges = Ranges(directory)
    entries = {name: entry for file in _files(path) for name, entry in _entries(directory, ranges, file).items()}
    tree: dict[str, Any] = {}
    stores = {}
    for name, entry in entries.items():
      found = renaming.path_of(name, rules)
      stores[name] = _store(ranges, entry, directory, transposed=found.transposed)
      _place(tree, found.name, _meta(name, directory, stores[name]), str(path))
    self.item = ItemDescription(tree, item_info(directory, LimitsConfig(), ocdbt=False, zarr3=False), {}, stores)
    self.meta = {path_name(p): meta for p, meta in jax.tree_util.tree_flatten_with_path(tree)[0]}
    self.infos = {info.path: info for info in leaf_infos(tree, {})}

  def __str__(self) -> str:
    return str(self._path)


def _is_directory(path: epath.Path) -> bool:
  return not path.name.endswith((".safetensors", ".json"))


def _files(path: epath.Path) -> list[str]:
  """The files that hold the arrays, below the directory of `path`."""
  if path.name.endswith(".safetensors"):
    return [path.name]
  index = path if path.name.endswith(".json") else path / INDEX
  try:
    data = untrusted.read_json(index)
  except FileNotFoundError:
    if look.exists(path / _SINGLE):
      return [_SINGLE]
    there = [name for name in look.names(path) if name.endswith(".safetensors")]
    if len(there) == 1:
      return there
    raise NoCheckpointError(
      f"{path}: neither {INDEX} nor one file of safetensors", topic="export-and-safetensors"
    ) from None
  files = data.get("weight_map") if isinstance(data, dict) else None
  if not isinstance(files, dict) or not all(isinstance(f, str) and os.path.basename(f) == f for f in files.values()):
    raise CorruptCheckpointError(f"{index}: has no weight_map of names and files", topic="export-and-safetensors")
  return sorted(set(files.values()))


def _entries(directory: epath.Path, ranges: Ranges, file: str) -> dict[str, _Entry]:
  """The arrays of a file, by name: https://github.com/huggingface/safetensors#format."""
  where = directory / file
  try:
    length = int.from_bytes(ranges.read(file, 0, 8), "little")
    if length > _MOST_HEADER:
      raise ValueError(f"a header of {length} bytes")
    header = json.loads(ranges.read(file, 8, length))
    header.pop("__metadata__", None)
    entries, end = {}, 0
    for name, found in header.items():
      dtype, shape = np.dtype(jnp.dtype(DTYPES[found["dtype"]])), tuple(found["shape"])
      start, stop = found["data_offsets"]
      if untrusted.claimed_bytes([(shape, dtype.itemsize)], f"{where}: {name}") != stop - start or start < 0:
        raise ValueError(f"{name}: {stop - start} bytes for {dtype}{list(shape)}")
      entries[name] = _Entry(file, dtype, shape, 8 + length + start)
      end = max(end, 8 + length + stop)
    ranges.read(file, max(0, end - 1), min(1, end))  # the last byte: the file is whole
    return entries
  except FileNotFoundError as e:
    raise NoCheckpointError(str(e), topic="export-and-safetensors") from e
  except CheckpointError:
    raise
  except (EOFError, ValueError, KeyError, TypeError, AttributeError) as e:
    raise CorruptCheckpointError(
      f"{where}: not a file of safetensors ({type(e).__name__}: {e})", topic="export-and-safetensors"
    ) from e


def _store(ranges: Ranges, entry: _Entry, directory: epath.Path, *, transposed: bool) -> ts.TensorStore:
  """The array of an entry as TensorStore sees it, with chunks of whole rows, which divide its length if they can."""
  shape = entry.shape or (1,)  # TensorStore makes no virtual array without axes
  rows, row_nbytes = shape[0], max(1, math.prod(shape[1:]) * entry.dtype.itemsize)
  most = max(1, (_REMOTE_NBYTES if is_object_store(directory) else _LOCAL_NBYTES) // row_nbytes)
  # As many as all devices could share, however large they are.
  wanted = max(1, min(most, -(-rows // jax.device_count())))
  chunk_rows = next((n for n in range(wanted, wanted // 8, -1) if rows % n == 0), wanted)

  def fill(domain: ts.IndexDomain, array: np.ndarray, promise: ts.Promise) -> None:
    try:
      memory = array if array.flags.c_contiguous else np.empty(array.shape, array.dtype)
      ranges.into(memory, entry.file, entry.start + domain.origin[0] * row_nbytes)
      if memory is not array:
        array[...] = memory
      promise.set_result(None)
    except Exception as e:
      promise.set_exception(e)

  def read(domain: ts.IndexDomain, array: np.ndarray, _: Any) -> ts.Future:
    # Not in TensorStore's thread, which may be the one that the read of a bucket waits for.
    pair: Any = ts.Promise.new()
    promise, future = pair
    _readers.submit(fill, domain, array, promise)
    return future

  store = ts.virtual_chunked(
    read,
    dtype=ts.dtype(entry.dtype),
    domain=ts.IndexDomain(shape=shape),
    chunk_layout=ts.ChunkLayout(read_chunk_shape=[max(1, n) for n in (chunk_rows, *shape[1:])]),
  )
  if not entry.shape:
    store = store[0]
  if transposed:
    if len(entry.shape) != 2:
      raise ConfigError(f"rename: an array of shape {list(entry.shape)} is no matrix, which `:T` transposes")
    return store.transpose([1, 0])
  return store


def _meta(name: str, directory: epath.Path, store: ts.TensorStore) -> Any:
  storage = ocp.metadata.StorageMetadata(chunk_shape=tuple(store.chunk_layout.read_chunk.shape or ()), write_shape=None)
  dtype = np.dtype(store.dtype.numpy_dtype)
  return ocp.metadata.ArrayMetadata(
    name=name, directory=directory, shape=tuple(store.shape), dtype=dtype, sharding=None, storage=storage
  )


def _place(tree: dict[str, Any], path: str, leaf: Any, where: str) -> None:
  *nodes, last = path.split("/")
  for key in nodes:
    tree = tree.setdefault(key, {})
    if not isinstance(tree, dict):
      raise ConfigError(f"{where}: {path} would be below an array; rename= can give it another path")
  if last in tree:
    raise ConfigError(f"{where}: two arrays would be {path}; make the rules of rename= tell them apart")
  tree[last] = leaf
