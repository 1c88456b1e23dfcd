"""What the commands share: their options, and how they print, ask and fail."""

from __future__ import annotations

import dataclasses
import datetime
import difflib
import functools
import importlib
import inspect
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any, NoReturn, cast

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table
from typer.core import TyperCommand, TyperGroup

from ckpt_jax.config import parse_bytes, parse_duration
from ckpt_jax.config.explain import did_you_mean
from ckpt_jax.config.units import parse_count
from ckpt_jax.errors import ConfigError


def _run(path: str) -> str:
  from ckpt_jax.run import foreign
  from ckpt_jax.run.steps import newest_step, run_directory

  directory = run_directory(path)
  if newest_step(directory) is None:
    foreign.refuse(directory)
  return path


Run = Annotated[str, typer.Argument(help="Directory of the run: a path, gs://...", show_default=False, callback=_run)]
Step = Annotated[int, typer.Argument(help="A committed step.", show_default=False)]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before deleting.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
_RICH_ROWS = 300


def _parsed(parse: Callable[[Any], float], unit: str, *names: str, make: Any = typer.Option, **settings: Any) -> Any:
  def convert(value: Any) -> float:
    try:
      return parse(value)
    except ValueError as e:
      raise typer.BadParameter(str(e)) from None

  return make(*names, parser=convert, **({"metavar": unit, "show_default": False} | settings))


duration = functools.partial(_parsed, parse_duration, "DURATION")  # options such as 90s or 2d6h, in seconds
size = functools.partial(_parsed, parse_bytes, "SIZE")  # options such as 512MiB, in bytes
number = functools.partial(_parsed, parse_count, "COUNT")  # options such as 7b


def _bare_flags(parameters: list[Any]) -> list[Any]:
  """Has the help show a flag without the type that typer gives it, `<bool>`."""
  for parameter in parameters:
    if getattr(parameter, "is_flag", False) and parameter.metavar is None:
      parameter.metavar = ""
  return parameters


class PlainCommand(TyperCommand):
  """A command whose flags are shown as flags."""

  def get_params(self, ctx: Any) -> list[Any]:
    return _bare_flags(super().get_params(ctx))


class NearestName(TyperGroup):
  """A group of commands that suggests the nearest one when a name is mistyped."""

  def get_params(self, ctx: Any) -> list[Any]:
    return _bare_flags(super().get_params(ctx))

  def names(self) -> list[str]:
    """The names to choose from."""
    return list(self.commands)

  def resolve_command(self, ctx: Any, args: list[str]) -> Any:
    if args and not args[0].startswith("-") and args[0] not in self.commands:
      near = difflib.get_close_matches(args[0], self.names(), n=1, cutoff=0.4)
      hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(self.names())}"
      ctx.fail(f"no command {args[0]!r}{hint}")
    return super().resolve_command(ctx, args)


def grouped(command: Callable[..., None]) -> Callable[..., None]:
  """Lets a command take options as a dataclass: each field is an option, declared as a parameter would be."""
  parameters: list[inspect.Parameter] = []
  groups: dict[str, type[Any]] = {}
  for name, parameter in inspect.signature(command, eval_str=True).parameters.items():
    if dataclasses.is_dataclass(parameter.annotation):
      groups[name] = cast(type[Any], parameter.annotation)
      parameters += inspect.signature(groups[name], eval_str=True).parameters.values()
    else:
      parameters.append(parameter)
  parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]

  def call(**values: Any) -> None:
    for name, group in groups.items():
      values[name] = group(**{field.name: values.pop(field.name) for field in dataclasses.fields(group)})
    command(**values)

  call.__name__, call.__doc__ = command.__name__, command.__doc__
  call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
  call.__annotations__ = {p.name: p.annotation for p in parameters}
  return call


