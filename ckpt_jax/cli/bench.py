"""`ckpt-jax bench`: measurements side by side with raw Orbax and others. One function a subcommand."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import signal
import sys
import tempfile
from typing import Annotated, Any

import typer

from ckpt_jax.bench import files
from ckpt_jax.cli.common import Json, NearestName, PlainCommand, print_json, print_table, size
from ckpt_jax.errors import ConfigError

_MAIN = ["w1", "w2", "w3", "small", "moe", "multi", "bucket", "compressible"]


class _SuiteOrCommand(NearestName):
  """`ckpt-jax bench w1 w2` is short for `ckpt-jax bench suites w1 w2`."""

  def names(self) -> list[str]:
    from ckpt_jax.bench.suites import NAMES

    return [*NAMES, *super().names()]

  def resolve_command(self, ctx: Any, args: list[str]) -> Any:
    from ckpt_jax.bench.suites import GROUPS, SUITES

    known = args and args[0] in {*SUITES, *GROUPS} - {*self.commands}
    return super().resolve_command(ctx, ["suites", *args] if known else args)


bench = typer.Typer(
  cls=_SuiteOrCommand, no_args_is_help=True, help="Measure side by side with raw Orbax; `bench w1 w2` runs suites."
)
command = functools.partial(bench.command, cls=PlainCommand)

Directory = Annotated[str | None, typer.Option("--dir", help="Write here; default: the temporary directory.")]
Output = Annotated[str | None, typer.Option("-o", "--output", help="Write the JSON into this file.")]
Merged = Annotated[str | None, typer.Option("-o", "--output", help="Merge the results into this JSON file.")]
Minutes = Annotated[float, typer.Option(min=0.1, help="Stop after this time; the next call continues.")]
Plot = Annotated[
  str | None, typer.Option(help="Draw the results into this file (.png, .svg, .pdf), of suites one each.")
]
Fill = Annotated[
  list[str] | None, typer.Option(help="Put the tables into the blocks <!-- bench:... --> of this Markdown file.")
]


def _progress(text: str) -> None:
  typer.echo(text, err=True)


def _keep(output: str | None, found: Any) -> None:
  """Writes results into a file if one is given."""
  if output:
    files.write(output, found)


def _emit(found: Any, output: str | None) -> None:
  """Writes results as JSON: into a file if one is given, else on stdout."""
  _keep(output, found)
  if not output:
    typer.echo(json.dumps(found, indent=1))


@command()
def suites(
  names: Annotated[
    list[str] | None, typer.Argument(metavar="[SUITE]...", help=f"Of {', '.join(_MAIN)}; default: all of them.")
  ] = None,
  rounds: Annotated[int, typer.Option(min=1, help="Rounds that count; one more comes before them.")] = 5,
  variants: Annotated[str | None, typer.Option(help="Only these, commas between: orbax,ckpt_jax,tuned.")] = None,
  directory: Directory = None,
  output: Merged = None,
  plot: Plot = None,
  fill: Fill = None,
  as_json: Json = False,
) -> None:
  """Save and restore states side by side: raw Orbax, ckpt_jax, torch DCP, safetensors, a raw file."""
  from ckpt_jax.bench import results
  from ckpt_jax.bench.runner import run_suite
  from ckpt_jax.bench.suites import chosen_suites

  signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the worker processes and removes their files
  only = [v.strip() for v in variants.split(",")] if variants else None
  data: dict[str, Any] = {"format": results.FORMAT, "suites": {}}
  if output:
    results.save(output, data)  # a file that cannot be written or merged into fails now
  for suite in chosen_suites(names or _MAIN):
    data["suites"][suite.name] = run_suite(suite, only, rounds, directory or tempfile.gettempdir(), _progress)
    if output:
      results.save(output, data)  # each suite as it comes: a run of many may be cut off
  _show(data, as_json)
  _draw(results.load(output) if output else data, plot, fill)


@command()
def tables(
  file: Annotated[str, typer.Argument(help="JSON that `bench suites -o` wrote.", show_default=False)],
  plot: Plot = None,
  fill: Fill = None,
  as_json: Json = False,
) -> None:
  """Show earlier results of `bench suites`; draw them, or put their tables into documentation."""
  from ckpt_jax.bench import results

  data = results.load(file)
  _show(data, as_json)
  _draw(data, plot, fill)


def _show(data: dict[str, Any], as_json: bool) -> None:
  from ckpt_jax.bench import report, results

  if as_json:
    print_json(data)
    return
  found = results.all_results(data)
  for table in report.tables(found):
    print_table(table.header, table.rows, table.title)
  for suite in found:
    typer.echo("\n  ".join(report.machine_lines(suite)))


def _draw(data: dict[str, Any], plot: str | None, fill: list[str] | None) -> None:
  from ckpt_jax.bench import report, results

  found = results.all_results(data)
  if plot and not found:
    raise ConfigError("nothing was measured: no plot")
  if plot:
    report.plot(plot, found)
  for file in fill or ():
    report.fill_file(file, found)


@command()
def bucket(
  parts: Annotated[
    list[str] | None, typer.Argument(help="gs, s3, requests, faults, mount; default: gs and s3.")
  ] = None,
  output: Merged = None,
  repeats: Annotated[int, typer.Option(min=1, help="Saves while requests fail.")] = 3,
) -> None:
  """Save to emulated buckets, near and behind a link of 400 Mbit/s and 30 ms: gs beside raw Orbax, s3 beside boto3.

  `bench suites bucket` is the suite of that name.
  """
  from ckpt_jax.bench import bucket as speed
  from ckpt_jax.bench import object_stores

  with files.continued(output) as found:
    for part in parts or speed.PARTS:
      if part in speed.PARTS:
        found[part] = speed.run(part, _progress)
      elif part in object_stores.PARTS:
        found[part] = object_stores.run(part, repeats, _progress)
      else:
        raise ConfigError(f"{part}: no part of this measurement; they are gs, s3, requests, faults and mount")
  print_table(("", "side", "blocking s", "commit s", "restore s", "requests: save", "restore"), speed.table(found))


@command()
def export(
  rounds: Annotated[int, typer.Option(min=1, help="Rounds that count; one more comes before them.")] = 5,
  directory: Directory = None,
  output: Output = None,
) -> None:
  """Export and load 340 MB of parameters, beside plain Orbax with the safetensors library and Orbax's own reader."""
  from ckpt_jax.bench.export import run, table

  found = run(rounds, directory, _progress)
  _keep(output, found)
  print_table(("", "side", "seconds", "CPU s", "extra MB", "MB/s"), table(found))


