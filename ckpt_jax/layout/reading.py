"""Reads arrays with little Python per leaf: one store, few large reads, each once for the whole process.

Orbax reads shard by shard through its event loop: about 1 ms a shard, and three copies (a zeroed array, TensorStore's
buffer, `device_put`). Here all reads are queued at once under a limit of bytes, on a CPU large arrays go straight into
memory of jax, and an array that several devices of the process share is read once and divided in memory.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from ckpt_jax.job import threads
from ckpt_jax.layout import packing
from ckpt_jax.layout.keys import prefix
from ckpt_jax.layout.memory import unaligned_empty
from ckpt_jax.layout.sharding import Box, chunk_nbytes, split_box
from ckpt_jax.orbax import private

# How long to wait for the oldest read before polling the others, at about 0.2 us each.
_SWEEP_S, _SWEEP_S_A_READ = 0.003, 5e-6
_ENOUGH_LOCALLY = 2**28
_ENOUGH_SLABS = 2**26  # so that the first leaves are delivered before all slabs are read
_SEVERAL = 4  # reads
# Of a data file in a bucket that one request reads. Orbax merges all reads of 1 ms, here 264 MB of a step, into one
# request: one connection, whose bytes are passed on only when all have come.
_MERGED_NBYTES = 2**24
_MOST_GATHERED_NBYTES = 2**26


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
  """One array to read.

  Attributes:
    name: its name.
    store: its open store.
    boxes: the parts to read.
    memory: an array for each box to read into; None for fresh memory.
  """

  name: str
  store: ts.TensorStore
  boxes: tuple[Box, ...]
  memory: tuple[np.ndarray, ...] | None = None


def open_stores(info: ocp.type_handlers.ParamInfo, names: Sequence[str]) -> dict[str, ts.TensorStore]:
  """Opens arrays of an item, by their names in the database, through one key-value store.

  Raises:
    ValueError: naming the array that cannot be opened.
  """
  if not names:
    return {}
  spec = private.tensorstore_read_spec(
    info.replace(name=""),
    use_ocdbt=bool(info.is_ocdbt_checkpoint),
    raise_array_data_missing_error=info.raise_array_data_missing_error,
  )
  context = info.ts_context
  database = spec.pop("kvstore")
  if "experimental_read_coalescing_merged_bytes" in database:
    database["experimental_read_coalescing_merged_bytes"] = _MERGED_NBYTES
  root = ts.KvStore.open(database, context=context).result()
  futures = {
    name: ts.open(spec, kvstore=root / prefix(name) if name else root, context=context, open=True, read=True)
    for name in names
  }
  return {name: result_of(future, name) for name, future in futures.items()}


@dataclasses.dataclass(frozen=True)
class Window:
  """How much is read at a time.

  Attributes:
    most: bytes of chunks in flight; a larger chunk is read alone.
    is_local: whether storage answers at once, so that nothing is gained by asking for everything early. TensorStore
      reads into its own buffers first, which it reuses when little is in flight: 1 GB in the page cache took 0.38 s
      with all in flight, 0.29 s with 256 MiB.
  """

  most: int
  is_local: bool

  def is_full(self, reads: int, nbytes: int, more: int, enough: int) -> bool:
    """Whether `more` bytes have to wait for some of the `reads` (`nbytes`) in flight; `enough` suffices locally."""
    if reads < _SEVERAL or not self.is_local:
      return reads > 0 and nbytes + more > self.most
    return nbytes + more > min(enough, self.most)

  def part(self, enough: int) -> int:
    """Bytes of one read, if the chunks allow it."""
    return min(self.most, max(1, enough // _SEVERAL)) if self.is_local else self.most


def read(
  requests: Sequence[Request], window: Window, enough: int = _ENOUGH_LOCALLY
) -> Iterator[tuple[Request, list[np.ndarray]]]:
  """The boxes of each request as arrays; requests in the order in which they are complete.

  Args:
    requests: what to read.
    window: how much at a time.
    enough: bytes in flight that suffice for a local disk.

  Raises:
    ValueError: naming the array that cannot be read.
    CheckpointError: if the restore was given up (see `job.threads`).
  """
  flight = _Flight(gathers=not window.is_local)
  try:
    yield from _read(requests, window, enough, flight)
  finally:
    flight.settle()


def _read(
  requests: Sequence[Request], window: Window, enough: int, flight: _Flight
) -> Iterator[tuple[Request, list[np.ndarray]]]:
  for request in requests:
    store = request.store
    dtype = store.dtype.numpy_dtype
    chunk: tuple[int, ...] = tuple(c or n for c, n in zip(_chunk_shape(store), store.shape, strict=True))
    memory = request.memory or [unaligned_empty(tuple(b - a for a, b in box), dtype) for box in request.boxes]
    wanted = _Wanted(request, list(memory))
    for box, array in zip(request.boxes, wanted.arrays, strict=True):
      for part in split_box(box, chunk, dtype.itemsize, window.part(enough)):
        threads.check()
        nbytes = chunk_nbytes(part, chunk, dtype.itemsize)
        while window.is_full(len(flight), flight.nbytes, nbytes, enough):
          yield from flight.land()
        target = array[tuple(slice(a - o, b - o) for (a, b), (o, _) in zip(part, box, strict=True))]
        if not part:  # TensorStore copies a 0-d array instead of referring to it
          target, source = array.reshape(1), store[ts.newaxis]
        elif target.shape == store.shape:
          source = store
        else:
          source = store[tuple(slice(a, b) for a, b in part)].translate_to[0]
        flight.start(nbytes, ts.array(target).write(source, batch=flight.batch), wanted)
    wanted.all_started = True
    if not wanted.pending:
      yield request, wanted.arrays
    yield from flight.land(wait=False)
  while flight:
    yield from flight.land()


@dataclasses.dataclass
class _Wanted:
  """A request in progress: the arrays it fills, and the number of its reads in flight."""

  request: Request
  arrays: list[np.ndarray]
  pending: int = 0
  all_started: bool = False


class _Flight:
  """Reads in flight, which end in any order.

  Attributes:
    nbytes: of all.
    batch: into which the next one goes; None without batches.
  """

  def __init__(self, *, gathers: bool):
    """`gathers`: whether reads are sent together: first 16 MiB, so that the link is busy soon, later 64 MiB.

    OCDBT by itself merges what is asked for within a millisecond, which is a handful of small arrays.
    """
    self._flying: collections.deque[tuple[int, Any, _Wanted]] = collections.deque()
    self.nbytes = 0
    self.batch = ts.Batch() if gathers else None
    self._gathered, self._enough = 0, _MERGED_NBYTES

  def __len__(self) -> int:
    return len(self._flying)

  def start(self, nbytes: int, future: Any, wanted: _Wanted) -> None:
    """Adds a read."""
    wanted.pending += 1
    self.nbytes += nbytes
    self._flying.append((nbytes, future, wanted))
    self._gathered += nbytes
    if self._gathered >= self._enough:
      self._enough = min(2 * self._enough, _MOST_GATHERED_NBYTES)
      self._send()

  def _send(self) -> None:
    """Sends what was gathered; nothing of it is read before."""
    if self.batch is not None and self._gathered:
      self.batch.submit()
      self.batch = ts.Batch()
    self._gathered = 0

  def settle(self) -> None:
    """Waits for all reads, failed or not: none may write into memory that was freed, or outlive Python."""
    self._send()
    for _, future, _ in self._flying:
      future.exception()
    self._flying.clear()

  def land(self, *, wait: bool = True) -> Iterator[tuple[Request, list[np.ndarray]]]:
    """The requests that are complete; with `wait`, at least one read has ended when it returns."""
    landed = 0
    if wait:
      self._send()
    while self._flying and (self._flying[0][1].done() or (wait and not landed)):
      ended: list[tuple[int, Any, _Wanted]] = []
      try:
        self._flying[0][1].exception(timeout=max(_SWEEP_S, len(self._flying) * _SWEEP_S_A_READ))
        ended.append(self._flying.popleft())
      except TimeoutError:  # another one may have ended
        flying: collections.deque[tuple[int, Any, _Wanted]] = collections.deque()
        for read in self._flying:
          (ended if read[1].done() else flying).append(read)
        self._flying = flying
      landed += len(ended)
      for nbytes, future, wanted in ended:
        result_of(future, wanted.request.name)
        self.nbytes -= nbytes
        wanted.pending -= 1
        if wanted.all_started and not wanted.pending:
          yield wanted.request, wanted.arrays


def read_packed(
  info: ocp.type_handlers.ParamInfo,
  index: packing.Index,
  boxes: Mapping[str, tuple[Box, ...]],
  window: Window,
) -> Iterator[tuple[str, list[np.ndarray]]]:
  """Parts of packed arrays, in the order in which they are complete; only chunks that hold some of them are read.

  `boxes` are the parts to read, by array.
  """
  wanted: dict[int, list[tuple[int, int, str]]] = {}
  for name, parts in boxes.items():
    found = False
    for process, start, stop in packing.needed(index[name], parts):
      wanted.setdefault(process, []).append((start, stop, name))
      found = True
    if not found:  # this process needs no part of it
      yield name, []
  if not wanted:
    return
  names = [packing.slab_name(process) for process in wanted]
  # A slab is zarr 2 in every item.
  stores = open_stores(info.replace(use_zarr3=False, raise_array_data_missing_error=True), names)
  requests: dict[Request, int] = {}
  slabs: dict[int, packing.SlabBytes] = {}
  missing: collections.Counter[str] = collections.Counter()  # chunks that an array waits for
  waiting: dict[tuple[int, int], list[str]] = {}
  for process, name, store in zip(wanted, names, stores.values(), strict=True):
    length = store.shape[0]
    chunk = _chunk_shape(store)[0] or length
    slabs[process] = packing.SlabBytes(chunk)
    touched: dict[int, None] = {}
    for start, stop, array in wanted[process]:
      for c in range(start // chunk, -(-stop // chunk)):
        touched[c] = None
        waiting.setdefault((process, c * chunk), []).append(array)
        missing[array] += 1
    # One request per chunk, in its own memory, which is freed once the arrays in it are gone.
    for c in sorted(touched):
      requests[Request(name, store, (((c * chunk, min((c + 1) * chunk, length)),),))] = process
  for request, (data,) in read(list(requests), window, _ENOUGH_SLABS):
    process, start = requests[request], request.boxes[0][0][0]
    slabs[process].add(start, data)
    for name in waiting.pop((process, start)):
      missing[name] -= 1
      if not missing[name]:
        yield name, [packing.gather(index[name], box, slabs) for box in boxes[name]]


def _chunk_shape(store: ts.TensorStore) -> Sequence[int | None]:
  return store.chunk_layout.read_chunk.shape or store.shape


def result_of(future: Any, name: str) -> Any:
  """TensorStore's result; a ValueError that names the array if there is none."""
  try:
    return future.result()
  except (ValueError, OSError) as e:
    raise ValueError(f"{name}: {e}") from e
