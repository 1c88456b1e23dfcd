"""What a search found, as a table and as a configuration file with the measurements in its comments."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import pydantic

from ckpt_jax.config import Config
from ckpt_jax.config.units import decimal_text, duration_text
from ckpt_jax.tuning.choices import value_text
from ckpt_jax.tuning.plan import Plan
from ckpt_jax.tuning.search import LEAST_ROUNDS, Candidate, Standing, Tuned


def to_yaml(tuned: Tuned, plan: Plan, user: Config, header: list[str]) -> str:
  """A commented YAML file that `load_config` reads: the user's settings, the tuned ones with their reasons, the table.

  Args:
    tuned, plan, user: the result, the plan it started from, and the user's settings.
    header: comment lines that say where it was measured and for which state.
  """
  lines = [f"# {line}".rstrip() for line in [*header, "", *table(tuned), ""]]
  reasons = {c.key: c for c in plan.choices}
  for section in type(tuned.config).model_fields:
    written: list[str] = []
    values = getattr(tuned.config, section)
    if not isinstance(values, pydantic.BaseModel):  # a setting without a section
      if section in user.model_fields_set and values is not None:
        lines += [f"{section}: {json.dumps(values)}", ""]
      continue
    for key in type(values).model_fields:
      value, path = getattr(values, key), f"{section}.{key}"
      if path in tuned.best.changes:
        found = next(s for s in tuned.standings if s.candidate.name == tuned.best.name)
        written += [f"  # measured: {found.text} of the plan's seconds", _entry(path, value)]
      elif path in plan.values and value != "auto":
        choice = reasons[path]
        written += [f"  # {'set by you; ' if choice.by_user else ''}{choice.reason}", _entry(path, value)]
      elif key in getattr(user, section).model_fields_set:
        written.append(f"  {key}: {json.dumps(values.model_dump(mode='json')[key])}")  # JSON is YAML
    if written:
      lines += [f"{section}:", *written, ""]
  return "\n".join(lines)


HEADERS = ("settings", "blocks", "commit", "restore", "bytes", "rounds", "seconds against the plan")


def rows(standings: Sequence[Standing], best: Candidate | None = None) -> list[tuple[str, ...]]:
  """Medians of candidates as cells for a table with HEADERS; the one that was taken is marked."""
  found = []
  for s in standings:
    c = s.candidate
    seconds = [duration_text(c.median(f)) for f in ("blocking_s", "commit_s", "restore_s")]
    mark = "  <- taken" if best is not None and c.name == best.name else ""
    cells = (c.name, *seconds, decimal_text(c.median("nbytes")), str(len(c.samples)))
    found.append((*cells, f"{s.text}{mark}".strip()))
  return found


def table(tuned: Tuned) -> list[str]:
  """All candidates, the plan first, as lines of text; then the noise, and what the time did not suffice for."""
  cells = [HEADERS, *rows(tuned.standings, tuned.best)]
  widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
  lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
  if math.isfinite(tuned.noise):
    lines.append(
      f"a trial scatters by {tuned.noise:.0%}; in brackets what that leaves open (95%, all comparisons together)"
    )
  elif len(tuned.standings) > 1:
    lines.append("the noise is not known: the time sufficed for one round only, so that the plan stays")
  if tuned.untried:
    names = ", ".join(c.name for c in tuned.untried)
    lines.append(f"not tried, since {LEAST_ROUNDS} rounds would take longer than the budget: {names}")
  return lines


def _entry(path: str, value: Any) -> str:
  text = json.dumps(value) if isinstance(value, Mapping) else value_text(path, value)
  return f"  {path.split('.')[1]}: {text}"
