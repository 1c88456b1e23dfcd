"""Arrays into a checkpoint with little Python a leaf: the twin of `reading`.

Orbax opens each array twice, and gives each piece a chain of asyncio tasks: 1.3 to 1.8 ms an array. Here the arrays of
a process are opened through one key-value store and their writes queued, under a limit of bytes.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from ckpt_jax.errors import CheckpointError
from ckpt_jax.layout import packing
from ckpt_jax.layout.keys import prefix
from ckpt_jax.layout.memory import host_view, unaligned_empty
from ckpt_jax.layout.sharding import Box, box_of, merge_boxes, one_device, replicas, shape_of, whole_box, within
from ckpt_jax.orbax import private

# Pieces of one array that make up a whole of at most this are stored as one chunk: one request instead of one a device.
# Larger ones stay as they are, since a later restore on more hosts reads whole chunks.
_JOINED_NBYTES = 32 * 2**20
# What is in flight before others may have Python: it keeps a disk of 1 GB/s busy for 50 ms.
_AHEAD_NBYTES = 48 * 2**20
_SLAB_NBYTES = 64 * 2**20  # of a slab in flight at a time, and kept for the next save
_ZSTD = {"id": "zstd", "level": 1}


@dataclasses.dataclass(frozen=True)
class Written:
  """An array, and what this process writes of it.

  Attributes:
    info, args: Orbax's.
    shape, dtype: of the whole array.
    write_shape: of one piece; alike on all processes.
    pieces: what this process writes.
  """

  info: ocp.type_handlers.ParamInfo
  args: ocp.SaveArgs
  shape: tuple[int, ...]
  dtype: np.dtype
  write_shape: tuple[int, ...]
  pieces: tuple[tuple[Box, np.ndarray], ...]

  @property
  def nbytes(self) -> int:
    """Bytes of the whole array."""
    return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def on_host(
  arrays: Sequence[jax.Array],
  infos: Sequence[ocp.type_handlers.ParamInfo],
  args: Sequence[ocp.SaveArgs],
  *,
  replica_parallel: bool,
  slice_nbytes: int | None,
) -> list[Written]:
  """What this process writes of each array, in host memory. It may be jax's own memory, kept from being reused.

  Args:
    arrays, infos, args: as Orbax gives them.
    replica_parallel: replicas each write a part of what they hold.
    slice_nbytes: the smallest such part.
  """
  alone = [i for i, array in enumerate(arrays) if one_device(array.sharding) == "here"]
  rest = sorted({*range(len(arrays))} - {*alone})
  values = _on_their_way([arrays[i] for i in alone])
  divided = private.replica_slices_on_host(
    [arrays[i] for i in rest], replica_parallel, slice_nbytes, infos[0].enable_pinned_host_transfer, host_view
  )
  found = dict(zip(rest, divided, strict=True))
  for i, value in zip(alone, values, strict=True):
    found[i] = arrays[i].sharding.shard_shape(arrays[i].shape), ((whole_box(arrays[i].shape), value()),)
  return [
    Written(info, arg, array.shape, np.dtype(array.dtype), *found[i])
    for i, (array, info, arg) in enumerate(zip(arrays, infos, args, strict=True))
  ]


def turn_of(array: jax.Array, number: int) -> int | None:
  """Which replica's shards are written of an array that goes into slabs, the `number`th: replicas take turns.

  None if the whole array lies on one device of this process.
  """
  return None if one_device(array.sharding) == "here" else number % replicas(array.sharding, array.shape)


def small_boxes(array: jax.Array, turn: int | None) -> list[Box]:
  """What this process writes of an array that goes into slabs."""
  if turn is None:
    return [whole_box(array.shape)]
  return [box_of(s.index, array.shape) for s in array.addressable_shards if s.replica_id == turn]


def small_on_host(arrays: Sequence[jax.Array], turns: Sequence[int | None]) -> list[np.ndarray]:
  """The values in the boxes of `small_boxes`, array by array, in host memory, which may be jax's own."""
  chosen: list[jax.Array] = []
  for array, turn in zip(arrays, turns, strict=True):
    if turn is None:
      chosen.append(array)
    else:
      chosen += [s.data for s in array.addressable_shards if s.replica_id == turn]
  return [value() for value in _on_their_way(chosen)]


