"""`ckpt-jax export`: the parameters of a step, for inference."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from ckpt_jax.cli.common import Json, Run, grouped, print_json, print_table, size
from ckpt_jax.config.units import count, size_text


@dataclasses.dataclass(frozen=True)
class Form:
  """The options that say what the files hold."""

  dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16; `same`: as it was saved.")] = "bfloat16"
  quantize: Annotated[str | None, typer.Option(help="int8 or int4, for matrices.")] = None
  group: Annotated[int, typer.Option(help="Inputs that share a scale of int4: 32, 64 or 128.")] = 64
  keep: Annotated[list[str] | None, typer.Option(help="Leaves that are not quantised: a path or a glob.")] = None
  format: Annotated[str, typer.Option(help="orbax or safetensors.")] = "orbax"
  rename: Annotated[list[str] | None, typer.Option(help="PATH=NAME: names in safetensors.")] = None
  shard_size: Annotated[int | None, size("--shard-size", help="Largest file of safetensors; default: 5GB.")] = None


@dataclasses.dataclass(frozen=True)
class Source:
  """The options that say what is exported."""

  subtree: Annotated[
    str | None, typer.Option(help="The node to export; `.` for all. Default: the parameters.", show_default=False)
  ] = None
  ema: Annotated[bool, typer.Option("--ema", help="Export the averaged parameters.")] = False
  item: Annotated[str | None, typer.Option(help="The item that holds the state, in steps with several.")] = None


@grouped
def export(
  run: Run,
  step: Annotated[str, typer.Argument(help="A committed step, `latest`, or `best:METRIC`.", show_default=False)],
  out: Annotated[str, typer.Argument(help="A new directory: a path, gs://...", show_default=False)],
  form: Form,
  source: Source,
  overflow: Annotated[bool, typer.Option("--overflow", help="Let numbers too large for float16 become inf.")] = False,
  overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is at OUT.")] = False,
  memory: Annotated[int | None, size("--memory", help="Bytes of values in memory at a time; default: 128MiB.")] = None,
  evaluate: Annotated[
    str | None, typer.Option("--eval", help="MODULE:FUNCTION, given parameters, returns a loss.", show_default=False)
  ] = None,
  as_json: Json = False,
) -> None:
  """Write the parameters of a step for inference: cast or quantised, for Orbax or as safetensors; resumable."""
  from ckpt_jax.inference.export import WORTH_SAYING
  from ckpt_jax.inference.export import export as write
  from ckpt_jax.job.progress import reported
  from ckpt_jax.observe.progress import Bar

  options = vars(form) | vars(source) | {"memory": memory, "evaluate": evaluate}
  given = {name: value for name, value in options.items() if value is not None}
  given |= {"dtype": None if form.dtype == "same" else form.dtype, "overflow": overflow, "overwrite": overwrite}
  far = [0.0, 0.0]  # bytes read, and in all

  def read(*bytes_: float) -> None:
    far[:] = bytes_

  with reported(Bar(), f"exporting step {step}", lambda: far[1] or None, lambda: far[0]):
    report = write(run, step, out, progress=read, **given)
  if as_json:
    print_json(dataclasses.asdict(report) | {"by_group": {g: vars(loss) for g, loss in report.by_group().items()}})
    return
  rows = [(group, f"{loss.largest:.3g}", f"{loss.relative:.2%}") for group, loss in report.by_group().items()]
  print_table(("group", "largest error", "of the largest value"), rows)
  share = report.nbytes / max(1, report.source_nbytes)
  typer.echo(
    f"{report.path}: {count(report.leaves, 'leaf', 'leaves')} of {report.node or 'the state'} at step {report.step}, "
    f"{size_text(report.nbytes)}, {share:.0%} of {size_text(report.source_nbytes)}"
    + (f"; {count(len(report.quantized), 'matrix', 'matrices')} quantised" if report.quantized else "")
  )
  for path, dtype in report.left_out.items():
    typer.echo(f"left out: {path} ({dtype})")
  if report.change is not None:
    much = f", more than {WORTH_SAYING:.0%}" if not abs(report.change) <= WORTH_SAYING else ""
    typer.echo(f"loss {report.loss_before:.4f} before, {report.loss_after:.4f} after: {report.change:+.2%}{much}")
