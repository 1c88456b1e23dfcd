"""`ckpt-jax tune`: from a plan to a configuration file, by real saves and restores."""

from __future__ import annotations

import dataclasses
import datetime
import difflib
import importlib
import os
import sys
import types
from typing import Annotated, Any

import typer

from ckpt_jax.cli.common import Json, print_json
from ckpt_jax.config import Config, load_config, parse_bytes, parse_duration
from ckpt_jax.errors import CheckpointError, ConfigError

# Of the budget, what one save and restore of the sample may take by the plan's expectation.
_TRIAL_SHARE = 1 / 16
_LEAST_NBYTES = 16 << 20
_SYNTHETIC_NBYTES = 512 << 20


def tune(
  path: Annotated[str, typer.Argument(help="Where runs will lie: a directory, gs://..., s3://...", show_default=False)],
  like: Annotated[str | None, typer.Option(metavar="RUN@STEP", help="Tune for the state of this step.")] = None,
  state: Annotated[
    str | None, typer.Option(metavar="MODULE:FUNCTION", help="Tune for the state that this function returns.")
  ] = None,
  output: Annotated[str | None, typer.Option("-o", "--output", metavar="FILE.yaml", help="Write it here.")] = None,
  budget: Annotated[str, typer.Option(help="Time to measure for.")] = "2m",
  max_bytes: Annotated[str, typer.Option(help="Of the state, save and restore at most so much in a trial.")] = "1GiB",
  config: Annotated[str | None, typer.Option(help="A file with settings that stay.")] = None,
  pack: Annotated[bool, typer.Option("--pack", help="Packing of small arrays may be chosen.")] = False,
  explain: Annotated[
    bool, typer.Option("--explain", "--dry-run", help="Print the plan with its reasons; save nothing.")
  ] = False,
  as_json: Json = False,
) -> None:
  """Find the settings that save and restore a state fastest on a storage; write them with what was measured."""
  from ckpt_jax.tuning.plan import make_plan
  from ckpt_jax.tuning.search import search, table, to_yaml

  try:
    seconds, limit = parse_duration(budget), parse_bytes(max_bytes)
  except ValueError as e:
    raise ConfigError(str(e)) from None
  if like and state:
    raise ConfigError("--like and --state exclude each other; give one")
  user = load_config(config) if config else Config()
  if pack:
    user = user.model_copy(update={"layout": user.layout.model_copy(update={"pack": "auto"})})
  if output and not explain:
    _check_writable(output)
  real, what = _state(like, state, limit)
  plan = make_plan(real, path, config=user)
  if explain:
    print_json(plan.to_dict()) if as_json else typer.echo(plan.explain())
    return

  from ckpt_jax.bench.trial import bounded, trials

  expected = plan.commit_s + plan.restore_s
  affordable = plan.state.nbytes * seconds * _TRIAL_SHARE / max(expected, 1e-9)
  sample = bounded(real, max(_LEAST_NBYTES, min(limit, int(affordable))))
  sample_plan = make_plan(sample, plan.storage, plan.host, user)
  quiet = as_json or not sys.stderr.isatty()
  with trials(path, sample) as measure:
    tuned = search(
      sample_plan, user, measure, seconds, pack=pack, progress=lambda s: None if quiet else typer.echo(s, err=True)
    )
  import ckpt_jax

  now = datetime.datetime.now(datetime.timezone.utc)
  header = [
    f"ckpt-jax {ckpt_jax.__version__} tune, {now:%Y-%m-%d %H:%M} UTC, on {plan.host.host} ({plan.host.cores} cores), "
    f"{plan.storage.kind} at {path}",
    f"State: {what}, {plan.state.nbytes:,} bytes in {plan.state.leaves:,} arrays; measured on "
    f"{sample_plan.state.nbytes:,} bytes in {sample_plan.state.leaves:,}, in {tuned.seconds:.0f} s. Medians:",
  ]
  # Sizes of the whole state decide the limits, not those of the sample.
  whole = _for_whole(plan, tuned, user)
  text = to_yaml(whole, plan, user, header)
  if output:
    with open(output, "w", encoding="utf-8") as file:
      file.write(text)
  if as_json:
    print_json(
      {
        "config": whole.config.to_dict(),
        "taken": tuned.best.name,
        "seconds": tuned.seconds,
        "measured": [
          {"settings": c.name, "changes": c.changes, "rounds": len(c.samples)}
          | {f: c.median(f) for f in ("blocking_s", "commit_s", "restore_s", "nbytes")}
          for c in tuned.candidates
        ],
        "file": output,
      }
    )
  elif output:
    typer.echo("\n".join(table(tuned)))
    typer.echo(f"{output}: written; Checkpointer(run, config={output!r}) loads it")
  else:
    typer.echo(text)


