"""JSON files of results: campaigns continue them, and Markdown pages quote them."""

from __future__ import annotations

import contextlib
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any


def read(file: str | None) -> dict[str, Any]:
  """The results in a file; empty if there is none yet."""
  path = pathlib.Path(file or "")
  return json.loads(path.read_text(encoding="utf-8")) if file and path.exists() else {}


def write(file: str, results: Any) -> None:
  """Writes results into a file."""
  pathlib.Path(file).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


@contextlib.contextmanager
def continued(file: str | None) -> Iterator[dict[str, Any]]:
  """The results in a file so far, which are written back even if the measurement is cut off."""
  results = read(file)
  try:
    yield results
  finally:
    if file:
      write(file, results)


def rewrite(page: str | pathlib.Path, change: Callable[[str], str]) -> None:
  """Replaces the text of a page by `change(text)`."""
  path = pathlib.Path(page)
  path.write_text(change(path.read_text(encoding="utf-8")), encoding="utf-8")


def filled(page: str, mark: str, text: str) -> str:
  """A page with `text` between its `<!-- MARK -->` and `<!-- /MARK -->`; the page itself if it has none."""
  head, begin, rest = page.partition(f"<!-- {mark} -->")
  _, end, tail = rest.partition(f"<!-- /{mark} -->")
  return f"{head}{begin}\n{text}\n{end}{tail}" if end else page
