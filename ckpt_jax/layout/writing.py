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
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
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
# Of a transaction in which arrays go to a bucket. Python takes 0.1 ms an array: the first one ends after so many, so
# that the link is busy soon.
_TOGETHER_NBYTES, _FIRST_ARRAYS = 2**29, 500


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
    return min([values.turn for _, values in self.pieces], default=0)

  @property
  def boxes(self) -> tuple[Box, ...]:
    """Those of the pieces."""
    return tuple([box for box, _ in self.pieces])

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
  """The pieces of each array that this process writes, in host memory or on their way there; of a ring `in_turn`.

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

  found = [
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
  return in_turn(found) if copies.in_turn else found


def in_turn(arrays: Iterable[Written]) -> list[Written]:
  """Arrays in the order in which a ring brings them."""
  return sorted(arrays, key=lambda array: array.turn)


def small_on_host(slices: Sequence[Slices], copies: HostCopies) -> list[Values]:
  """The values of the pieces of packed arrays, array by array, in host memory or on their way there."""
  chosen = [shard for some in slices for _, shard, _ in some.parts]
  copies.stage(chosen)
  return [copies.of(shard) for shard in chosen]


_Chunk = tuple[Box, np.ndarray, Callable[[], None]]  # where it goes, what, and what is called once it is there


@dataclasses.dataclass(eq=False, slots=True)
class _Target:
  """An array to write into a database.

  Attributes:
    writer: of the database.
    name, prefix: its name, and that of its keys.
    spec: TensorStore's, without the key-value store.
    create: whether this process writes its metadata.
    chunks: what is to be written of it.
  """

  writer: Writer
  name: str
  prefix: str
  spec: dict[str, Any]
  create: bool
  chunks: Callable[[], Iterator[_Chunk]]


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
    memory: packing.SlabMemory | None = None,
    direct: bool = False,
    batches: bool = False,
  ):
    """Opens nothing yet.

    Args:
      context: TensorStore's resources.
      window: bytes in flight at a time; None hands over everything at once, in one transaction.
      process: the process whose database this is (0 writes the arrays' metadata); None for the item's own database.
      compressed: whether slabs are, by zstd.
      memory: buffers for the chunks of slabs.
      direct: whether what is written leaves the page cache meanwhile.
      batches: whether what is written goes into a row of transactions, of which some are in flight at a time. By
        itself OCDBT commits whatever is there, each time with some six requests to a bucket, for which all else waits.
    """
    self.stop = threading.Event()
    self.queued = threading.Event()
    self._context = context
    self._window = window
    self._process = process
    self._compressed = compressed
    self._memory = memory or packing.SlabMemory()
    self._direct = direct
    self._batches = batches
    self._specs: dict[Any, dict[str, Any]] = {}
    self._kvstore: dict[str, Any] = {}
    self._flying: collections.deque[tuple[int, Any, str, Sequence[Callable[[], None]]]] = collections.deque()
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
    other = Writer(self._context, self._window, process=self._process, direct=self._direct, batches=self._batches)
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
    beside: tuple[Writer, Sequence[Written]] | None = None,
  ) -> None:
    """Writes arrays and, if there is one, a slab; returns when everything is committed to the database.

    Args:
      arrays: those that are stored by themselves. Their specs locate the database; without any, one was asked for.
      slab, pieces: packed arrays, and the values of their pieces.
      number: names the slab.
      beside: a nested database and its arrays: what a ring brings is written in the order in which it comes.

    Raises:
      ValueError: naming the array that could not be written.
      CheckpointError: if `stop` was set.
    """
    of = [(self, array) for array in arrays]
    with contextlib.ExitStack() as stack:
      stack.enter_context(self._written_behind(arrays))
      if beside is not None:
        stack.enter_context(beside[0]._written_behind(beside[1]))
        of += [(beside[0], array) for array in beside[1]]
        of.sort(key=lambda one: one[1].turn)
      self._write(of, slab, pieces, number)

  def _written_behind(self, arrays: Sequence[Written]) -> contextlib.AbstractContextManager[None]:
    for array in arrays[:1]:
      self.spec(array)
    place = self._kvstore.get("base", {})
    if not self._direct or place.get("driver") != "file":
      return contextlib.nullcontext()
    return write_behind(os.path.join(place["path"], VALUES))

  def _write(
    self, arrays: Sequence[tuple[Writer, Written]], slab: packing.Slab | None, pieces: Sequence[Values], number: int
  ) -> None:
    targets = [self._array(array, of) for of, array in arrays]
    if slab is not None and slab.nbytes:
      targets.append(self._slab(slab, pieces, number))
    transaction = ts.Transaction(atomic=True) if self._window is None and not self._batches else None
    try:
      writers = {self, *(target.writer for target in targets)}
      roots = {of: ts.KvStore.open(of._kvstore, context=self._context).result() for of in writers}
      if self._batches:
        self._write_batches(roots, targets)
      else:
        for target, store in self._opened(roots, dict.fromkeys(targets, True), transaction):
          for box, data, landed in target.chunks():
            self._await_window(data.nbytes)
            self._fly(data.nbytes, _begin_write(store, box, data), target.name, landed)
      while self._flying:
        self.land()
    finally:
      self.queued.set()
      for _, future, _, _ in self._flying:  # after a failure, whatever comes of them: the directory is about to go
        future.exception()
      self._flying.clear()
    if transaction is not None:
      transaction.commit_async().result()

  def _write_batches(self, roots: Mapping[Writer, ts.KvStore], targets: Sequence[_Target]) -> None:
    begun: set[_Target] = set()
    for nbytes, batch in _gathered(targets):
      self._await_window(nbytes)
      transaction = ts.Transaction(atomic=True)
      landed: list[Callable[[], None]] = []
      for target, store in self._opened(roots, {t: t not in begun for t in batch}, transaction):
        for box, data, then in batch[target]:
          result_of(_begin_write(store, box, data), target.name)  # only noted, until the transaction is committed
          landed.append(then)
      begun.update(batch)
      names = [target.name for target in batch]
      self._fly(nbytes, transaction.commit_async(), " to ".join(dict.fromkeys([names[0], names[-1]])), *landed)

  def _opened(
    self, roots: Mapping[Writer, ts.KvStore], targets: Mapping[_Target, bool], transaction: ts.Transaction | None
  ) -> Iterator[tuple[_Target, ts.TensorStore]]:
    """Opens arrays, all at once; `targets` has for each whether it is new to the database."""
    common: dict[str, Any] = {"context": self._context, "transaction": transaction, "open": True}
    opened = [
      ts.open(
        target.spec,
        kvstore=roots[target.writer] / target.prefix if target.prefix else roots[target.writer],
        create=target.create and new,
        assume_metadata=not (target.create and new),
        **common,
      )
      for target, new in targets.items()
    ]
    return ((target, result_of(future, target.name)) for target, future in zip(targets, opened, strict=True))

  def _array(self, array: Written, of: Writer) -> _Target:
    name = array.info.name

    def chunks() -> Iterator[_Chunk]:
      for box, values in array.chunks(self._make_room):
        self._make_room(values)
        yield box, values(), values.done

    return _Target(of, name, prefix(name) if name else "", self.spec(array), self._process in (0, None), chunks)

  def _make_room(self, values: Values) -> None:
    """Waits for writes that have begun, as long as what they write is in the way of a piece in a ring."""
    while self._flying and not values.is_sent:
      self.land()

  def _slab(self, slab: packing.Slab, pieces: Sequence[Values], number: int) -> _Target:
    name = packing.slab_name(number)
    again = self._window is not None and not self._batches  # a transaction keeps every chunk until the commit
    memory = self._memory if again else packing.FreshMemory()

    def chunks() -> Iterator[_Chunk]:
      memory.begin(slab.chunk_nbytes)
      for offset, nbytes, chunk in slab.chunks(pieces, functools.partial(memory.take, self.land)):
        yield ((offset, offset + nbytes),), chunk[:nbytes], functools.partial(memory.give, chunk)

    return _Target(self, name, f"{name}/", _slab_spec(slab, self._compressed), True, chunks)

  def _await_window(self, more: int) -> None:
    while self._window is not None and self._flying and self._nbytes + more > self._window:
      self.land()
    if self.stop.is_set():
      raise CheckpointError("the save was given up", topic="save-failed")

  def _fly(self, nbytes: int, future: Any, name: str, *landed: Callable[[], None]) -> None:
    self._flying.append((nbytes, future, name, landed))
    self._nbytes += nbytes
    if self._nbytes >= _AHEAD_NBYTES and not self.queued.is_set():
      self.queued.set()

  def land(self) -> None:
    """Waits for the write that was started first."""
    if not self.queued.is_set():
      self.queued.set()
    nbytes, future, name, landed = self._flying.popleft()
    result_of(future, name)
    self._nbytes -= nbytes
    for then in landed:
      then()


def _gathered(targets: Sequence[_Target]) -> Iterator[tuple[int, dict[_Target, list[_Chunk]]]]:
  """What is committed together: its bytes, and the chunks of each array."""
  nbytes = 0
  batch: dict[_Target, list[_Chunk]] = {}
  for i, target in enumerate(targets, 1):
    batch[target] = []
    for chunk in target.chunks():
      if nbytes and nbytes + chunk[1].nbytes > _TOGETHER_NBYTES:
        yield nbytes, batch
        nbytes, batch = 0, {}
      batch.setdefault(target, []).append(chunk)
      nbytes += chunk[1].nbytes
    if i == _FIRST_ARRAYS < len(targets):
      yield nbytes, batch
      nbytes, batch = 0, {}
  if batch:
    yield nbytes, batch


def _begin_write(store: ts.TensorStore, box: Box, data: np.ndarray) -> Any:
  """Starts to write a part of an array."""
  if not box:
    store, data = store[ts.newaxis], data.reshape(1)
  elif data.shape != store.shape:
    store = store[tuple(slice(a, b) for a, b in box)].translate_to[0]
  # The memory is jax's, which does not change, or our own: TensorStore need not copy it.
  return store.write(data, can_reference_source_data_indefinitely=True)


def _inside(kvstore: dict[str, Any], name: str) -> dict[str, Any]:
  """The spec of a database in a directory inside that of another one."""
  places = {key: kvstore[key] for key in ("base", "manifest") if key in kvstore}
  return kvstore | {key: place | {"path": f"{place['path'].rstrip('/')}/{name}/"} for key, place in places.items()}


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
