"""`ckpt-jax prune`, `pin`, `unpin`: the live retention, asked by hand."""

from __future__ import annotations

import dataclasses
import datetime
import os
import re
from typing import Annotated, Any

import typer

from ckpt_jax.cli.common import Run, confirmed, fail, pairs, print_json, print_table
from ckpt_jax.config.units import duration_text, size_text
from ckpt_jax.errors import ConfigError

_PATIENCE = 24 * 3600.0  # a user who waits may press Ctrl-C: the marks stay, and the next prune goes on
StepArgument = Annotated[int, typer.Argument(help="A committed step.", show_default=False)]


def retention(config: Any, options: dict[str, Any]) -> Any:
  """The Retention of a configuration (or None), with what command line options set in its place.

  Args:
    config: a Config or None.
    options: Retention's fields, None where the user gave none; `best` is METRIC, METRIC:max or METRIC:max:3, and
      `thin` is DURATION or DURATION:PATH,PATH.

  Raises:
    ConfigError: if a value is wrong.
  """
  from ckpt_jax.policies.retention import Retention

  given = {name: value for name, value in options.items() if value is not None}
  if "best" in given:
    match = re.fullmatch(r"(.+?)(?::(min|max))?(?::(\d+))?", given["best"])
    if match is None:
      raise ConfigError("--keep-best: expected METRIC, METRIC:max or METRIC:max:3")
    given["best"] = {"metric": match[1], "mode": match[2] or "min", "n": int(match[3] or 1)}
  if "thin" in given:
    after, _, paths = given["thin"].partition(":")
    given["thin"] = {"after": after} | ({"keep": paths.split(",")} if paths else {})
  rules = Retention() if config is None else Retention.from_config(config.retention)
  return dataclasses.replace(rules, **given)


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
  thin: Annotated[
    str | None,
    typer.Option(metavar="AGE[:PATH,...]", help="Leave only these leaves (default: params) of older steps, e.g. 1d."),
  ] = None,
  config: Annotated[
    str | None, typer.Option(help="A YAML file whose rules and price hold where no option does.")
  ] = None,
  price: Annotated[float | None, typer.Option(help="Of a GiB-month, in your currency.")] = None,
  dry_run: Annotated[bool, typer.Option("--dry-run", "-n", help="Show what would go; change nothing.")] = False,
  yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before deleting.")] = False,
  as_json: Annotated[bool, typer.Option("--json", help="Print JSON; deletes only with --yes.")] = False,
) -> None:
  """Delete the steps that no rule keeps: a step stays if any rule keeps it, as in restic's forget."""

  from ckpt_jax.config import load_config
  from ckpt_jax.rewrite.swap import finish_rewrites

  settings = None if config is None else load_config(config)
  options = {
    "last": keep_last,
    "hourly": keep_hourly,
    "daily": keep_daily,
    "weekly": keep_weekly,
    "monthly": keep_monthly,
    "within": keep_within,
    "every_steps": keep_every_steps,
    "best": keep_best,
    "budget": budget,
    "thin": thin,
  }
  try:
    rules = retention(settings, options)
  except ConfigError as e:
    raise typer.BadParameter(str(e)) from None
  if rules.keeps_all and rules.thin is None:
    raise typer.BadParameter("no rule given; name at least one, e.g. --keep-last 3 (or --dry-run with it to look)")
  if price is None and settings is not None:
    price = settings.storage.price_per_gib_month
  from ckpt_jax.run.steps import DELETING, noted_steps, run_directory
  from ckpt_jax.save.retention import plan_pruning

  directory = run_directory(run)
  going = not dry_run and (yes or not as_json)
  if going:
    finish_rewrites(directory)
  plan = plan_pruning(run, rules)
  if not plan.steps and not noted_steps(directory, DELETING):
    fail(f"{directory}: no committed checkpoint; check the path")
  going = going and (yes or bool(plan.removed or plan.thinned))
  if not as_json and plan.steps:
    _print_plan(plan, directory, price, dry_run)
  if not going:
    if as_json:
      print_json(_as_json(plan, price) | {"dry_run": True})
    return
  what = [f"delete {len(plan.removed)}"] * bool(plan.removed) + [f"thin {len(plan.thinned)}"] * bool(plan.thinned)
  if not confirmed(f"{' and '.join(what).capitalize()} of {len(plan.steps)} steps?", yes=yes):
    fail("nothing deleted")
  done = _carry_out(plan, rules, directory)
  if as_json:
    told = {"dry_run": False, "removed": done.deleted, "thinned": done.thinned, "nbytes_freed": done.nbytes}
    print_json(_as_json(plan, price) | told | {"failed": done.failed})
  elif done.deleted or done.thinned or not done.failed:
    thinned = f", thinned {len(done.thinned)}" if done.thinned else ""
    steps = "1 step" if len(done.deleted) == 1 else f"{len(done.deleted)} steps"
    typer.echo(f"deleted {steps}{thinned}, {size_text(done.nbytes)}")
  if done.failed:
    reasons = "; ".join(f"step {step}: {why}" for step, why in sorted(done.failed.items()))
    fail(f"{directory}: not everything could be removed: {reasons}. Run prune again once that is mended")


