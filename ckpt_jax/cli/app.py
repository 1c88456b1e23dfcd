"""The `ckpt-jax` command: all commands together, and how they end.

Exit codes: 0 fine, 1 a finding (no checkpoint, damage), 2 wrong usage.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from ckpt_jax.cli import (
  bench,
  convert,
  diff,
  estimate,
  explain,
  export,
  probe,
  prune,
  quarantine,
  repack,
  report,
  show,
  simulate,
  tree,
  tune,
  verify,
)
from ckpt_jax.cli.common import NearestName, PlainCommand, error
from ckpt_jax.errors import CheckpointError, ConfigError, StorageError
from ckpt_jax.version import __version__

app = typer.Typer(
  cls=NearestName,
  no_args_is_help=True,
  context_settings={"help_option_names": ["-h", "--help"]},
  pretty_exceptions_enable=False,
  help="Checkpoints of JAX and Flax trainers: look at them, check them, prune, tune, measure.",
)


def _version(show: bool) -> None:
  if show:
    typer.echo(f"ckpt-jax {__version__}")
    raise typer.Exit


@app.callback()
def _options(
  version: Annotated[
    bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
  ] = False,
) -> None:
  pass


app.command("ls", cls=PlainCommand)(show.list_steps)
for command in (
  tree.show,
  show.who,
  diff.diff,
  probe.probe,
  prune.prune,
  prune.pin,
  prune.unpin,
  estimate.estimate,
  simulate.simulate,
  verify.verify,
  verify.rollback,
  tune.tune,
  repack.repack,
  convert.convert,
  export.export,
  report.report,
  explain.explain,
):
  app.command(cls=PlainCommand)(command)
app.command("restore-quarantined", cls=PlainCommand)(quarantine.restore_quarantined)
app.add_typer(bench.bench, name="bench")


def main() -> None:
  """Runs the command line. Every expected failure is a message and an exit code, never a traceback."""
  try:
    app()
  except ConfigError as e:  # an argument that makes no sense
    error(e)
    sys.exit(2)
  except CheckpointError as e:
    error(e)
  except BrokenPipeError:
    # `ckpt-jax ls RUN | head -1`: the reader has what it wanted. Python would complain once more at exit.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(0)
  except OSError as e:
    error(StorageError(f"{e.filename or ''}: {e.strerror or e}"))
  except Exception as e:  # a bug: CKPT_JAX_TRACEBACK=1 shows where
    if os.environ.get("CKPT_JAX_TRACEBACK"):
      raise
    error(CheckpointError(f"{type(e).__name__}: {' '.join(str(e).split())[:500]}"))
  sys.exit(1)
