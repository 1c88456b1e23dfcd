"""The `ckpt-jax` command: thin, one function a command.

Exit codes: 0 fine, 1 a finding (no checkpoint, damage), 2 wrong usage.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Column, Table

from ckpt_jax.cli import bench, convert, prune, quarantine, repack, simulate, tune, verify
from ckpt_jax.cli.common import Json, NearestName, Run, console, fail, pairs, print_json, print_table, size
from ckpt_jax.errors import CheckpointError, ConfigError, CorruptCheckpointError
from ckpt_jax.version import __version__

app = typer.Typer(
  cls=NearestName,
  no_args_is_help=True,
  add_completion=False,
  pretty_exceptions_enable=False,
  help="Checkpoints of JAX and Flax trainers: look at them, check them, prune, tune, measure.",
)


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
def list_command(
  run: Run,
  everything: Annotated[
    bool, typer.Option("--all", "-a", help="Also those in quarantine, and those that a rollback has set aside.")
  ] = False,
  as_json: Json = False,
) -> None:
  """List the committed steps of a run: when, how large, with which metrics."""
  from ckpt_jax.run.quarantine import listed
  from ckpt_jax.run.steps import list_readable_steps, run_directory

  steps, damaged = list_readable_steps(run)
  aside = listed(run_directory(run))
  if as_json:
    found = [dataclasses.asdict(s) for s in steps] + [
      {"step": n, "damaged" if isinstance(e, CorruptCheckpointError) else "unreadable": str(e)}
      for n, e in damaged.items()
    ]
    print_json(found + (quarantine.as_json(run, aside) if everything else []))
  elif steps:
    thinned = not all(s.resumable for s in steps)
    rows = []
    for s in steps:
      when = s.time.strftime("%Y-%m-%d %H:%M:%S") if s.time else "?"
      resumable = [("yes" if s.resumable else "no, thinned")] if thinned else []
      rows.append([str(s.step), when, size(s.nbytes), pairs(s.metrics), *resumable])
    headers = ["step", "committed (UTC)", "size", "metrics"] + ["training can go on from it"] * thinned
    print_table(headers, rows, title=str(run_directory(run)))
  if not (as_json and everything):
    quarantine.show(run, aside, in_full=everything, err=as_json)
  for e in damaged.values():
    typer.echo(f"error: {e}", err=True)
  if damaged:
    raise typer.Exit(1)
  if not steps:
    fail(f"{run_directory(run)}: no committed checkpoint; check the path")


@app.command()
def show(
  run: Run,
  step: Annotated[int | None, typer.Argument(help="Default: the newest.", show_default=False)] = None,
  item: Annotated[str | None, typer.Option(help="Of a step with several items. Default: the training state.")] = None,
  as_json: Json = False,
) -> None:
  """Show what a step holds: run metadata, metrics, extras, items, and every leaf with shape, dtype and size."""
  from ckpt_jax.layout.contents import describe

  found = describe(run, step, item)
  if as_json:
    print_json(dataclasses.asdict(found))
    return
  terminal = console()
  facts = Table(title=f"step {found.step}", show_header=False)
  for key, value in found.metadata.items():
    facts.add_row(escape(key), escape(json.dumps(value) if isinstance(value, (dict, list)) else str(value)))
  facts.add_row("metrics", escape(pairs(found.metrics)))
  facts.add_row("extras", escape(json.dumps(found.extras)))
  terminal.print(facts)
  if [part.name for part in found.items if part.name != "metrics"] != [found.item]:
    table = Table("item", "kind", "handler", "")
    for part in found.items:
      shown = "shown below" if part.name == found.item else f"--item {part.name}"
      table.add_row(*map(escape, (part.name, part.kind, part.handler, shown)))
    terminal.print(table)
  if found.content is not None:
    terminal.print_json(json.dumps(found.content))
  if not found.leaves:
    return
  leaves = Table(Column("leaf", overflow="fold"), "shape", "dtype", "size")
  for leaf in found.leaves:
    leaves.add_row(
      escape(leaf.path or "(the state itself)"), escape(str(list(leaf.shape))), escape(leaf.dtype), size(leaf.nbytes)
    )
  leaves.add_section()
  leaves.add_row(f"{len(found.leaves)} leaves", "", "", size(sum(leaf.nbytes for leaf in found.leaves)))
  terminal.print(leaves)


@app.command()
def who(
  run: Run, step: Annotated[int, typer.Argument(help="A committed step.", show_default=False)], as_json: Json = False
) -> None:
  """Show how many bytes and chunks each process wrote; exit 1 if two wrote the same chunk."""
  from ckpt_jax.multihost import who_wrote

  report = who_wrote(run, step)
  if as_json:
    print_json(dataclasses.asdict(report))
  else:
    typer.echo(report.table())
  empty = [p.process for p in report.processes if p.chunks == 0]
  if empty and not as_json:
    typer.echo(f"error: nothing is left of what process {', '.join(map(str, empty))} wrote", err=True)
  if report.overlaps or empty:
    raise typer.Exit(1)


@app.command("probe")
def probe_command(
  path: Annotated[str, typer.Argument(help="Directory, gs://... or s3://...", show_default=False)],
  budget: Annotated[str, typer.Option(help="Time it may take.")] = "30s",
  max_bytes: Annotated[str, typer.Option(help="Bytes it may have stored at a time.")] = "4GiB",
  cached: Annotated[bool, typer.Option("--cached", help="Show the last measurement of this storage instead.")] = False,
  plot: Annotated[str | None, typer.Option(help="Draw the curves into this file (.png, .svg, .pdf).")] = None,
  as_json: Json = False,
) -> None:
  """Measure storage: throughput over streams, cost of a read over its size, latency of metadata operations."""
  from ckpt_jax.storage.probe import cached_profile, probe
  from ckpt_jax.storage.show import plot_profile, tables

  profile = cached_profile(path) if cached else probe(path, budget, max_bytes)
  if profile is None:
    fail(f"{path}: not measured on this host yet; leave out --cached")
  if plot:
    plot_profile(profile, plot)
  if as_json:
    print_json(profile.to_dict() | {"age_s": profile.age_s})
    return
  for table in tables(profile):
    console().print(table)


app.add_typer(bench.bench, name="bench")
app.command()(prune.prune)
app.command()(prune.pin)
app.command()(prune.unpin)
app.command()(simulate.simulate)
app.command()(verify.verify)
app.command()(verify.rollback)
app.command("restore-quarantined")(quarantine.restore_quarantined)
app.command()(tune.tune)
app.command()(repack.repack)
app.command()(convert.convert)


def main() -> None:
  """Entry point: every expected failure is a message and an exit code, never a traceback."""
  try:
    app()
  except ConfigError as e:  # an argument that makes no sense
    typer.echo(f"error: {e}", err=True)
    sys.exit(2)
  except CheckpointError as e:
    typer.echo(f"error: {e}", err=True)
  except BrokenPipeError:
    # `ckpt-jax ls RUN | head -1`: the reader has what it wanted. Python would complain once more at exit.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(0)
  except OSError as e:
    typer.echo(f"error: {e.filename or ''}: {e.strerror or e}", err=True)
  except Exception as e:  # no command ends in a traceback; CKPT_JAX_TRACEBACK=1 shows it to whoever reports the bug
    if os.environ.get("CKPT_JAX_TRACEBACK"):
      raise
    typer.echo(f"error: {type(e).__name__}: {' '.join(str(e).split())[:500]}", err=True)
  sys.exit(1)
