"""What `mkdocs build` takes from the code: configuration keys, commands, public names, and the pages at the root.

A page of docs/ says where: a line `<!-- from the code: NAME -->`, where NAME is one of `SOURCES`.
"""

from __future__ import annotations

import functools
import inspect
import pathlib
import re
from collections.abc import Iterator
from typing import Any, get_args

import pydantic
import typer
from typer.cli import get_docs_for_click

import ckpt_jax as ckpt
from ckpt_jax.cli.app import app
from ckpt_jax.config import sections

ROOT = pathlib.Path(__file__).parents[2]
MARK = re.compile(r"^<!-- from the code: (\w+) -->$", re.MULTILINE)
# What a key takes, by the names that ckpt_jax/config/sections.py has for its types.
TAKES = {
  "AutoOrBytes": "`auto`, or bytes: `512MiB`, `1.5GB`",
  "AutoOrCount": "`auto`, or a whole number from 1",
  "AutoOrDuration": "`auto`, or a time: seconds, `90s`, `1h30m`",
  "Bytes": "bytes: `512MiB`, `2TiB`, `1.5GB`",
  "Compression": "`auto`, `on`, `off`, `zstd`, `shuffled`, or a codec for some kinds of leaves",
  "Count": "a whole number from 1",
  "Duration": "a time: seconds, `90s`, `10m`, `2d6h`",
  "FileMode": 'octal text: `"0640"`',
  "ItemName": "a name",
  "LearnedOrDuration": "`learned`, or a time: seconds, `90s`, `6h`",
  "LeafPaths": "a path in the state, or a list of them",
  "Price": "a number above 0",
  "Share": "a share: `0.01`, `1%`",
  "StepNumber": "a whole number from 0",
  "StrictBool": "`true` or `false`",
  "StrictStr": "text",
  "Switch": "`auto`, `on` or `off`",
}


def on_page_markdown(markdown: str, **_: Any) -> str:
  """Called by mkdocs with the text of each page."""
  return MARK.sub(lambda mark: SOURCES[mark[1]](), markdown)


def config_keys() -> str:
  """The sections of `Config`: a heading and a table each."""
  return "\n\n".join(_section(ckpt.Config, "", "Top level"))


def _section(section: type[pydantic.BaseModel], path: str, title: str) -> Iterator[str]:
  said, inner = _said(section), []
  rows = ["| key | takes | default | what it does |", "|---|---|---|---|"]
  for name, written in inspect.get_annotations(section).items():
    field = section.model_fields[name]
    kinds = [k for k in (field.annotation, *get_args(field.annotation)) if inspect.isclass(k)]
    nested = next((k for k in kinds if issubclass(k, pydantic.BaseModel)), None)
    takes, text = _takes(written), said.get(name)
    if nested:
      inner.append((nested, f"{path}{name}"))
      takes = f"[its keys](#{path}{name})"
      text = text or (inspect.getdoc(nested) or "").partition("\n\n")[0].replace("\n", " ")
    default = field.get_default(call_default_factory=True)
    plain = isinstance(default, (bool, int, float, str))
    shown = f"`{str(default).lower() if isinstance(default, bool) else default}`" if plain else ""
    rows.append(f"| `{path}{name}` | {takes} | {shown} | {text} |")
  about = (inspect.getdoc(section) or "").partition("\n\nAttributes:")[0]
  yield f"## {title}\n\n{about}\n\n" + "\n".join(rows)
  for kind, key in inner:
    yield from _section(kind, f"{key}.", f"`{key}` {{ #{key} }}")


def _said(section: type[Any]) -> dict[str, str]:
  """What the docstring of a section says of each key."""
  listed = (inspect.getdoc(section) or "").partition("Attributes:\n")[2].partition("\n\n")[0]
  found: dict[str, str] = {}
  for names, text in re.findall(r"^  ((?:\w+, )*\w+): (.*(?:\n {3,}.*)*)", listed, re.MULTILINE):
    found |= dict.fromkeys(names.split(", "), " ".join(text.split()))
  return found


def _takes(written: str) -> str:
  """What a key takes, from its type as the code has it."""
  written = written.removesuffix(" | None")
  if many := re.fullmatch(r"tuple\[(\w+), \.\.\.\]", written):
    return f"a list; each {_takes(many[1])}"
  if limits := re.search(r"ge=(\d+), le=(\d+)", written):
    return f"a whole number, {limits[1]} to {limits[2]}"
  words = get_args(sections.StorageName) if written == "StorageName" else re.findall(r"['\"](\w+)['\"]", written)
  if words:
    return ", ".join(f"`{word}`" for word in words)
  return TAKES.get(name := re.sub(r"Annotated\[(\w+).*", r"\1", written)) or name.removesuffix("Config").lower()


def commands() -> str:
  """Every command with its arguments and options, by typer's own generator."""
  command = typer.main.get_command(app)
  text = get_docs_for_click(obj=command, ctx=typer.Context(command), name="ckpt-jax")
  text = re.sub(
    r"\*\*Commands\*\*:\n\n(\* .*\n)+\n", "", text
  )  # cut short by typer, and the page has a list of contents
  text = re.sub(r"^Example: (.*)$", r"**Example**:\n\n```sh\n\1\n```", text, flags=re.MULTILINE)
  return text.partition("**Usage**")[0].partition("\n\n")[2] + "**Usage**" + text.partition("**Usage**")[2]


def _from_root(name: str) -> str:
  """A page that lies at the root of the repository, without its title; its links as seen from docs/."""
  text = (ROOT / name).read_text(encoding="utf-8").partition("\n\n")[2]
  text = re.sub(r"\]\(docs/", "](", text)
  return re.sub(r"\]\(([A-Z]+\.md)", lambda link: f"]({link[1].lower()}".replace("readme.md", "start.md"), text)


def _example(path: pathlib.Path) -> str:
  """A trainer as a block of code, folded."""
  code = path.read_text(encoding="utf-8").rstrip()
  code = "\n".join(f"    {line}".rstrip() for line in f"```python\n{code}\n```".splitlines())
  return f'??? example "The whole file"\n\n{code}'


SOURCES = {
  "config_keys": config_keys,
  "commands": commands,
  "readme": lambda: _from_root("README.md"),
  "contributing": lambda: _from_root("CONTRIBUTING.md"),
  "changelog": lambda: _from_root("CHANGELOG.md"),
  **{p.stem: functools.partial(_example, p) for p in (ROOT / "ckpt_jax" / "examples").glob("*_*.py")},
}
