"""Takes the small arrays out of a tree before Orbax saves it, and adds them to Orbax's description of the tree.

Orbax goes through a tree some twenty times per save, at 40 us a leaf in all. Arrays that go into slabs need none of
that: Orbax saves the rest, and its description of the tree is completed before the commit, so that the tree on disk is
the same whether or not a step is packed.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
from etils import epath

from ckpt_jax.layout import packing, shares
from ckpt_jax.layout.encoding import is_prng_key
from ckpt_jax.layout.structure import flatten, segment
from ckpt_jax.orbax import private
from ckpt_jax.orbax.format import ARRAY_TYPES, ITEM_METADATA, KEY, KEY_TYPE, KEYS, TREE, VALUE, VALUE_TYPE, WRITE_SHAPE

PyTree = Any
SEQUENCE, NAMES = 1, 2  # Orbax's KeyType


class Leaf(NamedTuple):
  """A leaf: the keys that lead to it, their kinds, and the shard shape of a packed one."""

  names: tuple[str, ...]
  kinds: tuple[int, ...]
  packed: tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Small:
  """The packed arrays of a tree, and the leaves of the whole tree, without values.

  Attributes:
    slab: the places of the pieces that this process writes.
    shardings: of the packed arrays, by their names in the database.
    leaves: those of the whole tree, in order.
  """

  slab: packing.Slab
  shardings: Mapping[str, jax.sharding.Sharding]
  leaves: Sequence[Leaf]

  @functools.cached_property
  def shardings_json(self) -> str:
    """The shardings as Orbax writes them."""
    return private.shardings_json(self.shardings)

  @functools.cached_property
  def entries(self) -> list[str]:
    """The JSON of each leaf in `_METADATA`, without the value of leaves that Orbax saves."""
    out = []
    for leaf in self.leaves:
      keys = [{KEY: name, KEY_TYPE: kind} for name, kind in zip(leaf.names, leaf.kinds, strict=True)]
      entry = f'{json.dumps(str(leaf.names))}: {{"{KEYS}": {json.dumps(keys)}, "{VALUE}": '
      if leaf.packed is not None:
        value = {VALUE_TYPE: ARRAY_TYPES[0], "skip_deserialize": False, WRITE_SHAPE: leaf.packed}
        entry += f"{json.dumps(value)}}}"
      out.append(entry)
    return out

  def complete(self, item: epath.Path) -> None:
    """Describes the whole tree in the item's `_METADATA`."""
    file = item / ITEM_METADATA
    data = json.loads(file.read_text())
    known = data.pop(TREE)
    tree = [
      entry if leaf.packed is not None else f"{entry}{json.dumps(known[str(leaf.names)][VALUE])}}}"
      for leaf, entry in zip(self.leaves, self.entries, strict=True)
    ]
    file.write_text(f'{{"{TREE}": {{{", ".join(tree)}}}, {json.dumps(data)[1:]}')


@dataclasses.dataclass(frozen=True)
class _Cut:
  small: Small
  numbers: Sequence[int]  # of the packed arrays among the leaves
  rest: Sequence[tuple[tuple[str, ...], int | None, Any]]  # keys, and the leaf's number or the empty node


def split(tree: PyTree) -> tuple[dict[str, Any], list[jax.Array], Small] | None:
  """Cuts a tree in two, in the same way on all processes.

  Returns:
    The tree for Orbax, as dicts of dicts; the arrays to pack; and their description. None if there are none to pack.
  """
  flat = flatten(tree)
  cut = flat.structure.once(_cut, tree)
  if cut is None:
    return None
  rest: dict[str, Any] = {}
  for names, number, empty in cut.rest:
    node = rest
    for name in names[:-1]:
      node = node.setdefault(name, {})
    node[names[-1]] = empty if number is None else flat.leaves[number]
  return rest, [flat.leaves[i] for i in cut.numbers], cut.small


def _cut(tree: PyTree) -> _Cut | None:
  paths = jax.tree_util.tree_flatten_with_path(
    tree, is_leaf=lambda x: not isinstance(x, jax.Array) and private.is_empty_node(x)
  )[0]
  small = [isinstance(leaf, jax.Array) and packing.is_small(leaf.nbytes) and not is_prng_key(leaf) for _, leaf in paths]
  if True in small and not any(
    isinstance(leaf, jax.Array) and not cut for (_, leaf), cut in zip(paths, small, strict=True)
  ):
    small[small.index(True)] = False  # Orbax saves no tree without leaves, and slabs are written together with arrays
  if True not in small:
    return None
  rest: list[tuple[tuple[str, ...], int | None, Any]] = []
  arrays: dict[str, jax.Array] = {}
  numbers, leaves = [], []
  number = 0
  for (path, leaf), cut in zip(paths, small, strict=True):
    names = tuple([segment(key) for key in path])
    kinds = tuple([_kind(key) for key in path])
    if cut:
      arrays[".".join(names)] = leaf
      numbers.append(number)
      leaves.append(Leaf(names, kinds, tuple(leaf.sharding.shard_shape(leaf.shape))))
    else:
      is_leaf = jax.tree_util.all_leaves([leaf])
      rest.append((names, number, None) if is_leaf else (names, None, copy.copy(leaf)))
      leaves.append(Leaf(names, kinds))
    number += jax.tree_util.all_leaves([leaf])
  found = zip(arrays.items(), shares.slices(list(arrays.values()), shares.WHOLE), strict=True)
  parts = {name: (x.dtype, x.shape, [box for box, _, _ in some.parts]) for (name, x), some in found}
  slab = packing.lay_out(jax.process_index(), parts)
  shardings = {name: array.sharding for name, array in arrays.items()}
  return _Cut(Small(slab, shardings, leaves), numbers, rest)


def _kind(key: Any) -> int:
  return SEQUENCE if isinstance(key, (jax.tree_util.SequenceKey, jax.tree_util.FlattenedIndexKey)) else NAMES
