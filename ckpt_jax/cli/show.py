"""`ckpt-jax ls` and `who`: what a run holds, and which process wrote how much of a step."""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING, Annotated

import typer

from ckpt_jax.cli import quarantine
from ckpt_jax.cli.common import Json, Run, Step, error, fail, print_json, print_table
from ckpt_jax.config.units import count, duration_text, pairs_text, size_text
from ckpt_jax.errors import CorruptCheckpointError, NoCheckpointError

if TYPE_CHECKING:
  from etils import epath

  from ckpt_jax.run.steps import StepInfo


def list_steps(
  run: Run,
  everything: Annotated[
    bool, typer.Option("--all", "-a", help="Include steps in quarantine, and those that a rollback has set aside.")
  ] = False,
  goodput: Annotated[
    bool, typer.Option("--goodput", help="What the run did with its time, over all restarts, by its records.")
  ] = False,
  as_json: Json = False,
) -> None:
  """List the committed steps of a run: when, how large, with which metrics, pinned, unhealthy or thinned."""
  if goodput:
    _show_goodput(run, as_json)
    return
  from ckpt_jax.layout.homes import shared_by_step
  from ckpt_jax.run.quarantine import listed
  from ckpt_jax.run.steps import list_readable_steps, run_directory, why_no_step

  directory = run_directory(run)
  steps, damaged = list_readable_steps(run)
  aside = listed(directory)
  shared = {} if as_json else shared_by_step(directory, [s.step for s in steps])
  if as_json:
    unread = [
      {"step": number, "damaged" if isinstance(e, CorruptCheckpointError) else "unreadable": str(e)}
      for number, e in damaged.items()
    ]
    print_json([*steps, *unread, *(quarantine.as_json(run, aside) if everything else [])])
  elif steps:
    rows = [
      [
        str(s.step),
        s.time.strftime("%Y-%m-%d %H:%M:%S") if s.time else "?",
        size_text(s.nbytes),
        pairs_text(s.metrics),
        _remarks(s, directory, sum(shared[s.step].values())),
      ]
      for s in steps
    ]
    headers = ["step", "committed (UTC)", "size", "metrics", ""]
    shown = len(headers) - (not any(row[-1] for row in rows))
    print_table(headers[:shown], [row[:shown] for row in rows], title=str(directory))
  if not (as_json and everything):
    quarantine.show(run, aside, in_full=everything, err=as_json)
  for e in damaged.values():
    error(e)
  if damaged:
    raise typer.Exit(1)
  if not steps:
    fail(NoCheckpointError(why_no_step(directory)))


def _remarks(step: StepInfo, directory: epath.Path, shared: int) -> str:
  from ckpt_jax.run.steps import step_path
  from ckpt_jax.storage.space import tree_nbytes
  from ckpt_jax.storage.urls import is_object_store

  compressed = "compressed"
  if step.compressed and step.nbytes and not is_object_store(directory):  # where asking costs no requests
    compressed += f" to {tree_nbytes(os.fspath(step_path(directory, step.step))) / step.nbytes:.0%}"
  remarks = {
    f"{size_text(shared)} shared with others": shared > 0,
    compressed: step.compressed,
    "pinned": step.pinned,
    "unhealthy": step.healthy is False,
    "thinned, training cannot resume from it": not step.resumable,
  }
  return ", ".join(remark for remark, holds in remarks.items() if holds)


def _show_goodput(run: str, as_json: bool) -> None:
  from ckpt_jax.observe.goodput import goodput
  from ckpt_jax.run.journal import read_records
  from ckpt_jax.run.steps import run_directory

  directory = run_directory(run)
  found = goodput(directory, read_records(directory))
  if as_json:
    print_json(dataclasses.asdict(found) | {"goodput": found.share, "other_s": found.other_s})
    return
  typer.echo(
    f"goodput {found.share:.1%}: {count(found.steps)} of {duration_text(found.step_s)} in "
    f"{duration_text(found.seconds)}; {count(found.attempts, 'job')}, "
    f"{count(found.interruptions, 'interruption')}"
  )
  parts = {
    "training that stayed": found.productive_s,
    "waiting in save": found.saving_s,
    "training that was lost": found.redone_s,
    "down, from one job to the next": found.down_s,
    "the rest: compilation, evaluation, slower steps": found.other_s,
  }
  rows = [(what, duration_text(seconds), f"{seconds / found.seconds:.1%}") for what, seconds in parts.items()]
  print_table((), rows)


def who(run: Run, step: Step, as_json: Json = False) -> None:
  """Show how many bytes and chunks each process wrote; exit 1 if two wrote the same chunk."""
  from ckpt_jax.multihost import who_wrote

  report = who_wrote(run, step)
  if as_json:
    print_json(report)
  else:
    typer.echo(report.table())
  empty = [p.process for p in report.processes if p.chunks == 0]
  if empty and not as_json:
    error(f"nothing is left of what process {', '.join(map(str, empty))} wrote")
  if report.overlaps or empty:
    raise typer.Exit(1)
