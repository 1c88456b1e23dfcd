"""`ckpt-jax convert`: checkpoints of other programs become steps of a run."""

from __future__ import annotations

from typing import Annotated

import typer

from ckpt_jax.cli.common import fail
from ckpt_jax.config.units import count
from ckpt_jax.errors import NoCheckpointError


def convert(
  source: Annotated[
    str, typer.Argument(help="Files of flax.training.checkpoints, an Orbax checkpoint, or a run.", show_default=False)
  ],
  run: Annotated[str, typer.Argument(help="The run to make: a path, gs://...", show_default=False)],
  step: Annotated[
    int | None, typer.Option(help="The one of several to convert; the number of one that has none.")
  ] = None,
  item: Annotated[str | None, typer.Option(help="The item that holds the state, in steps with several.")] = None,
  config: Annotated[str | None, typer.Option(help="A YAML file with the settings of the new run.")] = None,
) -> None:
  """Make checkpoints of flax, or of Orbax without step numbers, steps of a new run, which Checkpointer opens."""
  from ckpt_jax.config import load_config
  from ckpt_jax.inference.convert import convert as make_steps
  from ckpt_jax.run.steps import run_directory

  settings = None if config is None else load_config(config)
  steps = 0
  for made in make_steps(source, run, step=step, item=item, config=settings):
    typer.echo(f"{made.path} -> step {made.step}")
    steps += 1
  if not steps:
    fail(NoCheckpointError(f"{source}: nothing to convert", topic="convert"))
  typer.echo(f"{count(steps)} in {run_directory(run)}")
