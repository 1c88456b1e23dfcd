"""Times retention decisions, listing, opening and saving in a run of thousands of steps.

The run is made of one real step, hard-linked under all the other numbers, each with a commit time and metrics of its
own.
"""

from __future__ import annotations

import datetime
import json
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

from ckpt_jax.bench.common import output, timed
from ckpt_jax.orbax.format import STEP_METADATA
from ckpt_jax.run.steps import OURS, committed_steps, list_steps, our_metadata, run_directory, step_metadata

_EVERY_S = 600.0
RULES: dict[str, Any] = {
  "last": 3,
  "hourly": 24,
  "daily": 7,
  "weekly": 8,
  "monthly": 12,
  "within": "6h",
  "every_steps": 1000,
  "best": {"metric": "loss", "n": 5},
  "budget": "10TiB",
  "thin": {"after": "1d"},
}


def measure(steps: int = 5000, repeats: int = 5, progress: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
  """Seconds of each operation on a run of `steps` steps with all rules set: medians, and the minimum for `decide`.

  `save` keeps every step, so that each save meets all of them; a second run of 3 steps shows what a save costs without
  them.
  """
  with tempfile.TemporaryDirectory() as directory:
    progress(f"making a run of {steps} steps")
    large, small = pathlib.Path(directory) / "large", pathlib.Path(directory) / "small"
    make_run(large, steps)
    make_run(small, 3)
    progress("deciding and listing")
    found = _decisions(large, repeats)
    progress("the commands")
    found["ls"] = _command(repeats, "ls", str(large)) - (imports := _command(repeats, "ls", str(small)))
    found["ls_imports"] = imports
    found["prune_dry_run"] = _command(repeats, "prune", str(large), "--keep-last", "3", "--dry-run") - imports
    progress("opening and saving")
    for name, path in (("large", large), ("small", small)):
      found |= {f"{key}_{name}": value for key, value in _saves(path, repeats).items()}
    found["save_not_due"] = _not_due(small)
  return {"steps": steps, "repeats": repeats, "cpus": os.cpu_count(), "seconds": found}


def make_run(path: pathlib.Path, steps: int) -> None:
  """Makes a run of `steps` committed steps, one every 10 minutes until now."""
  import jax.numpy as jnp

  import ckpt_jax as ckpt
  from ckpt_jax.run.checksums import with_digest

  with ckpt.Checkpointer(path, ckpt.Config(retention={"last": None})) as c:
    c.save(0, {"params": {"w": jnp.ones(1000)}, "opt": {"w": jnp.ones(2000)}}, metrics={"loss": 1.0})
  first = path / "0"
  metadata = step_metadata(c.directory / "0")
  ours = our_metadata(c.directory / "0")
  now = datetime.datetime.now(datetime.timezone.utc).timestamp()
  for step in range(steps):
    target = path / str(step)
    for folder, _, names in os.walk(first) if step else ():
      there = target / pathlib.Path(folder).relative_to(first)
      there.mkdir()
      for name in names:
        if name not in (STEP_METADATA, "metrics"):
          os.link(os.path.join(folder, name), there / name)
    metadata["commit_timestamp_nsecs"] = int((now - (steps - step) * _EVERY_S) * 1e9)
    metadata["custom_metadata"][OURS] = with_digest(ours | {"metrics": {"loss": 1 / (step + 1)}})
    (target / STEP_METADATA).unlink(missing_ok=True)
    (target / STEP_METADATA).write_text(json.dumps(metadata))
    (target / "metrics" / "metrics").write_text(json.dumps({"loss": 1 / (step + 1)}))


def _decisions(path: pathlib.Path, repeats: int) -> dict[str, float]:
  from ckpt_jax.policies import Retention

  rules = Retention(**RULES)
  listed = list_steps(path)
  return {
    "list_steps": _timed(repeats, lambda: list_steps(path)),
    "committed_steps": _timed(repeats, lambda: committed_steps(run_directory(path))),
    # Pure computation: other work of the machine can only add to it.
    "decide": min(timed(lambda: rules.decide(listed)) for _ in range(5 * repeats)),
  }


def _saves(path: pathlib.Path, repeats: int) -> dict[str, float]:
  import jax.numpy as jnp

  import ckpt_jax as ckpt

  rules = RULES | {"within": "3650d", "thin": {"after": "3650d"}}
  state = {"params": {"w": jnp.ones(1000)}, "opt": {"w": jnp.ones(2000)}}
  started = time.perf_counter()
  with ckpt.Checkpointer(path, ckpt.Config(retention=rules)) as c:
    opened = time.perf_counter() - started
    newest = c.latest_step() or 0
    commits = []
    for i in range(repeats + 2):
      started = time.perf_counter()
      c.save(newest + 1 + i, state, metrics={"loss": 1.0})
      c.wait()
      commits.append(time.perf_counter() - started)
    closing = time.perf_counter()
  return {
    "close": time.perf_counter() - closing,
    "open": opened,
    "first_save_blocking": c.saves[0].blocking_s,
    "second_save_blocking": c.saves[1].blocking_s,
    "save_blocking": statistics.median(s.blocking_s for s in c.saves[2:]),
    "save_to_commit": statistics.median(commits[2:]),
  }


def _not_due(path: pathlib.Path, calls: int = 1000) -> float:
  """Seconds of one call of `save` for which no save is due."""
  import ckpt_jax as ckpt

  with ckpt.Checkpointer(path, ckpt.Config(schedule={"every": "1h"}, retention={"last": None})) as c:
    for step in range(10_000, 10_050):
      c.save(step, {})
    started = time.perf_counter()
    for step in range(10_050, 10_050 + calls):
      c.save(step, {})
    return (time.perf_counter() - started) / calls


def _timed(repeats: int, function: Callable[[], Any]) -> float:
  return statistics.median(timed(function) for _ in range(repeats))


def _command(repeats: int, *arguments: str) -> float:
  return _timed(repeats, lambda: output(arguments[0], ["ckpt_jax", *arguments], timeout=300))
