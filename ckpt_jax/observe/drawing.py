"""Pieces of the report: tables, bars and line charts as HTML and SVG, without scripts or other files."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 420.0, 190.0, 60.0, 18.0
_MOST_POINTS = 400
Series = Sequence[tuple[float, float]]


class Cell(NamedTuple):
  """A cell of a table: its text, and the number to sort by; `bad` marks what went wrong."""

  text: str
  value: float | None = None
  bad: bool = False


def escape(text: object) -> str:
  """Text as HTML."""
  return html.escape(str(text), quote=True)


def table(headers: Sequence[str], rows: Sequence[Sequence[Cell | str]]) -> str:
  """A table whose columns sort when their heads are clicked."""
  head = "".join(f"<th><button>{escape(h)}</button></th>" for h in headers)
  body = "".join(f"<tr>{''.join(_cell(Cell(c) if isinstance(c, str) else c) for c in row)}</tr>" for row in rows)
  return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(cell: Cell) -> str:
  value = "" if cell.value is None else f' data-value="{cell.value:g}"'
  return f"<td{value}{' class=bad' if cell.bad else ''}>{escape(cell.text)}</td>"


def section(title: str, body: str, note: str = "", *, wide: bool = False) -> str:
  """A titled part of the page; empty if there is nothing in it."""
  about = f"<p>{escape(note)}</p>" if note else ""
  return f"<section{' class=wide' if wide else ''}><h2>{escape(title)}</h2>{about}{body}</section>" if body else ""


def keys(names: Sequence[str]) -> str:
  """The legend of up to five colours."""
  shown = (f'<span class="named"><span class="key k{i}"></span>{escape(name)}</span>' for i, name in enumerate(names))
  return f'<div class="soft">{" ".join(shown)}</div>'


def parts(shares: Mapping[str, float]) -> str:
  """One bar of several parts, which are shares of their sum."""
  total = sum(shares.values()) or 1.0
  spans = (f'<div class="k{i}" style="width:{100 * v / total:.2f}%"></div>' for i, v in enumerate(shares.values()))
  return keys(list(shares)) + f'<div class="parts">{"".join(spans)}</div>'


def bars(values: Mapping[str, float], label: Callable[[float], str]) -> str:
  """A bar for each name, the longest as wide as the page."""
  most = max(values.values(), default=0.0) or 1.0
  rows = [
    f'<tr><td>{escape(name)}</td><td data-value="{value:g}">{escape(label(value))}</td>'
    f'<td style="width:50%"><div class="bar k0" style="width:{100 * value / most:.1f}%"></div></td></tr>'
    for name, value in values.items()
  ]
  return f'<div class="scroll"><table><tbody>{"".join(rows)}</tbody></table></div>' if rows else ""


def chart(
  series: Mapping[str, Series], label: Callable[[float], str], label_x: Callable[[float], str], *, log: bool = False
) -> str:
  """Lines over a common axis. Of many points the highest in each interval is drawn.

  Args:
    series: points of finite numbers by name, in the order of x; up to five.
    label, label_x: numbers as text, for the axes.
    log: a logarithmic y axis; points that are not positive are left out.
  """
  kept = {n: [(x, y) for x, y in points if math.isfinite(y) and (y > 0 or not log)] for n, points in series.items()}
  kept = {name: _thinned(points) for name, points in kept.items() if points}
  if not kept:
    return ""
  xs = [x for points in kept.values() for x, _ in points]
  ys = [math.log10(y) if log else y for points in kept.values() for _, y in points]
  left, right = min(xs), max(xs)
  low, high = (min(ys), max(ys)) if log else (0.0, max(ys))
  right = right if right > left else left + 1
  if high <= low:
    low, high = (low - 0.5, high + 0.5) if log else (0.0, 1.0)

  def at(x: float, y: float) -> tuple[float, float]:
    y = math.log10(y) if log else y
    across = _LEFT + (x - left) / (right - left) * (_WIDTH - _LEFT - 8)
    return across, 8 + (high - y) / (high - low) * (_HEIGHT - _BOTTOM - 8)

  shapes = [_axes(low, high, left, right, label, label_x, log)]
  for i, points in enumerate(kept.values()):
    placed = [at(x, y) for x, y in points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
    shapes.append(f'<polyline class="s{i}" points="{path}"/>')
    if len(placed) <= 60:
      shapes += [f'<circle class="s{i}" cx="{x:.1f}" cy="{y:.1f}" r="2"/>' for x, y in placed]
  names = list(kept)
  return f'{keys(names)}<svg viewBox="0 0 {_WIDTH:.0f} {_HEIGHT:.0f}" role="img">{"".join(shapes)}</svg>'


def _axes(low: float, high: float, left: float, right: float, label: Any, label_x: Any, log: bool) -> str:
  shapes = []
  for share in (0.0, 0.5, 1.0):
    y = 8 + (1 - share) * (_HEIGHT - _BOTTOM - 8)
    value = low + share * (high - low)
    shapes.append(f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - 8}" y1="{y:.1f}" y2="{y:.1f}"/>')
    text = escape(label(10**value if log else value))
    shapes.append(f'<text x="{_LEFT - 4}" y="{y + 3.5:.1f}" text-anchor="end">{text}</text>')
  for x, anchor, value in ((_LEFT, "start", left), (_WIDTH - 8, "end", right)):
    shapes.append(f'<text x="{x}" y="{_HEIGHT - 4}" text-anchor="{anchor}">{escape(label_x(value))}</text>')
  return "".join(shapes)


def _thinned(points: Series) -> list[tuple[float, float]]:
  size = -(-len(points) // _MOST_POINTS)
  return [max(points[i : i + size], key=lambda p: p[1]) for i in range(0, len(points), size)]
