"""Objects as HTML, for notebooks."""

from __future__ import annotations

import html
from collections.abc import Sequence


def html_table(headers: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> str:
  """A table of plain text, which is escaped; the first column is aligned to the left, the others to the right."""

  def row(tag: str, cells: Sequence[str]) -> str:
    sides = ("left", *["right"] * (len(cells) - 1))
    cells = [f'<{tag} style="text-align:{side}">{html.escape(c)}</{tag}>' for side, c in zip(sides, cells, strict=True)]
    return f"<tr>{''.join(cells)}</tr>"

  head = f"<caption>{html.escape(caption)}</caption>" if caption else ""
  body = "".join(row("td", cells) for cells in rows)
  return f"<table>{head}<thead>{row('th', headers)}</thead><tbody>{body}</tbody></table>"
