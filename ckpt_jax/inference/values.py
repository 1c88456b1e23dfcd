"""The values of leaves on their way into an export: read ahead, checked, cast or quantised, in blocks of whole rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from ckpt_jax.errors import CheckpointError, CorruptCheckpointError
from ckpt_jax.inference.cast import Loss, cast
from ckpt_jax.inference.files import Leaf
from ckpt_jax.inference.options import Options
from ckpt_jax.inference.quantize import Magnitudes, Scheme, packed, quantized
from ckpt_jax.integrity import fingerprint, record, sums
from ckpt_jax.layout.sharding import Box, whole_box, within
from ckpt_jax.restore import stream
from ckpt_jax.restore.step import Step

Take = Callable[[np.ndarray], None]


class Values:
  """The values of leaves, one leaf after the other, read ahead across leaves and compared with the save's sums."""

  def __init__(self, source: Step, leaves: Sequence[Leaf], options: Options):
    """Takes the leaves of a step in the order in which they will be converted; begins to read with the first."""
    self._options = options
    self._record = record.read_record(source.directory, source.item_name, source.ours)
    self._where = str(source)
    groups = stream.parts(source, [leaf.source for leaf in leaves], options.memory // 8)
    boxes: dict[str, list[list[stream.Part]]] = {}
    for group in groups:
      boxes.setdefault(group[0].plan.name, []).append(group)
    # Scales are known only after all of a matrix was seen: one that is read in several parts is read twice.
    self._twice = {leaf.source for leaf in leaves if leaf.scheme and len(boxes.get(leaf.source, ())) > 1}
    order = [group for name, own in boxes.items() for group in (own * 2 if name in self._twice else own)]
    self._total = sum(part.nbytes for group in order for part in group)
    self._done = 0
    self._stream = stream.stream(source, order) if order else iter(())
    self._parts = self._flat()

  def _flat(self) -> Iterator[tuple[stream.Part, Any]]:
    for group, values in self._stream:
      yield from zip(group, values, strict=True)
      self._done += sum(part.nbytes for part in group)
      self._options.progress(self._done, self._total)

  def close(self) -> None:
    """Ends the reading."""
    self._parts.close()  # type: ignore[attr-defined]
    if hasattr(self._stream, "close"):
      self._stream.close()

  def convert(self, leaf: Leaf, take: Take) -> Loss:
    """Gives `take` the bytes of the arrays that the next leaf becomes, in order.

    Raises:
      CorruptCheckpointError: if it is not what was saved.
      CheckpointError: if it has a number that the export cannot hold.
    """
    if leaf.scheme is not None:
      return self._quantize(leaf, leaf.scheme, take)
    loss = Loss()
    rows = _Rows(leaf.shape, leaf.dtype, (lambda v: take(v.T)) if leaf.transposed else take, whole=leaf.transposed)
    for box, values in self._of(leaf):
      converted, lost = self._cast(leaf, values)
      loss.add(lost)
      rows.put(box, converted)
    return loss

  def _quantize(self, leaf: Leaf, scheme: Scheme, take: Take) -> Loss:
    loss = Loss()
    seen = Magnitudes(scheme, leaf.shape)
    only: list[tuple[Box, np.ndarray]] = []
    for box, values in self._of(leaf):
      if not np.isfinite(values).all():
        problem = "has numbers that are not finite, which integers cannot hold"
        raise CheckpointError(f"{leaf.path}: {problem}; pass keep={leaf.path!r}", topic="export-and-safetensors")
      seen.see(values, box)
      only = [] if leaf.source in self._twice else [(box, values)]
    scales = seen.scales()
    rows = _Rows(leaf.shape, np.dtype(np.int8), take if scheme.bits == 8 else lambda v: take(packed(v)), whole=False)
    for box, values in only or self._of(leaf, again=True):
      integers, lost = quantized(values, box, scheme, scales)
      loss.add(lost)
      rows.put(box, integers)
    take(scales)
    return loss

  def _cast(self, leaf: Leaf, values: np.ndarray) -> tuple[np.ndarray, Loss]:
    if values.dtype == leaf.dtype or not jnp.issubdtype(leaf.dtype, jnp.floating):
      return values, Loss()
    converted, lost = cast(values, leaf.dtype)
    if lost.overflowed and not self._options.overflow:
      raise CheckpointError(
        f"{leaf.path}: {lost.overflowed} numbers up to {lost.magnitude:.4g} are too large for {leaf.dtype.name} and "
        "would become infinite; export to bfloat16, or pass overflow=True (--overflow)",
        topic="export-and-safetensors",
      )
    return converted, lost

  def _of(self, leaf: Leaf, *, again: bool = False) -> Iterator[tuple[Box, np.ndarray]]:
    """The parts of a leaf, each with its box; after the last the sum is compared with that of the save."""
    saved = None if self._record is None or again else self._record.leaves.get(leaf.source)
    tally, covered = sums.Tally(), 0
    while covered < max(1, math.prod(leaf.shape)):
      part, value = next(self._parts)
      assert part.plan.name == leaf.source
      array = np.asarray(value)
      box = part.box or whole_box(leaf.shape)
      if saved is not None and part.plan.scalar is None:
        tally.add(fingerprint.tally_of_box(array, box, leaf.shape))
      covered += max(1, array.size)
      yield box, array
    if saved is not None and part.plan.scalar is None and tally.total != saved.total:
      raise CorruptCheckpointError(f"{self._where}: {leaf.source} is not what was saved")


class _Rows:
  """Puts boxes of an array, which come in C order, together to blocks of whole rows.

  Rows that are cut are held until they are whole: one band of chunks, or all of the array if `whole` is set.
  """

  def __init__(self, shape: tuple[int, ...], dtype: np.dtype, emit: Take, whole: bool):
    self._shape, self._dtype, self._emit, self._whole = shape, dtype, emit, whole
    self._band: tuple[Box, np.ndarray] | None = None
    self._missing = 0

  def put(self, box: Box, values: np.ndarray) -> None:
    """Takes the next box."""
    rows = whole_box(self._shape) if self._whole else (*box[:1], *whole_box(self._shape[1:]))
    if box == rows:
      self._emit(values)
      return
    if self._band is None:
      self._band = rows, np.empty([b - a for a, b in rows], self._dtype)
      self._missing = self._band[1].size
    outer, band = self._band
    band[within(box, outer)] = values
    self._missing -= values.size
    if not self._missing:
      self._band = None
      self._emit(band)
