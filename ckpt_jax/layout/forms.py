"""The names of a state's leaves, and the dicts and lists that stand for trees that Orbax cannot take.

Orbax names a leaf by the text of the keys that lead to it. Trees whose leaves would share a name, or whose names no
database holds, are refused. Nodes that Orbax cannot rebuild (nnx modules, `jax.tree_util.Partial`, nodes with keys of
their own) become dicts and lists with the same names.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import enum
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from ckpt_jax.errors import CheckpointError
from ckpt_jax.layout import keys, text
from ckpt_jax.layout.structure import Structure, node_types, path_name, segment
from ckpt_jax.orbax import private
from ckpt_jax.run import untrusted

PyTree = Any
Path = tuple[Any, ...]
_SEQUENCE = (jax.tree_util.SequenceKey, jax.tree_util.FlattenedIndexKey)
_NAMES = (jax.tree_util.DictKey, jax.tree_util.GetAttrKey)
_CONTAINERS = (Mapping, list, tuple, type(None))  # a defaultdict, a namedtuple, Flax's FrozenDict
_MAX_NAME_NBYTES = 60_000  # OCDBT holds keys of 65,535 bytes, those of chunks among them
_MAX_SHOWN, _MAX_SHOWN_NAME = 40, 200


@dataclasses.dataclass(frozen=True)
class Form:
  """A tree as dicts and lists.

  Attributes:
    treedef: structure of the dicts and lists.
    order: the number in the state of each of its leaves.
  """

  treedef: Any
  order: tuple[int, ...]

  def of(self, leaves: Sequence[Any]) -> PyTree:
    """The form of a state with these leaves."""
    return self.treedef.unflatten([leaves[i] for i in self.order])


def form_of(structure: Structure, tree: PyTree) -> Form | None:
  """The form of a tree for Orbax; None if Orbax can take the tree itself.

  Raises:
    CheckpointError: naming the leaves whose names cannot be stored.
  """
  # Empty nodes too: Orbax describes them, and they have keys.
  rows = jax.tree_util.tree_flatten_with_path(
    tree, is_leaf=lambda x: not isinstance(x, jax.Array) and private.is_empty_node(x)
  )[0]
  if not structure.paths and len(rows) == 1 and not rows[0][0]:
    raise CheckpointError(
      f"cannot save this state; nothing was written: it is {tree!r:.60}, without a leaf. Save at least one number, "
      "such as {'step': 0}; extras= and metrics= go beside it",
      topic="state-cannot-be-saved",
    )
  names = [[segment(key) for key in path] for path, _ in rows]
  _refuse(
    f"{shown('/'.join(name))}: {problem}"
    for (path, _), name in zip(rows, names, strict=True)
    if (problem := _unstorable(path, name))
  )
  numbers = iter(range(len(structure.paths)))
  top, stored = _Node(None), []
  problems: list[str] = []
  for (path, node), name in zip(rows, names, strict=True):
    end = _plain_empty(node)
    if structure.paths and _is_inner(path, node):
      continue
    if jax.tree_util.all_leaves([node]):
      end = _Leaf(next(numbers))
      stored.append(".".join(name))
    problems += top.put(path, name, end)
  _refuse(problems)
  _refuse(shared_names(structure.paths, structure.names))
  _refuse(shared_names(structure.paths, stored))
  _refuse(_displaced(structure, stored))
  if _is_rebuilt(structure) and all(node.is_describable for node in top.nodes()):
    return None
  leaves, treedef = jax.tree.flatten(top.built())
  return Form(treedef, tuple(leaf.number for leaf in leaves))


def _refuse(problems: Iterable[str]) -> None:
  if found := list(problems):
    raise refusal(found)


def refusal(problems: Sequence[str]) -> CheckpointError:
  """The error for a state that cannot be saved, from lines `leaf: problem`."""
  lines = list(problems[:_MAX_SHOWN])
  if len(problems) > len(lines):
    lines.append(f"... and {len(problems) - len(lines)} more")
  return CheckpointError(
    "cannot save this state; nothing was written:\n  " + "\n  ".join(lines), topic="state-cannot-be-saved"
  )


def shown(name: str) -> str:
  """The path of a leaf in a message."""
  printable = name if name.isprintable() else repr(name)[1:-1]  # a name may hold what no terminal can
  return (printable if len(name) <= _MAX_SHOWN_NAME else f"{printable[:_MAX_SHOWN_NAME]}...") or "(the state itself)"


def why_not_flat(tree: PyTree) -> str | None:
  """The node that jax cannot flatten, and why: a dict with keys that cannot be sorted, or the node's own error."""
  try:
    jax.tree.flatten(tree)
  except Exception as e:
    return _not_flat(tree, (), e)
  return None


def _not_flat(node: PyTree, path: Path, error: Exception) -> str:
  children = []
  with contextlib.suppress(Exception):
    children = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)[0]
  for keys_, child in children:
    try:
      jax.tree.flatten(child)
    except Exception as e:
      return _not_flat(child, (*path, *keys_), e)
  why = f"jax cannot flatten this node ({type(error).__name__}: {' '.join(str(error).split())})"
  if isinstance(node, dict):
    kinds = sorted({type(key).__name__ for key in node})
    why = f"jax cannot order the keys of this dict, which are of type {' and '.join(kinds)}. Use str keys"
  return f"{shown(path_name(path))}: {why}"


# -- names that cannot be stored


def shared_names(leaves: Sequence[Path], names: Sequence[str]) -> list[str]:
  """A line for each name of several leaves: `{"a": {"b": 1}, "a/b": 2}`."""
  if len(set(names)) == len(names):
    return []
  called: dict[str, list[Path]] = collections.defaultdict(list)
  for name, path in zip(names, leaves, strict=True):
    called[name].append(path)
  return [_alike(name, paths) for name, paths in called.items() if len(paths) > 1]


