"""`ckpt-jax report`: what happened to a run, as one HTML page that needs no network."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import datetime
import importlib.resources
import os
import string
from collections.abc import Sequence
from typing import Any

from etils import epath

from ckpt_jax.config.units import count, duration_text, size_text
from ckpt_jax.errors import CheckpointError, NoCheckpointError
from ckpt_jax.layout.contents import LeafInfo, saved_leaves
from ckpt_jax.observe.drawing import Cell, bars, chart, escape, parts, section, table
from ckpt_jax.observe.goodput import Goodput, goodput
from ckpt_jax.run.events import Attempt, Deletion, Event, Failure, Fallback, PlanMade, Quarantine, RetryStorm, Save
from ckpt_jax.run.journal import Records, read_records
from ckpt_jax.run.steps import StepInfo, list_readable_steps, newest_step, run_directory, step_path, why_no_step
from ckpt_jax.storage.probe import StorageProfile, cached_profile
from ckpt_jax.version import __version__

_MOST_ROWS = 500  # of a table: the newest
_MOST_DAYS = 42
_MOST_GROUPS = 24
_Rows = list[list[Cell | str]]


@dataclasses.dataclass(frozen=True)
class Facts:
  """What a report shows.

  Attributes:
    directory: the run.
    steps: the committed steps, oldest first.
    records: what the run has recorded.
    goodput: None where the records do not suffice; `no_goodput` says why.
    leaves: of the newest step.
    storage: what was measured of its storage on this host; None if nothing was.
  """

  directory: epath.Path
  steps: list[StepInfo]
  records: Records
  goodput: Goodput | None
  no_goodput: str
  leaves: list[LeafInfo]
  storage: StorageProfile | None

  @property
  def saves(self) -> list[Save]:
    """The recorded saves that are not rolled up."""
    return [event for event in self.records.events if isinstance(event, Save)]


def gather(path: str | os.PathLike[str]) -> Facts:
  """Reads what a report shows; metadata only.

  Raises:
    NoCheckpointError: if the run has neither steps nor records.
  """
  directory = run_directory(path)
  steps, _ = list_readable_steps(directory)
  records = read_records(directory)
  if not steps and not records.attempts:
    raise NoCheckpointError(why_no_step(directory))
  found, why = None, ""
  try:
    found = goodput(directory, records)
  except NoCheckpointError as e:
    why = str(e).removeprefix(f"{directory}: ")
  leaves: list[LeafInfo] = []
  newest = newest_step(directory)
  if newest is not None:
    with contextlib.suppress(CheckpointError):  # the list of steps, and verify, report it
      leaves = saved_leaves(step_path(directory, newest))
  return Facts(directory, steps, records, found, why, leaves, cached_profile(directory))


def page(facts: Facts) -> str:
  """The report as HTML."""
  template = importlib.resources.files(__package__).joinpath("report.html").read_text(encoding="utf-8")
  now = datetime.datetime.now(datetime.timezone.utc)
  shown = (_time, _saves, _sizes, _norms, _restarts, _calendar, _groups, _processes, _storage, _troubles, _plan, _table)
  return string.Template(template).substitute(
    title=escape(facts.directory),
    subtitle=escape(f"ckpt-jax report of {now:%Y-%m-%d %H:%M} UTC, version {__version__}"),
    tiles="".join(f'<div class="tile"><b>{escape(value)}</b>{escape(name)}</div>' for name, value in _tiles(facts)),
    sections="".join(part(facts) for part in shown),
  )


def _tiles(facts: Facts) -> list[tuple[str, str]]:
  tiles = []
  if facts.goodput is not None:
    tiles += [
      ("goodput", f"{facts.goodput.share:.1%}"),
      ("from first start to last record", duration_text(facts.goodput.seconds)),
      ("a step", duration_text(facts.goodput.step_s)),
      ("work lost and trained again", duration_text(facts.goodput.redone_s)),
    ]
  if facts.steps:
    tiles += [("newest committed step", f"{facts.steps[-1].step:,}")]
  tiles += [("in storage", count(len(facts.steps))), ("together", size_text(sum(s.nbytes for s in facts.steps)))]
  lives = [a for a in facts.records.attempts if a.saves]
  return [*tiles, ("starts that saved", str(len(lives))), ("of them killed", str(sum(a.end is None for a in lives)))]


def _time(facts: Facts) -> str:
  found = facts.goodput
  if found is None:
    return section("What the run did with its time", f"<p>{escape(facts.no_goodput)}</p>")
  shares = {
    "training that stayed": found.productive_s,
    "waiting in save": found.saving_s,
    "lost and trained again": found.redone_s,
    "down": found.down_s,
    "the rest": found.other_s,
  }
  rows: _Rows = [[name, Cell(duration_text(s), s), Cell(f"{s / found.seconds:.1%}", s)] for name, s in shares.items()]
  note = "The rest is compilation, evaluation and slower steps. What a killed job had not saved is estimated."
  return section("What the run did with its time", parts(shares) + table(("", "time", "share"), rows), note)


def _saves(facts: Facts) -> str:
  curves = {
    "blocking": [(s.time, s.blocking_s) for s in facts.saves],
    "background": [(s.time, s.background_s) for s in facts.saves],
    "of it commit": [(s.time, s.commit_s) for s in facts.saves],
  }
  return section("Seconds of each save", chart(curves, duration_text, _stamp), "Training waits for the blocking part.")


def _sizes(facts: Facts) -> str:
  curves = {
    "state": [(s.step, float(s.nbytes)) for s in facts.saves],
    "stored": [(s.step, float(s.stored_nbytes)) for s in facts.saves if s.stored_nbytes],
  }
  if any(s.unchanged_nbytes for s in facts.saves):
    curves["written"] = [(s.step, float(s.nbytes - s.unchanged_nbytes)) for s in facts.saves]
  if not facts.saves:
    curves = {"in storage": [(s.step, float(s.nbytes)) for s in facts.steps]}
  return section("Size of the steps", chart(curves, lambda n: size_text(int(n)), lambda s: f"step {s:,.0f}"))


def _norms(facts: Facts) -> str:
  groups: dict[str, list[tuple[float, float]]] = collections.defaultdict(list)
  for save in facts.saves:
    for group, norm in save.norms.items():
      groups[group].append((save.step, norm))
  biggest = dict(sorted(groups.items(), key=lambda g: -max(y for _, y in g[1]))[:5])
  unhealthy = [str(s.step) for s in facts.saves if s.healthy is False]
  note = f"Tagged unhealthy: steps {', '.join(unhealthy[:20])}." if unhealthy else "No step is tagged unhealthy."
  drawn = chart(biggest, lambda n: f"{n:.3g}", lambda s: f"step {s:,.0f}", log=True)
  return section("Health: norms of the state by group", drawn, note)


def _restarts(facts: Facts) -> str:
  rows: _Rows = []
  for before, a in zip([None, *facts.records.attempts], facts.records.attempts, strict=False):
    if not (a.saves or a.restores or a.failures):
      continue
    back = max(0, before.last_step - a.restored) if before is not None and before.saves and a.restored else 0
    rows.append(
      [
        Cell(_stamp(a.started), a.started),
        Cell(duration_text(a.lived_s), a.lived_s),
        Cell(a.end or "killed, or still runs", bad=a.end is None),
        Cell("afresh" if a.restored is None else f"step {a.restored}", float(-1 if a.restored is None else a.restored)),
        Cell(f"{a.first_step} to {a.last_step}" if a.saves else "none", float(a.last_step)),
        Cell(str(a.saves), a.saves),
        Cell(count(back), back),
      ]
    )
  headers = ("started (UTC)", "lived", "end", "from", "saved steps", "saves", "committed and trained again")
  return section("Starts and restarts", table(headers, rows[-_MOST_ROWS:]) if rows else "", wide=True)


def _calendar(facts: Facts) -> str:
  kept = {s.step for s in facts.steps}
  when = {s.step: s.time.timestamp() for s in facts.steps if s.time} | {s.step: s.time for s in facts.saves}
  hours: dict[str, dict[int, set[str]]] = collections.defaultdict(lambda: collections.defaultdict(set))
  for step, time in when.items():
    moment = datetime.datetime.fromtimestamp(time, datetime.timezone.utc)
    hours[f"{moment:%Y-%m-%d}"][moment.hour].add("kept" if step in kept else "gone")
  cells = []
  for day in sorted(hours)[-_MOST_DAYS:]:
    cells.append(f"<span>{day}</span>")
    for hour in range(24):
      there = hours[day].get(hour, set())
      cells.append(f'<i class="{"kept" if "kept" in there else "gone" if there else ""}"></i>')
  deleted = sum(a.deletions for a in facts.records.attempts)
  note = (
    f"Hours (UTC): filled where a step is kept, outlined where all are gone. {count(deleted, 'deletion')} recorded."
  )
  return section("Retention", f'<div class="hours">{"".join(cells)}</div>' if cells else "", note)


def _groups(facts: Facts) -> str:
  sizes: collections.Counter[str] = collections.Counter()
  for leaf in facts.leaves:
    sizes["/".join(leaf.path.split("/")[:2]) or "(the state itself)"] += leaf.nbytes
  note = f"Of step {facts.steps[-1].step}: {count(len(facts.leaves), 'leaf', 'leaves')}." if facts.steps else ""
  return section(
    "Bytes by group of leaves", bars(dict(sizes.most_common(_MOST_GROUPS)), lambda n: size_text(int(n))), note
  )


def _processes(facts: Facts) -> str:
  last = facts.saves[-1] if facts.saves else None
  if last is None or not last.processes:
    return ""
  written = {f"process {p.process}": float(p.nbytes_written) for p in last.processes}
  note = f"Of the save of step {last.step}, as stored."
  return section("Bytes written by each process", bars(written, lambda n: size_text(int(n))), note)


def _storage(facts: Facts) -> str:
  profile = facts.storage
  if profile is None:
    return ""
  curves = {
    name: [(float(t.streams), t.bytes_per_s) for t in found]
    for name, found in (("write, durable", profile.write), ("read", profile.read))
  }
  drawn = chart(curves, lambda n: f"{n / 1e6:,.0f} MB/s", lambda n: count(int(n), "stream"))
  rows: _Rows = [[name, Cell(f"{s * 1e3:.2f} ms", s)] for name, s in profile.latency.items()]
  note = f"{profile.kind}, measured on {profile.host} at {profile.measured_at[:16]}."
  return section("Storage", drawn + table(("operation", "takes"), rows), note)


def _troubles(facts: Facts) -> str:
  def trouble(event: Event) -> tuple[str, int | None, str] | None:
    if isinstance(event, Failure):
      return f"{event.what} failed", event.step, event.error
    if isinstance(event, Fallback):
      return "restored in place of others", event.step, f"steps {', '.join(map(str, event.skipped))}"
    if isinstance(event, Quarantine):
      return event.place, event.step, event.reason
    if isinstance(event, RetryStorm):
      return f"retries during a {event.during}", event.step, str(event.retries)
    return None

  rows: _Rows = [
    [Cell(_stamp(e.time), e.time), Cell(row[0], bad=True), Cell(str(row[1] if row[1] is not None else "")), row[2]]
    for e in facts.records.events
    if (row := trouble(e)) is not None
  ]
  return section("Trouble", table(("when (UTC)", "what", "step", ""), rows[-_MOST_ROWS:]) if rows else "", wide=True)


def _plan(facts: Facts) -> str:
  plans = [e.plan for e in facts.records.events if isinstance(e, PlanMade)]
  choices: Sequence[dict[str, Any]] = plans[-1].get("choices", ()) if plans else ()
  rows: _Rows = [
    [str(c.get("key")), str(c.get("value")), str(c.get("reason")), str(c.get("default"))]
    for c in choices
    if isinstance(c, dict)
  ]
  drawn = table(("setting", "value", "why", "Orbax's default"), rows) if rows else ""
  return section("The plan", drawn, "As last made; `auto` leaves a setting to Orbax.", wide=True)


def _table(facts: Facts) -> str:
  gone = {e.step: e.why for e in facts.records.events if isinstance(e, Deletion)}
  kept = {s.step: s for s in facts.steps}
  rows: _Rows = [
    [
      Cell(str(s.step), s.step),
      Cell(_stamp(s.time), s.time),
      Cell(size_text(s.nbytes), s.nbytes),
      Cell("" if s.files is None else str(s.files), s.files),
      Cell(duration_text(s.blocking_s), s.blocking_s),
      Cell(duration_text(s.background_s), s.background_s),
      Cell(f"{size_text(int(s.nbytes / max(s.background_s, 1e-3)))}/s", s.nbytes / max(s.background_s, 1e-3)),
      Cell(str(s.retries), s.retries),
      "kept" + ", pinned" * kept[s.step].pinned if s.step in kept else gone.get(s.step, "gone"),
    ]
    for s in facts.saves[-_MOST_ROWS:]
  ]
  headers = ("step", "committed (UTC)", "size", "files", "blocking", "background", "speed", "retries", "now")
  return section("Saves", table(headers, rows) if rows else "", wide=True)


def _stamp(time: float) -> str:
  return f"{datetime.datetime.fromtimestamp(time, datetime.timezone.utc):%Y-%m-%d %H:%M:%S}"


def as_json(facts: Facts) -> dict[str, Any]:
  """The same as data."""
  attempts: list[Attempt] = facts.records.attempts
  return {
    "directory": str(facts.directory),
    "steps": facts.steps,
    "goodput": None if facts.goodput is None else vars(facts.goodput) | {"share": facts.goodput.share},
    "attempts": attempts,
    "events": facts.records.events,
    "leaves": facts.leaves,
    "storage": None if facts.storage is None else facts.storage.to_dict(),
  }
