"""The values of a step, a bounded part at a time, in host memory: what checks, compares and exports whole steps reads.

No devices are needed. Groups follow from the metadata alone, so that an interrupted job finds the same ones again.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from ckpt_jax.job.threads import Worker
from ckpt_jax.layout.sharding import Box, chunk_nbytes
from ckpt_jax.restore.leaf import LeafPlan
from ckpt_jax.restore.step import Step

GROUP_NBYTES = 64 << 20
_GROUP_LEAVES = 256


@dataclasses.dataclass(frozen=True)
class Part:
  """A leaf, or a box of one that is too large to be read at once.

  Attributes:
    plan: of the leaf; `plan.name` is its path, `plan.shape` that of its stored form.
    box: of the stored form; None for the whole leaf.
  """

  plan: LeafPlan
  box: Box | None = None

  @property
  def nbytes(self) -> int:
    """Bytes that are read."""
    if self.box is None or self.plan.chunk_shape is None:
      return self.plan.nbytes
    return chunk_nbytes(self.box, self.plan.chunk_shape, self.plan.dtype.itemsize)


def parts(
  step: Step, names: Iterable[str] | None = None, nbytes: int = GROUP_NBYTES, chunks_of: Step | None = None
) -> list[list[Part]]:
  """Divides leaves (default: all) into groups to be read one after the other, in the order of the tree.

  A group has at most 256 leaves and about `nbytes` bytes. A larger leaf is cut between its chunks, one group for each
  part, in C order; a chunk is never cut, since it is read whole, nor is a packed leaf. Nor are the chunks of
  `chunks_of`, another step with these leaves, where they are multiples of those.
  """
  groups: list[list[Part]] = []
  open_group, room = False, 0
  for plan in [step.plan(name) for name in (step.meta if names is None else names)]:
    if plan.nbytes > nbytes and plan.chunk_shape and step.is_in_chunks(plan.name):
      chunk = plan.chunk_shape
      if chunks_of is not None:
        chunk = tuple(map(max, chunk, chunks_of.plan(plan.name).chunk_shape or chunk))
      groups += [[Part(plan, box)] for box in _boxes(plan.shape, chunk, plan.dtype.itemsize, nbytes)]
      open_group = False
    elif open_group and plan.nbytes <= room and len(groups[-1]) < _GROUP_LEAVES:
      groups[-1].append(Part(plan))
      room -= plan.nbytes
    else:
      groups.append([Part(plan)])
      open_group, room = True, nbytes - plan.nbytes
  return groups


def _boxes(shape: tuple[int, ...], chunk: tuple[int, ...], itemsize: int, nbytes: int) -> Iterator[Box]:
  """Boxes of whole chunks in C order that cover an array: of its last axes as much as fits, so bands of whole rows."""
  size = [min(c, n) for c, n in zip(chunk, shape, strict=True)]
  for axis in reversed(range(len(shape))):
    more = max(1, nbytes // (math.prod(size) * itemsize))
    size[axis] = min(shape[axis], size[axis] * more)
  yield from itertools.product(
    *([(a, min(a + s, n)) for a in range(0, n, s)] for n, s in zip(shape, size, strict=True))
  )


def read(step: Step, group: Sequence[Part]) -> list[Any]:
  """The values of a group, in order: numpy arrays of the leaves' dtypes, Python numbers and text.

  A typed PRNG key comes as its words: uint32, one axis more.

  Raises:
    StorageError, CorruptCheckpointError, CheckpointError: as `Step.read` does.
  """
  whole = step.read([(part.plan, None) for part in group if part.box is None])
  stored = [whole[p.plan.name] if p.box is None else step.read_box(p.plan.name, p.box) for p in group]
  return [_decoded(part.plan, value) for part, value in zip(group, stored, strict=True)]


def _decoded(plan: LeafPlan, value: Any) -> Any:
  return value if plan.note and plan.note["kind"] == "prng_key" else plan.decode(value)


def stream(step: Step, groups: Iterable[Sequence[Part]]) -> Iterator[tuple[Sequence[Part], list[Any]]]:
  """Groups with their values; one is read ahead while the caller works on another. Raises what `read` raises."""
  worker = Worker("ckpt_jax-stream")
  try:
    ahead = None
    for group, following in itertools.pairwise([*groups, None]):
      assert group is not None
      values = (ahead or worker.submit(functools.partial(read, step, group))).result()
      ahead = None if following is None else worker.submit(functools.partial(read, step, following))
      yield group, values
      del values
  finally:
    worker.close()