def _alike(name: str, paths: Iterable[Path]) -> str:
  places = " and ".join([shown(jax.tree_util.keystr(path)) for path in paths])
  return f"{shown(name)}: is the name of {places}. Rename one of the keys"


def _displaced(structure: Structure, stored: Sequence[str]) -> list[str]:
  """A line for each leaf that would be stored in the place of another: an array `a/` beside an array `a`."""
  is_text = [isinstance(kind[0], type) and issubclass(kind[0], str) for kind in structure.kinds]
  texts = text.collisions(name for name, is_one in zip(stored, is_text, strict=True) if is_one)
  arrays = keys.collisions(name for name, is_one in zip(stored, is_text, strict=True) if not is_one)
  return [
    f"{shown(name)}: would be stored in the place of {shown(other)!r}. Rename one of the keys"
    for name, place, is_one in zip(structure.names, stored, is_text, strict=True)
    if (other := (texts if is_one else arrays).get(place)) is not None
  ]


def _unstorable(path: Path, names: Sequence[str]) -> str | None:
  # A name that `untrusted` refuses to read must not be written.
  if len(path) > untrusted.MAX_DEPTH:
    return f"nested {len(path)} deep; {untrusted.MAX_DEPTH} is the limit"
  stored = ".".join(names)
  if problem := keys.problem(stored):
    return problem
  for key, name in zip(path, names, strict=True):
    if problem := _bad_name(name) or _unstable(key, name):
      return problem
  if len(stored) > _MAX_NAME_NBYTES // 4 and (n := len(stored.encode())) > _MAX_NAME_NBYTES:
    return f"its name has {n} bytes; {_MAX_NAME_NBYTES} is the limit. Shorten the keys"
  return None


_bad_name = functools.lru_cache(maxsize=4096)(untrusted.check_name)


def _unstable(key: Any, name: str) -> str | None:
  """Why the text of a key differs between processes; None if it does not."""
  if type(key) is jax.tree_util.DictKey:
    key = key.key
  if key is None or isinstance(key, (str, bytes, int, float, complex, enum.Enum, np.generic, *_SEQUENCE, *_NAMES)):
    return None
  if isinstance(key, tuple):
    return next((p for part in key if (p := _unstable(part, name))), None)
  if isinstance(key, (set, frozenset)) or " at 0x" in name:
    return f"the text of the key {name:.80} is another one in each process. Use a str or an int as key"
  return None


# -- trees that Orbax cannot take


class _Leaf:
  """In place of a leaf."""

  def __init__(self, number: int):
    self.number = number


_NOTHING = object()


class _Node:
  """An inner node, with its children by name, or an end: a leaf or an empty node."""

  def __init__(self, key: Any):
    self.key = key
    self.children: dict[str, _Node] = {}
    self.end: Any = _NOTHING

  def put(self, path: Path, names: Sequence[str], end: Any) -> list[str]:
    """Adds an end; returns a line if two nodes share a name."""
    node = self
    for i, (key, name) in enumerate(zip(path, names, strict=True)):
      child = node.children.get(name)
      if child is None:
        child = node.children[name] = _Node(key)
      elif child.end is not _NOTHING or (child.key is not key and child.key != key):
        return [_alike(path_name(path[: i + 1]), [(*path[:i], child.key), path[: i + 1]])]
      node = child
    if node.children:
      return [_alike(path_name(path), [path, path])]
    node.end = end
    return []

  def nodes(self) -> Iterator[_Node]:
    """The inner nodes."""
    rest = [self]
    while rest:
      node = rest.pop()
      if node.end is _NOTHING:
        yield node
        rest += node.children.values()

  @property
  def is_sequence(self) -> bool:
    """Whether the keys are 0, 1, 2 ... of a sequence."""
    found = [child.key for child in self.children.values()]
    return all(isinstance(key, _SEQUENCE) and int(segment(key)) == i for i, key in enumerate(found))

  @property
  def is_describable(self) -> bool:
    """Whether Orbax's metadata can describe the keys."""
    return all(isinstance(child.key, _NAMES) for child in self.children.values()) or self.is_sequence

  def built(self) -> Any:
    """The node as a dict or list."""
    if self.end is not _NOTHING:
      return self.end
    children = {name: child.built() for name, child in self.children.items()}
    return list(children.values()) if self.is_sequence else children


def _is_rebuilt(structure: Structure) -> bool:
  """Whether the tree can be rebuilt with other objects for leaves, as Orbax does."""
  if not all(issubclass(kind, _CONTAINERS) or dataclasses.is_dataclass(kind) for kind in node_types(structure.treedef)):
    return False
  places = [_Leaf(i) for i in range(len(structure.paths))]
  try:
    again, treedef = jax.tree.flatten(structure.treedef.unflatten(places))
    return bool(treedef == structure.treedef) and all(a is b for a, b in zip(again, places, strict=True))
  except Exception:  # a dataclass that checks its fields
    return False


def _is_inner(path: Path, node: Any) -> bool:
  """Whether a node is what an object keeps for itself, such as an nnx module's `_pytree__state`: it holds no leaf."""
  is_attribute = bool(path) and isinstance(path[-1], jax.tree_util.GetAttrKey)
  return is_attribute and not isinstance(node, _CONTAINERS) and not jax.tree_util.all_leaves([node])


def _plain_empty(node: Any) -> Any:
  """The plain container that stands for a node without leaves."""
  for kind, empty in ((Mapping, {}), (list, [])):
    if isinstance(node, kind):
      return empty
  return () if isinstance(node, tuple) and not hasattr(node, "_fields") else None
