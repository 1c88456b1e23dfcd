"""`ckpt-jax bench`: measurements side by side with raw Orbax and others. One function a subcommand."""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from typing import Annotated, Any

import typer

from ckpt_jax.cli.common import Json, NearestName, console, print_json
from ckpt_jax.errors import ConfigError

_MAIN = ["w1", "w2", "w3", "small", "moe", "multi", "bucket", "compressible"]


class _SuiteOrCommand(NearestName):
  """`ckpt-jax bench w1 w2` is short for `ckpt-jax bench suites w1 w2`."""

  def names(self) -> list[str]:
    from ckpt_jax.bench.suites import NAMES

    return [*NAMES, *super().names()]

  def resolve_command(self, ctx: Any, args: list[str]) -> Any:
    from ckpt_jax.bench.suites import GROUPS, SUITES

    known = args and args[0] in {*SUITES, *GROUPS}
    return super().resolve_command(ctx, ["suites", *args] if known else args)


bench = typer.Typer(
  cls=_SuiteOrCommand, no_args_is_help=True, help="Measure side by side with raw Orbax; `bench w1 w2` runs suites."
)

Plot = Annotated[str | None, typer.Option(help="Draw the results into this file (.png, .svg, .pdf).")]
Fill = Annotated[
  list[str] | None, typer.Option(help="Put the tables into the blocks <!-- bench:... --> of this Markdown file.")
]


@bench.command("suites")
def suites(
  names: Annotated[
    list[str] | None, typer.Argument(metavar="[SUITE]...", help=f"Of {', '.join(_MAIN)}; default: all of them.")
  ] = None,
  rounds: Annotated[int, typer.Option(min=1, help="Turns of each variant that count.")] = 5,
  variants: Annotated[str | None, typer.Option(help="Only these, commas between: orbax,ckpt_jax,tuned.")] = None,
  directory: Annotated[str | None, typer.Option("--dir", help="Write here; default: the temporary directory.")] = None,
  output: Annotated[str | None, typer.Option("-o", "--output", help="Merge the results into this JSON file.")] = None,
  plot: Plot = None,
  fill: Fill = None,
  as_json: Json = False,
) -> None:
  """Save and restore states side by side: raw Orbax, ckpt_jax, torch DCP, safetensors, a raw file."""
  from ckpt_jax.bench import results
  from ckpt_jax.bench.runner import run_suite
  from ckpt_jax.bench.suites import chosen_suites

  signal.signal(
    signal.SIGTERM, lambda *_: sys.exit(143)
  )  # its processes end, and its files go, also when it is cut off
  only = [v.strip() for v in variants.split(",")] if variants else None
  where = directory or tempfile.gettempdir()
  data: dict[str, Any] = {"format": results.FORMAT, "suites": {}}
  if output:
    results.save(output, data)  # what cannot be written or merged into is better told now
  for suite in chosen_suites(names or _MAIN):
    found = run_suite(suite, only, rounds, where, lambda what: typer.echo(what, err=True))
    data["suites"][suite.name] = found
    if output:
      results.save(output, data)  # each suite as it comes: a run of many may be cut off
  if as_json:
    print_json(data)
  else:
    _show(data)
  everything = results.load(output) if output else data
  _draw(everything, plot, fill)


@bench.command("tables")
def tables(
  file: Annotated[str, typer.Argument(help="JSON that `bench suites -o` wrote.", show_default=False)],
  plot: Plot = None,
  fill: Fill = None,
  as_json: Json = False,
) -> None:
  """Show what `bench suites` measured earlier; draw it, or put its tables into documentation."""
  from ckpt_jax.bench import results

  data = results.load(file)
  if as_json:
    print_json(data)
  else:
    _show(data)
  _draw(data, plot, fill)


def _show(data: dict[str, Any]) -> None:
  from ckpt_jax.bench import report, results

  found = results.all_results(data)
  for table in report.tables(found):
    console().print(table.rich())
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


@bench.command("object-stores")
def object_stores(
  output: Annotated[str | None, typer.Option("-o", "--output", help="Write the JSON into this file.")] = None,
  repeats: Annotated[int, typer.Option(min=1, help="Saves while requests fail.")] = 10,
  megabytes: Annotated[int, typer.Option(min=1, help="Size of the state, 10**6 bytes.")] = 268,
) -> None:
  """Count requests, save while one request in five fails, compare s3:// with an s3fs mount; emulated servers."""
  from ckpt_jax.bench.object_stores import run

  found = json.dumps(run(repeats, megabytes, lambda what: typer.echo(what, err=True)), indent=1)
  if output:
    with open(output, "w", encoding="utf-8") as file:
      file.write(found + "\n")
  else:
    typer.echo(found)


