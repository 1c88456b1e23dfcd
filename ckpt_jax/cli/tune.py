"""`ckpt-jax tune`: from a plan to a configuration file, by real saves and restores."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ckpt_jax.cli.common import Json, duration, grouped, named_function, print_json, run_at_step, size
from ckpt_jax.config import Config, load_config
from ckpt_jax.config.units import count, decimal_text, duration_text
from ckpt_jax.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
  from rich.console import Console, RenderableType

  from ckpt_jax.tuning.profile import StateProfile
  from ckpt_jax.tuning.search import Tuned, Update


@dataclasses.dataclass(frozen=True)
class StateOptions:
  """The state to tune for."""

  like: Annotated[
    str | None,
    typer.Option(metavar="RUN@STEP", help="Tune for the state of this step (default: the newest, if PATH is a run)."),
  ] = None
  state: Annotated[
    str | None, typer.Option(metavar="MODULE:FUNCTION", help="Tune for the state that this function returns.")
  ] = None
  max_bytes: Annotated[
    int, size(help="Save and restore at most this much of the state in a trial (default: 1GiB).")
  ] = 1 << 30

  def make(self, path: str) -> tuple[StateProfile, Any, str]:
    """The profile of the state, a sample of it, and its description, which is printed before anything takes time."""
    if self.like and self.state:
      raise ConfigError("--like and --state exclude each other; give one")
    if self.state:
      function = named_function("--state", self.state)
      _say(f"tuning for the state that {self.state} returns")
      return _profiled(_called(self.state, function), f"what {self.state} returns")
    found = (*run_at_step(self.like), "--like") if self.like else _newest(path)
    if found is not None:
      return self._saved(*found)
    from ckpt_jax.bench.tune import SYNTHETIC, synthetic_state

    _say(f"tuning for {SYNTHETIC}: {path} holds no run, and neither --like nor --state was given")
    return _profiled(synthetic_state(), SYNTHETIC)

  def _saved(self, run: str, step: int, why: str) -> tuple[StateProfile, Any, str]:
    from ckpt_jax.layout.contents import saved_leaves
    from ckpt_jax.run.steps import run_directory, step_directory

    step_dir = step_directory(run_directory(run), step)
    leaves = saved_leaves(step_dir)
    nbytes = decimal_text(sum(leaf.nbytes for leaf in leaves))
    what = f"the state of {step_dir}, {nbytes} in {count(len(leaves), 'leaf', 'leaves')}"
    _say(f"tuning for {what} ({why})")
    from ckpt_jax.bench.tune import saved_state

    return (*saved_state(step_dir, leaves, self.max_bytes), what)


@grouped
def tune(
  path: Annotated[str, typer.Argument(help="Where runs will be: a directory, gs://..., s3://...", show_default=False)],
  options: StateOptions,
  output: Annotated[str | None, typer.Option("-o", "--output", metavar="FILE.yaml", help="Write it here.")] = None,
  budget: Annotated[float, duration(help="Time to measure for (default: 2m).")] = 120,
  config: Annotated[str | None, typer.Option(help="A YAML file with settings that stay.")] = None,
  pack: Annotated[bool, typer.Option("--pack", help="Packing of small arrays may be chosen.")] = False,
  explain: Annotated[
    bool, typer.Option("--explain", "--dry-run", help="Print the plan with its reasons; save nothing.")
  ] = False,
  as_json: Json = False,
) -> None:
  """Find the settings that save and restore a state fastest on a storage; write them with the measurements."""
  user = load_config(config) if config else Config()
  if pack:
    user = user.changed({"layout.pack": "auto"})
  if output and not explain:
    _check_writable(output)
  profile, sample, what = options.make(path)
  from ckpt_jax.bench.tune import Task
  from ckpt_jax.bench.tune import tune as search
  from ckpt_jax.tuning.plan import make_plan
  from ckpt_jax.tuning.tuned_file import table

  plan = make_plan(profile, path, config=user)
  if explain:
    print_json(plan.to_dict()) if as_json else typer.echo(plan.explain())
    return
  _say(f"saving and restoring samples of it at {path} for at most {duration_text(budget)} (--budget)")
  with _Shown() as shown:
    tuned, text = search(Task(path, profile, sample, what, user, pack), plan, budget, options.max_bytes, shown)
  if output:
    with open(output, "w", encoding="utf-8") as file:
      file.write(text)
  if as_json:
    print_json(_as_json(tuned) | {"file": output})
  elif output:
    typer.echo("\n".join(table(tuned)))
    typer.echo(f"{output}: written; Checkpointer(run, config={output!r}) loads it")
  else:
    typer.echo(text)


class _Shown:
  """Shows a search on stderr as it goes: a table on a terminal, else a line for each trial."""

  def __init__(self, console: Console | None = None):
    from rich.console import Console
    from rich.live import Live

    self._console = console or Console(stderr=True)
    self._live = Live(self, console=self._console, transient=True) if self._console.is_terminal else None
    self._update: Update | None = None
    self._at = 0.0

  def __enter__(self) -> _Shown:
    if self._live is not None:
      self._live.start()
    return self

  def __exit__(self, *_: object) -> None:
    if self._live is not None:
      self._live.stop()

  def __call__(self, update: Update) -> None:
    self._update, self._at = update, time.monotonic()
    if self._live is None and update.sample is not None:
      self._console.print(self._line(update), markup=False, highlight=False, soft_wrap=True)

  def _line(self, update: Update) -> str:
    sample, name = update.sample, update.running.name
    assert sample is not None
    against = next((s.text for s in update.standings if s.candidate.name == name), "")
    return (
      f"round {update.round}, {name}: commit {duration_text(sample.commit_s)}, restore "
      f"{duration_text(sample.restore_s)}{f'; {against}' if against else ''}; {_left(update.left_s)}"
    )

  def __rich__(self) -> RenderableType:
    from rich.console import Group
    from rich.table import Table

    from ckpt_jax.tuning.tuned_file import HEADERS, rows

    update = self._update
    if update is None or not update.standings:
      return "the first trials, of which one does not count"
    table = Table(*HEADERS)
    for standing, cells in zip(update.standings, rows(update.standings), strict=True):
      runs = update.sample is None and standing.candidate.name == update.running.name
      table.add_row(*cells, style="bold" if runs else "dim" if standing.dropped else "")
    since = time.monotonic() - self._at
    now = f"round {update.round}: {update.running.name}"
    return Group(table, f"{now}; {duration_text(update.spent_s + since)} so far, {_left(update.left_s - since)}")


def _left(seconds: float) -> str:
  return f"at most {duration_text(round(seconds))} left" if seconds >= 1 else "nearly done"


def _say(text: str) -> None:
  typer.echo(text, err=True)


def _newest(path: str) -> tuple[str, int, str] | None:
  from ckpt_jax.run.steps import newest_step, run_directory

  step = newest_step(run_directory(path))
  return None if step is None else (path, step, f"the newest step of the run at {path}; --like takes another")


def _profiled(state: Any, what: str) -> tuple[StateProfile, Any, str]:
  from ckpt_jax.tuning.profile import profile_state

  profile = profile_state(state)
  return profile, state, f"{what}, {decimal_text(profile.nbytes)} in {count(profile.leaves, 'array')}"


def _as_json(tuned: Tuned) -> dict[str, Any]:
  return {
    "config": tuned.config.to_dict(),
    "taken": tuned.best.name,
    "seconds": tuned.seconds,
    "noise": _finite(tuned.noise),
    "untried": [c.name for c in tuned.untried],
    "measured": [
      {"settings": s.candidate.name, "changes": s.candidate.changes, "rounds": len(s.candidate.samples)}
      | {"ratio": s.ratio, "margin": _finite(s.margin), "dropped": s.dropped}
      | {field: s.candidate.median(field) for field in ("blocking_s", "commit_s", "restore_s", "nbytes")}
      for s in tuned.standings
    ],
  }


def _finite(value: float) -> float | None:
  return value if math.isfinite(value) else None


def _check_writable(output: str) -> None:
  folder = os.path.dirname(os.path.abspath(output))
  if os.path.isdir(output) or not os.path.isdir(folder) or not os.access(folder, os.W_OK):
    raise ConfigError(f"-o {output}: cannot be written there; give the name of a file in a directory that exists")


def _called(text: str, function: Any) -> Any:
  import jax

  try:
    state = function()
  except Exception as e:
    raise CheckpointError(
      f"--state {text}: {function.__name__}() failed: {type(e).__name__}: {e}", topic="configuration"
    ) from None
  if not any(hasattr(x, "nbytes") for x in jax.tree.leaves(state)):
    raise ConfigError(f"--state {text}: {function.__name__}() returned no arrays; it must return the state to save")
  return state
