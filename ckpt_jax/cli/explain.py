"""`ckpt-jax explain`: what an error means and what to do, from docs/troubleshooting.md, which a wheel holds too."""

from __future__ import annotations

import pathlib
import re
from typing import Annotated

import typer

from ckpt_jax import errors
from ckpt_jax.cli.common import console
from ckpt_jax.config.explain import did_you_mean
from ckpt_jax.errors import ConfigError

PAGE = pathlib.Path(__file__).parents[1] / "troubleshooting.md"  # a link to docs/
_SECTION = re.compile(r"^### (?P<title>.+)\n(?P<text>(?:(?!^##).*\n)*)", re.MULTILINE)


def topics() -> dict[str, str]:
  """The sections of the page, as Markdown, by the anchors that GitHub and the site give their titles."""
  found = _SECTION.finditer(PAGE.read_text(encoding="utf-8"))
  return {_anchor(m["title"]): m[0].strip() for m in found}


def _anchor(title: str) -> str:
  return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def explain(
  topic: Annotated[
    str, typer.Argument(help="As an error names it, or the name of its class. Default: list all.", show_default=False)
  ] = "",
) -> None:
  """Print what an error means and what to do about it; needs no network."""
  from rich.markdown import Markdown

  sections = topics()
  of_class = getattr(errors, topic.rpartition(".")[2], None)  # as a traceback names it, with its module
  known = _anchor(getattr(of_class, "topic", topic))
  if not topic:
    for name, text in sections.items():
      typer.echo(f"{name:26} {text.splitlines()[2].replace('`', '')}")
  elif known in sections:
    console().print(Markdown(sections[known], hyperlinks=False))
  else:
    raise ConfigError(f"no topic {topic!r}{did_you_mean(topic, sections) or '; `ckpt-jax explain` lists all'}")
