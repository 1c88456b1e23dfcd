"""A bar for people who wait: an `on_progress=` function that draws, or prints lines where nothing can move."""

from __future__ import annotations

import html
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ckpt_jax.config.units import duration_text, size_text
from ckpt_jax.job.progress import Progress

if TYPE_CHECKING:  # a trainer that shows no bar does without rich
  from rich.console import Console
  from rich.progress import Progress as RichProgress

_LINE_S = 10.0


class Bar:
  """Shows progress on stderr with speed and time left: a bar in a terminal or notebook, else a line now and then."""

  def __init__(
    self, console: Console | None = None, line_s: float = _LINE_S, clock: Callable[[], float] = time.monotonic
  ):
    """Shows nothing yet.

    Args:
      console: default: stderr.
      line_s: seconds between two lines where there is no terminal; work that ends sooner prints none.
      clock: for tests.
    """
    from rich.console import Console

    self._console = console or Console(file=sys.stderr)
    self._line_s, self._clock = line_s, clock
    self._lock = threading.Lock()
    self._show = self._print
    if self._console.is_jupyter:
      self._show = self._display
    elif self._console.is_terminal:
      self._show = self._draw
    self._shown: RichProgress | None = None
    self._tasks: dict[str, Any] = {}
    self._began: dict[str, tuple[float, float]] = {}  # when, and how far it was
    self._last: dict[str, float] = {}

  def __call__(self, progress: Progress) -> None:
    with self._lock:
      now = self._clock()
      began, done = self._began.setdefault(progress.what, (now, progress.done))
      speed = (progress.done - done) / (now - began) if now > began else 0.0
      self._show(progress, speed, now)
      if progress.finished:
        self._began.pop(progress.what)
        self._last.pop(progress.what, None)

  def _draw(self, progress: Progress, speed: float, now: float) -> None:
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    if self._shown is None:
      columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[how_far]}"),
        TimeRemainingColumn(),
      )
      self._shown = RichProgress(*columns, console=self._console, transient=True)
      self._shown.start()
    if progress.what not in self._tasks:
      self._tasks[progress.what] = self._shown.add_task(progress.what, total=progress.total, how_far="")
    task = self._tasks[progress.what]
    self._shown.update(task, completed=progress.done, total=progress.total, how_far=_how_far(progress, speed))
    if progress.finished:
      self._shown.remove_task(self._tasks.pop(progress.what))
      if not self._tasks:
        self._shown.stop()
        self._shown = None

  def _display(self, progress: Progress, speed: float, now: float) -> None:
    from IPython.display import HTML, display

    # rich would need ipywidgets for this.
    what, how_far = html.escape(progress.what), html.escape(_how_far(progress, speed))
    value = f'value="{progress.done}" max="{progress.total}"' if progress.total else ""
    shown = HTML(f"{what} <progress {value}></progress> {how_far}")
    if progress.what not in self._tasks:
      self._tasks[progress.what] = display(shown, display_id=True)
    else:
      self._tasks[progress.what].update(shown)
    if progress.finished:
      self._tasks.pop(progress.what)

  def _print(self, progress: Progress, speed: float, now: float) -> None:
    last = self._last.setdefault(progress.what, now)
    if now - last < self._line_s:
      return
    self._last[progress.what] = now
    left = ""
    if progress.total and speed > 0 and not progress.finished:
      left = f", {duration_text(max(0.0, progress.total - progress.done) / speed)} left"
    self._console.print(f"{progress.what}: {_how_far(progress, speed)}{left}", markup=False, highlight=False)


def _how_far(progress: Progress, speed: float) -> str:
  """`1.5 GiB of 4 GiB, 512 MiB/s`, `3 of 10 steps`."""
  done, total, unit = progress.done, progress.total, progress.unit
  if unit == "B":
    of = "" if total is None else f" of {size_text(int(total))}"
    return f"{size_text(int(done))}{of}" + (f", {size_text(int(speed))}/s" if speed > 0 else "")
  if unit == "s":
    return duration_text(done) + ("" if total is None else f" of {duration_text(total)}")
  return f"{done:,.0f}" + ("" if total is None else f" of {total:,.0f}") + f" {unit}"
