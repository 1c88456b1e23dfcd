"""`ckpt-jax show`: the tree of a step, with shapes, dtypes, sizes and how it is stored."""

from __future__ import annotations

import collections
import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ckpt_jax.cli.common import Json, Run, console, fail, grouped, print_json, print_table
from ckpt_jax.config.units import count, pairs_text, size_text

if TYPE_CHECKING:
  from ckpt_jax.layout.contents import LeafInfo, StepDescription

_LINES = 60  # of a tree whose depth is not given
_LARGEST = 5


@dataclasses.dataclass(frozen=True)
class TreeOptions:
  """What to print of a step."""

  depth: Annotated[
    int | None, typer.Option(min=1, help="Levels of the tree (default: as many as fit into 60 lines).")
  ] = None
  only: Annotated[list[str] | None, typer.Option(help="Path or glob of leaves to print; repeat it for more.")] = None
  stored: Annotated[
    bool,
    typer.Option(
      "--stored",
      "-s",
      help="Add sharding, chunks, codec, what it leaves of the bytes, and the processes that wrote a leaf.",
    ),
  ] = False
  config: Annotated[bool, typer.Option("--config", help="Print the settings that it was saved with.")] = False
  item: Annotated[str | None, typer.Option(help="Of a step with several items. Default: the training state.")] = None


@grouped
def show(
  run: Run,
  options: TreeOptions,
  step: Annotated[int | None, typer.Argument(help="Default: the newest.", show_default=False)] = None,
  as_json: Json = False,
) -> None:
  """Show what a step holds: run metadata, metrics, extras, and the tree with shapes, dtypes and sizes."""
  from ckpt_jax.layout.contents import describe

  found = describe(run, step, options.item)
  if options.only:
    found = dataclasses.replace(found, leaves=_selected(found, options.only))
  writers, sizes = _written(run, found) if options.stored else (None, {})
  if as_json:
    stored = {} if writers is None else {"writers": writers, "stored_nbytes": sizes}
    print_json(dataclasses.asdict(found) | stored)
    return
  print_table((), list(_facts(found).items()), title=f"step {found.step}")
  if options.config:
    _print_config(found.metadata.get("config", {}))
  if [part.name for part in found.items if part.name != "metrics"] != [found.item]:
    items = [
      (part.name, part.kind, part.handler, "shown below" if part.name == found.item else f"--item {part.name}")
      for part in found.items
    ]
    print_table(("item", "kind", "handler", ""), items)
  if found.content is not None:
    console().print_json(json.dumps(found.content))
  if found.leaves:
    _print_tree(found, options.depth, writers, sizes)


def _selected(found: StepDescription, only: list[str]) -> list[LeafInfo]:
  from ckpt_jax.restore.patterns import as_patterns, selected

  wanted = selected(as_patterns(only, "--only"), [leaf.path for leaf in found.leaves], "--only", f"step {found.step}")
  return [leaf for leaf in found.leaves if leaf.path in wanted]


def _facts(found: StepDescription) -> dict[str, str]:
  """What is worth a line of the metadata; empty values are left out."""
  ours = found.metadata
  facts: dict[str, Any] = {}
  if "processes" in ours:
    facts["saved by"] = (
      f"{count(ours['processes'], 'process')}, {count(ours['devices'], 'device')}, {ours.get('platform', '?')}"
    )
  facts["meshes"] = "; ".join(map(_text, ours.get("meshes", [])))
  facts["versions"] = "  ".join(f"{name} {version}" for name, version in ours.get("versions", {}).items())
  facts["health"] = "" if (health := ours.get("health", {})) == {"healthy": True} else _text(health)
  facts["thinned to"] = ", ".join((ours.get("thinned") or {}).get("keep", []))
  facts["metrics"] = pairs_text(found.metrics)
  facts["extras"] = _text(found.extras)
  return {name: value for name, value in facts.items() if value not in ("", "{}", "null")} or {"metadata": "none"}


def _text(value: Any) -> str:
  return value if isinstance(value, str) else json.dumps(value)


def _print_config(config: dict[str, Any]) -> None:
  import yaml

  def given(value: Any) -> Any:
    if not isinstance(value, dict):
      return value
    return {k: kept for k, v in value.items() if (kept := given(v)) not in (None, {})}

  if not config:
    fail("no settings were saved with this step")
  typer.echo(yaml.safe_dump(given(config), sort_keys=False).rstrip())


