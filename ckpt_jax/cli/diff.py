"""`ckpt-jax diff`: what differs between two steps."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from ckpt_jax.cli.common import Json, print_json, print_table, run_at_step

_ROWS = 40


def diff(
  a: Annotated[str, typer.Argument(metavar="RUN@A", help="The one step.", show_default=False)],
  b: Annotated[str, typer.Argument(metavar="RUN@B", help="The other; @B is one of the same run.", show_default=False)],
  only: Annotated[list[str] | None, typer.Option(help="Path or glob of leaves to compare; repeat it for more.")] = None,
  item: Annotated[str | None, typer.Option(help="Of steps with several items. Default: the training state.")] = None,
  everything: Annotated[bool, typer.Option("--all", "-a", help="List the leaves that are the same too.")] = False,
  as_json: Json = False,
) -> None:
  """Compare two steps leaf by leaf: shapes, dtypes, bits, largest differences, norms; exit 1 if they differ."""
  from ckpt_jax.observe.progress import Bar
  from ckpt_jax.restore.diff import HEADERS
  from ckpt_jax.restore.diff import diff as compare

  (run_a, step_a), (run_b, step_b) = run_at_step(a), run_at_step(b if not b.startswith("@") else run_at_step(a)[0] + b)
  found = compare(run_a, step_a, run_b, step_b, only=only or None, item=item, on_progress=Bar())
  if as_json:
    every = [dataclasses.asdict(leaf) | {"change": leaf.change} for leaf in found.leaves]
    print_json({"a": found.a, "b": found.b, "same": found.same, "leaves": every, "beside": found.beside})
  else:
    leaves = found.leaves if everything else found.differing[:_ROWS]
    if leaves:
      print_table(HEADERS, [leaf.cells() for leaf in leaves], title=f"A: {found.a}  B: {found.b}")
    more = max(len(found.differing) - _ROWS, 0) + max(len(found.beside) - _ROWS, 0)
    if more and not everything:
      typer.echo(f"{more:,} more that differ: --all")
    for other in found.beside if everything else found.beside[:_ROWS]:
      typer.echo(str(other))
    typer.echo(found.summary())
  if not found.same:
    raise typer.Exit(1)
