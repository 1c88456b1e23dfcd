"""The `ckpt-jax` command: thin, one function a command.

Exit codes: 0 fine, 1 a finding (no checkpoint, damage), 2 wrong usage.
"""

from __future__ import annotations

import dataclasses
import datetime
import difflib
import json
import os
import sys
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table
from typer.core import TyperGroup

from ckpt_jax import cli_prune, cli_simulate
from ckpt_jax.errors import CheckpointError
from ckpt_jax.version import __version__


class _NearestName(TyperGroup):
  """Names the nearest command when one is mistyped."""

  def resolve_command(self, ctx: Any, args: list[str]) -> Any:
    if args and not args[0].startswith("-") and args[0] not in self.commands:
      near = difflib.get_close_matches(args[0], self.commands, n=1, cutoff=0.4)
      hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(self.commands)}"
      ctx.fail(f"no command {args[0]!r}{hint}")
    return super().resolve_command(ctx, args)


app = typer.Typer(
  cls=_NearestName,
  no_args_is_help=True,
  add_completion=False,
  pretty_exceptions_enable=False,
  help="Look at checkpoints of JAX and Flax trainers.",
)
Run = Annotated[str, typer.Argument(help="Directory of the run: a path, gs://...", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def _version(show: bool) -> None:
  if show:
    typer.echo(f"ckpt-jax {__version__}")
    raise typer.Exit


@app.callback()
def _options(
  version: Annotated[
    bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
  ] = False,
) -> None:
  pass


@app.command("ls")
def list_command(run: Run, as_json: Json = False) -> None:
  """List the committed steps of a run: when, how large, with which metrics."""
  from ckpt_jax.run import list_steps, run_directory

  steps = list_steps(run)
  if as_json:
    _print_json([dataclasses.asdict(s) for s in steps])
  elif steps:
    table = Table("step", "committed (UTC)", "size", "metrics", title=str(run_directory(run)))
    for s in steps:
      when = s.time.strftime("%Y-%m-%d %H:%M:%S") if s.time else "?"
      table.add_row(str(s.step), when, _size(s.nbytes), _pairs(s.metrics))
    _console().print(table)
  if not steps:
    _fail(f"{run_directory(run)}: no committed checkpoint; check the path")


@app.command()
def show(
  run: Run,
  step: Annotated[int | None, typer.Argument(help="Default: the newest.", show_default=False)] = None,
  as_json: Json = False,
) -> None:
  """Show what a step holds: run metadata, metrics, extras, and every leaf with shape, dtype and size."""
  from ckpt_jax.run import describe

  found = describe(run, step)
  if as_json:
    _print_json(dataclasses.asdict(found))
    return
  console = _console()
  facts = Table(title=f"step {found.step}", show_header=False)
  for key, value in found.metadata.items():
    facts.add_row(key, json.dumps(value) if isinstance(value, (dict, list)) else str(value))
  facts.add_row("metrics", _pairs(found.metrics))
  facts.add_row("extras", json.dumps(found.extras))
  console.print(facts)
  leaves = Table(Column("leaf", overflow="fold"), "shape", "dtype", "size")
  for leaf in found.leaves:
    leaves.add_row(leaf.path, str(list(leaf.shape)), leaf.dtype, _size(leaf.nbytes))
  leaves.add_section()
  leaves.add_row(f"{len(found.leaves)} leaves", "", "", _size(sum(leaf.nbytes for leaf in found.leaves)))
  console.print(leaves)


@app.command()
def who(
  run: Run, step: Annotated[int, typer.Argument(help="A committed step.", show_default=False)], as_json: Json = False
) -> None:
  """Show how many bytes and chunks each process wrote; exit 1 if two wrote the same chunk."""
  from ckpt_jax.multihost import who_wrote

  report = who_wrote(run, step)
  if as_json:
    _print_json(dataclasses.asdict(report))
  else:
    typer.echo(report.table())
  if report.overlaps:
    raise typer.Exit(1)


app.command()(cli_prune.prune)
app.command()(cli_prune.pin)
app.command()(cli_prune.unpin)
app.command()(cli_simulate.simulate)


def main() -> None:
  """Entry point: every expected failure is a message and an exit code, never a traceback."""
  try:
    app()
  except CheckpointError as e:
    typer.echo(f"error: {e}", err=True)
  except BrokenPipeError:
    # `ckpt-jax ls RUN | head -1`: the reader has what it wanted. Python would complain once more at exit.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(0)
  except OSError as e:
    typer.echo(f"error: {e.filename or ''}: {e.strerror or e}", err=True)
  sys.exit(1)


def _fail(message: str) -> None:
  typer.echo(f"error: {message}", err=True)
  raise typer.Exit(1)


def _console() -> Console:
  # Into a pipe or file nothing is cut to the width of a terminal that is not there.
  return Console(highlight=False, width=None if sys.stdout.isatty() else 160)


def _print_json(value: Any) -> None:
  def other(x: Any) -> Any:
    return x.isoformat() if isinstance(x, datetime.datetime) else str(x)

  typer.echo(json.dumps(value, default=other, indent=2))


def _pairs(values: dict[str, Any]) -> str:
  return "  ".join(f"{k}={v:.6g}" if isinstance(v, float) else f"{k}={v}" for k, v in values.items())


def _size(nbytes: float) -> str:
  for unit in ("B", "KiB", "MiB", "GiB"):
    if nbytes < 1024:
      return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
    nbytes /= 1024
  return f"{nbytes:.1f} TiB"
