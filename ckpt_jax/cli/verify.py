"""`ckpt-jax verify` and `ckpt-jax rollback`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ckpt_jax.cli import quarantine
from ckpt_jax.cli.common import Json, Run, Yes, confirmed, fail, print_json, print_table
from ckpt_jax.config.units import size_text

if TYPE_CHECKING:
  from ckpt_jax.restore.verify import Verdict


def verify(
  run: Annotated[str, typer.Argument(help="A run, or an export: a path, gs://...", show_default=False)],
  step: Annotated[int | None, typer.Argument(help="Default: all committed steps.", show_default=False)] = None,
  as_json: Json = False,
) -> None:
  """Read steps, or an export, and compare every bit with what was written; exit 1 if anything is wrong."""
  from ckpt_jax.observe.progress import Bar
  from ckpt_jax.restore.verify import verdicts
  from ckpt_jax.run.quarantine import listed
  from ckpt_jax.run.steps import run_directory

  found = list(verdicts(run, step, Bar()))
  findings = [finding for verdict in found for finding in verdict.findings]
  aside = listed(run_directory(run)) if step is None else []
  if as_json:
    unread = {"leaves": 0, "nbytes": 0, "fingerprints": 0, "how_far": "not read: it does not count", "findings": []}
    print_json([*found, *(unread | a for a in quarantine.as_json(run, aside))])
  else:
    rows = [(str(v.step), _state(v), str(v.leaves), size_text(v.nbytes), v.how_far) for v in found]
    print_table(("step", "", "leaves", "size", "checked"), rows)
    if findings:
      wrong = [(str(f.step), f.kind, f.leaf, f.file, f.message) for f in findings]
      print_table(("step", "kind", "leaf", "file", "what is wrong"), wrong)
    quarantine.show(run, aside, in_full=True)
  if findings:
    raise typer.Exit(1)


def _state(verdict: Verdict) -> str:
  from ckpt_jax.restore.verify import DELETED, UNREADABLE

  if not verdict.findings:
    return "deleted" if verdict.how_far == DELETED else "sound"
  return "could not be read" if all(f.kind == UNREADABLE for f in verdict.findings) else "damaged"


def rollback(
  run: Run,
  step: Annotated[int, typer.Argument(help="The step that becomes the newest.", show_default=False)],
  delete: Annotated[bool, typer.Option("--delete", help="Delete the newer steps for good.")] = False,
  yes: Yes = False,
  as_json: Json = False,
) -> None:
  """Make an older step the newest one; no job may be writing the run."""
  from ckpt_jax.restore.rollback import deleted_by_rollback, place_of, roll_back
  from ckpt_jax.run.events import Quarantine
  from ckpt_jax.run.journal import record
  from ckpt_jax.run.steps import run_directory, step_directory

  directory = run_directory(run)
  if delete:
    step_directory(directory, step)  # fails before the question is asked
    newer = deleted_by_rollback(directory, step)
    steps = f"step{'s' * (len(newer) != 1)} {', '.join(map(str, newer))}"
    if newer and not confirmed(f"Delete {steps} for good?", yes=yes, stderr=as_json):
      fail("nothing deleted")
  newer = roll_back(directory, step, delete=delete)
  place = place_of(delete)
  record(directory, *(Quarantine(step=s, place=place, reason=f"rollback to step {step}") for s in newer))
  if as_json:
    print_json({"step": step, place: newer})
    return
  names = ", ".join(map(str, newer)) or "none"
  where = "deleted" if delete else f"in {directory}/.ckpt_jax/set_aside"
  typer.echo(f"step {step} is the newest; newer steps: {names}" + (f" ({where})" if newer else ""))
  if newer and not delete:
    typer.echo(f"the way back: {quarantine.way_back(run)}")