@bench.command()
def goodput(
  output: Annotated[str, typer.Option("-o", "--output", help="JSON; a round of another seed is added to it.")],
  kills: Annotated[int, typer.Option(min=1, help="Interruptions in this round.")] = 30,
  seed: Annotated[int, typer.Option(help="Of the lives; a round of the same seed is replaced.")] = 0,
) -> None:
  """Kill trainers again and again: YoungDaly beside half and double its interval, and what the simulator predicts."""
  from ckpt_jax.bench import goodput as bench_goodput

  rounds = []
  if os.path.exists(output):
    with open(output, encoding="utf-8") as file:
      rounds = [r for r in json.load(file)["rounds"] if r["seed"] != seed]
  rounds.append(bench_goodput.measure(kills, seed, lambda what: typer.echo(what, err=True)))
  told = bench_goodput.summary(rounds)
  with open(output, "w", encoding="utf-8") as file:
    file.write(json.dumps({"summary": told, "rounds": rounds}, indent=1) + "\n")
  typer.echo(json.dumps(told, indent=1))


@bench.command("faults")
def faults(
  names: Annotated[list[str] | None, typer.Argument(metavar="[FAULT]...", help="Default: all of them.")] = None,
  seeds: Annotated[int, typer.Option(min=1, help="Tries of each fault.")] = 3,
  kills: Annotated[int, typer.Option(min=1, help="Tries of each kind of kill.")] = 30,
  minutes: Annotated[float, typer.Option(min=0.1, help="Stop after this time; the next call goes on.")] = 60.0,
  output: Annotated[
    str | None, typer.Option("-o", "--output", help="Add to this JSON; its .md gets the table.")
  ] = None,
  as_json: Json = False,
) -> None:
  """Kill, fill, freeze and delete under real trainers, over ckpt_jax and over plain Orbax. Some faults need root."""
  from ckpt_jax.bench import faults as campaign

  wrong = [name for name in names or [] if name not in (*campaign.FAULTS, "fsync")]
  if wrong:
    raise ConfigError(f"no fault {wrong[0]!r}; there are {', '.join(campaign.FAULTS)}, and fsync (what syncing costs)")
  results = _read_results(output)
  chosen = [name for name in names or campaign.FAULTS if name != "fsync"]
  if "fsync" in (names or ["fsync"]):
    results["fsync"] = campaign.fsync_cost()
  try:
    campaign.campaign(chosen, seeds, kills, minutes, results, lambda text: typer.echo(text, err=True))
  finally:
    _write_results(output, results)
  page = os.path.splitext(output)[0] + ".md" if output else None
  if page and os.path.exists(page):
    _rewrite(page, lambda text: campaign.render(results, text))
  if as_json:
    print_json(results)
  elif not output:
    typer.echo(campaign.table(results))


@bench.command("people")
def people(
  names: Annotated[
    list[str] | None, typer.Argument(metavar="[NAME]...", help="Tried again; default: what the file lacks.")
  ] = None,
  minutes: Annotated[float, typer.Option(min=0.1, help="Stop after this time; the next call goes on.")] = 60.0,
  output: Annotated[str | None, typer.Option("-o", "--output", help="Add to this JSON.")] = None,
  fill: Annotated[
    list[str] | None, typer.Option(help="Put the table between <!-- people --> and <!-- /people --> of this file.")
  ] = None,
  as_json: Json = False,
) -> None:
  """What people do, and what becomes of it, over ckpt_jax and over plain Orbax."""
  from ckpt_jax.bench import people as campaign

  wrong = [name for name in names or [] if name not in campaign.PEOPLE]
  if wrong:
    raise ConfigError(f"nobody does {wrong[0]!r}; there are {', '.join(campaign.PEOPLE)}")
  results = _read_results(output)
  try:
    chosen = names or list(campaign.PEOPLE)
    campaign.campaign(chosen, minutes, results, lambda text: typer.echo(text, err=True), again=bool(names))
  finally:
    _write_results(output, results)
  for file in fill or ():
    _rewrite(file, lambda text: campaign.render(results, text))
  if as_json:
    print_json(results)
  elif not output:
    typer.echo(campaign.table(results))


def _read_results(file: str | None) -> dict[str, Any]:
  if not (file and os.path.exists(file)):
    return {}
  with open(file, encoding="utf-8") as opened:
    return json.load(opened)


def _write_results(file: str | None, results: dict[str, Any]) -> None:
  if file:
    with open(file, "w", encoding="utf-8") as opened:
      opened.write(json.dumps(results, indent=1) + "\n")


def _rewrite(file: str, change: Callable[[str], str]) -> None:
  with open(file, encoding="utf-8") as opened:
    text = change(opened.read())
  with open(file, "w", encoding="utf-8") as opened:
    opened.write(text)


