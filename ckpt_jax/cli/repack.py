"""`ckpt-jax repack`: a step's small arrays into slabs, or out of them."""

from __future__ import annotations

import enum
from typing import Annotated

import typer

from ckpt_jax.cli.common import Run, Step


class Pack(enum.StrEnum):
  """Whether small arrays are stored side by side, in slabs."""

  ON = "on"
  OFF = "off"


def repack(
  run: Run,
  step: Step,
  pack: Annotated[Pack, typer.Option(help="off: an ordinary Orbax checkpoint; on: small arrays side by side.")],
) -> None:
  """Rewrite a step as an ordinary Orbax checkpoint, or packed: a new copy, compared bit by bit, then swapped."""
  from ckpt_jax.observe.progress import Bar
  from ckpt_jax.rewrite.repack import repack_step
  from ckpt_jax.run.steps import run_directory

  moved = repack_step(run_directory(run), step, pack=pack is Pack.ON, on_progress=Bar())
  if moved:
    place = "into slabs" if pack is Pack.ON else "out of slabs"
    typer.echo(f"step {step}: moved {moved} arrays {place}, compared bit by bit")
  else:
    what = "has no small arrays that are not packed" if pack is Pack.ON else "is an ordinary Orbax checkpoint"
    typer.echo(f"step {step} {what} already; nothing to do")
