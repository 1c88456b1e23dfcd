"""Takes the small arrays out of a tree before Orbax is given it, and describes them in what Orbax wrote.

Orbax goes through a tree some twenty times for each save, at 40 us a leaf in all. Arrays that go into slabs need none
of it: Orbax saves what is left, and its description of the tree is completed before the commit, so that on disk it is
the same whether or not a step is packed.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import Any, NamedTuple

import jax
from etils import epath

from ckpt_jax import orbax_private, run
from ckpt_jax.layout import packing
from ckpt_jax.layout.encoding import is_prng_key, segment

PyTree = Any
SEQUENCE, NAMES = 1, 2  # Orbax's KeyType


class Leaf(NamedTuple):
  """A leaf: the names on the way to it, the kind of node that each is in, and of a small one its shard shape."""

  names: tuple[str, ...]
  kinds: tuple[int, ...]
  packed: tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Description:
  """The leaves of a whole tree, in its order, with none of their values."""

  leaves: tuple[Leaf, ...]

  @functools.cached_property
  def entries(self) -> list[str]:
    """The JSON of each leaf in `_METADATA`, up to the value of those that are not small."""
    out = []
    for leaf in self.leaves:
      keys = [{"key": name, "key_type": kind} for name, kind in zip(leaf.names, leaf.kinds, strict=True)]
      head = f'{json.dumps(str(leaf.names))}: {{"key_metadata": {json.dumps(keys)}, "value_metadata": '
      shape = None if leaf.packed is None else list(leaf.packed)
      value = f'{{"value_type": "jax.Array", "skip_deserialize": false, "write_shape": {shape}}}}}'
      out.append(head if leaf.packed is None else head + value)
    return out

  def complete(self, item: epath.Path) -> None:
    """Describes the whole tree in the item's `_METADATA`."""
    file = item / run.ITEM_METADATA
    data = json.loads(file.read_text())
    known = data.pop("tree_metadata")
    tree = [
      entry if leaf.packed is not None else f"{entry}{json.dumps(known[str(leaf.names)]['value_metadata'])}}}"
      for leaf, entry in zip(self.leaves, self.entries, strict=True)
    ]
    file.write_text(f'{{"tree_metadata": {{{", ".join(tree)}}}, {json.dumps(data)[1:]}')


def split(tree: PyTree) -> tuple[dict[str, Any], dict[str, jax.Array], Description] | None:
  """Cuts a tree in two. All processes of a job cut alike.

  Returns:
    What Orbax is to save, as dicts of dicts; the small arrays, by the names that Orbax would give them; and the
    description of both. None if there is nothing to cut off.
  """
  paths = jax.tree_util.tree_flatten_with_path(
    tree, is_leaf=lambda x: not isinstance(x, jax.Array) and orbax_private.is_empty_node(x)
  )[0]
  small = [isinstance(leaf, jax.Array) and packing.is_small(leaf.nbytes) and not is_prng_key(leaf) for _, leaf in paths]
  if True in small and not any(
    isinstance(leaf, jax.Array) and not cut for (_, leaf), cut in zip(paths, small, strict=True)
  ):
    small[small.index(True)] = False  # Orbax saves no tree without leaves, and slabs are written together with arrays
  if True not in small:
    return None
  rest: dict[str, Any] = {}
  arrays: dict[str, jax.Array] = {}
  leaves = []
  for (path, leaf), cut in zip(paths, small, strict=True):
    names = tuple([segment(key) for key in path])
    kinds = tuple([_kind(key) for key in path])
    if cut:
      arrays[".".join(names)] = leaf
      leaves.append(Leaf(names, kinds, tuple(leaf.sharding.shard_shape(leaf.shape))))
      continue
    leaves.append(Leaf(names, kinds))
    node = rest
    for name in names[:-1]:
      node = node.setdefault(name, {})
    node[names[-1]] = leaf
  return rest, arrays, Description(tuple(leaves))


def _kind(key: Any) -> int:
  return SEQUENCE if isinstance(key, (jax.tree_util.SequenceKey, jax.tree_util.FlattenedIndexKey)) else NAMES
