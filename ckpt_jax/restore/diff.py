"""What differs between two steps, leaf by leaf: `ckpt_jax.diff`, `ckpt-jax diff`. Reads them in bounded memory."""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ckpt_jax.config.arguments import check_request, check_type
from ckpt_jax.config.html import html_table
from ckpt_jax.config.units import count
from ckpt_jax.integrity.fingerprint import bits_of
from ckpt_jax.job.progress import Counter, OnProgress, reported
from ckpt_jax.layout.contents import LeafInfo
from ckpt_jax.layout.description import ONCE
from ckpt_jax.restore import stream
from ckpt_jax.restore.patterns import as_patterns, selected
from ckpt_jax.restore.step import Step
from ckpt_jax.run.steps import StepInfo, run_directory, step_directory, step_info
from ckpt_jax.storage.objects import snapshot

_GROUP_NBYTES = 32 << 20  # of each step; two groups of each are in memory
# Elements that are compared at a time, in float64: they stay in a core's cache, and OpenBLAS starts no threads, which
# made it 20 times slower, for fewer than 10,000.
_BLOCK = 1 << 13
_SHOWN = 50  # rows in a notebook
SAME, VALUES, DTYPE, SHAPE, ONLY_A, ONLY_B = "same", "values", "dtype", "shape", "only in A", "only in B"
_ORDER = (ONLY_A, ONLY_B, SHAPE, DTYPE, VALUES, SAME)


@dataclasses.dataclass(frozen=True)
class LeafDiff:
  """One leaf in two steps A and B. Typed PRNG keys are compared as their words, text as equal or not.

  Figures are computed in float64, and are 0 or None for what is not compared: other shapes, or leaves of one step only.

  Attributes:
    path: the keys that lead to it, joined by slashes.
    what: `same` if all bits are; else `values`, `dtype`, `shape`, `only in A` or `only in B`.
    a, b: shape and dtype in either step; None where it is not there.
    elements: number of elements compared.
    differing: those whose bits differ; of leaves of different dtypes those whose values do.
    max_abs: the largest |a - b|; infinite where one alone is NaN.
    max_rel: the largest |a - b| / max(|a|, |b|), 0 to 2.
    norm_a, norm_b, norm_diff: Euclidean norms of A, of B and of A - B; NaN if there is a NaN.
    cosine: of the angle between A and B; None if a norm is zero or not finite.
  """

  path: str
  what: str
  a: LeafInfo | None
  b: LeafInfo | None
  elements: int = 0
  differing: int = 0
  max_abs: float = 0.0
  max_rel: float = 0.0
  norm_a: float | None = None
  norm_b: float | None = None
  norm_diff: float | None = None
  cosine: float | None = None

  @property
  def change(self) -> float:
    """|A - B| / max(|A|, |B|): how far the leaf has moved; infinite where that is not finite."""
    if not self.norm_diff:
      return 0.0
    found = self.norm_diff / max(self.norm_a or 0.0, self.norm_b or 0.0, 1e-300)
    return found if math.isfinite(found) else math.inf

  def cells(self) -> tuple[str, ...]:
    """A row of text for a table with HEADERS."""
    shown = [info for info in (self.a, self.b) if info is not None]
    shape = " -> ".join(dict.fromkeys(str(list(info.shape)) for info in shown))
    dtype = " -> ".join(dict.fromkeys(info.dtype for info in shown))
    row = (self.path or "(the state itself)", self.what, shape, dtype)
    if self.norm_a is None or self.norm_b is None:
      return (*row, f"{self.differing:,}" if self.differing else "", *[""] * 6)
    figures = (self.max_abs, self.max_rel, self.norm_a, self.norm_b, self.change)
    cosine = "" if self.cosine is None else f"{self.cosine:.6f}"
    return (*row, f"{self.differing:,}", *(f"{figure:.3g}" for figure in figures), cosine)


HEADERS = ("leaf", "differs in", "shape", "dtype", "elements", "max abs", "max rel", "|A|", "|B|", "change", "cosine")