@command()
def goodput(
  output: Annotated[str, typer.Option("-o", "--output", help="JSON file that the round is added to.")],
  kills: Annotated[int, typer.Option(min=1, help="Interruptions in this round.")] = 30,
  seed: Annotated[int, typer.Option(help="Seed of the lifetimes; replaces an earlier round of the same seed.")] = 0,
) -> None:
  """Kill trainers again and again: YoungDaly beside half and double its interval, and what the simulator predicts."""
  from ckpt_jax.bench.goodput import measure, summary

  rounds = [r for r in files.read(output).get("rounds", []) if r["seed"] != seed]
  rounds.append(measure(kills, seed, _progress))
  _emit({"summary": summary(rounds), "rounds": rounds}, output)
  _emit(summary(rounds), None)


@command()
def faults(
  names: Annotated[list[str] | None, typer.Argument(metavar="[FAULT]...", help="Default: all of them.")] = None,
  seeds: Annotated[int, typer.Option(min=1, help="Tries of each fault.")] = 3,
  kills: Annotated[int, typer.Option(min=1, help="Tries of each kind of kill.")] = 30,
  minutes: Minutes = 60.0,
  output: Annotated[
    str | None, typer.Option("-o", "--output", help="Add to this JSON file; the .md beside it gets the table.")
  ] = None,
  as_json: Json = False,
) -> None:
  """Kill, fill, freeze and delete under real trainers, over ckpt_jax and over plain Orbax. Some faults need root."""
  from ckpt_jax.bench import faults as campaign

  for name in names or []:
    if name not in (*campaign.FAULTS, "fsync"):
      raise ConfigError(f"no fault {name!r}; there are {', '.join(campaign.FAULTS)}, and fsync (what syncing costs)")
  with files.continued(output) as results:
    if "fsync" in (names or ["fsync"]):
      results["fsync"] = campaign.fsync_cost()
    chosen = [name for name in names or campaign.FAULTS if name != "fsync"]
    campaign.campaign(chosen, seeds, kills, minutes, results, _progress)
  pages = [page] if output and os.path.exists(page := os.path.splitext(output)[0] + ".md") else []
  _show_campaign(campaign, results, pages, output, as_json)


