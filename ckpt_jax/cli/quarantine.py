"""`ckpt-jax restore-quarantined`, and how commands show steps that are in quarantine or set aside."""

from __future__ import annotations

import collections
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ckpt_jax.cli.common import Json, Run, error, print_json, print_table
from ckpt_jax.config.units import count

if TYPE_CHECKING:
  from ckpt_jax.run.quarantine import AsideStep


def way_back(run: str, step: int | str = "STEP") -> str:
  """The command that makes a step count again."""
  return f"ckpt-jax restore-quarantined {shlex.quote(run)} {step}"


def as_json(run: str, steps: Sequence[AsideStep]) -> list[dict[str, Any]]:
  """One entry for each step; `aside` is its kind, quarantine or set_aside."""
  return [
    {"step": a.step, "aside": a.kind, "reason": a.reason, "time": a.time, "path": a.path}
    | {"way_back": way_back(run, a.step)}
    for a in steps
  ]


def show(run: str, steps: Sequence[AsideStep], *, in_full: bool, err: bool = False) -> None:
  """Prints the steps that do not count, if there are any.

  Args:
    run: the run as the user wrote it.
    steps: those to show.
    in_full: print a table with reasons rather than one line.
    err: print the line on stderr.
  """
  if steps and in_full:
    rows = [(str(a.step), a.where, f"{a.time:%Y-%m-%d %H:%M:%S}" if a.time else "?", a.reason, a.path) for a in steps]
    print_table(("step", "", "since (UTC)", "why", "where it is"), rows, title="steps that do not count")
    typer.echo(f"the way back: {way_back(run)}")
  elif steps:
    counts = collections.Counter(a.where for a in steps)
    what = ", ".join(f"{count(n)} {where}" for where, n in sorted(counts.items()))
    typer.echo(f"{what}: ckpt-jax ls {shlex.quote(run)} --all", err=err)


def restore_quarantined(
  run: Run,
  step: Annotated[int, typer.Argument(help="A step that is in quarantine or set aside.", show_default=False)],
  damaged: Annotated[bool, typer.Option("--damaged", help="Put it back even if it is damaged.")] = False,
  as_json: Json = False,
) -> None:
  """Put a step back that is in quarantine, or that a rollback has set aside; no job may be writing the run.

  The step is then verified, and goes into quarantine again if it is damaged.
  """
  from ckpt_jax.restore.verify import verdicts
  from ckpt_jax.run.events import Quarantine
  from ckpt_jax.run.journal import record
  from ckpt_jax.run.quarantine import put_aside, put_back
  from ckpt_jax.run.steps import run_directory

  directory = run_directory(run)
  found = put_back(directory, step)
  (verdict,) = verdicts(run, step)
  wrong = [f"{f.leaf or f.file or f.kind}: {f.message}" for f in verdict.findings]
  stays = damaged or not wrong
  if stays:
    record(directory, Quarantine(step=step, place="back", reason=f"{found.where}: {found.reason}"))
  else:
    put_aside(directory, [step], found.kind, {step: found.reason or "; ".join(wrong[:3])})
  if as_json:
    print_json({"step": step, "put_back": stays, "was": found.kind, "verdict": verdict})
  elif stays:
    typer.echo(f"step {step} counts again; checked: {verdict.how_far}")
  for message in wrong:
    error(f"step {step}: {message}")
  if not stays:
    error(f"step {step} stays {found.where}: it is damaged; --damaged puts it back as it is")
  if wrong:
    raise typer.Exit(1)
