"""What the commands share: arguments, and how they print and fail."""

from __future__ import annotations

import datetime
import difflib
import json
import sys
from collections.abc import Sequence
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer.core import TyperGroup

from ckpt_jax.config.units import size_text


def _run(path: str) -> str:
  from ckpt_jax.run import foreign
  from ckpt_jax.run.steps import newest_step, run_directory

  directory = run_directory(path)
  if newest_step(directory) is None:
    foreign.refuse(directory)
  return path


Run = Annotated[str, typer.Argument(help="Directory of the run: a path, gs://...", show_default=False, callback=_run)]
_RICH_ROWS = 300
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


class NearestName(TyperGroup):
  """Names the nearest command when one is mistyped."""

  def names(self) -> list[str]:
    """What may be typed."""
    return list(self.commands)

  def resolve_command(self, ctx: Any, args: list[str]) -> Any:
    if args and not args[0].startswith("-") and args[0] not in self.commands:
      near = difflib.get_close_matches(args[0], self.names(), n=1, cutoff=0.4)
      hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(self.names())}"
      ctx.fail(f"no command {args[0]!r}{hint}")
    return super().resolve_command(ctx, args)


def confirmed(question: str, *, yes: bool, aloud: bool = True) -> bool:
  """Whether the user agrees to what cannot be undone. Nobody there to ask is wrong usage: exit 2.

  Args:
    question: what is asked.
    yes: whether the command line has answered.
    aloud: ask on stdout rather than on stderr, which leaves stdout to JSON.
  """
  if yes:
    return True
  try:
    if sys.stdin is not None and not sys.stdin.closed:
      return typer.confirm(question, err=not aloud)
  except typer.Abort:
    if sys.stdin.isatty():  # Ctrl-C
      raise
  raise typer.BadParameter("nobody answers on the standard input, and this cannot be undone; agree to it with --yes")


def fail(message: str) -> NoReturn:
  typer.echo(f"error: {message}", err=True)
  raise typer.Exit(1)


def console() -> Console:
  # Into a pipe or file nothing is cut to the width of a terminal that is not there.
  return Console(highlight=False, width=None if sys.stdout.isatty() else 160)


def print_table(headers: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
  """Rows of plain text under headers. Thousands of rows come as bare columns: rich takes a second for each thousand."""
  if len(rows) <= _RICH_ROWS:
    table = Table(*headers, title=escape(title))
    for row in rows:
      table.add_row(*map(escape, row))
    console().print(table)
    return
  widths = [max(map(len, column)) for column in zip(headers, *rows, strict=True)]
  lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (headers, *rows)]
  typer.echo("\n".join([title, *(line.rstrip() for line in lines)]))


def print_json(value: Any) -> None:
  def other(x: Any) -> Any:
    return x.isoformat() if isinstance(x, datetime.datetime) else str(x)

  typer.echo(json.dumps(value, default=other, indent=2))


def pairs(values: dict[str, Any]) -> str:
  return "  ".join(f"{k}={v:.6g}" if isinstance(v, float) else f"{k}={v}" for k, v in values.items())


size = size_text