def confirmed(question: str, *, yes: bool, stderr: bool = False) -> bool:
  """Whether the user agrees to something that cannot be undone. Without anybody to ask it is wrong usage: exit 2.

  Args:
    question: the question.
    yes: whether the command line has answered it.
    stderr: ask on stderr, which leaves stdout to JSON.
  """
  if yes:
    return True
  try:
    if sys.stdin is not None and not sys.stdin.closed:
      return typer.confirm(question, err=stderr)
  except typer.Abort:
    if sys.stdin.isatty():  # Ctrl-C
      raise
  raise typer.BadParameter("this cannot be undone, and standard input gives no answer; agree with --yes")


def error(message: object) -> None:
  """Prints an error message on stderr, and below it the notes of an exception."""
  typer.echo("\n  ".join([f"error: {message}", *getattr(message, "__notes__", ())]), err=True)


def fail(message: object) -> NoReturn:
  """Ends the command with an error message and exit code 1."""
  error(message)
  raise typer.Exit(1)


class _Console(Console):
  def on_broken_pipe(self) -> None:
    raise BrokenPipeError  # `main` ends well; rich would end with 1


def console() -> Console:
  """A console for tables: as wide as the terminal or COLUMNS, and 160 columns in a pipe or file without."""
  return _Console(highlight=False, width=None if sys.stdout.isatty() or os.environ.get("COLUMNS") else 160)


def print_table(headers: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
  """Prints rows of plain text, under headers if there are any.

  Many rows are printed as bare columns: rich needs a second for a thousand.
  """
  if len(rows) <= _RICH_ROWS:
    columns = [Column(name, overflow="fold") for name in headers or [""] * len(rows[0])]
    table = Table(*columns, title=escape(title), show_header=bool(headers))
    for row in rows:
      table.add_row(*map(escape, row))
    console().print(table)
    return
  widths = [max(map(len, column)) for column in zip(headers, *rows, strict=True)]
  lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (headers, *rows)]
  typer.echo("\n".join([title, *(line.rstrip() for line in lines)]))


def print_json(value: Any) -> None:
  """Prints a value as JSON: dataclasses as objects, times in ISO 8601."""

  def plain(x: Any) -> Any:
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
      return dataclasses.asdict(x)
    return x.isoformat() if isinstance(x, datetime.datetime) else str(x)

  typer.echo(json.dumps(value, default=plain, indent=2))


def run_at_step(text: str) -> tuple[str, int]:
  """The run and the step of `RUN@STEP`.

  Raises:
    ConfigError: if the text is something else.
  """
  run, _, step = text.rpartition("@")
  if not run or not step.isdigit():
    raise ConfigError(f"{text}: expected RUN@STEP, e.g. ~/runs/a@1000")
  return run, int(step)


def named_function(option: str, text: str) -> Callable[..., Any]:
  """The function of `MODULE:FUNCTION`; the current directory is searched first, as `python -m` does.

  Raises:
    ConfigError: if there is none, naming the nearest one.
  """
  name, _, attribute = text.partition(":")
  if not name or not attribute:
    raise ConfigError(f"{option} {text}: expected MODULE:FUNCTION, e.g. train:init_state")
  sys.path.insert(0, os.getcwd())
  try:
    module = importlib.import_module(name)
  except Exception as e:
    hint = ""
    if isinstance(e, ModuleNotFoundError) and e.name == name:
      near = did_you_mean(name, [f.removesuffix(".py") for f in os.listdir() if f.endswith(".py")])
      hint = near or f"; looked in {os.getcwd()} and the installed packages"
    raise ConfigError(f"{option} {text}: {name} cannot be imported: {type(e).__name__}: {e}{hint}") from None
  function = getattr(module, attribute, None)
  if not callable(function):
    names = sorted(n for n, v in vars(module).items() if callable(v) and not n.startswith("_"))
    hint = did_you_mean(attribute, names) or f"; it has {', '.join(names[:10]) or 'no functions'}"
    raise ConfigError(f"{option} {text}: {name} has no function {attribute}{hint}")
  return function
