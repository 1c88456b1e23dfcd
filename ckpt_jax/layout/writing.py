"""Arrays into a checkpoint with little Python a leaf: the counterpart of `reading`.

Orbax opens each array twice, and gives each piece a chain of asyncio tasks: 1.3 to 1.8 ms an array. Here the arrays of
a process are opened through one key-value store and their writes queued, under a limit of bytes.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import math
import os
import threading
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from ckpt_jax.errors import CheckpointError
from ckpt_jax.layout import codec, packing
from ckpt_jax.layout.keys import bounds, prefix
from ckpt_jax.layout.memory import unaligned_empty
from ckpt_jax.layout.reading import result_of
from ckpt_jax.layout.ring import Values
from ckpt_jax.layout.sharding import Box, one_device, shape_of, whole_box, within
from ckpt_jax.layout.shares import Slices
from ckpt_jax.layout.staging import HostCopies
from ckpt_jax.orbax import private
from ckpt_jax.orbax.format import VALUES
from ckpt_jax.storage.page_cache import write_behind

# Bytes in flight before other threads may have Python: they keep a disk of 1 GB/s busy for 50 ms.
_AHEAD_NBYTES = 48 * 2**20
_SLAB_NBYTES = 64 * 2**20  # of a slab in flight at a time, and kept for the next save


@dataclasses.dataclass(frozen=True)
class Written:
  """An array, and the pieces of it that this process writes.

  Attributes:
    info, args: Orbax's.
    shape, dtype: of the whole array.
    write_shape: of its chunks, unless `args` asks for smaller ones; the same on all processes.
    pieces: box of each, and what returns its values once they are in host memory.
    codec: that of its chunks, see `codec`.
  """

  info: ocp.type_handlers.ParamInfo
  args: ocp.SaveArgs
  shape: tuple[int, ...]
  dtype: np.dtype
  write_shape: tuple[int, ...]
  pieces: tuple[tuple[Box, Values], ...]
  codec: str = codec.OFF

  @property
  def turn(self) -> int:
    """When its first piece arrives, see `Values`."""
    return min((values.turn for _, values in self.pieces), default=0)

  @property
  def own_nbytes(self) -> int:
    """Bytes of the pieces."""
    return sum(math.prod(shape_of(box)) for box, _ in self.pieces) * self.dtype.itemsize

  def chunks(self, make_room: Callable[[Values], None]) -> tuple[tuple[Box, Values], ...]:
    """The pieces as they are stored; waits, after `make_room`, for the values of one that is made of several."""
    if self.write_shape != self.shape or len(self.pieces) < 2:
      return self.pieces
    whole = whole_box(self.shape)
    out = unaligned_empty(self.shape, self.dtype)
    for box, values in self.pieces:
      make_room(values)
      out[within(box, whole)] = values()
      values.done()
    return ((whole, Values(out)),)


def on_host(
  arrays: Sequence[jax.Array],
  infos: Sequence[ocp.type_handlers.ParamInfo],
  args: Sequence[ocp.SaveArgs],
  copies: HostCopies,
  compression: codec.Compression,
) -> list[Written]:
  """The pieces of each array that this process writes, in host memory or on their way there.

  Args:
    arrays, infos, args: as Orbax gives them.
    copies: of the arrays, as far as they were started before.
    compression: the codec of each.
  """
  # Keys that each process has for itself are the same on all, and the first one's are saved.
  others = [jax.process_index() > 0 and one_device(array.sharding) == "here" for array in arrays]
  copies.plan(arrays)
  copies.stage([array for array, is_others in zip(arrays, others, strict=True) if not is_others])

  def pieces(array: jax.Array, is_others: bool) -> tuple[tuple[int, ...], tuple[tuple[Box, Values], ...]]:
    if is_others:
      return array.shape, ()
    found = copies.pieces(array)
    return found.chunks, found.pieces

  return [
    Written(
      info,
      arg,
      array.shape,
      dtype := np.dtype(array.dtype),
      *pieces(array, is_others),
      codec.codec_of(compression, info.name, dtype),
    )
    for array, info, arg, is_others in zip(arrays, infos, args, others, strict=True)
  ]


def small_on_host(slices: Sequence[Slices], copies: HostCopies) -> list[Values]:
  """The values of the pieces of packed arrays, array by array, in host memory or on their way there."""
  chosen = [shard for some in slices for _, shard, _ in some.parts]
  copies.stage(chosen)
  return [copies.of(shard) for shard in chosen]


class Writer:
  """Writes arrays of one item into an OCDBT database.

  Attributes:
    stop: set to give up.
    queued: set once TensorStore has enough to be busy with while other threads have Python.
  """

  def __init__(
    self,
    context: ts.Context,
    window: int | None,
    *,
    process: int | None = None,
    compressed: bool = False,
    memory: SlabMemory | None = None,
    direct: bool = False,
  ):
    """Opens nothing yet.

    Args:
      context: TensorStore's resources.
      window: bytes in flight at a time; None hands over everything at once, in one transaction.
      process: the process whose database this is (0 writes the arrays' metadata); None for the item's own database.
      compressed: whether slabs are, by zstd.
      memory: buffers for the chunks of slabs.
      direct: whether what is written leaves the page cache meanwhile.
    """
    self.stop = threading.Event()
    self.queued = threading.Event()
    self._context = context
    self._window = window
    self._process = process
    self._compressed = compressed
    self._memory = memory or SlabMemory()
    self._direct = direct
    self._specs: dict[Any, dict[str, Any]] = {}
    self._kvstore: dict[str, Any] = {}
    self._flying: collections.deque[tuple[int, Any, str, Callable[[], None] | None]] = collections.deque()
    self._nbytes = 0

  def spec(self, array: Written) -> dict[str, Any]:
    """Orbax's TensorStore spec of an array, without its key-value store; arrays that differ in name only share it."""
    kind = (array.shape, array.write_shape, array.dtype, array.codec)
    key = (*kind, array.args.chunk_byte_size, tuple(array.args.shard_axes))
    if (spec := self._specs.get(key)) is None:
      spec = private.tensorstore_write_spec(
        array.info,
        use_ocdbt=True,
        global_shape=array.shape,
        local_shape=array.write_shape,
        dtype=array.dtype,
        process_index=self._process,
        arg=array.args,
      )
      codec.set_codec(spec["metadata"], array.codec, array.dtype.itemsize)
      kvstore = spec.pop("kvstore")
      kvstore.pop("path", None)
      self._kvstore = self._kvstore or kvstore
      self._specs[key] = spec
    return spec

  def nested(self, name: str) -> Writer:
    """Writes into a database of its own inside the directory of this one, whose arrays are this one's by `refer`."""
    other = Writer(self._context, self._window, process=self._process, direct=self._direct)
    other.stop, other._specs, other._kvstore = self.stop, self._specs, _inside(self._kvstore, name)
    return other

  def files(self) -> list[str]:
    """The files of the database."""
    base = ts.KvStore.open(self._kvstore["base"], context=self._context).result()
    return [key.decode() for key in base.list().result()]

  def refer(self, nested: Writer, names: Collection[str] | None = None) -> None:
    """Takes over arrays of a nested database: references to their values, not the values.

    Args:
      nested: see `nested`.
      names: of the arrays; None for all.
    """
    of, to = (ts.KvStore.open(writer._kvstore, context=self._context).result() for writer in (nested, self))
    transaction = ts.Transaction(atomic=True)
    for only in [None] if names is None else [ts.KvStore.KeyRange(*bounds(name)) for name in sorted(names)]:
      of.experimental_copy_range_to(to.with_transaction(transaction), source_range=only).result()
    transaction.commit_async().result()

  def chunk_shape(self, array: Written) -> tuple[int, ...]:
    """The shape of the chunks in which an array is stored."""
    return codec.chunk_shape(self.spec(array)["metadata"])

  def write(
    self,
    arrays: Sequence[Written],
    slab: packing.Slab | None = None,
    pieces: Sequence[Values] = (),
    number: int = 0,
  ) -> None:
    """Writes arrays and, if there is one, a slab; returns when everything is committed to the database.

    Args:
      arrays: those that are stored by themselves. Their specs locate the database; without any, one was asked for.
      slab, pieces: packed arrays, and the values of their pieces.
      number: names the slab.

    Raises:
      ValueError: naming the array that could not be written.
      CheckpointError: if `stop` was set.
    """
    with self._written_behind(arrays):
      self._write(arrays, slab, pieces, number)

  def _written_behind(self, arrays: Sequence[Written]) -> contextlib.AbstractContextManager[None]:
    for array in arrays[:1]:
      self.spec(array)
    place = self._kvstore.get("base", {})
    if not self._direct or place.get("driver") != "file":
      return contextlib.nullcontext()
    return write_behind(os.path.join(place["path"], VALUES))

  def _write(self, arrays: Sequence[Written], slab: packing.Slab | None, pieces: Sequence[Values], number: int) -> None:
    transaction = ts.Transaction(atomic=True) if self._window is None else None
    common: dict[str, Any] = {"context": self._context, "transaction": transaction, "open": True}
    create = self._process in (0, None)
    try:
      specs = [self.spec(array) for array in arrays]
      root = ts.KvStore.open(self._kvstore, context=self._context).result()
      opened = [
        ts.open(
          spec,
          kvstore=root / prefix(array.info.name) if array.info.name else root,
          create=create,
          assume_metadata=not create,
          **common,
        )
        for array, spec in zip(arrays, specs, strict=True)
      ]
      for array, future in zip(arrays, opened, strict=True):
        self._write_array(array, result_of(future, array.info.name))
      if slab is not None and slab.nbytes:
        name = packing.slab_name(number)
        slab_spec = _slab_spec(slab, self._compressed)
        store = result_of(ts.open(slab_spec, kvstore=root / f"{name}/", create=True, **common), name)
        self._write_slab(slab, pieces, store, name)
      while self._flying:
        self.land()
    finally:
      self.queued.set()
      for _, future, _, _ in self._flying:  # after a failure, whatever comes of them: the directory is about to go
        future.exception()
      self._flying.clear()
    if transaction is not None:
      transaction.commit_async().result()

  def _write_array(self, array: Written, store: ts.TensorStore) -> None:
    for box, values in array.chunks(self._make_room):
      target = store if shape_of(box) == array.shape else store[tuple(slice(a, b) for a, b in box)].translate_to[0]
      self._make_room(values)
      data = values()
      if not box:
        target, data = store[ts.newaxis], data.reshape(1)
      self._start(target, data, array.info.name, values.done)

  def _make_room(self, values: Values) -> None:
    """Waits for writes that have begun, as long as what they write is in the way of a piece in a ring."""
    while self._flying and not values.is_sent:
      self.land()

  def _write_slab(self, slab: packing.Slab, pieces: Sequence[Values], store: ts.TensorStore, name: str) -> None:
    again = self._window is not None  # a transaction keeps every chunk until the commit
    self._memory.begin(slab.chunk_nbytes)
    take = functools.partial(self._memory.take, self.land) if again else functools.partial(fresh, slab.chunk_nbytes)
    for offset, nbytes, chunk in slab.chunks(pieces, take):
      target = store[offset : offset + nbytes].translate_to[0]
      self._start(target, chunk[:nbytes], name, functools.partial(self._memory.give, chunk) if again else None)

  def _start(
    self, target: ts.TensorStore, data: np.ndarray, name: str, landed: Callable[[], None] | None = None
  ) -> None:
    while self._window is not None and self._flying and self._nbytes + data.nbytes > self._window:
      self.land()
    if self.stop.is_set():
      raise CheckpointError("the save was given up", topic="save-failed")
    # The memory is jax's, which does not change, or our own: TensorStore need not copy it.
    future = target.write(data, can_reference_source_data_indefinitely=True)
    self._flying.append((data.nbytes, future, name, landed))
    self._nbytes += data.nbytes
    if self._nbytes >= _AHEAD_NBYTES:
      self.queued.set()

  def land(self) -> None:
    """Waits for the write that was started first."""
    self.queued.set()
    nbytes, future, name, landed = self._flying.popleft()
    result_of(future, name)
    self._nbytes -= nbytes
    if landed is not None:
      landed()


class SlabMemory:
  """Buffers for the chunks of slabs, reused once a chunk is written, and by the next save.

  Fresh memory costs as much as filling it, and now and then ten times that, where the kernel has to move pages for it.
  """

  def __init__(self) -> None:
    self._chunk_nbytes = 0
    self._free: list[np.ndarray] = []
    self._left = 0

  def begin(self, chunk_nbytes: int) -> None:
    """Sets the size of the chunks from now on."""
    most = max(1, _SLAB_NBYTES // chunk_nbytes)
    self._free = self._free[:most] if self._chunk_nbytes == chunk_nbytes else []
    self._chunk_nbytes = chunk_nbytes
    self._left = most - len(self._free)

  def take(self, wait: Callable[[], None]) -> np.ndarray:
    """A buffer for a chunk; `wait` is called until one is free."""
    while not self._left and not self._free:
      wait()
    if self._free:
      return self._free.pop()
    self._left -= 1
    return fresh(self._chunk_nbytes)

  def give(self, chunk: np.ndarray) -> None:
    """Takes the buffer of a written chunk back."""
    self._free.append(chunk)


def _inside(kvstore: dict[str, Any], name: str) -> dict[str, Any]:
  """The spec of a database in a directory inside that of another one."""
  places = {key: kvstore[key] for key in ("base", "manifest") if key in kvstore}
  return kvstore | {key: place | {"path": f"{place['path'].rstrip('/')}/{name}/"} for key, place in places.items()}


def fresh(nbytes: int) -> np.ndarray:
  """A new buffer."""
  return unaligned_empty((nbytes,), np.dtype(np.uint8))


def _slab_spec(slab: packing.Slab, compressed: bool) -> dict[str, Any]:
  metadata = {"shape": [slab.nbytes], "chunks": [slab.chunk_nbytes], "compressor": None}
  codec.set_codec(metadata, codec.ZSTD if compressed else codec.OFF, 1)
  return {
    "driver": "zarr",
    "dtype": "uint8",
    "recheck_cached_data": False,
    "recheck_cached_metadata": False,
    "store_data_equal_to_fill_value": True,
    "metadata": metadata,
  }
