"""Draws docs/picture.svg: the life of a run, and what ckpt_jax does in it. `python docs/scripts/picture.py`."""

from __future__ import annotations

import pathlib
import sys

import matplotlib
from matplotlib.figure import Figure

BLUE, LIGHT, GREY, RED, INK = "#1f6fb4", "#a9cbe8", "#dfe3e7", "#c8442f", "#222222"
LANES = {"training": 2.0, "background": 1.0, "storage": 0.0}
# lane, from, to, colour, text
BOXES = [
  ("training", 0.0, 3.0, GREY, "steps"),
  ("training", 3.0, 3.15, BLUE, ""),
  ("training", 3.15, 6.0, GREY, "steps"),
  ("training", 6.0, 6.15, BLUE, ""),
  ("training", 6.15, 7.0, GREY, ""),
  ("background", 3.15, 5.2, LIGHT, "write and sum"),
  ("background", 6.15, 7.0, LIGHT, "write"),
  ("storage", 5.2, 5.9, BLUE, "100"),
  ("storage", 7.0, 7.7, "#f3d4ce", "200"),
  ("storage", 8.9, 9.6, BLUE, "100"),
  ("training", 9.6, 11.0, LIGHT, "restore"),
  ("training", 11.0, 14.6, GREY, "steps, on another mesh"),
]
NOTES = [
  (3.1, 2.62, "save returns: a copy is on its way", BLUE),
  (5.0, -0.62, "committed: synced, all or nothing", BLUE),
  (7.0, 2.62, "killed", RED),
  (9.9, -0.62, "the newest whole step", BLUE),
  (11.6, 1.42, "hosts share one read, and", BLUE),
  (11.6, 1.06, "every leaf is compared with its sum", BLUE),
]


def draw(path: str) -> None:
  """Writes the picture; the ending of the name says the format."""
  # Text stays text, and the same picture is the same file.
  matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "ckpt_jax"}
  figure = Figure(figsize=(8.6, 2.3))
  axes = figure.add_axes((0, 0, 1, 1))
  axes.set_axis_off()
  axes.set_xlim(-1.9, 14.9)
  axes.set_ylim(-1.0, 3.0)
  for name, y in LANES.items():
    axes.text(-1.8, y, name, va="center", fontsize=9, fontweight="bold", color=INK)
    axes.plot([0, 7.0 if name == "background" else 14.6], [y, y], color=GREY, lw=1, zorder=0)
  for lane, start, end, colour, text in BOXES:
    axes.barh(LANES[lane], end - start, left=start, height=0.52, color=colour)
    ink = "white" if colour == BLUE else INK
    axes.text((start + end) / 2, LANES[lane], text, ha="center", va="center", fontsize=8.5, color=ink)
  axes.plot([7.0, 7.0], [-0.3, 2.4], color=RED, lw=1.5)
  for x, y, text, colour in NOTES:
    axes.text(x, y, text, ha="center", va="center", fontsize=8.5, color=colour)
  figure.savefig(path, facecolor="white", dpi=160, metadata={"Date": None} if path.endswith(".svg") else None)


if __name__ == "__main__":
  draw(sys.argv[1] if len(sys.argv) > 1 else str(pathlib.Path(__file__).parents[1] / "picture.svg"))
