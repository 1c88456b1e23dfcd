"""Arrays out of a checkpoint with little Python a leaf: one store, few large reads, each once for the whole process.

Orbax reads shard by shard through its event loop: about 1 ms a shard, and three copies (a zeroed array, TensorStore's
buffer, `device_put`). Here all reads are queued at once under a limit of bytes, straight into memory that jax on CPU
takes over as it is, and an array that several devices of the process share is read once and divided in memory.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from ckpt_jax.errors import StructureMismatchError
from ckpt_jax.layout import packing
from ckpt_jax.layout.memory import aligned_empty
from ckpt_jax.layout.sharding import Box, box_of, chunk_nbytes, split_box

# How long to wait for the oldest read before looking at the others, which costs about 0.2 us each.
_SWEEP_S, _SWEEP_S_A_READ = 0.003, 5e-6


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
  """One array to read: its open store, and the boxes wanted of it."""

  name: str
  store: ts.TensorStore
  boxes: tuple[Box, ...]


def open_stores(
  infos: Sequence[ocp.type_handlers.ParamInfo], dtypes: Sequence[Any], context: ts.Context
) -> list[ts.TensorStore]:
  """Opens the arrays of a checkpoint through one key-value store.

  Args:
    infos: Orbax's descriptions; all of one checkpoint.
    dtypes: cast to this while reading, None to leave it.
    context: TensorStore's resources.

  Raises:
    ValueError: naming the array that cannot be opened.
  """
  first = infos[0]
  spec = ocp.type_handlers.get_json_tspec_read(
    first.replace(name=""),
    use_ocdbt=bool(first.is_ocdbt_checkpoint),
    raise_array_data_missing_error=first.raise_array_data_missing_error,
  )
  root = ts.KvStore.open(spec.pop("kvstore"), context=context).result()
  futures = [
    ts.open(spec, kvstore=root / f"{info.name}/" if info.name else root, context=context, open=True, read=True)
    for info in infos
  ]
  stores = [_result(future, info.name) for future, info in zip(futures, infos, strict=True)]
  return [
    store if dtype is None or store.dtype.name == (name := np.dtype(dtype).name) else ts.cast(store, name)
    for store, dtype in zip(stores, dtypes, strict=True)
  ]


def read(requests: Sequence[Request], window: int) -> Iterator[tuple[Request, list[np.ndarray]]]:
  """The boxes of each request as arrays in fresh aligned memory; requests in the order in which they are complete.

  Args:
    requests: what to read.
    window: bytes of chunks in flight at a time; a chunk that is larger is read alone.

  Raises:
    ValueError: naming the array that cannot be read.
  """
  flight = _Flight()
  for request in requests:
    store = request.store
    dtype = store.dtype.numpy_dtype
    chunk: tuple[int, ...] = tuple(c or n for c, n in zip(_chunk_shape(store), store.shape, strict=True))
    wanted = _Wanted(request, [aligned_empty(tuple(b - a for a, b in box), dtype) for box in request.boxes])
    for box, array in zip(request.boxes, wanted.arrays, strict=True):
      for part in split_box(box, chunk, dtype.itemsize, window):
        nbytes = chunk_nbytes(part, chunk, dtype.itemsize)
        while flight and flight.nbytes + nbytes > window:
          yield from flight.land()
        target = array[tuple(slice(a - o, b - o) for (a, b), (o, _) in zip(part, box, strict=True))]
        if not part:  # TensorStore copies a 0-d array instead of referring to it
          target, source = array.reshape(1), store[ts.newaxis]
        elif target.shape == store.shape:
          source = store
        else:
          source = store[tuple(slice(a, b) for a, b in part)].translate_to[0]
        flight.start(nbytes, ts.array(target).write(source), wanted)
    wanted.all_started = True
    if not wanted.pending:
      yield request, wanted.arrays
    yield from flight.land(wait=False)
  while flight:
    yield from flight.land()


@dataclasses.dataclass
class _Wanted:
  """A request under way: the memory that its boxes go into, and how many reads are to come."""

  request: Request
  arrays: list[np.ndarray]
  pending: int = 0
  all_started: bool = False


class _Flight:
  """Reads in flight. They end in any order: large ones, or those of a far server, late."""

  def __init__(self) -> None:
    self._flying: collections.deque[tuple[int, Any, _Wanted]] = collections.deque()
    self.nbytes = 0

  def __bool__(self) -> bool:
    return bool(self._flying)

  def start(self, nbytes: int, future: Any, wanted: _Wanted) -> None:
    wanted.pending += 1
    self.nbytes += nbytes
    self._flying.append((nbytes, future, wanted))

  def land(self, *, wait: bool = True) -> Iterator[tuple[Request, list[np.ndarray]]]:
    """The requests that are complete; waits for one read at least if asked to."""
    landed = 0
    while self._flying and (self._flying[0][1].done() or (wait and not landed)):
      if not self._is_done(self._flying[0][1]):
        # Another one may be there; looked for once in a while, since thousands may be in flight.
        flying = self._flying
        self._flying = collections.deque()
        for read in flying:
          if read[1].done():
            landed += 1
            yield from self._land(read)
          else:
            self._flying.append(read)
        continue
      landed += 1
      yield from self._land(self._flying.popleft())

  def _is_done(self, future: Any) -> bool:
    try:
      future.exception(timeout=max(_SWEEP_S, len(self._flying) * _SWEEP_S_A_READ))
    except TimeoutError:
      return False
    return True

  def _land(self, read: tuple[int, Any, _Wanted]) -> Iterator[tuple[Request, list[np.ndarray]]]:
    nbytes, future, wanted = read
    _result(future, wanted.request.name)
    self.nbytes -= nbytes
    wanted.pending -= 1
    if wanted.all_started and not wanted.pending:
      yield wanted.request, wanted.arrays


def read_packed(
  info: ocp.type_handlers.ParamInfo,
  index: packing.Index,
  boxes: Mapping[str, tuple[Box, ...]],
  context: ts.Context,
  window: int,
) -> Iterator[tuple[str, list[np.ndarray]]]:
  """Parts of arrays that lie in slabs, in the order in which they come; only chunks that hold some of them are read.

  Args:
    info: Orbax's description of any array of the checkpoint.
    index: where the arrays lie.
    boxes: the parts wanted, by array.
    context, window: as in `open_stores` and `read`.
  """
  wanted: dict[int, list[tuple[int, int, str]]] = {}
  for name, parts in boxes.items():
    found = False
    for process, start, stop in packing.needed(index[name], parts):
      wanted.setdefault(process, []).append((start, stop, name))
      found = True
    if not found:  # this process holds no part of it
      yield name, []
  if not wanted:
    return
  names = [packing.slab_name(process) for process in wanted]
  # A slab is zarr 2 in every item.
  infos = [info.replace(name=name, use_zarr3=False, raise_array_data_missing_error=True) for name in names]
  stores = open_stores(infos, [None] * len(infos), context)
  requests: dict[Request, int] = {}
  missing: collections.Counter[str] = collections.Counter()  # chunks that an array waits for
  waiting: dict[tuple[int, int], list[str]] = {}
  for process, name, store in zip(wanted, names, stores, strict=True):
    length = store.shape[0]
    chunk = _chunk_shape(store)[0] or length
    touched: dict[int, None] = {}
    for start, stop, array in wanted[process]:
      for c in range(start // chunk, -(-stop // chunk)):
        touched[c] = None
        waiting.setdefault((process, c * chunk), []).append(array)
        missing[array] += 1
    # A request each, in memory of its own: what comes first is used first, and given back once its arrays are gone.
    for c in sorted(touched):
      requests[Request(name, store, (((c * chunk, min((c + 1) * chunk, length)),),))] = process
  slabs = {process: packing.SlabBytes() for process in wanted}
  for request, (data,) in read(list(requests), window):
    process, start = requests[request], request.boxes[0][0][0]
    slabs[process].add(start, data)
    for name in waiting.pop((process, start)):
      missing[name] -= 1
      if not missing[name]:
        yield name, [packing.gather(index[name], box, slabs) for box in boxes[name]]


def to_jax(
  shape: tuple[int, ...], sharding: jax.sharding.Sharding, regions: dict[Box, np.ndarray], dtype: Any
) -> jax.Array:
  """A jax array from what this process read of it.

  Args:
    shape: of the whole array.
    sharding: where it goes.
    regions: `local_regions(sharding, shape)` and what they hold. The memory may become the array's own.
    dtype: of the array, for a process that holds no part of it.
  """

  def piece(index: tuple[slice, ...] | None) -> np.ndarray:
    assert index is not None  # it is for devices of other processes only
    box = box_of(index, shape)
    if (whole := regions.get(box)) is not None:
      return whole
    for outer, array in regions.items():
      if all(a <= c and d <= b for (a, b), (c, d) in zip(outer, box, strict=True)):
        return array[tuple(slice(c - a, d - a) for (a, _), (c, d) in zip(outer, box, strict=True))]
    raise AssertionError(f"{box} lies in none of {list(regions)}")

  return jax.make_array_from_callback(shape, sharding, piece, dtype=dtype)


def check_shape(name: str, saved: tuple[int, ...], wanted: tuple[int, ...] | None) -> None:
  """Refuses to pad or truncate.

  Raises:
    StructureMismatchError: naming the array.
  """
  if wanted is not None and tuple(wanted) != saved:
    raise StructureMismatchError(
      f"{name}: saved with shape {list(saved)}, asked for {list(wanted)}; pass a like= with the saved shape"
    )


def _chunk_shape(store: ts.TensorStore) -> Sequence[int | None]:
  return store.chunk_layout.read_chunk.shape or store.shape


def _result(future: Any, name: str) -> Any:
  try:
    return future.result()
  except (ValueError, OSError) as e:
    raise ValueError(f"{name}: {e}") from e
