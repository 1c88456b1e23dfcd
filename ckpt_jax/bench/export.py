"""Exports and imports side by side: plain Orbax with the safetensors library, and Orbax's own reader of safetensors.

Each measurement is a process of its own, since what counts is also how much memory it takes. Sides take turns.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import ckpt_jax as ckpt
from ckpt_jax.bench.common import answer, medians, rotated
from ckpt_jax.bench.worker import drop_cache

EXPORTS = {
  "ckpt_jax": "ckpt_jax.export(format='safetensors')",
  "ckpt_jax orbax": "ckpt_jax.export(format='orbax')",
  "ckpt_jax int8": "ckpt_jax.export(format='safetensors', quantize='int8')",
  "orbax": "Orbax restore of the parameters, cast, safetensors.flax.save_file, sync",
  "read": "the data of the parameters read from files, nothing else",
}
LOADS = {
  "ckpt_jax": "ckpt_jax.load_safetensors(like=)",
  "orbax": "Orbax v1, CheckpointLayout.SAFETENSORS",
  "safetensors": "safetensors.flax.load_file",
}
_WIDTH, _LAYERS = 1024, 20


def run(rounds: int, directory: str | None, progress: Callable[[str], None]) -> dict[str, Any]:
  """Medians of seconds, CPU seconds and extra memory of each side, from cold storage where the cache can be dropped."""
  with tempfile.TemporaryDirectory(dir=directory) as work:
    params = _save(f"{work}/run")
    found: dict[str, dict[str, list[dict[str, float]]]] = {"export": {}, "load": {}}
    for turn in range(rounds + 1):
      for kind, sides in (("export", EXPORTS), ("load", LOADS)):
        for side in rotated(sides, turn):
          out = f"{work}/{kind}-{turn}"
          source = f"{work}/run" if kind == "export" else f"{work}/weights"
          drop_cache(source)
          one = answer(f"{kind} {side}", ["ckpt_jax.bench.export_worker", kind, side, source, out])
          if kind == "export" and side == "ckpt_jax" and turn == 0:
            os.rename(out, f"{work}/weights")
          shutil.rmtree(out, ignore_errors=True)
          progress(f"{kind} {side}: {one['seconds']:.2f} s, {one['memory'] / 1e6:.0f} MB")
          if turn:  # the first round warms up
            found[kind].setdefault(side, []).append(one)
  return {
    "parameters_nbytes": params,
    "rounds": rounds,
    "what": EXPORTS | {f"load {name}": what for name, what in LOADS.items()},
    **{kind: {side: medians(ones, 3) for side, ones in sides.items()} for kind, sides in found.items()},
  }


def _save(path: str) -> int:
  """Saves 1 GB of Adam state; returns the bytes of its parameters."""
  rng = np.random.default_rng(0)
  some = rng.standard_normal((4 * _WIDTH, _WIDTH), dtype=np.float32)
  params = {str(i): {"up": jax.numpy.asarray(some + i), "bias": jax.numpy.zeros(_WIDTH)} for i in range(_LAYERS)}
  with ckpt.Checkpointer(path) as c:
    c.save(0, {"params": params, "mu": params, "nu": params, "count": 0})
  return sum(x.nbytes for x in jax.tree.leaves(params))


def table(found: dict[str, Any]) -> list[tuple[str, ...]]:
  """Rows for people: what was done, seconds, CPU seconds, extra memory, MB/s of float32 or of the file."""
  rows: list[tuple[str, ...]] = []
  for kind in ("export", "load"):
    nbytes = found["parameters_nbytes"] / (1 if kind == "export" else 2)
    for side, one in found[kind].items():
      rate = nbytes / one["seconds"] / 1e6
      rows.append(
        (kind, side, f"{one['seconds']:.2f}", f"{one['cpu']:.2f}", f"{one['memory'] / 1e6:.0f}", f"{rate:.0f}")
      )
  return rows