@dataclasses.dataclass(frozen=True)
class BesideDiff:
  """What differs in two steps beside the values of leaves.

  Attributes:
    path: below `metrics`, `extras`, or `containers` (the type of a node of the tree).
    what: `values`, `only in A` or `only in B`.
    a, b: the number, text or type in either step; None where it is not there.
  """

  path: str
  what: str
  a: Any
  b: Any

  def __str__(self) -> str:
    a, b = (f"{json.dumps(value):.60}" for value in (self.a, self.b))
    return (
      f"{self.path}: {a} -> {b}"
      if self.what == VALUES
      else f"{self.path}: {b if self.what == ONLY_B else a} {self.what}"
    )


@dataclasses.dataclass(frozen=True)
class Diff:
  """What differs between two steps. False if nothing does.

  Attributes:
    a, b: the steps, as RUN@STEP.
    leaves: of both; those of one step only first, then those that changed most, at last those that are the same.
    beside: what differs in metrics, extras and the types of containers (a list, a dict), which hold no bits of a state.
  """

  a: str
  b: str
  leaves: tuple[LeafDiff, ...]
  beside: tuple[BesideDiff, ...] = ()

  @property
  def differing(self) -> tuple[LeafDiff, ...]:
    """The leaves that are not the same, bit for bit."""
    return tuple(leaf for leaf in self.leaves if leaf.what != SAME)

  @property
  def same(self) -> bool:
    """Whether nothing differs."""
    return not self.differing and not self.beside

  def __bool__(self) -> bool:
    return not self.same

  def summary(self) -> str:
    """How many leaves differ in what, and what else does."""
    kinds = collections.Counter(leaf.what for leaf in self.leaves)
    prefix = {VALUES: "differ in ", DTYPE: "differ in ", SHAPE: "differ in "}
    named = [f"{kinds[what]:,} {prefix.get(what, '')}{what}" for what in _ORDER if kinds[what]]
    leaves = f"{count(len(self.leaves), 'leaf', 'leaves')}: {', '.join(named)}" if named else "no leaves"
    kinds = collections.Counter(found.path.split("/")[0] for found in self.beside)
    return "; ".join([leaves, *(f"{n:,} of the {what} differ" for what, n in kinds.items())])

  def __repr__(self) -> str:
    return f"Diff({self.a}, {self.b}: {self.summary()})"

  def _repr_html_(self) -> str:
    more = len(self.differing) - _SHOWN
    caption = f"{self.a} and {self.b}: {self.summary()}{f'; {more:,} more not shown' if more > 0 else ''}"
    return html_table(HEADERS, [leaf.cells() for leaf in self.differing[:_SHOWN]], caption)


def diff(
  run_a: str | os.PathLike[str],
  step_a: int,
  run_b: str | os.PathLike[str],
  step_b: int,
  *,
  only: str | Iterable[str] | None = None,
  item: str | None = None,
  on_progress: OnProgress | None = None,
) -> Diff:
  """Compares two steps leaf by leaf. Needs no devices, and some 300 MB of memory however large the steps
  are, or four of their chunks if those are larger.

  Args:
    run_a, step_a, run_b, step_b: the steps A and B, of one run or of two, local or in buckets.
    only: path or glob of the leaves to compare, or several, as for `restore`; then nothing but leaves is compared.
    item: of steps with several items. Default: the training state.
    on_progress: called with the bytes that are read.

  Raises:
    NoCheckpointError: if there is no such step.
    ConfigError: if there is no such item.
    UnknownLeafError: if `only` names a leaf of neither step.
    CorruptCheckpointError, StorageError: if one cannot be read.
  """
  check_request(only, None, None, item)
  check_type("on_progress", on_progress, on_progress is None or callable(on_progress), "a function of one argument")
  place_a, place_b = step_directory(run_directory(run_a), step_a), step_directory(run_directory(run_b), step_b)
  with snapshot(place_a), snapshot(place_b):
    a, b = Step(place_a, ONCE, item), Step(place_b, ONCE, item)
    comparison = _Comparison(a, b)
    leaves = comparison.leaves(None if only is None else as_patterns(only, "only"), on_progress)
    beside: list[BesideDiff] = []
    if only is None:
      beside = _differing(*(_beside(s, step_info(s.directory.parent, n)) for s, n in ((a, step_a), (b, step_b))))
  return Diff(f"{os.fspath(run_a)}@{step_a}", f"{os.fspath(run_b)}@{step_b}", tuple(leaves), tuple(beside))