def _on_their_way(arrays: Sequence[jax.Array]) -> list[Callable[[], np.ndarray]]:
  """What gives the values of arrays that lie on one device each, the copies of which from an accelerator have begun."""
  on_host = jax.default_backend() == "cpu"
  if not on_host:
    for array in arrays:
      array.copy_to_host_async()
  return [functools.partial(host_view if on_host else np.asarray, array) for array in arrays]


def joined(array: Written) -> Written:
  """The array with one piece in place of several, for a process that writes all of it; copied when it is written."""
  whole = whole_box(array.shape)
  if (
    len(array.pieces) < 2 or array.nbytes > _JOINED_NBYTES or merge_boxes([box for box, _ in array.pieces]) != (whole,)
  ):
    return array
  return dataclasses.replace(array, write_shape=array.shape)


def chunk_shape(array: Written, specs: Specs) -> tuple[int, ...]:
  """The chunks in which an array is stored."""
  metadata = specs.of(array)["metadata"]
  return tuple(metadata["chunks"] if "chunks" in metadata else metadata["chunk_grid"]["configuration"]["chunk_shape"])


class Specs:
  """TensorStore specs of arrays of one item, as Orbax makes them; one each for arrays that differ in name only."""

  def __init__(self, process: int | None):
    """`process`: whose database the arrays go into; None for the item's own, which the processes' are merged into."""
    self._process = process
    self._known: dict[Any, dict[str, Any]] = {}
    self.kvstore: dict[str, Any] = {}

  def of(self, array: Written) -> dict[str, Any]:
    """The spec without its key-value store, which is noted in `kvstore`."""
    key = (array.shape, array.write_shape, array.dtype, array.args.chunk_byte_size, tuple(array.args.shard_axes))
    if (spec := self._known.get(key)) is None:
      spec = private.tensorstore_write_spec(
        array.info,
        use_ocdbt=True,
        global_shape=array.shape,
        local_shape=array.write_shape,
        dtype=array.dtype,
        process_index=self._process,
        arg=array.args,
      )
      kvstore = spec.pop("kvstore")
      kvstore.pop("path", None)
      self.kvstore = self.kvstore or kvstore
      self._known[key] = spec
    return spec


def write(
  arrays: Sequence[Written],
  slab: packing.Slab | None,
  pieces: Sequence[np.ndarray],
  specs: Specs,
  *,
  compressed: bool,
  context: ts.Context,
  process: int,
  window: int | None,
  stop: threading.Event,
  queued: threading.Event | None = None,
  memory: SlabMemory | None = None,
  slab_number: int | None = None,
) -> None:
  """Writes arrays and, if there is one, a slab; returns when everything is committed to the process's database.

  Args:
    arrays: those that are stored as arrays of their own.
    slab, pieces: those that are not.
    specs: Orbax's specs of all of them, asked for at least once.
    compressed: whether the slab is; the arrays' specs say so themselves.
    context: TensorStore's resources.
    process: this process; 0 writes the arrays' metadata.
    window: bytes in flight at a time; None hands over everything at once, in one transaction.
    stop: set by whoever gives up.
    queued: set once TensorStore has enough to be busy with while Python is.
    memory: where the slab's chunks pass through.
    slab_number: what names the slab, if not the process.

  Raises:
    ValueError: naming the array that could not be written.
  """
  transaction = ts.Transaction(atomic=True) if window is None else None
  root = ts.KvStore.open(specs.kvstore, context=context).result()
  opened = [
    ts.open(
      specs.of(array),
      kvstore=root / prefix(array.info.name) if array.info.name else root,
      context=context,
      transaction=transaction,
      open=True,
      create=process == 0,
      assume_metadata=process != 0,
    )
    for array in arrays
  ]
  flight = _Flight(window, stop, queued or threading.Event())
  try:
    for array, future in zip(arrays, opened, strict=True):
      store = _result(future, array.info.name)
      for box, data in _pieces(array):
        target = store if shape_of(box) == array.shape else store[tuple(slice(a, b) for a, b in box)].translate_to[0]
        if not box:
          target, data = store[ts.newaxis], data.reshape(1)
        flight.start(data.nbytes, functools.partial(_start, target, data), array.info.name)
    if slab is not None and slab.nbytes:
      name = packing.slab_name(process if slab_number is None else slab_number)
      store = _slab_store(slab, name, compressed, root, context, transaction)
      take, give = functools.partial(_fresh, slab.chunk_nbytes), None
      if transaction is None:  # which would keep every chunk until the commit
        memory = memory or SlabMemory()
        memory.begin(slab.chunk_nbytes)
        take, give = functools.partial(memory.take, flight), memory.give
      for offset, nbytes, chunk in slab.chunks(pieces, take):
        target = store[offset : offset + nbytes].translate_to[0]
        landed = give and functools.partial(give, chunk)
        flight.start(nbytes, functools.partial(_start, target, chunk[:nbytes]), name, landed)
    flight.land_all()
  finally:
    flight.settle()
  if transaction is not None:
    transaction.commit_async().result()


