"""Guesses, from names, shapes and dtypes, at why `like` and a checkpoint differ."""

from __future__ import annotations

import collections
import difflib
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from ckpt_jax.config.units import count

_CONSIDERED = 200  # leaves that are compared with each other by name; a message needs no more
_MANY = 6  # hints after which no more renamings are listed
_VOCABULARY = re.compile(r"embed|vocab|lm_head|logits|wte|token", re.IGNORECASE)
_OPTIMIZER = re.compile(r"^opt", re.IGNORECASE)


class ShapeDtype(NamedTuple):
  """Shape and dtype of a leaf; `dtype` is numpy's name, a Python type's, or `key<impl>`."""

  shape: tuple[int, ...]
  dtype: str


Leaves = Mapping[str, ShapeDtype]


def nearest(name: str, leaf: ShapeDtype, candidates: Leaves) -> str | None:
  """The candidate that `name` may be called by; one of the same shape and dtype rather than one of a similar name."""
  names = list(candidates)
  if len(names) > _CONSIDERED:
    last = name.rsplit("/", 1)[-1]
    names = [n for n in names if candidates[n] == leaf or n.endswith(last)][:_CONSIDERED]
  best, best_score = None, 0.6
  for other in names:
    score = difflib.SequenceMatcher(None, name, other).ratio() + (0.2 if candidates[other] == leaf else -0.1)
    if score > best_score:
      best, best_score = other, score
  return best


def explain(like: Leaves, saved: Leaves, casts_allowed: bool = False) -> list[str]:
  """Guesses, the most likely first; empty if nothing stands out."""
  guesses = _Guesses(like, saved)
  if not guesses.another_root():
    guesses.leaf_or_subtree()
    guesses.scanned()
    guesses.layer_count()
    guesses.renamed()
    guesses.new_leaves()
  guesses.shapes()
  guesses.dtypes(casts_allowed)
  guesses.one_root_only()
  return guesses.hints


def _some(names: Iterable[str]) -> str:
  names = [name or "(the state itself)" for name in names]
  return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _root(name: str) -> str:
  return name.split("/", 1)[0]


def _nodes(name: str) -> list[str]:
  """The nodes above a leaf, the top (empty) first."""
  parts = name.split("/")
  return ["/".join(parts[:depth]) for depth in range(len(parts))]