class _Comparison:
  """Two open steps."""

  def __init__(self, a: Step, b: Step):
    self._a, self._b = a, b

  def leaves(self, only: Sequence[str] | None, on_progress: OnProgress | None) -> list[LeafDiff]:
    """The leaves of both, sorted, or those that the patterns `only` name; reads what both have."""
    names = list(dict.fromkeys([*self._a.infos, *self._b.infos]))
    if only is not None:
      wanted = selected(only, names, "only", f"{self._a} or {self._b}")
      names = [name for name in names if name in wanted]
    figures = dict(self._figures([name for name in names if self._is_compared(name)], on_progress))
    found = [self._leaf(name, figures.get(name)) for name in names]
    ranks = {what: min(i, _ORDER.index(DTYPE)) for i, what in enumerate(_ORDER)} | {SAME: len(_ORDER)}
    return sorted(found, key=lambda leaf: (ranks[leaf.what], -leaf.change, -leaf.max_abs))

  def _is_compared(self, name: str) -> bool:
    """Whether a leaf has values in both steps that can be compared, one by one."""
    a, b = self._a.infos.get(name), self._b.infos.get(name)
    if a is None or b is None or a.shape != b.shape or 0 in a.shape:
      return False
    return a.dtype == b.dtype or (a.has_numbers and b.has_numbers)

  def _figures(self, names: Sequence[str], on_progress: OnProgress | None) -> Iterator[tuple[str, _Tally]]:
    groups = stream.parts(self._a, names, _GROUP_NBYTES, chunks_of=self._b)
    same_of_b = [[dataclasses.replace(part, plan=self._b.plan(part.plan.name)) for part in group] for group in groups]
    tally, read = _Tally(), Counter()
    name = None
    nbytes = [sum(part.nbytes for part in (*one, *other)) for one, other in zip(groups, same_of_b, strict=True)]
    streams = stream.stream(self._a, groups), stream.stream(self._b, same_of_b)
    with reported(on_progress, f"comparing {self._a} and {self._b}", sum(nbytes), read):
      for (group, of_a), (_, of_b), size in zip(*streams, nbytes, strict=True):
        for part, a, b in zip(group, of_a, of_b, strict=True):
          if part.plan.name != name:  # parts of a leaf follow each other
            if name is not None:
              yield name, tally
            name, tally = part.plan.name, _Tally()
          tally.add(a, b)
        read.add(size)
    if name is not None:
      yield name, tally

  def _leaf(self, name: str, tally: _Tally | None) -> LeafDiff:
    a, b = self._a.infos.get(name), self._b.infos.get(name)
    if a is None or b is None:
      return LeafDiff(name, ONLY_B if a is None else ONLY_A, a, b)
    if a.shape != b.shape or a.dtype != b.dtype:
      what = SHAPE if a.shape != b.shape else DTYPE
    else:
      what = VALUES if tally is not None and tally.differing else SAME
    return LeafDiff(name, what, a, b, **({} if tally is None else tally.figures()))


def _differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[BesideDiff]:
  found = []
  for path in dict.fromkeys([*a, *b]):
    what = ONLY_B if path not in a else ONLY_A if path not in b else VALUES
    if what != VALUES or json.dumps(a[path]) != json.dumps(b[path]):  # as text 1 and 1.0 differ, and two NaNs do not
      found.append(BesideDiff(path, what, a.get(path), b.get(path)))
  return found


def _beside(step: Step, info: StepInfo) -> dict[str, Any]:
  """Numbers and text of a step's metrics and extras, and the types of its containers, by path."""
  found = dict(_entries("metrics", info.metrics)) | dict(_entries("extras", step.ours.get("extras")))
  return found | dict(_containers("containers", step.item.tree))


def _entries(path: str, value: Any) -> Iterator[tuple[str, Any]]:
  """The numbers and texts in JSON; containers only if they are empty."""
  if value and isinstance(value, (Mapping, list)):
    for key, below in value.items() if isinstance(value, Mapping) else enumerate(value):
      yield from _entries(f"{path}/{key}", below)
  elif path not in ("metrics", "extras"):
    yield path, value


