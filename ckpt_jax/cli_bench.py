"""`ckpt-jax bench`: measurements side by side with raw Orbax and others. One function a subcommand."""

from __future__ import annotations

import json
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
