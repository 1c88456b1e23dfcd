"""A StorageProfile as rich tables, and as a picture with the `plots` extra."""

from __future__ import annotations

import os
from typing import Any

from rich.table import Table

from ckpt_jax.config.units import duration_text, size_text
from ckpt_jax.errors import ConfigError
from ckpt_jax.storage.probe import StorageProfile


def tables(profile: StorageProfile) -> list[Table]:
  """The tables of `ckpt-jax probe`."""
  facts = Table(title=profile.path, show_header=False)
  facts.add_row("kind", str(profile.kind))
  facts.add_row("what that means", profile.kind.traits.why)
  age = profile.age_s
  facts.add_row("measured", f"{duration_text(age)} ago on {profile.host}, in {profile.seconds:.1f} s")
  facts.add_row("reads", f"cold: {profile.cold_by}" if profile.cold_by else "WARM: they came from the page cache")
  facts.add_row("knee", f"{size_text(profile.knee_nbytes)}: half of the throughput of large reads")
  if cache := profile.page_cache:
    past = "O_DIRECT refused" if cache.read_direct is None else f"{_megabytes(cache.read_direct)} MB/s past it"
    facts.add_row(
      "page cache",
      f"one stream writes {_megabytes(cache.write)} MB/s through it and {_megabytes(cache.write_behind)} MB/s past it, "
      f"reads {_megabytes(cache.read)} MB/s through it, {past}",
    )
  curve = Table("streams", "write MB/s (durable)", "read MB/s")
  write = {t.streams: t.bytes_per_s for t in profile.write}
  read = {t.streams: t.bytes_per_s for t in profile.read}
  for streams in sorted({*write, *read}):
    curve.add_row(str(streams), _megabytes(write.get(streams)), _megabytes(read.get(streams)))
  ranges = Table("one read of", "takes ms", "MB/s")
  for r in profile.ranges:
    ranges.add_row(size_text(r.nbytes), f"{r.seconds * 1e3:.2f}", _megabytes(r.nbytes / r.seconds))
  latency = Table("operation", "ms")
  for name, seconds in profile.latency.items():
    latency.add_row(name, f"{seconds * 1e3:.2f}")
  return [facts, curve, ranges, latency]


def plot_profile(profile: StorageProfile, file: str | os.PathLike[str] | None = None) -> Any:
  """Draws throughput over streams and over request size.

  Args:
    profile: the measurements to draw.
    file: the file to write; None returns matplotlib's figure, for notebooks.

  Raises:
    ConfigError: if matplotlib is not installed, or cannot write the file.
  """
  figure = new_figure(10, 4)
  left, right = figure.subplots(1, 2)
  for name, curve in (("write, durable", profile.write), ("read", profile.read)):
    left.plot([t.streams for t in curve], [t.bytes_per_s / 1e6 for t in curve], "o-", label=name)
  left.set_xscale("log", base=2)
  left.set(xlabel="streams", ylabel="MB/s", ylim=(0, None), title=f"{profile.path} ({profile.kind})")
  left.legend()
  right.plot([r.nbytes for r in profile.ranges], [r.nbytes / r.seconds / 1e6 for r in profile.ranges], "o-")
  right.axvline(profile.knee_nbytes, linestyle="--", color="gray", label=f"knee {size_text(profile.knee_nbytes)}")
  right.set_xscale("log", base=2)
  right.set_yscale("log")
  right.set(xlabel="bytes a request", ylabel="MB/s, one at a time", title="reads by request size")
  right.legend()
  return drawn(figure, file)


def new_figure(width: float, height: float) -> Any:
  """An empty figure of matplotlib; sizes are in inches.

  Raises:
    ConfigError: if matplotlib is not installed.
  """
  try:
    from matplotlib.figure import Figure
  except ImportError as e:
    raise ConfigError('plots need matplotlib: pip install "ckpt_jax[plots]"', topic="missing-package") from e
  return Figure(figsize=(width, height), layout="constrained")


def drawn(figure: Any, file: str | os.PathLike[str] | None, **settings: Any) -> Any:
  """Writes a figure into a file; without one, returns the figure.

  Raises:
    ConfigError: if the file cannot be written, or is of a kind that matplotlib does not know.
  """
  if file is None:
    return figure
  try:
    figure.savefig(file, **settings)
  except (ValueError, OSError) as e:
    raise ConfigError(f"{os.fspath(file)}: the plot cannot be written: {e}") from e


def _megabytes(bytes_per_s: float | None) -> str:
  return "" if bytes_per_s is None else f"{bytes_per_s / 1e6:.0f}"
