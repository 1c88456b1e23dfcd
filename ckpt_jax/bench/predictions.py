"""Compares the predictions of a plan with measurements: w1 to w3 on a disk and on a bucket behind a 50 MB/s link.

The storage is measured once, then each round plans, saves and restores. The same for a compressible state, with
compression as the plan decides, on and off.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ckpt_jax.bench.buckets import gcs_server
from ckpt_jax.bench.common import CPU, answer, quiet, rotated
from ckpt_jax.bench.link import available, limited_link
from ckpt_jax.bench.suites import SUITES, state_of
from ckpt_jax.errors import CheckpointError, ConfigError

COMPRESSIBLE = "compressible"
STATES = ("w1", "w2", "w3", COMPRESSIBLE)
_FIGURES = ("blocking_s", "commit_s", "restore_s", "nbytes")
_LINK_MBIT = 400.0
# Some hundred megabytes: less would only measure a disk's write-behind.
_PROBE = {"disk": (6.0, "1GiB"), "50 MB/s": (6.0, "128MiB")}
STORAGES = tuple(_PROBE)
# A file system discards the blocks of a probe's files after it: saves took twice as long on this ext4.
_SETTLE_S = 10.0


def run(
  rounds: int,
  states: Sequence[str],
  storages: Sequence[str],
  directory: str | None,
  progress: Callable[[str], None],
  done: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
  """Runs all measurements. Returns JSON-able data.

  Args:
    rounds: on the disk; the slow link gets 3 at most.
    states, storages: of `STATES` and `STORAGES`.
    directory: on the disk to measure; None: the temporary directory.
    progress: called with a line before each measurement.
    done: called with all results so far after each state, since a long run may be cut off.

  Raises:
    ConfigError: for a state or storage that there is not.
    CheckpointError: if a measurement fails, or if this process may not limit a link.
  """
  for names, known in ((states, STATES), (storages, STORAGES)):
    for name in names:
      if name not in known:
        raise ConfigError(f"no {name!r}; there are {', '.join(known)}")
  found: dict[str, Any] = {
    "rounds": rounds,
    "cpus": os.cpu_count(),
    "python": platform.python_version(),
    "results": {},
  }
  for storage in storages:
    if storage != "disk" and not available():
      raise CheckpointError("the 50 MB/s link needs root and iproute2 (ip, tc); leave it out with --storage disk")
    for state in states:
      progress(f"{state} on {storage}")
      with on_storage(storage, directory) as (where, env):
        count = rounds if storage == "disk" else min(rounds, 3)
        rows = _child(state, storage, where, count, env)
      found["results"].setdefault(storage, {})[state] = summary(rows)
      done(found)
  return found


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
  """Medians over rounds of predictions and measurements, by setting, and their ratios."""
  result: dict[str, Any] = {}
  for setting in dict.fromkeys(row["setting"] for row in rows):
    mine = [row for row in rows if row["setting"] == setting]
    entry: dict[str, Any] = {"compression": mine[-1]["compression"]}
    for key in _FIGURES:
      predicted = statistics.median(row["predicted"][key] for row in mine)
      measured = statistics.median(row["measured"][key] for row in mine)
      entry[key] = {
        "predicted": predicted,
        "measured": measured,
        "ratio": predicted / measured,
        "all": [[row["predicted"][key], row["measured"][key]] for row in mine],
      }
    result[setting] = entry
  if len(result) > 1:
    times = {name: e["commit_s"]["measured"] + e["restore_s"]["measured"] for name, e in result.items()}
    best = min(times[name] for name in times if name != "auto")
    result["auto"]["loss_to_best_fixed"] = times["auto"] / best - 1
  return result


def merged(before: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
  """What `run` found, with earlier results of the states and storages that it did not measure."""
  old, new = before.get("results", {}), found["results"]
  return {**found, "results": {name: old.get(name, {}) | new.get(name, {}) for name in {**old, **new}}}


def lines(found: Mapping[str, Any]) -> Iterator[str]:
  """The results as text, a line for each storage, state and compression."""
  for storage, states in found["results"].items():
    for state, settings in states.items():
      for setting, entry in settings.items():
        figures = ", ".join(
          f"{key[:-2]} {entry[key]['predicted']:.2f} s predicted, {entry[key]['measured']:.2f} s measured"
          for key in _FIGURES[:3]
        )
        yield f"{storage}, {state}, compression {setting}: {figures}"


@contextlib.contextmanager
def on_storage(name: str, directory: str | None) -> Iterator[tuple[str, Mapping[str, str]]]:
  """A place for runs on a disk, or in a bucket behind a link of 50 MB/s, and the environment that it needs."""
  with contextlib.ExitStack() as stack:
    work = stack.enter_context(tempfile.TemporaryDirectory(prefix="ckpt-bench-", dir=directory))
    cache = {"XDG_CACHE_HOME": f"{work}/cache"}
    if name == "disk":
      yield f"{work}/runs", cache
      return
    link = stack.enter_context(limited_link(_LINK_MBIT))
    bucket = stack.enter_context(gcs_server(f"{work}/objects", link=link))
    yield f"{bucket.url}/runs", {**bucket.env, **cache}


def _child(state: str, storage: str, where: str, rounds: int, env: Mapping[str, str]) -> list[dict[str, Any]]:
  devices = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={SUITES[state].devices}"}
  command = [__name__, state, storage, where, str(rounds)]
  return answer(f"bench predictions: {state} on {storage}", command, {**env, **CPU, **devices})


# -- in the child


def _measure(state_name: str, storage: str, where: str, rounds: int) -> list[dict[str, Any]]:
  import ckpt_jax
  from ckpt_jax.bench.trial import trials
  from ckpt_jax.bench.variants import on_devices
  from ckpt_jax.config import Config
  from ckpt_jax.tuning.profile import profile_host, profile_state

  suite = SUITES[state_name]
  state = on_devices(state_of(suite), suite)
  choices = ("auto", "on", "off") if state_name == COMPRESSIBLE else ("auto",)
  profile, host = profile_state(state), profile_host()
  budget, limit = _PROBE[storage]
  rows = []
  with trials(where, state) as measure:
    measured = ckpt_jax.probe(where, budget, limit)
    time.sleep(_SETTLE_S)
    for turn in range(rounds + 1):
      for setting in rotated(choices, turn):
        user = Config(layout={"compression": setting})
        plan = ckpt_jax.make_plan(profile, measured, host, user)
        sample = measure(plan.apply(user))
        if turn:  # the first turn of a process pays for imports and connections
          rows.append(
            {
              "setting": setting,
              "compression": plan.values["layout.compression"],
              "predicted": {key: getattr(plan, key) for key in _FIGURES},
              "measured": {key: getattr(sample, key) for key in _FIGURES},
            }
          )
  return rows


if __name__ == "__main__":
  quiet()
  print(json.dumps(_measure(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))))
