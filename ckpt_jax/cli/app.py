"""The `ckpt-jax` command: all commands together, and how they end.

Exit codes: 0 fine, 1 a finding (no checkpoint, damage), 2 wrong usage.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
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


# In the order of `--help`: the command, its name if it is not the function's, an example, which a test runs.
_COMMANDS: tuple[tuple[Callable[..., None], str | None, str], ...] = (
  (show.list_steps, "ls", "ls runs/a --all"),
  (tree.show, None, "show runs/a 200 --only params --stored"),
  (show.who, None, "who runs/a 200"),
  (diff.diff, None, "diff runs/a@100 @200 --only params"),
  (probe.probe, None, "probe runs --budget 3s"),
  (prune.prune, None, "prune runs/a --keep-last 3 --keep-daily 7 --dry-run"),
  (prune.pin, None, "pin runs/a 100"),
  (prune.unpin, None, "unpin runs/a 100"),
  (estimate.estimate, None, "estimate 70b --hosts 32 --bandwidth 10GB"),
  (simulate.simulate, None, "simulate --params 7b --hosts 4 --bandwidth 2GB --keep-last 5"),
  (verify.verify, None, "verify runs/a 200"),
  (verify.rollback, None, "rollback runs/a 200"),
  (tune.tune, None, "tune runs --like runs/a@200 --explain"),
  (repack.repack, None, "repack runs/a 200 --pack on"),
  (convert.convert, None, "convert flax_checkpoints runs/b"),
  (export.export, None, "export runs/a latest serving --quantize int8 --format safetensors"),
  (report.report, None, "report runs/a -o report.html"),
  (explain.explain, None, "explain missing-package"),
  (quarantine.restore_quarantined, "restore-quarantined", "restore-quarantined runs/a 300"),
)
for _command, _name, _example in _COMMANDS:
  app.command(_name, cls=PlainCommand, epilog=f"Example: ckpt-jax {_example}")(_command)
app.add_typer(bench.bench, name="bench", epilog="Example: ckpt-jax bench tiny --rounds 1 --variants orbax,ckpt_jax")


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
