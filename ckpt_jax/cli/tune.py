"""`ckpt-jax tune`: from a plan to a configuration file, by real saves and restores."""

from __future__ import annotations

import dataclasses
import functools
import os
from typing import Annotated, Any

import typer

from ckpt_jax.cli.common import Json, duration, grouped, named_function, print_json, run_at_step, size
from ckpt_jax.config import Config, load_config
from ckpt_jax.config.units import duration_text
from ckpt_jax.errors import CheckpointError, ConfigError


@dataclasses.dataclass(frozen=True)
class StateOptions:
  """The state to tune for."""

  like: Annotated[str | None, typer.Option(metavar="RUN@STEP", help="Tune for the state of this step.")] = None
  state: Annotated[
    str | None, typer.Option(metavar="MODULE:FUNCTION", help="Tune for the state that this function returns.")
  ] = None
  max_bytes: Annotated[
    int, size(help="Save and restore at most this much of the state in a trial (default: 1GiB).")
  ] = 1 << 30

  def make(self) -> tuple[Any, str]:
    """The state, and its description for the file."""
    from ckpt_jax.bench.tune import saved_state, synthetic_state
    from ckpt_jax.run.steps import run_directory, step_directory

    if self.like and self.state:
      raise ConfigError("--like and --state exclude each other; give one")
    if self.state:
      return _called(self.state), self.state
    if not self.like:
      return synthetic_state()
    run, step = run_at_step(self.like)
    return saved_state(step_directory(run_directory(run), step), self.max_bytes), self.like


@grouped
def tune(
  path: Annotated[str, typer.Argument(help="Where runs will be: a directory, gs://..., s3://...", show_default=False)],
  options: StateOptions,
  output: Annotated[str | None, typer.Option("-o", "--output", metavar="FILE.yaml", help="Write it here.")] = None,
  budget: Annotated[float, duration(help="Time to measure for (default: 2m).")] = 120,
  config: Annotated[str | None, typer.Option(help="A YAML file with settings that stay.")] = None,
  pack: Annotated[bool, typer.Option("--pack", help="Packing of small arrays may be chosen.")] = False,
  explain: Annotated[
    bool, typer.Option("--explain", "--dry-run", help="Print the plan with its reasons; save nothing.")
  ] = False,
  as_json: Json = False,
) -> None:
  """Find the settings that save and restore a state fastest on a storage; write them with the measurements."""
  from ckpt_jax.bench.tune import Task
  from ckpt_jax.bench.tune import tune as search
  from ckpt_jax.observe.progress import Bar
  from ckpt_jax.tuning.plan import make_plan
  from ckpt_jax.tuning.search import table

  user = load_config(config) if config else Config()
  if pack:
    user = user.model_copy(update={"layout": user.layout.model_copy(update={"pack": "auto"})})
  if output and not explain:
    _check_writable(output)
  state, what = options.make()
  plan = make_plan(state, path, config=user)
  if explain:
    print_json(plan.to_dict()) if as_json else typer.echo(plan.explain())
    return
  progress = functools.partial(typer.echo, err=True)
  progress(f"tuning for {what}, for {duration_text(budget)} (--budget)")
  tuned, text = search(Task(path, state, what, user, pack), plan, budget, options.max_bytes, progress, Bar())
  if output:
    with open(output, "w", encoding="utf-8") as file:
      file.write(text)
  if as_json:
    print_json(_as_json(tuned) | {"file": output})
  elif output:
    typer.echo("\n".join(table(tuned)))
    typer.echo(f"{output}: written; Checkpointer(run, config={output!r}) loads it")
  else:
    typer.echo(text)


def _as_json(tuned: Any) -> dict[str, Any]:
  return {
    "config": tuned.config.to_dict(),
    "taken": tuned.best.name,
    "seconds": tuned.seconds,
    "measured": [
      {"settings": c.name, "changes": c.changes, "rounds": len(c.samples)}
      | {field: c.median(field) for field in ("blocking_s", "commit_s", "restore_s", "nbytes")}
      for c in tuned.candidates
    ],
  }


def _check_writable(output: str) -> None:
  folder = os.path.dirname(os.path.abspath(output))
  if os.path.isdir(output) or not os.path.isdir(folder) or not os.access(folder, os.W_OK):
    raise ConfigError(f"-o {output}: cannot be written there; give the name of a file in a directory that exists")


def _called(text: str) -> Any:
  import jax

  function = named_function("--state", text)
  try:
    state = function()
  except Exception as e:
    raise CheckpointError(
      f"--state {text}: {function.__name__}() failed: {type(e).__name__}: {e}", topic="configuration"
    ) from None
  if not any(hasattr(x, "nbytes") for x in jax.tree.leaves(state)):
    raise ConfigError(f"--state {text}: {function.__name__}() returned no arrays; it must return the state to save")
  return state
