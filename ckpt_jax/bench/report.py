"""Results as tables for a terminal, as blocks of a Markdown file, and as a picture."""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ckpt_jax.bench.aims import outcomes
from ckpt_jax.bench.results import SPACE, TIMES, Measured, Spread, SuiteResults
from ckpt_jax.errors import ConfigError
from ckpt_jax.storage.show import drawn, new_figure

_BASELINE = "orbax"


@dataclasses.dataclass(frozen=True)
class Table:
  """A table of text."""

  title: str
  header: tuple[str, ...]
  rows: tuple[tuple[str, ...], ...]

  def markdown(self) -> str:
    """For a Markdown file."""
    rule = ["---"] + ["---:"] * (len(self.header) - 1)
    lines = [self.header, tuple(rule), *self.rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _ratio(value: float | None) -> str:
  return "-" if value is None else f"{value:.1f}x" if value >= 10 else f"{value:.2f}x"


def _seconds(value: Spread | None) -> str:
  if value is None:
    return "-"
  digits = 3 if value.median < 0.1 else 2
  return f"{value.median:.{digits}f} ({value.least:.{digits}f}-{value.most:.{digits}f})"


def _megabytes(value: float | None) -> str:
  return "-" if value is None else f"{value / 1e6:,.0f}" if value >= 1e7 else f"{value / 1e6:,.1f}"


def ratio_table(suite: SuiteResults) -> Table:
  """Speed relative to raw Orbax's defaults."""
  rows = [(v.title, *(_ratio(suite.ratio(v.name, metric)) for metric in TIMES)) for v in suite.variants]
  return Table(f"{suite.name}: times faster than Orbax's defaults", (suite.name, *TIMES.values()), tuple(rows))


def seconds_table(suite: SuiteResults) -> Table:
  """Medians in seconds, with minimum and maximum."""
  rows = [(v.title, *(_seconds(v.metrics.get(metric)) for metric in TIMES)) for v in suite.variants]
  return Table(f"{suite.name}: seconds, median (min-max)", (suite.name, *TIMES.values()), tuple(rows))


def space_table(suite: SuiteResults) -> Table:
  """Bytes and files stored, and peak memory above that of the process with its state."""

  def cell(v: Measured, metric: str) -> str:
    median = v.median(metric)
    if metric == "files":
      return "-" if median is None else f"{median:.0f}"
    return _megabytes(median)

  rows = [(v.title, *(cell(v, metric) for metric in SPACE)) for v in suite.variants]
  return Table(f"{suite.name}: space", (suite.name, *SPACE.values()), tuple(rows))


def summary_table(suites: Iterable[SuiteResults], variants: Sequence[str] = ("ckpt_jax", "packed", "tuned")) -> Table:
  """One line a suite and variant of ours: ratios only."""
  columns = {k: TIMES[k] for k in ("blocking_s", "synced_s", "cold_s", "warm_s")}
  rows = []
  for suite in suites:
    for name in variants:
      measured = suite.variant(name)
      if measured is not None and suite.variant(_BASELINE) is not None:
        cells = []
        for metric in columns:
          # A bucket has no page cache on this host to sync: its commit is durable.
          value = suite.ratio(name, metric)
          cells.append(_ratio(suite.ratio(name, "commit_s") if metric == "synced_s" and value is None else value))
        rows.append((f"{suite.name}: {measured.title}", *cells))
  return Table("Times faster than Orbax's defaults", ("", *columns.values()), tuple(rows))


def aims_table(suites: Iterable[SuiteResults]) -> Table:
  """The project's aims, met or not."""
  rows = [
    (f"{o.aim.suite}: {o.aim.what}", _ratio(o.aim.least), _ratio(o.ratio), "yes" if o.met else "no")
    for o in outcomes(suites)
  ]
  return Table("Aims", ("how many times faster", "aim", "measured", "met"), tuple(rows))


def machine_lines(suite: SuiteResults) -> list[str]:
  """Where and how a suite was measured."""
  m = suite.machine
  versions = ", ".join(f"{k} {v}" for k, v in m["versions"].items())
  caches = "dropped before cold restores" if m["page_cache_dropped"] else "cannot be dropped here: no cold restores"
  lines = [
    f"{suite.name}: {suite.what}; {suite.leaves:,} leaves, {suite.nbytes / 1e6:,.1f} MB; {suite.rounds} rounds",
    f"{m['date']}; {m['cores']} cores ({m['cpu']}), {m['memory_nbytes'] / 2**30:.0f} GiB, kernel {m['kernel']}, "
    f"{m['disk']}; load {m['load_before']} before; page cache {caches}",
    versions,
  ]
  return lines + [f"left out: {title}: {reason}" for title, reason in suite.left_out.items()]


def tables(suites: Sequence[SuiteResults]) -> list[Table]:
  """All tables: ratios first."""
  aims = aims_table(suites)
  found = [make(s) for make in (ratio_table, seconds_table, space_table) for s in suites]
  return [*found, aims] if aims.rows else found


# -- Markdown


def _blocks(suites: Sequence[SuiteResults]) -> dict[str, Callable[[], str]]:
  def each(make: Callable[[SuiteResults], Table]) -> Callable[[], str]:
    return lambda: "\n\n".join(f"{s.what}:\n\n{make(s).markdown()}" for s in suites)

  def conditions() -> str:
    lines: list[str] = []
    for s in suites:
      first, *rest = machine_lines(s)
      lines += [f"- {first}", *(f"  - {line}" for line in rest)]
    return "\n".join(lines)

  return {
    "summary": lambda: summary_table(suites).markdown(),
    "aims": lambda: aims_table(suites).markdown(),
    "ratios": each(ratio_table),
    "seconds": each(seconds_table),
    "space": each(space_table),
    "conditions": conditions,
  }


def fill(text: str, suites: Sequence[SuiteResults], where: str = "text") -> str:
  """`text` with each block between `<!-- bench:NAME -->` and `<!-- /bench -->` made from the results.

  NAME is summary, aims, ratios, seconds, space or conditions, and may name suites: `summary w1 w2`.

  Raises:
    ConfigError: for an unknown block or suite, naming `where`.
  """
  by_name = {s.name: s for s in suites}

  def block(match: re.Match[str]) -> str:
    name, *only = match[1].split()
    missing = [n for n in only if n not in by_name]
    if missing:
      raise ConfigError(f"{where}: bench:{match[1]}: no results of {', '.join(missing)}")
    makers = _blocks([by_name[n] for n in only] if only else suites)
    if name not in makers:
      raise ConfigError(f"{where}: no block bench:{name}; there are {', '.join(makers)}")
    return f"<!-- bench:{match[1]} -->\n{makers[name]()}\n<!-- /bench -->"

  return re.sub(r"<!-- bench:([\w -]+?) -->\n.*?<!-- /bench -->", block, text, flags=re.DOTALL)


def fill_file(path: str, suites: Sequence[SuiteResults]) -> None:
  """Replaces the blocks of a Markdown file by tables of the results."""
  file = pathlib.Path(path)
  text = file.read_text(encoding="utf-8")
  filled = fill(text, suites, path)
  if filled == text and "<!-- bench:" not in text:
    raise ConfigError(f"{path}: has no block between <!-- bench:NAME --> and <!-- /bench -->")
  file.write_text(filled, encoding="utf-8")


# -- picture

_COLOURS = {"orbax": "#8c8c8c", "ckpt_jax": "#1f6fb4", "dcp": "#d98032", "safetensors": "#7a5ba6", "raw": "#c9c9c9"}


def _colour(name: str) -> str:
  if name in ("packed", "tuned") or name.startswith("ckpt_jax"):
    return _COLOURS["ckpt_jax"]
  return next((c for key, c in _COLOURS.items() if name.startswith(key)), "#444444")


def plot(path: str, suites: Sequence[SuiteResults]) -> None:
  """Draws blocking, commit and restore of every variant: bars at the median, lines from min to max.

  Each suite has a file of its own: `docs/bench.png` becomes `docs/bench-w1.png`, `docs/bench-w2.png` ...

  Raises:
    ConfigError: if matplotlib is not installed, or cannot write a file.
  """
  for suite in suites:
    figure = new_figure(9, 0.2 * len(suite.variants) + 0.9)
    grid: Any = figure.subplots(1, 3)
    cold = any(v.median("cold_s") is not None for v in suite.variants)
    synced = any(v.median("synced_s") is not None for v in suite.variants)
    metrics = ("blocking_s", "synced_s" if synced else "commit_s", "cold_s" if cold else "warm_s")
    for axes, metric in zip(grid, metrics, strict=True):
      _bars(axes, suite, metric)
    for axes in grid[1:]:
      axes.set_yticklabels([])
    figure.suptitle(f"{suite.name}: {suite.what}", fontsize=8.5, fontweight="bold", x=0.01, ha="left")
    file = pathlib.Path(path)
    drawn(figure, file.with_stem(f"{file.stem}-{suite.name}"), dpi=130)


def _bars(axes: Any, suite: SuiteResults, metric: str) -> None:
  most = max((v.metrics[metric].most for v in suite.variants if v.metrics[metric]), default=1.0)  # type: ignore[union-attr]
  for i, v in enumerate(suite.variants):
    found = v.metrics[metric]
    if found is None:
      continue
    error = [[found.median - found.least], [found.most - found.median]]
    axes.barh(i, found.median, color=_colour(v.name), xerr=error, error_kw={"lw": 0.8, "ecolor": "#222222"})
    ratio = suite.ratio(v.name, metric)
    label = f" {found.median:.2f} s" if found.median >= 0.1 else f" {found.median * 1e3:.0f} ms"
    if ratio is not None and v.name != _BASELINE:
      label += f"  {_ratio(ratio)}"
    axes.text(found.most, i, label, va="center", fontsize=6.5)
  axes.set_yticks(range(len(suite.variants)), [v.title for v in suite.variants], fontsize=7)
  axes.set_ylim(len(suite.variants) - 0.4, -0.6)
  axes.set_xlim(0, most * 1.45)
  axes.tick_params(axis="x", labelsize=7)
  axes.spines[["top", "right"]].set_visible(False)
  axes.set_xlabel(f"{TIMES[metric]}, seconds", fontsize=7.5, loc="left", labelpad=1)
