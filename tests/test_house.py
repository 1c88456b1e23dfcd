"""The house keeps its order: functions that can be read, files of bounded length, public names with docstrings."""

import ast
import importlib
import inspect
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "ckpt_jax"
FILES = sorted(PACKAGE.rglob("*.py"))
MOST_LINES, MOST_PARAMETERS, MOST_LINES_OF_A_FILE = 60, 8, 450


def functions(tree):
  return [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def parameters(function):
  args = function.args
  named = [a.arg for a in (*args.posonlyargs, *args.args, *args.kwonlyargs)]
  return len(named) - (named[:1] in (["self"], ["cls"]))


def is_command(function):
  """Whether typer makes a command line of a function: its parameters are the options."""
  return any("typer" in ast.unparse(a.annotation) for a in function.args.args if a.annotation is not None)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_functions_can_be_read_on_one_screen(path):
  source = path.read_text()
  assert source.count("\n") <= MOST_LINES_OF_A_FILE
  for function in functions(ast.parse(source)):
    lines = function.end_lineno - function.lineno + 1
    assert lines <= MOST_LINES or is_command(function), f"{function.name} has {lines} lines"
    assert parameters(function) <= MOST_PARAMETERS or is_command(function), f"{function.name}: too many parameters"


def public_names():
  """Functions and classes, and the methods that a class has by itself and its docstring does not describe."""
  for path in FILES:
    module = importlib.import_module(".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts))
    for name, value in vars(module).items():
      if name.startswith("_") or getattr(value, "__module__", None) != module.__name__ or "bench" in path.parts:
        continue
      if inspect.isfunction(value) or inspect.isclass(value):
        yield f"{module.__name__}.{name}", value
      if inspect.isclass(value):
        for attribute, member in vars(value).items():
          function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
          if attribute.startswith("_") or not inspect.isfunction(function) or function.__name__ == "<lambda>":
            continue
          inherited = any(hasattr(base, attribute) for base in value.__mro__[1:])
          if not inherited and f"`{attribute}`" not in (value.__doc__ or ""):
            yield f"{module.__name__}.{name}.{attribute}", getattr(value, attribute)


def test_public_names_have_docstrings():
  assert [name for name, value in public_names() if not inspect.getdoc(value)] == []