@command()
def people(
  names: Annotated[
    list[str] | None, typer.Argument(metavar="[NAME]...", help="Tried again; default: those that the file lacks.")
  ] = None,
  minutes: Minutes = 60.0,
  output: Merged = None,
  fill: Annotated[
    list[str] | None, typer.Option(help="Put the table between <!-- people --> and <!-- /people --> of this file.")
  ] = None,
  as_json: Json = False,
) -> None:
  """Try ordinary use and common mistakes in real processes, over ckpt_jax and over plain Orbax."""
  from ckpt_jax.bench import people as campaign

  for name in names or []:
    if name not in campaign.PEOPLE:
      raise ConfigError(f"no scenario {name!r}; there are {', '.join(campaign.PEOPLE)}")
  with files.continued(output) as results:
    campaign.campaign(names or list(campaign.PEOPLE), minutes, results, _progress, again=bool(names))
  _show_campaign(campaign, results, fill or [], output, as_json)


def _show_campaign(campaign: Any, results: dict[str, Any], pages: list[str], output: str | None, as_json: bool) -> None:
  for page in pages:
    files.rewrite(page, functools.partial(campaign.render, results))
  if as_json:
    print_json(results)
  elif not output:
    typer.echo(campaign.table(results))


@command()
def predictions(
  states: Annotated[list[str] | None, typer.Argument(metavar="[STATE]...", help="Default: all.")] = None,
  output: Merged = None,
  rounds: Annotated[int, typer.Option(min=1, help="Saves and restores; 3 at most at 50 MB/s.")] = 5,
  storage: Annotated[list[str] | None, typer.Option(help="disk or '50 MB/s'; default: both.")] = None,
  directory: Directory = None,
) -> None:
  """Compare what plans predict with what saves and restores then cost: w1 to w3 and a compressible state."""
  from ckpt_jax.bench import predictions as bench_predictions

  before = files.read(output)

  def keep(found: dict[str, Any]) -> None:
    _keep(output, bench_predictions.merged(before, found))

  chosen, storages = states or bench_predictions.STATES, storage or bench_predictions.STORAGES
  found = bench_predictions.run(rounds, chosen, storages, directory, _progress, keep)
  for line in bench_predictions.lines(found):
    typer.echo(line)


@command()
def policies(
  output: Output = None,
  steps: Annotated[int, typer.Option(min=10, help="Steps in the run.")] = 5000,
  repeats: Annotated[int, typer.Option(min=1, help="Measurements of each.")] = 5,
) -> None:
  """Time retention decisions, listing, opening and saving in a run of thousands of steps."""
  from ckpt_jax.bench.policies import measure

  _emit(measure(steps, repeats, _progress), output)


@command()
def flips(
  output: Output = None,
  count: Annotated[int, typer.Option("--flips", min=1, help="Bits to flip, in all.")] = 200,
  seed: Annotated[int, typer.Option(help="Seed of the random flips.")] = 0,
  plain: Annotated[bool, typer.Option("--plain/--no-plain", help="Flip plain Orbax's bits too.")] = True,
  fill: Annotated[
    list[str] | None, typer.Option(help="Put the table between <!-- flips --> and <!-- /flips --> of this file.")
  ] = None,
) -> None:
  """Flip random bits in the files of checkpoints, then restore; exit 1 if ckpt_jax restores wrong bits in silence."""
  from ckpt_jax.bench.flips import render, run

  found = run(count, seed, _progress, plain=plain)
  for side, totals in found["totals"].items():
    typer.echo(f"{side}: " + ", ".join(f"{n} {outcome}" for outcome, n in totals.items()))
  _keep(output, found)
  for page in fill or []:
    files.rewrite(page, functools.partial(render, found))
  if found["totals"]["ckpt_jax"]["silently wrong"]:
    raise typer.Exit(1)


@command()
def integrity(
  output: Output = None,
  rounds: Annotated[int, typer.Option(min=1, help="Rounds of each variant.")] = 5,
  directory: Directory = None,
) -> None:
  """Time fingerprints, health checks and verification, on 1.0 GB in 604 leaves."""
  from ckpt_jax.bench.integrity import run

  _emit(run(rounds, directory, _progress), output)


@command()
def accelerator(
  output: Output = None,
  state_size: Annotated[float, size("--size", help="Size of the state.")] = 2.95e9,
  rounds: Annotated[int, typer.Option(min=1, help="Rounds of each side, each in fresh processes.")] = 3,
  minutes: Annotated[float, typer.Option(min=0.1, help="No round begins after this time.")] = 9.0,
  quick: Annotated[bool, typer.Option("--quick", help="One round, and 20 saves instead of 100 for growth.")] = False,
  directory: Annotated[
    str | None,
    typer.Option("--dir", help="Write here; default: memory if there is room, else the temporary directory."),
  ] = None,
  as_json: Json = False,
) -> None:
  """Save and restore on the accelerators at hand beside raw Orbax; without any, CPU devices stand in for them."""
  from ckpt_jax.bench import accelerator as bench_accelerator

  extent = bench_accelerator.Extent(int(state_size), rounds, minutes=minutes)
  if quick:
    extent = dataclasses.replace(extent, rounds=1, repeats=2, growth=20)
  found = bench_accelerator.run(extent, directory, _progress, functools.partial(_keep, output))
  _keep(output, found)
  if as_json:
    print_json(found)
    return
  for table in bench_accelerator.tables(found):
    print_table(table.header, table.rows, table.title)
  for line in found["failed"]:
    typer.echo(f"failed: {line}", err=True)
  if found["failed"]:
    raise typer.Exit(1)