def _written(run: str, found: StepDescription) -> tuple[dict[str, list[int]], dict[str, int]]:
  """The processes that wrote each leaf, and its bytes as stored, by path.

  Empty for a step that was rewritten, or saved without OCDBT; a packed leaf has no bytes of its own.
  """
  from ckpt_jax.integrity import databases
  from ckpt_jax.layout.keys import SLABS, owner
  from ckpt_jax.run.steps import run_directory, step_directory

  item = step_directory(run_directory(run), found.step) / (found.item or "")
  paths = {stored.name: path for path, stored in found.stored.items()}
  writers: dict[str, dict[int, None]] = collections.defaultdict(dict)
  sizes: collections.Counter[str] = collections.Counter()
  for process, chunks in databases.written(item):
    for key, nbytes in chunks.items():
      if not key.startswith(SLABS) and (name := owner(key, paths)) is not None:
        writers[paths[name]][process] = None
        sizes[paths[name]] += nbytes
  packed = {path: list(stored.slabs) for path, stored in found.stored.items() if stored.slabs}
  return {path: [*processes] for path, processes in writers.items()} | packed, dict(sizes)


# -- the tree


@dataclasses.dataclass
class _Node:
  """A node of the tree: its leaf if it is one, what is below it, and the number and bytes of all its leaves."""

  leaf: LeafInfo | None = None
  below: dict[str, _Node] = dataclasses.field(default_factory=dict)
  leaves: int = 0
  nbytes: int = 0

  def add(self, path: tuple[str, ...], leaf: LeafInfo) -> None:
    """Adds a leaf at a path below this node."""
    self.leaves += 1
    self.nbytes += leaf.nbytes
    if path:
      self.below.setdefault(path[0], _Node()).add(path[1:], leaf)
    else:
      self.leaf = leaf

  def lines(self, depth: int, indent: str = "") -> Iterator[tuple[str, _Node]]:
    """A label and a node for each line, down to a depth."""
    names = list(self.below)
    for name in names:
      node, last = self.below[name], name == names[-1]
      yield f"{indent}{'└─ ' if last else '├─ '}{name}", node
      if depth > 1:
        yield from node.lines(depth - 1, indent + ("   " if last else "│  "))


def _print_tree(
  found: StepDescription, depth: int | None, writers: Mapping[str, list[int]] | None, sizes: Mapping[str, int]
) -> None:
  top = _Node()
  for leaf in found.leaves:
    top.add(tuple(leaf.path.split("/")) if leaf.path else (), leaf)
  deepest = max(leaf.path.count("/") + 1 for leaf in found.leaves)
  if depth is None:
    fitting = [d for d in range(1, deepest + 1) if sum(1 for _ in top.lines(d)) <= _LINES]
    depth = max(fitting, default=1)
  lines = [("(the state itself)", top)] if top.leaf else list(top.lines(depth))
  rows = [(label, *_cells(node, found, writers, sizes)) for label, node in lines]
  stored = ("sharding", "chunks", "codec", "stored", "written by") if writers is not None else ()
  rows.append((count(top.leaves, "leaf", "leaves"), "", "", size_text(top.nbytes), *[""] * len(stored)))
  print_table(("", "shape", "dtype", "size", *stored), rows)
  if depth < deepest:
    typer.echo(
      f"{count(depth, 'level')} of {deepest}; --depth {deepest} shows all leaves, --only PATH those below a path"
    )
  dtypes: collections.Counter[str] = collections.Counter()
  for leaf in found.leaves:
    dtypes[leaf.dtype] += leaf.nbytes
  if len(found.leaves) > _LARGEST:
    largest = sorted(found.leaves, key=lambda leaf: -leaf.nbytes)[:_LARGEST]
    typer.echo(f"by dtype: {', '.join(f'{dtype} {size_text(n)}' for dtype, n in dtypes.most_common() if n)}")
    typer.echo(f"largest: {', '.join(f'{leaf.path} {size_text(leaf.nbytes)}' for leaf in largest)}")


def _cells(
  node: _Node, found: StepDescription, writers: Mapping[str, list[int]] | None, sizes: Mapping[str, int]
) -> tuple[str, ...]:
  leaf = node.leaf
  if leaf is None:
    return (count(node.leaves, "leaf", "leaves"), "", size_text(node.nbytes), *[""] * (5 if writers is not None else 0))
  cells = (str(list(leaf.shape)), leaf.dtype, size_text(leaf.nbytes))
  if writers is None:
    return cells
  stored = found.stored.get(leaf.path)
  by = _ranges(writers.get(leaf.path, []))
  if stored is None:
    return (*cells, "", "", "", "", by)
  chunks = "" if stored.chunks is None else str(list(stored.chunks))
  share = f"{sizes[leaf.path] / leaf.nbytes:.0%}" if leaf.nbytes and leaf.path in sizes else ""
  return (*cells, stored.sharding, chunks, stored.codec, share, by)


def _ranges(numbers: list[int]) -> str:
  """`0-3, 6` for 0, 1, 2, 3, 6."""
  runs: list[list[int]] = []
  for n in sorted(numbers):
    if runs and n == runs[-1][1] + 1:
      runs[-1][1] = n
    else:
      runs.append([n, n])
  return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
