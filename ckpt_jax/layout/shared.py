"""nnx modules and Variables with several places in a tree: stored once, and again one object when they are restored.

To jax a module is a tree. Tied embeddings, one Variable in two places, are two leaves to it, and two Variables once the
tree is rebuilt from leaves; these would then train apart.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

import jax

from ckpt_jax.layout.structure import Flat, Structure, children, flatten, node_types, rebuild

PyTree = Any
Places = tuple[str, ...]  # of one object: the path that stores it, and its other paths


def shared_nodes(tree: PyTree) -> list[Places]:
  """The places of each module and Variable that has several."""
  leaves, treedef = jax.tree.flatten(tree)
  return _duplicates(tree) if _is_repeated(leaves) and _has_nnx(treedef) else []


def stored_once(flat: Flat) -> Flat:
  """A state whose shared Variables are leaves at the first of their places alone."""
  structure = flat.structure
  if not _is_repeated(flat.leaves) or not structure.once(_holds_nnx, structure):
    return flat
  names = structure.names
  others = other_names(names, _duplicates(flat.tree))
  if not others or len(set(names)) < len(names):  # names that are not unique are refused later
    return flat
  values = {name: leaf for name, leaf in zip(names, flat.leaves, strict=True) if name not in others}
  return flatten(rebuild(flat.tree, values))


def other_names(names: Iterable[str], shared: Sequence[Places]) -> dict[str, str]:
  """For each leaf of a shared node that is not stored under its own name, the name under which it is."""
  first = {place: places[0] for places in shared for place in places[1:]}
  found = {}
  for name in names if first else ():
    stored = name
    while node := next((node for node in _and_above(stored) if node in first), None):
      stored = first[node] + stored[len(node) :]
    if stored != name:
      found[name] = stored
  return found


def reunited(tree: PyTree, shared: Sequence[Places]) -> PyTree:
  """A tree that was rebuilt from leaves, where each shared node is one object again; its modules change in place."""
  for first, *others in shared:
    for place in others:
      tree = _replaced(tree, place.split("/"), first.split("/"), tree)
  return tree


def _is_repeated(leaves: Sequence[Any]) -> bool:
  # A Variable in two places is two leaves that are the same array. Few states have such leaves: a quick way out.
  return len(set(map(id, leaves))) < len(leaves)


def _has_nnx(treedef: Any) -> bool:
  nnx = sys.modules.get("flax.nnx")  # where it was never imported there are no such nodes
  return nnx is not None and any(issubclass(kind, (nnx.Pytree, nnx.Variable)) for kind in node_types(treedef))


def _holds_nnx(structure: Structure) -> bool:
  return _has_nnx(structure.treedef)


def _duplicates(tree: PyTree) -> list[Places]:
  # Not nnx.find_duplicates, which sorts the keys of every node: other libraries' may not be ordered.
  from flax import nnx

  found: dict[int, tuple[Any, list[str]]] = {}  # with the node, since the id of one that is gone is used again

  def walk(node: PyTree, path: str) -> None:
    if isinstance(node, (nnx.Pytree, nnx.Variable)):
      places = found.setdefault(id(node), (node, []))[1]
      places.append(path)
      if len(places) > 1:
        return
    for key, child in children(node).items():
      walk(child, f"{path}/{key}" if path else key)

  walk(tree, "")
  return [tuple(places) for _, places in found.values() if len(places) > 1]


def _and_above(name: str) -> Iterable[str]:
  """The names of a leaf and of the nodes above it, longest first."""
  while name:
    yield name
    name = name.rpartition("/")[0]


def _at(tree: PyTree, path: Sequence[str]) -> Any:
  for key in path:
    tree = children(tree)[key]
  return tree


def _replaced(node: PyTree, path: Sequence[str], source: Sequence[str], tree: PyTree) -> PyTree:
  """`node` with what `tree` holds at `source` in the place of what it holds at `path`, if both are there."""
  from flax import nnx

  if not path:
    try:
      return _at(tree, source)
    except KeyError:  # only a part was restored
      return node
  below = children(node)
  if path[0] not in below:
    return node
  child = below[path[0]] = _replaced(below[path[0]], path[1:], source, tree)
  if isinstance(node, nnx.List):
    node[int(path[0])] = child
  elif isinstance(node, nnx.Pytree):
    setattr(node, path[0], child)
  else:
    treedef: Any = jax.tree.structure(node, is_leaf=lambda x: x is not node)
    return treedef.unflatten(below.values())
  return node
