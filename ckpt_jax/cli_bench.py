"""`ckpt-jax bench`: measurements side by side with raw Orbax and others. One function a subcommand."""

from __future__ import annotations

import json
import os
from typing import Annotated

import typer

from ckpt_jax.cli_common import NearestName

bench = typer.Typer(cls=NearestName, no_args_is_help=True, help="Measure side by side with raw Orbax.")


@bench.command("object-stores")
def object_stores(
  output: Annotated[str | None, typer.Option("-o", "--output", help="Write the JSON into this file.")] = None,
  repeats: Annotated[int, typer.Option(min=1, help="Saves while requests fail.")] = 10,
  megabytes: Annotated[int, typer.Option(min=1, help="Size of the state, 10**6 bytes.")] = 268,
) -> None:
  """Count requests, save while one request in five fails, compare s3:// with an s3fs mount; emulated servers."""
  from ckpt_jax.bench.object_stores import run

  found = json.dumps(run(repeats, megabytes, lambda what: typer.echo(what, err=True)), indent=1)
  if output:
    with open(output, "w", encoding="utf-8") as file:
      file.write(found + "\n")
  else:
    typer.echo(found)


@bench.command()
def goodput(
  output: Annotated[str, typer.Option("-o", "--output", help="JSON; a round of another seed is added to it.")],
  kills: Annotated[int, typer.Option(min=1, help="Interruptions in this round.")] = 20,
  seed: Annotated[int, typer.Option(help="Of the lives; a round of the same seed is replaced.")] = 0,
) -> None:
  """Kill trainers again and again: YoungDaly beside half and double its interval, and what the simulator predicts."""
  from ckpt_jax.bench import goodput as bench_goodput

  rounds = []
  if os.path.exists(output):
    with open(output, encoding="utf-8") as file:
      rounds = [r for r in json.load(file)["rounds"] if r["seed"] != seed]
  rounds.append(bench_goodput.measure(kills, seed, lambda what: typer.echo(what, err=True)))
  told = bench_goodput.summary(rounds)
  with open(output, "w", encoding="utf-8") as file:
    file.write(json.dumps({"summary": told, "rounds": rounds}, indent=1) + "\n")
  typer.echo(json.dumps(told, indent=1))


@bench.command("policies")
def policies(
  output: Annotated[str | None, typer.Option("-o", "--output", help="Write the JSON into this file.")] = None,
  steps: Annotated[int, typer.Option(min=10, help="Steps in the run.")] = 5000,
  repeats: Annotated[int, typer.Option(min=1, help="Times that each is measured.")] = 5,
) -> None:
  """Deciding, listing, opening and saving in a run of thousands of steps."""
  from ckpt_jax.bench.policies import measure

  found = json.dumps(measure(steps, repeats, lambda what: typer.echo(what, err=True)), indent=1)
  if output:
    with open(output, "w", encoding="utf-8") as file:
      file.write(found + "\n")
  else:
    typer.echo(found)