class _Guesses:
  """What was guessed so far, in `hints`, and the missing and extra leaves that it explains."""

  def __init__(self, like: Leaves, saved: Leaves):
    self.like, self.saved = like, saved
    self.missing = {n: leaf for n, leaf in like.items() if n not in saved}
    self.extra = {n: leaf for n, leaf in saved.items() if n not in like}
    self.differing = {n: (saved[n], leaf) for n, leaf in like.items() if n in saved and saved[n] != leaf}
    self.explained: set[str] = set()
    self.hints: list[str] = []

  def _sides(self) -> list[tuple[Leaves, str, Leaves, str]]:
    ours, theirs = (self.missing, "like"), (self.extra, "the checkpoint")
    return [(*ours, *theirs), (*theirs, *ours)]

  def another_root(self) -> bool:
    """One of the two has one level more at the top."""
    if not self.missing:
      return False
    for root in sorted({_root(n) for n in self.extra if "/" in n}):
      if all(f"{root}/{n}" in self.saved for n in self.missing):
        self.hints.append(
          f"the checkpoint has all of these below {root}/: pass like={{{root!r}: ...}}, and only={root!r} if the rest "
          "of it is not wanted"
        )
        return True
    roots = {_root(n) for n in self.missing}
    if len(roots) == 1 and all(n.partition("/")[2] in self.extra for n in self.missing):
      self.hints.append(f"like has one level more than the checkpoint: its {roots.pop()}/ is the top of what was saved")
      return True
    return False

  def leaf_or_subtree(self) -> None:
    """A leaf on one side, a subtree on the other: another type of node."""
    for leaves, mine, others, theirs in self._sides():
      below = collections.defaultdict(list)
      for name in others:
        for node in _nodes(name)[1:]:
          below[node].append(name)
      for name in [n for n in leaves if n in below]:
        n = count(len(below[name]), "leaf", "leaves")
        self.explained |= {name, *below[name]}
        self.hints.append(
          f"{mine} has a leaf at {name or 'the top'}, {theirs} a subtree of {n} ({_some(below[name])}): another type "
          "of tree there?"
        )

  def scanned(self) -> None:
    """Separate layers (params/layer_0/kernel) on one side, one array with a leading axis on the other."""
    for whole, mine, apart, theirs in self._sides():
      advice = (
        "(unrolled against scanned): restore without like=, stack the layers with jnp.stack, and save that"
        if mine == "like"
        else "(scanned against unrolled): restore with the stacked like=, then take the layers apart"
      )
      by_kind = collections.defaultdict(list)
      for name, leaf in whole.items():
        by_kind[leaf].append(name)
      found: dict[str, None] = {}
      for (node, rest), layers in _templates(apart).items():
        leaf = apart[next(iter(layers.values()))]
        above = node.rpartition("/")[0]
        for name in by_kind[ShapeDtype((len(layers), *leaf.shape), leaf.dtype)] if len(layers) > 1 else ():
          if name.startswith(above) and name.endswith(rest):
            self.explained |= {name, *layers.values()}
            there = name.removesuffix(rest).rstrip("/")
            layer = node.replace("#", "*")
            found[
              f"{theirs} has {len(layers)} separate layers {layer}, {mine} has them stacked at {there} {advice}"
            ] = None
      self.hints += found

  def layer_count(self) -> None:
    """A numbered node that one side has more of."""
    ours, theirs = _templates(self.like), _templates(self.saved)
    found: dict[str, str] = {}
    for (node, rest), layers in ours.items():
      others = theirs.get((node, rest), {})
      odd = {(layers | others)[i] for i in layers.keys() ^ others.keys()}
      nested = layers.keys() < others.keys() or others.keys() < layers.keys()
      if others and nested and odd <= self.missing.keys() | self.extra.keys():
        self.explained |= odd
        text = f"{node.replace('#', '*')}: like has {len(layers)}, the checkpoint {len(others)}: another layer count?"
        found.setdefault(node, text)
    self.hints += found.values()

  def renamed(self) -> None:
    """Pairs of leaves with the same shape and dtype whose paths differ in one segment."""
    left = {n: leaf for n, leaf in self.missing.items() if n not in self.explained}
    holes = collections.defaultdict(list)
    for name, leaf in self.extra.items():
      if name not in self.explained:
        for before, part, after in _segments(name):
          holes[before, after, leaf].append((part, name))
    pairs: dict[tuple[str, str], list[tuple[str, str]]] = collections.defaultdict(list)
    for name, leaf in left.items():
      for before, part, after in _segments(name):
        for other, its_name in holes[before, after, leaf]:
          pairs[re.sub(r"\d+", "*", part), re.sub(r"\d+", "*", other)].append((name, its_name))
    for (mine, other), names in sorted(pairs.items(), key=lambda kv: -len(kv[1])):
      fresh = [pair for pair in names if not self.explained & {*pair}]
      if fresh and len(self.hints) <= _MANY:
        self.explained |= {n for pair in fresh for n in pair}
        n = count(len({a for a, _ in fresh}), "leaf", "leaves")
        self.hints.append(
          f"renamed? what like calls {mine!r} is {other!r} in the checkpoint, same shape and dtype ({n}, such as "
          f"{fresh[0][1]})"
        )

  def new_leaves(self) -> None:
    """The checkpoint lacks leaves, and has no others."""
    missing = sorted(self.missing.keys() - self.explained)
    if missing and not self.extra:
      last = {n.rsplit("/", 1)[-1] for n in missing}
      pattern = f"**/{last.pop()}" if len(last) == 1 and "/" in missing[0] else _some(missing[:1])
      self.hints.append(
        f"new in like ({_some(missing)})? init_missing={pattern!r} keeps like's own values for what the checkpoint "
        "lacks"
      )

  def one_root_only(self) -> None:
    """All differences are below one node at the top, and the rest fits: nearly always the optimizer."""
    wrong = {_root(n) for n in (*self.missing, *self.extra, *self.differing)}
    roots = {_root(n) for n in self.like} & {_root(n) for n in self.saved}
    if len(wrong) != 1 or not roots - wrong:
      return
    (root,) = wrong
    rest = sorted(roots - wrong)
    only = repr(rest[0]) if len(rest) == 1 else str(rest)
    if _OPTIMIZER.match(root):
      self.hints.append(
        f"everything but {root} fits: another optimizer, or other settings of it? only={only}, init_missing={root!r} "
        f"restores the rest and keeps like's {root}"
      )
    elif root in roots:
      self.hints.append(f"everything but {root} fits; only={only} restores the rest")

  def shapes(self) -> None:
    """Transposed weights, another vocabulary, number of stacked layers, or width."""
    reshaped = {n: (a.shape, b.shape) for n, (a, b) in self.differing.items() if a.shape != b.shape}
    turned = sorted(n for n, (a, b) in reshaped.items() if len(a) > 1 and a == b[::-1])
    if turned:
      self.hints.append(
        f"transposed ({_some(turned)}): another convention of the axes, as between Flax (in, out) and PyTorch "
        "(out, in)? Restore with the saved shape and transpose"
      )
    # By the lengths before and now: a wider layer is longer in one axis of its kernel and in another of the next.
    resized: dict[tuple[int, int], dict[str, int]] = collections.defaultdict(dict)
    for name, (old, new) in reshaped.items():
      if len(old) == len(new) and name not in turned:
        for axis in reversed([i for i, (a, b) in enumerate(zip(old, new, strict=True)) if a != b]):
          resized[old[axis], new[axis]][name] = axis
    for (before, now), axes in resized.items():
      if all(_VOCABULARY.search(n) for n in axes):
        self.hints.append(
          f"vocabulary resized from {before} to {now} ({_some(axes)})? Nothing is padded or cut: restore with the "
          "saved shape, then resize"
        )
        continue
      stacked = self._stacked({n for n, axis in axes.items() if axis == 0})
      if stacked:
        self.hints.append(
          f"another number of stacked layers? the first axis is {before} in the checkpoint, {now} in like"
        )
      if rest := [n for n in axes if n not in stacked]:
        self.hints.append(f"{before} in the checkpoint is {now} in like ({_some(rest)}): another width of the model?")

  def _stacked(self, resized: set[str]) -> set[str]:
    """Of the leaves whose first axis changed, those below a node all of whose leaves did, matrices among them."""
    below: dict[str, set[str]] = collections.defaultdict(set)
    for name in {*self.like, *self.saved}:
      for node in _nodes(name):
        below[node].add(name)
    found: set[str] = set()
    for names in below.values():
      if len(names) > 1 and names <= resized and any(len(self.saved[n].shape) > 2 for n in names):
        found |= names
    return found

  def dtypes(self, casts_allowed: bool) -> None:
    """PRNG keys of another kind, and dtypes that `cast=` can change."""
    changed: dict[tuple[str, str], list[str]] = collections.defaultdict(list)
    for name, (there, here) in self.differing.items():
      if there.dtype != here.dtype and (there.shape == here.shape or "key<" in there.dtype + here.dtype):
        changed[there.dtype, here.dtype].append(name)
    for (old, new), names in changed.items():
      if "key<" in new + old:
        self.hints.append(
          f"PRNG keys differ in kind ({_some(names)}: {old} saved, {new} in like): jax.random.key makes typed keys, "
          "jax.random.PRNGKey raw ones"
        )
      elif {old[:1], new[:1]} <= {"f", "b"} or old.strip("u1234567890") == new.strip("u1234567890"):
        one = f"{{{names[0]!r}: {new!r}}}" if len(names) == 1 else f"{{{_root(names[0])!r}: {new!r}}}"
        how = f"cast=True converts all of them, cast={one} those named"
        self.hints.append(
          f"saved as {old}, like has {new} ({_some(names)}): {'cast= does not name these' if casts_allowed else how}"
        )


def _segments(name: str) -> list[tuple[str, str, str]]:
  """Each segment of a path, between what comes before and after it."""
  parts = name.split("/")
  return [("/".join(parts[:i]), part, "/".join(parts[i + 1 :])) for i, part in enumerate(parts)]


def _templates(leaves: Iterable[str]) -> dict[tuple[str, str], dict[int, str]]:
  """Leaves of numbered nodes: (`params/layer_#`, `kernel`) -> {number: path}, for each numbered segment."""
  found: dict[tuple[str, str], dict[int, str]] = collections.defaultdict(dict)
  for name in leaves:
    for before, part, after in _segments(name):
      if number := re.search(r"\d+$", part):
        node = f"{before}/{part[: number.start()]}#".removeprefix("/")
        found[node, after][int(number[0])] = name
  return found