def _for_whole(plan: Any, tuned: Any, user: Config) -> Any:
  """The result for the whole state: its plan with the changes that won on the sample; limits never below its arrays."""
  from ckpt_jax.tuning.search import changed

  changes = {}
  for key, value in tuned.best.changes.items():
    floor = plan.state.largest_local_nbytes if key.endswith(("save_concurrency", "restore_concurrency")) else 0
    changes[key] = max(value, floor) if isinstance(value, int) else value
  return dataclasses.replace(tuned, config=changed(plan.apply(user), changes))


def _check_writable(output: str) -> None:
  folder = os.path.dirname(os.path.abspath(output))
  if os.path.isdir(output) or not os.path.isdir(folder) or not os.access(folder, os.W_OK):
    raise ConfigError(f"-o {output}: cannot be written there; give the name of a file in a directory that exists")


def _state(like: str | None, function: str | None, limit: int) -> tuple[Any, str]:
  """The state to tune for, and what it is called in the file."""
  if like is not None:
    return _saved(like, limit), like
  if function is not None:
    return _called(function), function
  import numpy as np

  rng = np.random.default_rng(0)
  rows = _SYNTHETIC_NBYTES // 128 // 4096
  made = {f"w{i}": rng.standard_normal((rows, 1024), dtype=np.float32) for i in range(128)}
  return made, "128 arrays of random float32 (give --like or --state for yours)"


def _saved(like: str, limit: int) -> Any:
  from ckpt_jax.layout import contents
  from ckpt_jax.restore.read import Request, read_state
  from ckpt_jax.run.steps import run_directory, step_directory

  where, at, step = like.rpartition("@")
  if not at or not where or not step.isdigit():
    raise ConfigError(f"--like {like}: expected RUN@STEP, e.g. ~/runs/a@1000")
  step_dir = step_directory(run_directory(where), int(step))
  leaves = contents.saved_leaves(step_dir)
  total = sum(leaf.nbytes for leaf in leaves)
  names: list[str] | None = None
  if total > limit:  # a part, spread evenly over the bytes
    names, taken, seen = [], 0, 0
    for leaf in leaves:
      seen += leaf.nbytes
      if taken + leaf.nbytes <= min(limit, seen * limit / total + leaf.nbytes / 2):
        names.append(leaf.path)
        taken += leaf.nbytes
  # Not through a Checkpointer, which would take the run for its own: a job may be writing there.
  return read_state(step_dir, Config(), Request(only=names)).state


def _called(text: str) -> Any:
  """What MODULE:FUNCTION returns; the current directory is looked in first, as `python -m` does."""
  import jax

  name, colon, attribute = text.partition(":")
  if not colon or not name or not attribute:
    raise ConfigError(f"--state {text}: expected MODULE:FUNCTION, e.g. train:init_state")
  if "" not in sys.path and os.getcwd() not in sys.path:
    sys.path.insert(0, os.getcwd())
  try:
    module: types.ModuleType = importlib.import_module(name)
  except ModuleNotFoundError as e:
    if e.name is None or not (name == e.name or name.startswith(f"{e.name}.")):
      raise ConfigError(f"--state {text}: {name} imports {e.name}, which is not installed") from None
    here = [f[:-3] for f in os.listdir() if f.endswith(".py")]
    near = difflib.get_close_matches(name, here, n=1)
    hint = f"; did you mean {near[0]}?" if near else f"; looked in {os.getcwd()} and the installed packages"
    raise ConfigError(f"--state {text}: no module {name}{hint}") from None
  except Exception as e:
    raise ConfigError(f"--state {text}: {name} cannot be imported: {type(e).__name__}: {e}") from None
  found = getattr(module, attribute, None)
  if not callable(found):
    names = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
    near = difflib.get_close_matches(attribute, names, n=1)
    hint = f"; did you mean {near[0]}?" if near else f"; it has {', '.join(sorted(names)[:10]) or 'no functions'}"
    raise ConfigError(f"--state {text}: {name} has no function {attribute}{hint}")
  try:
    made = found()
  except Exception as e:
    raise CheckpointError(f"--state {text}: {attribute}() failed: {type(e).__name__}: {e}") from None
  if not any(hasattr(x, "nbytes") for x in jax.tree.leaves(made)):
    raise ConfigError(f"--state {text}: {attribute}() returned no arrays; it must return the state to save")
  return made