class _Flight:
  """Writes in flight, under a limit of bytes."""

  def __init__(self, window: int | None, stop: threading.Event, ahead: threading.Event):
    self._window = window
    self._stop = stop
    self._ahead = ahead
    self._flying: collections.deque[tuple[int, Any, str, Callable[[], None] | None]] = collections.deque()
    self._nbytes = 0

  def start(self, nbytes: int, begin: Callable[[], Any], name: str, landed: Callable[[], None] | None = None) -> None:
    while self._window is not None and self._flying and self._nbytes + nbytes > self._window:
      self.land()
    if self._stop.is_set():
      raise CheckpointError("the save was given up")
    self._flying.append((nbytes, begin(), name, landed))
    self._nbytes += nbytes
    if self._nbytes >= _AHEAD_NBYTES:
      self._ahead.set()

  def land_all(self) -> None:
    self._ahead.set()
    while self._flying:
      self.land()

  def settle(self) -> None:
    """Waits for what a failure has left in flight, whatever comes of it: the directory is about to be removed."""
    for _, future, _, _ in self._flying:
      future.exception()
    self._flying.clear()

  def land(self) -> None:
    """Waits for the write that was started first."""
    self._ahead.set()
    nbytes, future, name, landed = self._flying.popleft()
    _result(future, name)
    self._nbytes -= nbytes
    if landed is not None:
      landed()


class SlabMemory:
  """Memory of a slab's chunks, used again once a chunk is written, and by the next save.

  Fresh memory costs as much as filling it, and now and then ten times that, where the kernel has to move pages for it.
  """

  def __init__(self) -> None:
    self._chunk_nbytes = 0
    self._free: list[np.ndarray] = []
    self._left = 0

  def begin(self, chunk_nbytes: int) -> None:
    """Takes chunks of that size from now on."""
    most = max(1, _SLAB_NBYTES // chunk_nbytes)
    self._free = self._free[:most] if self._chunk_nbytes == chunk_nbytes else []
    self._chunk_nbytes = chunk_nbytes
    self._left = most - len(self._free)

  def take(self, flight: _Flight) -> np.ndarray:
    """Memory for a chunk; waits for those that are in flight if there is none."""
    while not self._left and not self._free:
      flight.land()
    if self._free:
      return self._free.pop()
    self._left -= 1
    return _fresh(self._chunk_nbytes)

  def give(self, chunk: np.ndarray) -> None:
    """Gives the memory of a chunk back."""
    self._free.append(chunk)


def _fresh(nbytes: int) -> np.ndarray:
  return unaligned_empty((nbytes,), np.dtype(np.uint8))


def _start(store: ts.TensorStore, data: np.ndarray) -> Any:
  # The memory is jax's, which does not change, or our own: TensorStore need not copy it.
  return store.write(data, can_reference_source_data_indefinitely=True)


def _pieces(array: Written) -> Sequence[tuple[Box, np.ndarray]]:
  if array.write_shape != array.shape or len(array.pieces) < 2:
    return array.pieces
  whole = whole_box(array.shape)
  out = unaligned_empty(array.shape, array.dtype)
  for box, data in array.pieces:
    out[within(box, whole)] = data
  return [(whole, out)]


def _slab_store(
  slab: packing.Slab, name: str, compressed: bool, root: ts.KvStore, context: ts.Context, transaction: Any
) -> ts.TensorStore:
  spec = {
    "driver": "zarr",
    "dtype": "uint8",
    "recheck_cached_data": False,
    "recheck_cached_metadata": False,
    "store_data_equal_to_fill_value": True,
    "metadata": {"shape": [slab.nbytes], "chunks": [slab.chunk_nbytes], "compressor": _ZSTD if compressed else None},
  }
  future = ts.open(spec, kvstore=root / f"{name}/", context=context, transaction=transaction, open=True, create=True)
  return _result(future, name)


def _result(future: Any, name: str) -> Any:
  try:
    return future.result()
  except (ValueError, OSError) as e:
    raise ValueError(f"{name}: {e}") from e
