"""`ckpt-jax explain`: what an error means and what to do, from docs/troubleshooting.md, which a wheel holds too."""

from __future__ import annotations

import pathlib
import re
from typing import Annotated

import typer

from ckpt_jax.cli.common import console
from ckpt_jax.config.explain import did_you_mean
from ckpt_jax.errors import ConfigError

PAGE = pathlib.Path(__file__).parents[1] / "troubleshooting.md"  # a link to docs/
_SECTION = re.compile(r"^### (?P<title>.+)\n(?P<text>(?:(?!^##).*\n)*)", re.MULTILINE)


def topics() -> dict[str, str]:
  """The sections of the page, as Markdown, by the anchors that GitHub and the site give their titles."""
  found = _SECTION.finditer(PAGE.read_text(encoding="utf-8"))
  return {re.sub(r"[^a-z0-9]+", "-", m["title"].lower()).strip("-"): m[0].strip() for m in found}


def explain(
  topic: Annotated[str, typer.Argument(help="As an error names it. Default: list all.", show_default=False)] = "",
) -> None:
  """Print what an error means and what to do about it; needs no network."""
  from rich.markdown import Markdown

  sections = topics()
  if not topic:
    for name, text in sections.items():
      typer.echo(f"{name:24} {text.splitlines()[2]}")
  elif topic in sections:
    console().print(Markdown(sections[topic], hyperlinks=False))
  else:
    raise ConfigError(f"no topic {topic!r}{did_you_mean(topic, sections) or '; `ckpt-jax explain` lists all'}")
