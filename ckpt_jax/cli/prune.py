"""`ckpt-jax prune`, `pin`, `unpin`: a run's retention, applied by hand."""

from __future__ import annotations

import datetime
from typing import Annotated, Any

import typer

from ckpt_jax.cli.common import Run, Step, Yes, confirmed, fail, grouped, print_json, print_table
from ckpt_jax.cli.retention import RetentionOptions
from ckpt_jax.config.units import count, duration_text, pairs_text, size_text
from ckpt_jax.errors import ConfigError, NoCheckpointError


@grouped
def prune(
  run: Run,
  options: RetentionOptions,
  keep_best: Annotated[
    str | None, typer.Option(metavar="METRIC[:min|max][:N]", help="Keep the N best by a metric, e.g. loss:min:2.")
  ] = None,
  dry_run: Annotated[bool, typer.Option("--dry-run", "-n", help="Show what would be done; change nothing.")] = False,
  yes: Yes = False,
  as_json: Annotated[bool, typer.Option("--json", help="Print JSON; deletes only with --yes.")] = False,
) -> None:
  """Delete the steps that no rule keeps: a step stays if any rule keeps it, as in restic's forget."""
  from ckpt_jax.observe.progress import Bar
  from ckpt_jax.rewrite.pruning import plan_pruning
  from ckpt_jax.rewrite.swap import finish_rewrites
  from ckpt_jax.run.steps import DELETING, noted_steps, run_directory, why_no_step

  rules = options.rules(keep_best)
  if rules.keeps_all and rules.thin is None:
    raise ConfigError("no rule given; name at least one, e.g. --keep-last 3 (with --dry-run to look first)")
  directory = run_directory(run)
  changes = not dry_run and (yes or not as_json)
  if changes:
    finish_rewrites(directory)
  plan = plan_pruning(directory, rules)
  if not plan.steps and not noted_steps(directory, DELETING):
    fail(NoCheckpointError(why_no_step(directory)))
  if not as_json and plan.steps:
    _print_plan(plan, options, dry_run)
  if not changes or not (yes or plan.removed or plan.thinned):
    if as_json:
      print_json(_as_json(plan, options) | {"dry_run": True})
    return
  what = [f"delete {len(plan.removed)}"] * bool(plan.removed) + [f"thin {len(plan.thinned)}"] * bool(plan.thinned)
  if not confirmed(f"{' and '.join(what).capitalize()} of {count(len(plan.steps))}?", yes=yes):
    fail("nothing deleted")
  thinned, failed = plan.carry_out(Bar())
  removed = [step for step in plan.removed if step not in failed]
  freed = plan.freed_nbytes(without={*plan.removed, *plan.thinned} - {*removed, *thinned})
  if as_json:
    done = {"dry_run": False, "removed": removed, "thinned": thinned, "nbytes_freed": freed, "failed": failed}
    print_json(_as_json(plan, options) | done)
  elif removed or thinned or not failed:
    also = f", thinned {len(thinned)}" if thinned else ""
    typer.echo(f"deleted {count(len(removed))}{also}, {size_text(freed)}")
  if failed:
    reasons = "; ".join(f"step {step}: {why}" for step, why in sorted(failed.items()))
    fail(f"{directory}: not everything could be removed: {reasons}. Remove the cause and run prune again")


def _as_json(plan: Any, options: RetentionOptions) -> dict[str, Any]:
  return {
    "steps": [
      {"step": s.step, "time": s.time, "nbytes": s.nbytes, "metrics": s.metrics, "healthy": s.healthy}
      | {"resumable": s.resumable, "kept_by": list(plan.reasons[s.step]), "over_budget": s.step in plan.over_budget}
      | {"thinned_to_nbytes": plan.thinned.get(s.step)}
      for s in plan.steps
    ],
    "kept": [s.step for s in plan.steps if plan.reasons[s.step]],
    "removed": plan.removed,
    "thinned": sorted(plan.thinned),
    "nbytes_freed": plan.freed_nbytes(),
    "nbytes_kept": plan.kept_nbytes,
    "cost_per_month": options.monthly_cost(plan.kept_nbytes),
    "cost_per_month_freed": options.monthly_cost(plan.freed_nbytes()),
    "notes": list(plan.notes),
  }


def _print_plan(plan: Any, options: RetentionOptions, dry_run: bool) -> None:
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
    rows.append([str(s.step), age, size, pairs_text(s.metrics), health, what, reason])
  print_table(["step", "age", "size", "metrics", "health", "", "why"], rows, title=str(plan.directory))
  for note in plan.notes:
    typer.echo(f"note: {note}")
  thinned = f" and {len(plan.thinned)} {'would be thinned' if dry_run else 'to thin'}" if plan.thinned else ""
  kept, freed = plan.kept_nbytes, plan.freed_nbytes()
  typer.echo(
    f"{len(plan.removed)} of {count(len(plan.steps))} {'would be removed' if dry_run else 'to remove'}{thinned}, "
    f"{size_text(freed)} freed, {size_text(kept)} stay"
  )
  if (cost := options.monthly_cost(kept)) is not None:
    less = options.money(options.monthly_cost(freed) or 0.0)
    typer.echo(f"a month: {options.money(cost)} for what stays, {less} less than now")


def pin(run: Run, step: Step) -> None:
  """Keep a step whatever the retention rules say."""
  from ckpt_jax.run import pins

  pins.pin(run, step)
  typer.echo(f"pinned step {step}")


def unpin(run: Run, step: Step) -> None:
  """Give a step back to the retention rules; exit 1 if it was not pinned."""
  from ckpt_jax.run import pins

  if not pins.unpin(run, step):
    fail(f"step {step} is not pinned")
  typer.echo(f"unpinned step {step}")
