"""The structure of a tree apart from its values, shared by all trees that are alike.

A training loop saves leaves of the same names, shapes and shardings at every step, and Python takes some microseconds
to answer a question about a leaf: its name, its size, whether it can be stored, which process writes it. For 5,000
arrays that was most of a save's blocking time. Answers that do not depend on values are computed once.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
import threading
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import jax
import numpy as np

PyTree = Any
_T = TypeVar("_T")
_P = ParamSpec("_P")
_REMEMBERED = 8  # the states, and their encoded forms, of a few checkpointers

_lock = threading.Lock()
_known: list[Structure] = []  # the most recently used first


class Structure:
  """The leaves of a tree without their values. Compared by identity; it holds no array.

  Attributes:
    treedef: of the tree.
    paths: the key path of each leaf.
    kinds: `(aval, sharding)` of each jax array; of other leaves the type, and shape, dtype and sharding if any.
  """

  def __init__(self, treedef: Any, paths: Sequence[tuple[Any, ...]], kinds: Sequence[tuple[Any, ...]]):
    self.treedef = treedef
    self.paths = paths
    self.kinds = kinds
    self._answers: dict[Any, Any] = {}

  @functools.cached_property
  def abstract(self) -> list[Any]:
    """Shape, dtype and sharding of each leaf that has a shape and a dtype, and None for the others.

    A `jax.ShapeDtypeStruct` for a jax array, a numpy array of no memory for a numpy array or scalar.
    """
    return [_abstract(*kind) for kind in self.kinds]

  @functools.cached_property
  def names(self) -> list[str]:
    """The name of each leaf."""
    return [path_name(path) for path in self.paths]

  def once(self, question: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """`question(*args)`, computed the first time only; the answer must follow from the structure alone."""
    if question not in self._answers:
      self._answers[question] = question(*args, **kwargs)
    return self._answers[question]


@dataclasses.dataclass(frozen=True, eq=False)
class Flat:
  """A flattened tree. Functions that take a state take this in its place, so that a save flattens its state once."""

  tree: PyTree
  structure: Structure
  leaves: list[Any]


def flatten(tree: PyTree | Flat) -> Flat:
  """A tree with its leaves and its structure, which is the same object for trees that are alike."""
  if isinstance(tree, Flat):
    return tree
  leaves, treedef = jax.tree.flatten(tree)
  kinds = list(map(_kind, leaves))
  with _lock:
    for i, known in enumerate(_known):
      if _alike(known.treedef, treedef) and known.kinds == kinds:
        known.kinds = kinds  # the next tree may hold the same arrays, whose kinds are compared by identity then
        _known.insert(0, _known.pop(i))
        return Flat(tree, known, leaves)
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]
    _known.insert(0, Structure(treedef, paths, kinds))
    del _known[_REMEMBERED:]
    return Flat(tree, _known[0], leaves)


def path_name(path: tuple[Any, ...]) -> str:
  """`params/layer_3/kernel` for a jax key path, the way that Orbax names the leaf."""
  return "/".join([segment(key) for key in path])


def segment(key: Any) -> str:
  """One key of a path as a name."""
  if type(key) is jax.tree_util.DictKey:  # most of them, in trees of thousands of leaves
    return str(key.key)
  for attribute in ("key", "idx", "name"):
    if hasattr(key, attribute):
      return str(getattr(key, attribute))
  return str(key)  # a node may be registered with keys of any kind


def node_types(treedef: Any) -> set[type]:
  """The types of the nodes of a tree."""
  found, rest = set(), [treedef]
  while rest:
    node = rest.pop()
    if (data := node.node_data()) is not None:
      found.add(data[0])
      rest += node.children()
  return found


def children(node: PyTree) -> dict[str, Any]:
  """What is right below a node, by name; empty for a leaf."""
  found = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)[0]
  return {segment(path[0]): child for path, child in found if path}


def rebuild(tree: PyTree, values: dict[str, Any]) -> PyTree:
  """`tree` with the leaves of `values` (by path) in their places, and without the leaves that `values` lacks.

  A node all of whose leaves are there keeps its type. One that lacks some comes back as a dict of those that it has,
  by name or position; a node without any is left out.
  """
  found = _rebuilt(tree, "", values)
  return {} if found is _NOTHING else found


_NOTHING: Any = object()


def _rebuilt(node: PyTree, prefix: str, values: dict[str, Any]) -> PyTree:
  leaves, structure = jax.tree_util.tree_flatten_with_path(node)
  names = [prefix + path_name(path) if path else prefix.removesuffix("/") for path, _ in leaves]
  there = [name in values for name in names]
  if all(there) and (names or not prefix):
    treedef: Any = structure  # jax's stubs do not know its methods
    return treedef.unflatten([values[name] for name in names])
  if not any(there):
    return _NOTHING
  out: dict[str, Any] = {}
  for name, child in children(node).items():
    if (rebuilt := _rebuilt(child, f"{prefix}{name}/", values)) is not _NOTHING:
      out[name] = rebuilt
  return out


def _abstract(kind: Any, *rest: Any) -> Any:
  if len(rest) == 1:
    return jax.ShapeDtypeStruct(kind.shape, kind.dtype, sharding=rest[0], weak_type=kind.weak_type)
  shape, dtype, sharding = rest
  if shape is None or dtype is None:
    return None
  if issubclass(kind, (np.ndarray, np.generic)):
    return np.broadcast_to(np.empty((), dtype), shape)
  return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def _alike(one: Any, other: Any) -> bool:
  try:
    return bool(one == other)
  except Exception as e:  # a node's static data may hold an array, which has no single truth value
    if isinstance(e.__cause__, KeyboardInterrupt):  # which jax turns into a ValueError
      raise KeyboardInterrupt from e
    return False


_array_kind = operator.attrgetter("aval", "sharding")


def _kind(leaf: Any) -> tuple[Any, ...]:
  try:
    return _array_kind(leaf)
  except AttributeError:
    return type(leaf), getattr(leaf, "shape", None), getattr(leaf, "dtype", None), getattr(leaf, "sharding", None)