@command()
def hosts(
  counts: Annotated[str, typer.Option("--hosts", help="Numbers of hosts, commas between.")] = "2,4,8",
  mbit: Annotated[float, typer.Option(min=1, help="Bandwidth of the storage's link, 10**6 bits per second.")] = 400,
  megabytes: Annotated[int, typer.Option(min=8, help="Size of the state, 10**6 bytes.")] = 100,
  repeats: Annotated[int, typer.Option(min=1, help="Restores that count, after one that also compiles.")] = 3,
  output: Output = None,
  plot: Plot = None,
) -> None:
  """Restore on many hosts over one storage link, by each strategy and by Orbax; needs root and iproute2."""
  from ckpt_jax.bench.hosts import plot as draw
  from ckpt_jax.bench.hosts import run

  found = run(_numbers("--hosts", counts), mbit, megabytes, repeats, _progress)
  _emit(found, output)
  if plot:
    draw(found, plot)


@command()
def shares(
  counts: Annotated[str, typer.Option("--processes", help="Numbers of processes, commas between.")] = "3,5,6,7",
  rounds: Annotated[int, typer.Option(min=1, help="Saves that count, after one that does not.")] = 5,
  output: Output = None,
) -> None:
  """Save replicated leaves of mixed shapes from several numbers of processes: who writes how much."""
  from ckpt_jax.bench.shares import shares

  _emit(shares(_numbers("--processes", counts), rounds, _progress), output)


@command()
def reshard(
  processes: Annotated[int, typer.Option(min=2, help="Processes with one device each.")] = 4,
  rounds: Annotated[int, typer.Option(min=1, help="Saves and restores that count, after one that does not.")] = 9,
  output: Output = None,
) -> None:
  """Save rows spread over processes, restore columns: how much is read, and what cutting the chunks for it costs."""
  from ckpt_jax.bench.shares import reshard

  _emit(reshard(processes, rounds, _progress), output)


@command()
def lora(
  rounds: Annotated[int, typer.Option(min=1, help="Saves that count, after the first few.")] = 7,
  directory: Directory = None,
  output: Output = None,
) -> None:
  """Saves of a state of which 1% of the bytes move: bytes written, blocking time, commit; raw Orbax beside."""
  from ckpt_jax.bench.lora import lora

  _emit(lora(rounds, directory, _progress), output)


@command()
def direct(
  suite: Annotated[str, typer.Option(help="State to save: w1, w2 or w3.")] = "w1",
  rounds: Annotated[int, typer.Option(min=1, help="Rounds that count, after one that does not.")] = 10,
  directory: Directory = None,
  output: Output = None,
) -> None:
  """Save past the page cache and through it, beside raw Orbax and one raw file: time, CPU, and pages left behind."""
  from ckpt_jax.bench.direct import direct

  _emit(direct(suite, rounds, directory, _progress), output)


@command()
def codec(
  steps: Annotated[int, typer.Option(min=1, help="Steps of training before the measurements.")] = 250,
  rounds: Annotated[int, typer.Option(min=1, help="Saves and restores of each side.")] = 3,
  directory: Directory = None,
  output: Output = None,
  fill: Annotated[
    str | None, typer.Option(help="Put the table between <!-- codec --> and <!-- /codec --> of this file.")
  ] = None,
) -> None:
  """Train a small model, then save its parameters and moments under each codec: bytes and speed, raw Orbax beside."""
  from ckpt_jax.bench.codec import render, run, table

  found = run(steps, rounds, directory, _progress)
  typer.echo(table(found))
  _keep(output, found)
  if fill:
    files.rewrite(fill, functools.partial(render, found))


def _numbers(option: str, text: str) -> list[int]:
  if not all(n.strip().isdecimal() for n in text.split(",")):
    raise ConfigError(f"{option}: expected numbers with commas between, got {text!r}")
  return [int(n) for n in text.split(",")]