def _containers(path: str, node: Any) -> Iterator[tuple[str, str]]:
  """The type of each container of a tree; `None` for one that Orbax stored as empty."""
  if node is None or isinstance(node, (Mapping, list, tuple)):
    yield path, "None" if node is None else "dict" if isinstance(node, Mapping) else type(node).__name__
  if isinstance(node, Mapping):
    for key, below in node.items():
      yield from _containers(f"{path}/{key}", below)
  elif isinstance(node, (list, tuple)):
    for i, below in enumerate(node):
      yield from _containers(f"{path}/{i}", below)


class _Tally:
  """Sums over the elements of one leaf of two steps."""

  def __init__(self) -> None:
    self.elements = self.differing = 0
    self._most_abs = self._most_rel = 0.0
    self._aa = self._bb = self._ab = self._dd = 0.0
    self._is_text = False

  def figures(self) -> dict[str, Any]:
    """The fields of a LeafDiff."""
    found: dict[str, Any] = {"elements": self.elements, "differing": self.differing}
    if self._is_text:
      return found
    norm_a, norm_b = math.sqrt(self._aa), math.sqrt(self._bb)
    product = norm_a * norm_b
    cosine = self._ab / product if product and math.isfinite(product) else None
    return found | {
      "max_abs": self._most_abs,
      "max_rel": self._most_rel,
      "norm_a": norm_a,
      "norm_b": norm_b,
      "norm_diff": math.sqrt(self._dd),
      "cosine": None if cosine is None else max(-1.0, min(1.0, cosine)),
    }

  def add(self, a: Any, b: Any) -> None:
    """Adds values of the same shape: arrays, numbers or text."""
    if isinstance(a, str):
      self.elements, self.differing, self._is_text = 1, int(a != b), True
      return
    a, b = np.asarray(a).reshape(-1), np.asarray(b).reshape(-1)
    for at in range(0, a.size, _BLOCK):
      with np.errstate(all="ignore"):
        self._add(a[at : at + _BLOCK], b[at : at + _BLOCK])

  def _add(self, a: np.ndarray, b: np.ndarray) -> None:
    self.elements += a.size
    bits = None
    if a.dtype == b.dtype:
      bits = bits_of(a) != bits_of(b)
      bits = bits.reshape(a.size, -1).any(axis=1)  # a complex128 is two words
    x = _numbers(a)
    squares = float(np.vdot(x, x).real)
    self._aa += squares
    if bits is not None and not bits.any():
      self._bb += squares
      self._ab += squares
      return
    y = _numbers(b)
    more = float(np.vdot(y, y).real)
    self._bb += more
    self._ab += float(np.vdot(x, y).real)
    distance = _distances(a, b, x, y, finite=math.isfinite(squares + more))
    self.differing += int(np.count_nonzero(distance if bits is None else bits))
    self._dd += float(np.vdot(distance, distance))
    most = float(distance.max())
    self._most_abs = max(self._most_abs, most)
    if most == math.inf:  # beside a NaN or an infinity
      self._most_rel = math.inf
    else:
      relative = distance / np.maximum(np.abs(x), np.abs(y))
      self._most_rel = max(self._most_rel, float(np.fmax.reduce(relative, initial=0.0)))  # 0 / 0 does not count


def _numbers(values: np.ndarray) -> np.ndarray:
  return values.astype(np.complex128 if values.dtype.kind == "c" else np.float64)


def _distances(a: np.ndarray, b: np.ndarray, x: np.ndarray, y: np.ndarray, *, finite: bool) -> np.ndarray:
  """|a - b|, given the numbers x and y in float64 as well: 0 for two NaNs, infinite beside one."""
  if a.dtype == b.dtype and a.dtype.kind in "iu" and a.dtype.itemsize == 8:
    of_a, of_b = a.view(np.uint64), b.view(np.uint64)  # float64 holds 53 bits of them
    return np.where(a > b, of_a - of_b, of_b - of_a).astype(np.float64)
  distance = np.abs(x - y)
  if not finite:
    distance[(x == y) | (np.isnan(x) & np.isnan(y))] = 0.0  # infinities too
    distance[np.isnan(distance)] = math.inf
  return distance