@bench.command()
def predictions(
  states: Annotated[list[str] | None, typer.Argument(metavar="[STATE]...", help="Default: all.")] = None,
  output: Annotated[str | None, typer.Option("-o", "--output", help="Merge the results into this JSON file.")] = None,
  rounds: Annotated[int, typer.Option(min=1, help="Saves and restores; 3 at most at 50 MB/s.")] = 5,
  storage: Annotated[list[str] | None, typer.Option(help="disk or '50 MB/s'; default: both.")] = None,
  directory: Annotated[str | None, typer.Option("--dir", help="On the disk; default: the temporary directory.")] = None,
) -> None:
  """What plans predict beside what saves and restores then cost: w1 to w3 and a compressible state."""
  from ckpt_jax.bench import predictions as bench_predictions

  before: dict[str, Any] = {}
  if output and os.path.exists(output):
    with open(output, encoding="utf-8") as file:
      before = json.load(file)["results"]

  def keep(found: dict[str, Any]) -> None:
    if output:
      names = [*before, *(n for n in found["results"] if n not in before)]
      merged = {name: before.get(name, {}) | found["results"].get(name, {}) for name in names}
      with open(output, "w", encoding="utf-8") as file:
        file.write(json.dumps(found | {"results": merged}, indent=1) + "\n")

  found = bench_predictions.run(
    rounds,
    tuple(states or (*bench_predictions.STATES, bench_predictions.COMPRESSIBLE)),
    tuple(storage or ("disk", "50 MB/s")),
    directory,
    lambda what: typer.echo(what, err=True),
    keep,
  )
  for name, results in found["results"].items():
    for state, settings in results.items():
      for setting, entry in settings.items():
        figures = ", ".join(
          f"{key[:-2]} {entry[key]['predicted']:.2f} s predicted, {entry[key]['measured']:.2f} s measured"
          for key in ("blocking_s", "commit_s", "restore_s")
        )
        typer.echo(f"{name}, {state}, compression {setting}: {figures}")


@bench.command("policies")
def policies(
  output: Annotated[str | None, typer.Option("-o", "--output", help="Write the JSON into this file.")] = None,
  steps: Annotated[int, typer.Option(min=10, help="Steps in the run.")] = 5000,
  repeats: Annotated[int, typer.Option(min=1, help="Times that each is measured.")] = 5,
) -> None:
  """Deciding, listing, opening and saving in a run of thousands of steps."""
  from ckpt_jax.bench.policies import measure

  found = json.dumps(measure(steps, repeats, lambda what: typer.echo(what, err=True)), indent=1)
  if output:
    with open(output, "w", encoding="utf-8") as file:
      file.write(found + "\n")
  else:
    typer.echo(found)


@bench.command("flips")
def flips(
  output: Annotated[str | None, typer.Option("-o", "--output", help="Write the JSON into this file.")] = None,
  count: Annotated[int, typer.Option("--flips", min=1, help="Bits to flip, in all.")] = 200,
  seed: Annotated[int, typer.Option(help="Of the flips.")] = 0,
  plain: Annotated[bool, typer.Option("--plain/--no-plain", help="Flip plain Orbax's bits too.")] = True,
) -> None:
  """Flip random bits in all files of checkpoints: what is restored then? Exit 1 if anything is silently wrong."""
  from ckpt_jax.bench.flips import run

  found = run(count, seed, lambda what: typer.echo(what, err=True), plain=plain)
  for side, totals in found["totals"].items():
    typer.echo(f"{side}: " + ", ".join(f"{n} {outcome}" for outcome, n in totals.items()))
  if output:
    with open(output, "w", encoding="utf-8") as file:
      file.write(json.dumps(found, indent=1) + "\n")
  if found["totals"]["ckpt_jax"]["silently wrong"]:
    raise typer.Exit(1)


@bench.command("integrity")
def integrity(
  output: Annotated[str | None, typer.Option("-o", "--output", help="Write the JSON into this file.")] = None,
  rounds: Annotated[int, typer.Option(min=1, help="Turns of each variant.")] = 5,
  directory: Annotated[str | None, typer.Option("--dir", help="Write here; default: the temporary directory.")] = None,
) -> None:
  """What fingerprints, health and verification cost, on 1.0 GB in 604 leaves."""
  from ckpt_jax.bench.integrity import run

  found = json.dumps(run(rounds, directory, lambda what: typer.echo(what, err=True)), indent=1)
  if output:
    with open(output, "w", encoding="utf-8") as file:
      file.write(found + "\n")
  else:
    typer.echo(found)


@bench.command("hosts")
def hosts(
  counts: Annotated[str, typer.Option("--hosts", help="Numbers of hosts, commas between.")] = "2,4,8",
  mbit: Annotated[float, typer.Option(min=1, help="Bandwidth of the storage's link, 10**6 bits per second.")] = 400,
  megabytes: Annotated[int, typer.Option(min=8, help="Size of the state, 10**6 bytes.")] = 100,
  repeats: Annotated[int, typer.Option(min=1, help="Restores that count, after one that also compiles.")] = 3,
  output: Annotated[str | None, typer.Option("-o", "--output", help="Write the JSON into this file.")] = None,
  plot: Plot = None,
) -> None:
  """Restore on many hosts over one storage link, by each strategy and by Orbax; needs root and iproute2."""
  from ckpt_jax.bench.hosts import plot as draw
  from ckpt_jax.bench.hosts import run

  try:
    numbers = [int(n) for n in counts.split(",")]
  except ValueError:
    raise ConfigError(f"--hosts: expected numbers with commas between, got {counts!r}") from None
  found = run(numbers, mbit, megabytes, repeats, lambda what: typer.echo(what, err=True))
  text = json.dumps(found, indent=1)
  if output:
    with open(output, "w", encoding="utf-8") as file:
      file.write(text + "\n")
  else:
    typer.echo(text)
  if plot:
    draw(found, plot)
