"""Counts the non-finite numbers that a committed step holds, leaf by leaf."""

from __future__ import annotations

from collections.abc import Collection

from etils import epath

from ckpt_jax.config import Config
from ckpt_jax.integrity.fingerprint import take_restored
from ckpt_jax.restore.leaf import AS_SAVED
from ckpt_jax.restore.read import Reader, Step


def count_nonfinite(step_dir: epath.Path, item: str, names: Collection[str]) -> dict[str, tuple[int, int]]:
  """Infinities and NaNs by path, of those leaves among `names` that an item has. Reads them, one at a time.

  Raises:
    CheckpointError: if they cannot be read.
  """
  step = Step(step_dir, Config(), item)
  reader = Reader(step, Config())
  found = {}
  for name in names:
    if name not in step.meta:
      continue
    plan = step.plan(name, AS_SAVED, {})
    value = plan.finish(reader.read([(plan, None)])[name])
    tally = take_restored({name: value}, {}).tallies(1, fingerprint=False)[name]
    found[name] = (tally.nonfinite - tally.nan, tally.nan)
  return found
