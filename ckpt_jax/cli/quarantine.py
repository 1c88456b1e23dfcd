"""Steps in quarantine or set aside, as commands show them, and `ckpt-jax restore-quarantined`."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ckpt_jax.cli.common import Json, Run, print_json, print_table

if TYPE_CHECKING:
  from ckpt_jax.run.quarantine import AsideStep


def as_json(run: str, steps: Sequence[AsideStep]) -> list[dict[str, Any]]:
  """One entry a step; `aside` says of which kind it is."""
  return [
    {"step": a.step, "aside": a.kind, "reason": a.reason, "time": a.time, "path": a.path}
    | {"way_back": f"ckpt-jax restore-quarantined {shlex.quote(run)} {a.step}"}
    for a in steps
  ]


def show(run: str, steps: Sequence[AsideStep], *, in_full: bool, err: bool = False) -> None:
  """Prints what was put aside; nothing if nothing was.

  Args:
    run: as the user called it.
    steps: those to show.
    in_full: a table with reasons rather than one line.
    err: print on stderr.
  """
  if not steps:
    return
  if in_full:
    rows = [(str(a.step), a.where, f"{a.time:%Y-%m-%d %H:%M:%S}" if a.time else "?", a.reason, a.path) for a in steps]
    print_table(("step", "", "since (UTC)", "why", "where it is"), rows, title="steps that do not count")
    typer.echo(f"the way back: ckpt-jax restore-quarantined {shlex.quote(run)} STEP")
    return
  counts: dict[str, int] = {}
  for a in steps:
    counts[a.where] = counts.get(a.where, 0) + 1
  what = ", ".join(f"{n} {'step' if n == 1 else 'steps'} {where}" for where, n in sorted(counts.items()))
  typer.echo(f"{what}: ckpt-jax ls {shlex.quote(run)} --all", err=err)


def restore_quarantined(
  run: Run,
  step: Annotated[int, typer.Argument(help="A step that is in quarantine or set aside.", show_default=False)],
  damaged: Annotated[bool, typer.Option("--damaged", help="Put it back even if it is damaged.")] = False,
  as_json: Json = False,
) -> None:
  """Put a step back that is in quarantine, or that a rollback has set aside; no job may be writing the run.

  It is verified then, and goes into quarantine again if it is damaged.
  """
  from ckpt_jax.restore.verify import verdicts
  from ckpt_jax.run.quarantine import put_aside, put_back
  from ckpt_jax.run.steps import run_directory

  directory = run_directory(run)
  found = put_back(directory, step)
  (verdict,) = verdicts(run, step)
  stays = damaged or not verdict.findings
  if not stays:
    why = "; ".join(f"{f.leaf or f.file or f.kind}: {f.message}" for f in verdict.findings[:3])
    put_aside(directory, [step], found.kind, {step: found.reason or why})
  if as_json:
    print_json({"step": step, "put_back": stays, "was": found.kind} | {"verdict": dataclasses.asdict(verdict)})
  elif stays:
    typer.echo(f"step {step} counts again; checked: {verdict.how_far}")
  for f in verdict.findings:
    typer.echo(f"error: step {f.step}: {f.leaf or f.file or f.kind}: {f.message}", err=True)
  if verdict.findings:
    if not stays:
      typer.echo(f"error: step {step} stays {found.where}: it is damaged; --damaged puts it back as it is", err=True)
    raise typer.Exit(1)
