"""Runs `ckpt-jax` in the test process, which spares the start of an interpreter."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import signal
import sys
from unittest import mock

from ckpt_jax.cli.app import main


@dataclasses.dataclass(frozen=True)
class Done:
  """How a command ended, as `subprocess.run` reports it."""

  returncode: int
  stdout: str
  stderr: str


def cli(*arguments: object, answer: str = "") -> Done:
  """Runs `ckpt-jax ARGUMENTS` with `answer` on its standard input; unexpected exceptions propagate."""
  out, err = io.StringIO(), io.StringIO()
  with (
    contextlib.redirect_stdout(out),
    contextlib.redirect_stderr(err),
    mock.patch.object(sys, "stdin", io.StringIO(answer)),
    mock.patch.object(sys, "argv", ["ckpt-jax", *map(str, arguments)]),
    mock.patch.dict("os.environ", {"COLUMNS": "160", "CKPT_JAX_TRACEBACK": "1"}),
    mock.patch.object(signal, "signal"),  # commands must not replace the test process's handlers
  ):
    try:
      code = main()
    except SystemExit as e:
      code = e.code
  assert "Traceback" not in err.getvalue(), err.getvalue()
  return Done(code or 0, out.getvalue(), err.getvalue())
