"""Raw Orbax beside ckpt_jax on the accelerators at hand: what a save takes from training, and what a restore takes.

Each measurement is made in a fresh process, since first saves and first restores count; the sides take turns. Where
there is no accelerator, CPU devices stand in for one: that tests the script, and its figures say little.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ckpt_jax.bench.common import answer, rotated
from ckpt_jax.bench.report import Table
from ckpt_jax.bench.runner import machine
from ckpt_jax.bench.suites import ORBAX, ORBAX_PLAIN, OURS
from ckpt_jax.errors import CheckpointError

SIDES = (ORBAX, ORBAX_PLAIN, OURS)
UNVERIFIED = f"{OURS}, verify off"
_TIMEOUT_S = 300.0
_ROOM = 5  # states: those that are kept, the one that is written, and what limits measure
_GROWTH_SHARE, _LEAST_NBYTES = 16, 8_000_000
_MEMORY = "/dev/shm"


@dataclasses.dataclass(frozen=True)
class Extent:
  """How much is measured.

  Attributes:
    nbytes: size of the state.
    rounds: of saves and restores by each side.
    repeats: saves and restores of a process after its first.
    growth: saves after which memory is compared.
    minutes: no round begins after so many.
    sides: which of `SIDES`.
  """

  nbytes: int
  rounds: int = 3
  repeats: int = 3
  growth: int = 100
  minutes: float = 9.0
  sides: Sequence[str] = SIDES


def run(
  extent: Extent, directory: str | None, say: Callable[[str], None], keep: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
  """Measures all; what fails is noted under `failed`, and the rest goes on.

  Args:
    extent: how much.
    directory: where to write; None: into memory if there is room, else the temporary directory.
    say: called with a line about each measurement.
    keep: called with the results so far, again and again: a run may be cut off.

  Returns:
    JSON-able: `raw` answers of the processes, `medians` by side, `aims`, and the machine.
  """
  with tempfile.TemporaryDirectory(prefix="ckpt-bench-", dir=directory or _place(extent.nbytes)) as work:
    bench = _Bench(extent, work, say)
    for turn in range(extent.rounds):
      began = time.monotonic()
      for side in rotated(extent.sides, turn):
        bench.turn(side)
        keep(bench.results())
      took = time.monotonic() - began
      if turn == 0:
        bench.once()
        keep(bench.results())
      if bench.seconds() + took > extent.minutes * 60 and turn + 1 < extent.rounds:
        say(f"{turn + 1} of {extent.rounds} rounds fit into {extent.minutes:g} minutes")
        break
    return bench.results()


def _place(nbytes: int) -> str:
  with contextlib.suppress(OSError):
    if os.access(_MEMORY, os.W_OK) and shutil.disk_usage(_MEMORY).free > _ROOM * nbytes:
      return _MEMORY
  return tempfile.gettempdir()


class _Bench:
  """Starts the processes, one after the other, and collects their answers by measurement and side."""

  def __init__(self, extent: Extent, work: str, say: Callable[[str], None]):
    self._extent, self._work, self._say = extent, work, say
    self._raw: dict[str, list[dict[str, Any]]] = {}
    self._failed: list[str] = []
    self._started = time.monotonic()
    self._machine = machine(work)
    if (free := shutil.disk_usage(work).free) < _ROOM * extent.nbytes:
      raise CheckpointError(
        f"{work}: {free / 1e9:.1f} GB are free and {_ROOM * extent.nbytes / 1e9:.1f} GB are needed; choose --dir or a "
        "smaller --size"
      )

  def seconds(self) -> float:
    """Since the beginning."""
    return time.monotonic() - self._started

  def results(self) -> dict[str, Any]:
    """See `run`."""
    medians = summary(self._raw)
    about: dict[str, Any] = next(
      (answers[0]["about"] for name, answers in self._raw.items() if name.startswith("saves")), {}
    )
    return {
      "nbytes": self._extent.nbytes,
      "machine": self._machine | about,
      "seconds": round(self.seconds()),
      "medians": medians,
      "aims": [dataclasses.asdict(aim) for aim in aims(medians)],
      "failed": self._failed,
      "raw": self._raw,
    }

  def turn(self, side: str) -> None:
    """Saves and restores by one side."""
    with self._run() as directory:
      extent = self._extent
      if self._ask("saves", side, directory, extent.repeats) is None:
        return
      self._ask("restores", side, directory, extent.repeats)
      if side == OURS:
        self._ask("restores", side, directory, extent.repeats, {"restore": {"verify": False}}, UNVERIFIED)

  def once(self) -> None:
    """What needs no rounds: memory over many saves, memory under a limit, and the example."""
    small = max(_LEAST_NBYTES, self._extent.nbytes // _GROWTH_SHARE)
    for side in [s for s in (ORBAX, OURS) if s in self._extent.sides]:
      with self._run() as directory:
        self._ask("growth", side, directory, self._extent.growth, nbytes=small)
    if OURS in self._extent.sides:
      for what in ("bounded", "example"):
        with self._run() as directory:
          self._ask(what, OURS, directory, 0)

  @contextlib.contextmanager
  def _run(self) -> Iterator[str]:
    directory = tempfile.mkdtemp(dir=self._work)
    try:
      yield directory
    finally:
      shutil.rmtree(directory, ignore_errors=True)

  def _ask(
    self,
    what: str,
    side: str,
    directory: str,
    repeats: int,
    config: dict[str, Any] | None = None,
    name: str = "",
    nbytes: int = 0,
  ) -> dict[str, Any] | None:
    name = f"{what}: {name or side}"
    work = {"what": what, "variant": side, "directory": directory, "nbytes": nbytes or self._extent.nbytes}
    work |= {"repeats": repeats, "config": config or {}}
    started = time.monotonic()
    try:
      found = answer(name, ["ckpt_jax.bench.accelerator_worker", json.dumps(work)], {}, _TIMEOUT_S)
    except CheckpointError as e:
      self._fail(str(e))
      return None
    if found.get("bitwise") is False:
      self._fail(f"{name}: RESTORED OTHER BITS THAN IT SAVED")
    self._raw.setdefault(name, []).append(found)
    self._say(f"{name}, {time.monotonic() - started:.0f} s: {_brief(found)}")
    return found

  def _fail(self, why: str) -> None:
    self._failed.append(why)
    self._say(why)


def _brief(found: dict[str, Any]) -> str:
  plain = {key: value for key, value in found.items() if key != "about"}
  return json.dumps(json.loads(json.dumps(plain), parse_float=lambda text: round(float(text), 4)))


# -- results


def summary(raw: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, float]]:
  """Medians over rounds and repeats, by side: first ones apart from the others, seconds and bytes."""
  found: dict[str, dict[str, float]] = {}

  def put(side: str, metric: str, values: Sequence[float | None]) -> None:
    known = [v for v in values if v is not None]
    if known:
      found.setdefault(side, {})[metric] = statistics.median(known)

  for name, answers in raw.items():
    what, side = name.split(": ", 1)
    if what == "saves":
      for metric in ("blocking_s", "donated_s", "commit_s", "slowdown"):
        put(side, f"first_{metric}", [answer["saves"][0][metric] for answer in answers])
        put(side, metric, [save[metric] for answer in answers for save in answer["saves"][1:]])
      put(side, "update_s", [answer["update_s"] for answer in answers])
      put(side, "save_rss", [answer["rss"] for answer in answers])
      put(side, "pinned", [answer["pinned"] for answer in answers])
    elif what == "restores":
      put(side, "first_restore_s", [answer["seconds"][0] for answer in answers])
      put(side, "restore_s", [s for answer in answers for s in answer["seconds"][1:]])
      put(side, "restore_rss", [answer["rss"] for answer in answers])
    elif what == "growth":
      put(side, "growth_a_save", [answer["a_save"] for answer in answers])
    elif what == "bounded":
      for metric in ("saving", "restoring"):
        put(side, f"bounded_{metric}", [(a[metric] or 0) / a["limit"] for a in answers])
    elif what == "example":
      put(side, "example_first_s", [answer["blocking_s"][0] for answer in answers])
      put(side, "example_s", [max(answer["blocking_s"][1:]) for answer in answers])
  return found


@dataclasses.dataclass(frozen=True)
class Outcome:
  """An aim on an H200 or H100 for a state of 2.95 GB, and what was measured."""

  what: str
  most: float
  measured: float

  @property
  def met(self) -> bool:
    """Whether it was reached."""
    return self.measured <= self.most


def aims(medians: dict[str, dict[str, float]]) -> list[Outcome]:
  """The aims that these results can answer."""
  ours, orbax, off = (medians.get(side, {}) for side in (OURS, ORBAX, UNVERIFIED))

  def ratio(metric: str, other: dict[str, float] = orbax) -> float | None:
    a, b = ours.get(metric), other.get(metric)
    return None if a is None or not b else a / b

  verify = ratio("restore_s", off)
  growth = ours.get("growth_a_save")
  found = [
    ("blocking over Orbax's", 1 / 5, ratio("blocking_s")),
    ("blocking, s", 0.1, ours.get("blocking_s")),
    ("first save of a process over Orbax's, blocking", 1.2, ratio("first_blocking_s")),
    ("commit over Orbax's", 1 / 3, ratio("commit_s")),
    ("verified restore over Orbax's", 1 / 2, ratio("restore_s")),
    ("first verified restore over Orbax's", 1.0, ratio("first_restore_s")),
    ("verified restore over unverified", 1.1, verify),
    ("training step while writing, times alone", 1.02, ours.get("slowdown")),
    ("growth of memory a save, MiB", 1.0, None if growth is None else growth / 2**20),
    ("peak memory of a save over limits.host_memory", 1.1, ours.get("bounded_saving")),
    ("peak memory of a restore over limits.host_memory", 1.1, ours.get("bounded_restoring")),
    ("examples/lm.py: first save blocks, s", 1.0, ours.get("example_first_s")),
    ("examples/lm.py: later saves block, s", 0.05, ours.get("example_s")),
  ]
  return [Outcome(what, most, measured) for what, most, measured in found if measured is not None]


_ROWS = {
  "first_blocking_s": "first save blocks, s",
  "blocking_s": "save blocks, s",
  "first_donated_s": "first save, donating update done, s",
  "donated_s": "save, donating update done, s",
  "update_s": "update alone, s",
  "commit_s": "commit, s",
  "slowdown": "training step while writing, times alone",
  "first_restore_s": "first restore, s",
  "restore_s": "restore, s",
  "save_rss": "resident memory of saves, GB",
  "pinned": "of it pinned arrays, GB",
  "restore_rss": "resident memory of restores, GB",
  "growth_a_save": "growth a save, MiB",
}


def tables(found: dict[str, Any]) -> list[Table]:
  """The medians of all sides, and the aims."""
  medians: dict[str, dict[str, float]] = found["medians"]
  about = found["machine"]
  nbytes = about.get("state_nbytes", found["nbytes"])
  where = f"{nbytes / 1e9:.2f} GB on {about.get('devices', 0)} x {about.get('device', 'unknown')}"
  stand_in = " (CPU devices stand in for accelerators)" if about.get("stand_in") else ""

  def cell(side: str, metric: str) -> str:
    value = medians[side].get(metric)
    scale = 1e9 if metric in ("save_rss", "pinned", "restore_rss") else 2**20 if metric == "growth_a_save" else 1
    return "-" if value is None else f"{value / scale:.3f}"

  rows = [(text, *(cell(side, metric) for side in medians)) for metric, text in _ROWS.items()]
  outcomes = [Outcome(**aim) for aim in found["aims"]]
  of_aims = [(o.what, f"{o.most:.2f}", f"{o.measured:.3f}", "yes" if o.met else "no") for o in outcomes]
  return [
    Table(f"{where}{stand_in}: medians", ("", *medians), tuple(rows)),
    Table("Aims for an H200 or H100", ("at most", "aim", "measured", "met"), tuple(of_aims)),
  ]
