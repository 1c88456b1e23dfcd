"""`ckpt-jax repack`: small arrays of a step into slabs, or out of them."""

from __future__ import annotations

import enum
from typing import Annotated, Any

import typer

from ckpt_jax.cli.common import Run, fail


class Pack(enum.StrEnum):
  """Whether small arrays lie in slabs."""

  ON = "on"
  OFF = "off"


def repack(
  run: Run,
  step: Annotated[int, typer.Argument(help="A committed step.", show_default=False)],
  pack: Annotated[Pack, typer.Option(help="off: an ordinary Orbax checkpoint; on: small arrays side by side.")],
) -> None:
  """Rewrite a step as an ordinary Orbax checkpoint, or packed: a new copy, compared bit by bit, then swapped."""
  from ckpt_jax.layout import contents
  from ckpt_jax.rewrite.repack import check_moved, moving_leaves, repack_item
  from ckpt_jax.rewrite.swap import finish_rewrites, rewrite_step
  from ckpt_jax.run.steps import our_metadata, run_directory, step_directory, step_info

  directory = run_directory(run)
  on = pack is Pack.ON
  item = contents.item_directory(step_directory(directory, step))
  moving = moving_leaves(item, pack=on)
  if not moving:
    what = "has no small arrays that are not packed" if on else "is an ordinary Orbax checkpoint"
    typer.echo(f"step {step} {what} already; nothing to do")
    return

  def write(old: Any, new: Any) -> dict[str, Any]:
    item = contents.item_directory(old)
    repack_item(item, new / item.name, pack=on)
    ours = our_metadata(old)
    leaves = contents.saved_leaves(old)
    known = {
      "metrics": step_info(directory, step).metrics,
      "nbytes": sum(leaf.nbytes for leaf in leaves),
      "leaves": len(leaves),
    }
    return known | ours

  def check(old: Any, new: Any) -> None:
    item = contents.item_directory(old)
    check_moved(item, new / item.name, pack=on)

  finish_rewrites(directory)
  if not rewrite_step(directory, step, write, check):
    fail(f"{directory}: step {step} was deleted or saved anew meanwhile")
  place = "into slabs" if on else "out of slabs"
  typer.echo(f"step {step}: moved {len(moving)} arrays {place}, compared bit by bit")
