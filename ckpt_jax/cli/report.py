"""`ckpt-jax report`: one HTML page about a run."""

from __future__ import annotations

from typing import Annotated

import typer

from ckpt_jax.cli.common import Json, Run, print_json
from ckpt_jax.errors import ConfigError


def report(
  run: Run,
  output: Annotated[str, typer.Option("-o", "--output", metavar="FILE.html", help="Write it here.")] = "report.html",
  as_json: Json = False,
) -> None:
  """Write a page about a run: its saves, restarts, goodput, retention, health, sizes, storage and plan."""
  from ckpt_jax.observe.report import as_json as as_data
  from ckpt_jax.observe.report import gather, page

  facts = gather(run)
  if as_json:
    print_json(as_data(facts))
    return
  try:
    with open(output, "w", encoding="utf-8") as file:
      file.write(page(facts))
  except OSError as e:
    raise ConfigError(f"-o {output}: cannot be written: {e.strerror}") from None
  typer.echo(f"{output}: written; open it in a browser")
