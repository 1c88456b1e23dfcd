"""JSON files of results: campaigns continue them, and Markdown pages quote them."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any


def read(file: str | None) -> dict[str, Any]:
  """The results in a file; empty if there is none yet."""
  path = pathlib.Path(file or "")
  return json.loads(path.read_text(encoding="utf-8")) if file and path.exists() else {}


def write(file: str | os.PathLike[str], results: Any) -> None:
  """Writes results into a file, whose directory is made if necessary. An interrupted write leaves no half of a file."""
  path = pathlib.Path(file)
  path.parent.mkdir(parents=True, exist_ok=True)
  aside = path.with_name(f".{path.name}.tmp")
  aside.write_text(_compact(results) + "\n", encoding="utf-8")
  os.replace(aside, path)


def _compact(data: Any, indent: int = 0) -> str:
  """JSON with lists of numbers or text on one line."""
  if isinstance(data, dict) and data:
    items = [f"{json.dumps(k)}: {_compact(v, indent + 1)}" for k, v in data.items()]
  elif isinstance(data, list) and any(isinstance(v, (dict, list)) for v in data):
    items = [_compact(v, indent + 1) for v in data]
  else:
    return json.dumps(data)
  begin, end = "{}" if isinstance(data, dict) else "[]"
  inner = ",".join(f"\n{' ' * (indent + 1)}{item}" for item in items)
  return f"{begin}{inner}\n{' ' * indent}{end}"


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


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
  """A table in Markdown."""
  first, *others = (f"| {' | '.join(cells)} |" for cells in (header, *rows))
  return "\n".join([first, f"|{'---|' * len(header)}", *others])


def filled(page: str, mark: str, text: str) -> str:
  """A page with `text` between its `<!-- MARK -->` and `<!-- /MARK -->`; the page itself if it has none."""
  head, begin, rest = page.partition(f"<!-- {mark} -->")
  _, end, tail = rest.partition(f"<!-- /{mark} -->")
  return f"{head}{begin}\n{text}\n{end}{tail}" if end else page
