"""What may have happened when `like` and a checkpoint differ: guesses from names, shapes and dtypes."""

from __future__ import annotations

import collections
import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping

_CONSIDERED = 200  # leaves that are compared with each other by name; a message needs no more
_VOCABULARY = re.compile(r"embed|vocab|lm_head|logits|wte|token", re.IGNORECASE)
_OPTIMIZER = re.compile(r"^opt", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Leaf:
  """Shape and dtype of a leaf; `dtype` is numpy's name, a Python type's, or `key<impl>`."""

  shape: tuple[int, ...]
  dtype: str


Leaves = Mapping[str, Leaf]


def brief(lines: list[str]) -> list[str]:
  """Lines `path: what is wrong` with those put together that differ in numbers of the path only."""
  groups: dict[tuple[str, str], list[str]] = collections.defaultdict(list)
  for line in lines:
    path, _, rest = line.partition(": ")
    if rest.startswith("not in the checkpoint"):
      rest = re.sub(r"\d+", "#", rest)
    groups[re.sub(r"\d+", "#", path), rest].append(line)
  out = []
  for (path, _), members in groups.items():
    if len(members) < 3:
      out += members
    else:
      rest = members[0].partition(": ")[2].partition("; the checkpoint has")[0]
      out.append(f"{path.replace('#', '*')}: {rest} ({len(members)} leaves, such as {members[0].partition(': ')[0]})")
  return out


def nearest(name: str, leaf: Leaf, candidates: Leaves) -> str | None:
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
  """Guesses, the most telling first; empty if nothing stands out."""
  missing = {n: leaf for n, leaf in like.items() if n not in saved}
  extra = {n: leaf for n, leaf in saved.items() if n not in like}
  differing = {n: (saved[n], leaf) for n, leaf in like.items() if n in saved and saved[n] != leaf}
  hints: list[str] = []
  explained = _another_root(missing, extra, saved, hints)
  if not explained:
    explained |= _leaf_or_subtree(missing, extra, hints)
    explained |= _scanned(missing, extra, hints)
    explained |= _layer_count(like, saved, missing, extra, hints)
    explained |= _renamed(missing, extra, explained, hints)
    _new_leaves({n for n in missing if n not in explained}, extra, hints)
  _shapes(differing, like, saved, hints)
  _dtypes(differing, casts_allowed, hints)
  _one_root_only(like, saved, missing, extra, differing, hints)
  return hints


def _some(names: Iterable[str]) -> str:
  names = [name or "(the state itself)" for name in names]
  return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _another_root(missing: Leaves, extra: Leaves, saved: Leaves, hints: list[str]) -> set[str]:
  """One of the two has a level more at the top."""
  if not missing:
    return set()
  for root in sorted({n.split("/")[0] for n in extra if "/" in n}):
    if all(f"{root}/{n}" in saved for n in missing):
      hints.append(
        f"the checkpoint has all of these below {root}/: pass like={{{root!r}: ...}}, and only={root!r} if the rest of "
        "it is not wanted"
      )
      return set(missing)
  roots = {n.split("/")[0] for n in missing}
  if len(roots) == 1 and all(n.partition("/")[2] in extra for n in missing):
    root = roots.pop()
    hints.append(f"like has one level more than the checkpoint: its {root}/ is the top of what was saved")
    return set(missing)
  return set()


def _leaf_or_subtree(missing: Leaves, extra: Leaves, hints: list[str]) -> set[str]:
  """A leaf on one side, a subtree on the other: another type of node."""
  found = set()
  for one, other, text in (
    (missing, extra, "like has a leaf at {0}, the checkpoint a subtree of {1} ({2})"),
    (extra, missing, "the checkpoint has a leaf at {0}, like a subtree of {1} ({2})"),
  ):
    parents = collections.defaultdict(list)
    for name in other:
      parts = name.split("/")
      for depth in range(1, len(parts)):
        parents["/".join(parts[:depth])].append(name)
    for name in one:
      if name in parents:
        below = parents[name]
        found |= {name, *below}
        n = f"{len(below)} leaf" if len(below) == 1 else f"{len(below)} leaves"
        hints.append(text.format(name or "the top", n, _some(below)) + ": another type of tree there?")
  return found


def _templates(leaves: Leaves) -> dict[tuple[str, str], dict[int, tuple[str, Leaf]]]:
  """Leaves of numbered nodes: (`params/layer_#`, `kernel`) -> {number: (path, leaf)}, for each numbered segment."""
  found: dict[tuple[str, str], dict[int, tuple[str, Leaf]]] = collections.defaultdict(dict)
  for name, leaf in leaves.items():
    parts = name.split("/")
    for i, part in enumerate(parts):
      number = re.search(r"\d+$", part)
      if number:
        node = "/".join([*parts[:i], part[: number.start()] + "#"])
        found[node, "/".join(parts[i + 1 :])][int(number[0])] = (name, leaf)
  return found


def _scanned(missing: Leaves, extra: Leaves, hints: list[str]) -> set[str]:
  """Layers apart on one side (params/layer_0/kernel), one array with a leading axis on the other."""
  found: set[str] = set()
  for apart, stacked, text in (
    (
      extra,
      missing,
      "the checkpoint has {0} separate layers {1}, like has them stacked at {2} (unrolled against scanned): restore "
      "without like=, stack the layers with jnp.stack, and save that",
    ),
    (
      missing,
      extra,
      "like has {0} separate layers {1}, the checkpoint has them stacked at {2} (scanned against unrolled): restore "
      "with the stacked like=, then take the layers apart",
    ),
  ):
    told = set()
    by_rest = collections.defaultdict(list)
    for name, leaf in stacked.items():
      by_rest[name.rsplit("/", 1)[-1]].append((name, leaf))
    for (node, rest), layers in _templates(apart).items():
      leaf = next(iter(layers.values()))[1]
      above = node.rsplit("/", 1)[0] if "/" in node else ""
      for name, whole in by_rest[rest.rsplit("/", 1)[-1]]:
        inside = name.startswith(above) and name.endswith(rest)
        if inside and whole.dtype == leaf.dtype and whole.shape == (len(layers), *leaf.shape) and len(layers) > 1:
          found |= {name, *(n for n, _ in layers.values())}
          there = name.removesuffix(rest).rstrip("/")
          if (node, there) not in told:
            told.add((node, there))
            hints.append(text.format(len(layers), node.replace("#", "*"), there))
  return found


def _layer_count(like: Leaves, saved: Leaves, missing: Leaves, extra: Leaves, hints: list[str]) -> set[str]:
  ours, theirs = _templates(like), _templates(saved)
  found: set[str] = set()
  told = set()
  for key in ours.keys() & theirs.keys():
    mine, other = set(ours[key]), set(theirs[key])
    if mine == other or not (mine < other or other < mine):
      continue
    node = key[0]
    odd = {ours[key][i][0] for i in mine - other} | {theirs[key][i][0] for i in other - mine}
    if not odd <= (missing.keys() | extra.keys()):
      continue
    found |= odd
    if node not in told:
      told.add(node)
      hints.append(f"{node.replace('#', '*')}: like has {len(mine)}, the checkpoint {len(other)}: another layer count?")
  return found


def _one_root_only(
  like: Leaves, saved: Leaves, missing: Leaves, extra: Leaves, differing: Mapping[str, object], hints: list[str]
) -> None:
  """All differences lie below one node at the top, and the rest fits: nearly always the optimizer."""
  wrong = {n.split("/")[0] for n in (*missing, *extra, *differing)}
  roots = {n.split("/")[0] for n in like} & {n.split("/")[0] for n in saved}
  if len(wrong) != 1 or not roots - wrong:
    return
  root = wrong.pop()
  rest = sorted(roots - {root})
  only = repr(rest[0]) if len(rest) == 1 else str(rest)
  if _OPTIMIZER.match(root):
    hints.append(
      f"everything but {root} fits: another optimizer, or other settings of it? only={only}, init_missing={root!r} "
      f"restores the rest and keeps like's {root}"
    )
  elif root in roots:
    hints.append(f"everything but {root} fits; only={only} restores the rest")


def _renamed(missing: Leaves, extra: Leaves, explained: set[str], hints: list[str]) -> set[str]:
  """Pairs of leaves with the same shape and dtype whose paths differ in one segment."""
  pairs: dict[tuple[str, str], list[tuple[str, str]]] = collections.defaultdict(list)
  holes = collections.defaultdict(list)
  for name, leaf in extra.items():
    if name not in explained:
      parts = name.split("/")
      for i, part in enumerate(parts):
        holes["/".join(parts[:i]), "/".join(parts[i + 1 :])].append((part, name, leaf))
  for name, leaf in missing.items():
    if name in explained:
      continue
    parts = name.split("/")
    for i, part in enumerate(parts):
      for other, its_name, its_leaf in holes["/".join(parts[:i]), "/".join(parts[i + 1 :])]:
        if its_leaf == leaf:
          pairs[re.sub(r"\d+", "*", part), re.sub(r"\d+", "*", other)].append((name, its_name))
  found: set[str] = set()
  for (mine, other), names in sorted(pairs.items(), key=lambda kv: -len(kv[1])):
    fresh = [(a, b) for a, b in names if a not in found and b not in found]
    if not fresh:
      continue
    found |= {n for pair in fresh for n in pair}
    count = len({a for a, _ in fresh})
    n = "1 leaf" if count == 1 else f"{count} leaves"
    hints.append(
      f"renamed? what like calls {mine!r} is {other!r} in the checkpoint, same shape and dtype ({n}, such as "
      f"{fresh[0][1]})"
    )
    if len(hints) > 6:
      break
  return found


def _new_leaves(missing: set[str], extra: Leaves, hints: list[str]) -> None:
  if missing and not extra:
    last = collections.Counter(n.rsplit("/", 1)[-1] for n in missing)
    pattern = f"**/{next(iter(last))}" if len(last) == 1 and "/" in next(iter(missing)) else _some(sorted(missing)[:1])
    hints.append(
      f"new in like ({_some(sorted(missing))})? init_missing={pattern!r} keeps like's own values for what the "
      "checkpoint lacks"
    )


def _shapes(differing: Mapping[str, tuple[Leaf, Leaf]], like: Leaves, saved: Leaves, hints: list[str]) -> None:
  reshaped = {n: (a.shape, b.shape) for n, (a, b) in differing.items() if a.shape != b.shape}
  turned = {n for n, (a, b) in reshaped.items() if len(a) > 1 and a == b[::-1]}
  if turned:
    hints.append(
      f"transposed ({_some(sorted(turned))}): another convention of the axes, as between Flax (in, out) and PyTorch "
      "(out, in)? Restore with the saved shape and transpose"
    )
  # By the lengths before and now: a wider layer is longer in one axis of its kernel, and in another of the next one's.
  resized: dict[tuple[int, int], dict[str, int]] = collections.defaultdict(dict)
  for name, (old, new) in reshaped.items():
    if len(old) == len(new) and name not in turned:
      for axis in reversed([i for i, (a, b) in enumerate(zip(old, new, strict=True)) if a != b]):
        resized[old[axis], new[axis]][name] = axis
  for (before, now), axes in resized.items():
    if all(_VOCABULARY.search(n) for n in axes):
      hints.append(
        f"vocabulary resized from {before} to {now} ({_some(axes)})? Nothing is padded or cut: restore with the saved "
        "shape, then resize"
      )
      continue
    stacked = _stacked({n for n, axis in axes.items() if axis == 0}, like, saved)
    if stacked:
      hints.append(f"another number of stacked layers? the first axis is {before} in the checkpoint, {now} in like")
    if rest := [n for n in axes if n not in stacked]:
      hints.append(f"{before} in the checkpoint is {now} in like ({_some(rest)}): another width of the model?")


def _stacked(resized: set[str], like: Leaves, saved: Leaves) -> set[str]:
  """Of the leaves whose first axis changed, those below a node all of whose leaves did, matrices among them."""
  whole: collections.Counter[str] = collections.Counter()
  nodes: dict[str, list[str]] = collections.defaultdict(list)
  for name in {*like, *saved}:
    parts = name.split("/")
    for depth in range(len(parts)):
      node = "/".join(parts[:depth])
      whole[node] += 1
      if name in resized:
        nodes[node].append(name)
  found: set[str] = set()
  for node, names in nodes.items():
    if len(names) > 1 and len(names) == whole[node] and any(len(saved[n].shape) > 2 for n in names):
      found |= set(names)
  return found


def _dtypes(differing: Mapping[str, tuple[Leaf, Leaf]], casts_allowed: bool, hints: list[str]) -> None:
  changed: dict[tuple[str, str], list[str]] = collections.defaultdict(list)
  for name, (there, here) in differing.items():
    if there.dtype != here.dtype and (there.shape == here.shape or "key<" in there.dtype + here.dtype):
      changed[there.dtype, here.dtype].append(name)
  for (old, new), names in changed.items():
    if "key<" in new or "key<" in old:
      hints.append(
        f"PRNG keys differ in kind ({_some(names)}: {old} saved, {new} in like): jax.random.key makes typed keys, "
        "jax.random.PRNGKey raw ones"
      )
    elif {old[:1], new[:1]} <= {"f", "b"} or old.strip("u1234567890") == new.strip("u1234567890"):
      one = f"{{{names[0]!r}: {new!r}}}" if len(names) == 1 else f"{{'{names[0].split('/')[0]}': {new!r}}}"
      hints.append(
        f"saved as {old}, like has {new} ({_some(names)}): "
        + ("cast= does not name these" if casts_allowed else f"cast=True converts all of them, cast={one} those named")
      )
