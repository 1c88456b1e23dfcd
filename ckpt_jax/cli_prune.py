"""`ckpt-jax prune`, `pin`, `unpin`: the live retention, asked by hand."""

from __future__ import annotations

import datetime
import os
import re
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from ckpt_jax.cli_common import Run, console, fail, pairs, print_json, size
from ckpt_jax.errors import ConfigError

_PATIENCE = 24 * 3600.0  # a user who waits may press Ctrl-C: the marks stay, and the next prune goes on
StepArgument = Annotated[int, typer.Argument(help="A committed step.", show_default=False)]


def retention(
  last: int | None,
  hourly: int | None,
  daily: int | None,
  weekly: int | None,
  monthly: int | None,
  within: str | None,
  every_steps: int | None,
  best: str | None,
  budget: str | None,
) -> Any:
  """The Retention that command line options ask for; `best` is METRIC, METRIC:max or METRIC:max:3.

  Raises:
    ConfigError: if a value is wrong.
  """
  from ckpt_jax.policies.retention import Retention

  chosen = None
  if best is not None:
    match = re.fullmatch(r"(.+?)(?::(min|max))?(?::(\d+))?", best)
    assert match is not None
    chosen = {"metric": match[1], "mode": match[2] or "min", "n": int(match[3] or 1)}
  return Retention(last, hourly, daily, weekly, monthly, within, every_steps, chosen, budget)


def prune(
  run: Run,
  keep_last: Annotated[int | None, typer.Option(help="Keep the newest N steps.")] = None,
  keep_hourly: Annotated[int | None, typer.Option(help="Keep the newest step of each of the last N hours.")] = None,
  keep_daily: Annotated[int | None, typer.Option(help="... of the last N days.")] = None,
  keep_weekly: Annotated[int | None, typer.Option(help="... of the last N ISO weeks.")] = None,
  keep_monthly: Annotated[int | None, typer.Option(help="... of the last N months.")] = None,
  keep_within: Annotated[str | None, typer.Option(help="Keep steps younger than this, e.g. 2d6h.")] = None,
  keep_every_steps: Annotated[int | None, typer.Option(help="Keep multiples of N.")] = None,
  keep_best: Annotated[
    str | None, typer.Option(metavar="METRIC[:min|max][:N]", help="Keep the N best by a metric, e.g. loss:min:2.")
  ] = None,
  budget: Annotated[str | None, typer.Option(help="Bytes that all steps may take, e.g. 2TiB.")] = None,
  dry_run: Annotated[bool, typer.Option("--dry-run", "-n", help="Show what would go; delete nothing.")] = False,
  yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before deleting.")] = False,
  as_json: Annotated[bool, typer.Option("--json", help="Print JSON; deletes only with --yes.")] = False,
) -> None:
  """Delete the steps that no rule keeps: a step stays if any rule keeps it, as in restic's forget."""
  from ckpt_jax import run as runs

  try:
    rules = retention(
      keep_last,
      keep_hourly,
      keep_daily,
      keep_weekly,
      keep_monthly,
      keep_within,
      keep_every_steps,
      keep_best,
      budget,
    )
  except ConfigError as e:
    raise typer.BadParameter(str(e)) from None
  if rules.keeps_all:
    raise typer.BadParameter("no rule given; name at least one, e.g. --keep-last 3 (or --dry-run with it to look)")
  from ckpt_jax.policies.live import plan_pruning

  plan = plan_pruning(run, rules)
  directory = runs.run_directory(run)
  if not plan.steps and not runs.noted_steps(directory, runs.DELETING):
    fail(f"{directory}: no committed checkpoint; check the path")
  freed = sum(s.nbytes for s in plan.removed)
  going = not dry_run and (yes or (not as_json and bool(plan.removed)))
  if as_json:
    print_json(
      {
        "steps": [
          {"step": s.step, "time": s.time, "nbytes": s.nbytes, "metrics": s.metrics, "healthy": s.healthy}
          | {"kept_by": list(plan.reasons[s.step]), "over_budget": s.step in plan.over_budget}
          for s in plan.steps
        ],
        "kept": [s.step for s in plan.steps if plan.reasons[s.step]],
        "removed": [s.step for s in plan.removed],
        "nbytes_freed": freed,
        "notes": list(plan.notes),
        "dry_run": not going,
      }
    )
  elif plan.steps:
    _print_plan(plan, directory, freed, dry_run)
  if not going:
    return
  if not yes and not typer.confirm(f"Delete {len(plan.removed)} of {len(plan.steps)} steps?"):
    fail("nothing deleted")
  from ckpt_jax.policies.deletion import StepDeleter

  deleter = StepDeleter(directory, timeout=_PATIENCE)
  deleter.resume()
  deleter.delete_steps([s.step for s in plan.removed])
  deleter.finish()
  left = runs.noted_steps(directory, runs.DELETING)
  if left:
    fail(f"{directory}: steps {sorted(left)} are marked and could not be removed; run prune again")
  if not as_json:
    typer.echo(f"deleted {len(plan.removed)} steps, {size(freed)}")


def _print_plan(plan: Any, directory: Any, freed: int, dry_run: bool) -> None:
  now = datetime.datetime.now(datetime.timezone.utc)
  table = Table("step", "age", "size", "metrics", "health", "", "why", title=os.fspath(directory))
  for s in plan.steps:
    why = plan.reasons[s.step]
    health = "" if s.healthy is None else ("healthy" if s.healthy else "unhealthy")
    reason = ", ".join(why) if why else ("over budget" if s.step in plan.over_budget else "no rule keeps it")
    age = _age((now - s.time).total_seconds()) if s.time else "?"
    table.add_row(
      str(s.step), age, size(s.nbytes), escape(pairs(s.metrics)), health, "keep" if why else "remove", reason
    )
  console().print(table)
  for note in plan.notes:
    typer.echo(f"note: {note}")
  what = "would be removed" if dry_run else "to remove"
  typer.echo(f"{len(plan.removed)} of {len(plan.steps)} steps {what}, {size(freed)} freed")


def _age(seconds: float) -> str:
  for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
    if seconds >= length:
      return f"{seconds / length:.1f} {unit}"
  return f"{max(seconds, 0):.0f} s"


def pin(run: Run, step: StepArgument) -> None:
  """Keep a step whatever the retention rules say."""
  from ckpt_jax.policies import pins

  pins.pin(run, step)
  typer.echo(f"pinned step {step}")


def unpin(run: Run, step: StepArgument) -> None:
  """Give a step back to the retention rules; exit 1 if it was not pinned."""
  from ckpt_jax.policies import pins

  if not pins.unpin(run, step):
    typer.echo(f"error: step {step} is not pinned", err=True)
    raise typer.Exit(1)
  typer.echo(f"unpinned step {step}")
