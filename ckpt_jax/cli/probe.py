"""`ckpt-jax probe`: how fast a storage is."""

from __future__ import annotations

from typing import Annotated

import typer

from ckpt_jax.cli.common import Json, console, fail, print_json


def probe(
  path: Annotated[str, typer.Argument(help="Directory, gs://... or s3://...", show_default=False)],
  budget: Annotated[str, typer.Option(help="Time it may take.")] = "30s",
  max_bytes: Annotated[str, typer.Option(help="Bytes it may have stored at a time.")] = "4GiB",
  cached: Annotated[bool, typer.Option("--cached", help="Show the last measurement of this storage instead.")] = False,
  plot: Annotated[str | None, typer.Option(help="Draw the curves into this file (.png, .svg, .pdf).")] = None,
  as_json: Json = False,
) -> None:
  """Measure storage: throughput over streams, cost of a read over its size, latency of metadata operations."""
  from ckpt_jax.storage import probe as measure
  from ckpt_jax.storage.show import plot_profile, tables

  profile = measure.cached_profile(path) if cached else measure.probe(path, budget, max_bytes)
  if profile is None:
    fail(f"{path}: not measured on this host yet; leave out --cached")
  if plot:
    plot_profile(profile, plot)
  if as_json:
    print_json(profile.to_dict() | {"age_s": profile.age_s})
    return
  for table in tables(profile):
    console().print(table)