@dataclasses.dataclass(frozen=True)
class _Done:
  """What prune has done: the steps that are gone from the storage, those that are thinned, bytes, and what failed."""

  deleted: list[int]
  thinned: list[int]
  nbytes: int
  failed: dict[int, str]


def _carry_out(plan: Any, rules: Any, directory: Any) -> _Done:
  from ckpt_jax.errors import CheckpointError
  from ckpt_jax.rewrite.thin import thin_step
  from ckpt_jax.run.deletion import StepDeleter
  from ckpt_jax.run.steps import DELETING, noted_steps, step_path

  deleter = StepDeleter(directory, timeout=_PATIENCE)
  before = set(deleter.resume())
  deleter.delete_steps(
    [s.step for s in plan.removed], {s.step: rules.why_removed(s.step, plan.over_budget) for s in plan.removed}
  )
  thinned, failed = [], {}
  for step in plan.thinned:
    try:
      if thin_step(directory, step, rules.thin.keep, swapping=deleter.moving()):
        thinned.append(step)
    except (CheckpointError, OSError) as e:
      failed[step] = str(e)
  deleter.finish()
  there = {s.step for s in plan.removed if step_path(directory, s.step).exists()}
  for step in there | (before & noted_steps(directory, DELETING)):
    failed[step] = deleter.failed.get(step, "it is still there")
  gone = [s for s in plan.removed if s.step not in there]
  nbytes = {s.step: s.nbytes for s in plan.steps}
  freed = sum(s.nbytes for s in gone) + sum(nbytes[step] - plan.thinned[step] for step in thinned)
  return _Done([s.step for s in gone], sorted(thinned), freed, failed)


def _as_json(plan: Any, price: float | None) -> dict[str, Any]:
  return {
    "steps": [
      {"step": s.step, "time": s.time, "nbytes": s.nbytes, "metrics": s.metrics, "healthy": s.healthy}
      | {"resumable": s.resumable, "kept_by": list(plan.reasons[s.step]), "over_budget": s.step in plan.over_budget}
      | {"thinned_to_nbytes": plan.thinned.get(s.step)}
      for s in plan.steps
    ],
    "kept": [s.step for s in plan.steps if plan.reasons[s.step]],
    "removed": [s.step for s in plan.removed],
    "thinned": sorted(plan.thinned),
    "nbytes_freed": plan.freed_nbytes,
    "nbytes_kept": plan.kept_nbytes,
    "cost_per_month": None if price is None else monthly_cost(plan.kept_nbytes, price),
    "cost_per_month_freed": None if price is None else monthly_cost(plan.freed_nbytes, price),
    "notes": list(plan.notes),
  }


def monthly_cost(nbytes: float, price: float) -> float:
  """What bytes cost a month at a price for a GiB-month."""
  return nbytes / 2**30 * price


def _print_plan(plan: Any, directory: Any, price: float | None, dry_run: bool) -> None:
  now = datetime.datetime.now(datetime.timezone.utc)
  rows = []
  for s in plan.steps:
    why = plan.reasons[s.step]
    health = "" if s.healthy is None else ("healthy" if s.healthy else "unhealthy")
    reason = ", ".join(why) if why else ("over budget" if s.step in plan.over_budget else "no rule keeps it")
    age = duration_text(max((now - s.time).total_seconds(), 0)) if s.time else "?"
    what, size = "keep" if why else "remove", size_text(s.nbytes)
    if not s.resumable:
      size += " (thinned)"
    if s.step in plan.thinned:
      what, size = "thin", f"{size} -> {size_text(plan.thinned[s.step])}"
    rows.append([str(s.step), age, size, pairs(s.metrics), health, what, reason])
  print_table(["step", "age", "size", "metrics", "health", "", "why"], rows, title=os.fspath(directory))
  for note in plan.notes:
    typer.echo(f"note: {note}")
  thinned = ""
  if plan.thinned:
    thinned = f" and {len(plan.thinned)} {'would be thinned' if dry_run else 'to thin'}"
  typer.echo(
    f"{len(plan.removed)} of {len(plan.steps)} steps {'would be removed' if dry_run else 'to remove'}{thinned}, "
    f"{size_text(plan.freed_nbytes)} freed, {size_text(plan.kept_nbytes)} stay"
  )
  if price is not None:
    kept, freed = (f"{monthly_cost(n, price):,.2f}" for n in (plan.kept_nbytes, plan.freed_nbytes))
    typer.echo(f"a month: {kept} for what stays, {freed} less than now")


def pin(run: Run, step: StepArgument) -> None:
  """Keep a step whatever the retention rules say."""
  from ckpt_jax.run import pins

  pins.pin(run, step)
  typer.echo(f"pinned step {step}")


def unpin(run: Run, step: StepArgument) -> None:
  """Give a step back to the retention rules; exit 1 if it was not pinned."""
  from ckpt_jax.run import pins

  if not pins.unpin(run, step):
    typer.echo(f"error: step {step} is not pinned", err=True)
    raise typer.Exit(1)
  typer.echo(f"unpinned step {step}")
