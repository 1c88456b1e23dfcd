"""`ckpt-jax convert`: checkpoints of other programs become steps of a run."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from ckpt_jax.cli.common import fail


def convert(
  source: Annotated[
    str, typer.Argument(help="Files of flax.training.checkpoints, an Orbax checkpoint, or a run.", show_default=False)
  ],
  run: Annotated[str, typer.Argument(help="The run that is made: a path, gs://...", show_default=False)],
  step: Annotated[
    int | None, typer.Option(help="Of several the one to convert; for one without a number, the number it gets.")
  ] = None,
  item: Annotated[str | None, typer.Option(help="Of steps with several items, the one that holds the state.")] = None,
  config: Annotated[str | None, typer.Option(help="A YAML file with the settings of the new run.")] = None,
) -> None:
  """Make checkpoints of flax, or of Orbax without step numbers, steps of a new run, which Checkpointer opens."""
  from ckpt_jax.config import load_config
  from ckpt_jax.inference.convert import convert as make_steps
  from ckpt_jax.run.steps import run_directory

  settings = None if config is None else load_config(config)
  done = 0
  for one in make_steps(source, run, step=step, item=item, config=settings):
    typer.echo(f"{one.path} -> step {one.step}")
    done += 1
  if not done:
    fail(f"{source}: nothing to convert")
  typer.echo(f"{done} step{'s' * (done != 1)} in {os.fspath(run_directory(run))}")
