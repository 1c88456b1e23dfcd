"""Codecs on really trained weights: what they leave of parameters and of Adam's moments, and how fast; Orbax beside.

`examples.lm` trains a byte-level GPT for a while. Its parameters, mu and nu are then saved apart, as float32, as
bfloat16, and as bfloat16 kept as float32, on a disk; the whole state also on a bucket behind a link of 50 MB/s.
"""

from __future__ import annotations

import os
import re
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

from ckpt_jax.bench import suites
from ckpt_jax.bench.common import CPU, answer, conditions, emit, output, quiet, rotated, timed
from ckpt_jax.bench.files import filled, markdown
from ckpt_jax.bench.link import available
from ckpt_jax.bench.predictions import on_storage
from ckpt_jax.bench.worker import drop_cache
from ckpt_jax.storage.probe import StorageProfile

PARTS, FORMS, STATE = ("params", "mu", "nu"), ("float32", "bfloat16", "bfloat16 as float32"), "state"
OURS = ("off", "zstd", "shuffled", "auto")
ORBAX = {"orbax, zstd": suites.ORBAX, "orbax, off": suites.ORBAX_PLAIN}
DISK, LINK = "disk", "50 MB/s"
_NETWORK = ["--width", "384", "--layers", "6", "--batch", "16", "--context", "32", "--fsdp", "1"]
_LEAST_NBYTES = 80 * 10**6  # so that bytes take longer than the rest of a save
_TIMEOUT_S = 900.0


def run(steps: int, rounds: int, directory: str | None, progress: Callable[[str], None]) -> dict[str, Any]:
  """Trains, then saves and restores. Returns JSON-able data.

  Args:
    steps: of training.
    rounds: saves and restores of each side; at most 2 behind the link.
    directory: on the disk to measure; None: the temporary directory.
    progress: called with a line before each measurement.

  Raises:
    CheckpointError: if a process fails.
  """
  found = conditions(rounds=rounds, results={})
  with tempfile.TemporaryDirectory(prefix="ckpt-bench-", dir=directory) as work:
    progress(f"training for {steps} steps")
    training = ["--run", f"{work}/lm", "--steps", str(steps), "--every", str(steps), *_NETWORK]
    log = output("bench codec", ["ckpt_jax.examples.lm", *training], timeout=_TIMEOUT_S)
    found["trained"] = {
      "steps": steps,
      "parameters": re.findall(r"([\d.]+M) parameters", log)[0],
      "loss": float(re.findall(r"loss ([\d.]+)", log)[-1]),
    }
    for storage in (DISK, LINK) if available() else (DISK,):
      with on_storage(storage, directory) as (where, env):
        progress(f"saves and restores on {'a disk' if storage == DISK else 'a bucket behind 50 MB/s'}")
        command = [__name__, storage, f"{work}/lm", where, str(rounds)]
        found["results"][storage] = answer("bench codec", command, CPU | {**env}, _TIMEOUT_S)
  return found


# Hershcovitch et al. 2024, "ZipNN: Lossless Compression for AI Models": the share that it leaves of trained weights.
_ZIPNN = {"params float32": "83%", "params bfloat16": "67%"}


def table(found: Mapping[str, Any]) -> str:
  """The results as Markdown: what is left of the values, and MB/s of a commit and of a cold restore."""
  trained = found["trained"]
  rows = []
  for storage, by_values in found["results"].items():
    for values, entry in by_values.items():
      sides = entry["sides"]
      cells = [
        f"{e['share']:.0%}, {e['write_mb_s']:.0f} / {e['read_mb_s']:.0f}" if (e := sides.get(side)) else ""
        for side in (*OURS, *ORBAX)
      ]
      rows.append((values, storage, _ZIPNN.get(values, ""), *cells))
  about = (
    f"{trained['parameters']} parameters of `examples.lm` after {trained['steps']} steps (loss {trained['loss']}), "
    f"measured on {found['measured']} with {found['cpus']} CPUs, medians of {found['rounds']}: bytes left, MB/s of "
    "values written / read."
  )
  return f"{about}\n\n{markdown(('values', 'storage', 'ZipNN', *OURS, *ORBAX), rows)}"


def render(found: Mapping[str, Any], page: str) -> str:
  """A page with the table in its place."""
  return filled(page, "codec", table(found))


# -- in the child


def _measure(storage: str, run_directory: str, where: str, rounds: int) -> dict[str, Any]:
  import jax

  import ckpt_jax as ckpt

  with ckpt.Checkpointer(run_directory) as c:
    state = jax.tree.map(jax.numpy.asarray, c.restore().state)
  adam = state["opt"][0]
  speed = ckpt.probe(where, 4.0, "128MiB")
  if storage == LINK:
    whole = {"params": state["params"], "opt": adam}
    return {f"{STATE} float32": _sides(whole, speed, where, min(rounds, 2), orbax=False)}
  parts = {"params": state["params"], "mu": adam["mu"], "nu": adam["nu"]}
  found = {}
  for part, tree in parts.items():
    for form in FORMS:
      leaves = jax.tree.map(_as(form), tree)
      copies = -(-_LEAST_NBYTES // sum(x.nbytes for x in jax.tree.leaves(leaves)))  # each leaf is compressed alone
      state = {part: {str(i): jax.tree.map(jax.numpy.copy, leaves) for i in range(copies)}}
      found[f"{part} {form}"] = _sides(state, speed, f"{where}/{part}-{form}", rounds)
  return found


def _as(form: str) -> Callable[[Any], Any]:
  import jax.numpy as jnp

  casts = {"float32": [jnp.float32], "bfloat16": [jnp.bfloat16], "bfloat16 as float32": [jnp.bfloat16, jnp.float32]}

  def cast(x: Any) -> Any:
    for dtype in casts[form]:
      x = x.astype(dtype)
    return x

  return cast


def _sides(tree: Any, storage: StorageProfile, where: str, rounds: int, *, orbax: bool = True) -> dict[str, Any]:
  """Medians over rounds, the sides in turn: the share that is stored, and bytes of values per second."""
  import jax

  import ckpt_jax as ckpt
  from ckpt_jax.bench.trial import trials
  from ckpt_jax.config import Config
  from ckpt_jax.tuning.profile import profile_state

  nbytes = sum(x.nbytes for x in jax.tree.leaves(tree))
  profile = profile_state(tree)
  plans = {side: ckpt.make_plan(profile, storage, config=Config(layout={"compression": side})) for side in OURS}
  samples: dict[str, list[tuple[float, float, int]]] = {side: [] for side in (*OURS, *(ORBAX if orbax else ()))}
  with trials(where, tree) as ours:
    for turn in range(rounds):
      for side in rotated(samples, turn):
        if side in ORBAX:
          samples[side].append(_orbax(tree, f"{where}-orbax", ORBAX[side]))
        else:
          sample = ours(plans[side].apply(Config(layout={"compression": side})))
          samples[side].append((sample.commit_s, sample.restore_s, sample.nbytes))
  sides: dict[str, dict[str, Any]] = {}
  for side, all_of in samples.items():
    write_s, read_s, stored = map(statistics.median, zip(*all_of, strict=True))
    sides[side] = {
      "share": round(stored / nbytes, 4),
      "write_mb_s": round(nbytes / write_s / 1e6, 1),
      "read_mb_s": round(nbytes / read_s / 1e6, 1),
    }
  sides["auto"]["chosen"] = plans["auto"].values["layout.compression"]
  codecs = {
    kind.name: {
      name: {
        "share": round(c.ratio, 4),
        "compress_mb_s": round(c.compress_bytes_per_s / 1e6),
        "decompress_mb_s": round(c.decompress_bytes_per_s / 1e6),
      }
      for name, c in kind.codecs.items()
    }
    for kind in profile.kinds
  }
  rate = {"write_mb_s": round(storage.write_bytes_per_s / 1e6), "read_mb_s": round(storage.read_bytes_per_s / 1e6)}
  return {"nbytes": nbytes, "sides": sides, "on one thread": codecs, "storage": rate}


def _orbax(tree: Any, where: str, variant: str) -> tuple[float, float, int]:
  """One save to its commit, one restore from cold storage, and bytes stored."""
  from ckpt_jax.bench.variants import VARIANTS, jax_target
  from ckpt_jax.storage.space import tree_nbytes

  target = jax_target(VARIANTS[variant], tree, where)
  os.sync()
  started = time.perf_counter()
  target.save(0)
  target.wait()
  written = time.perf_counter() - started
  stored = tree_nbytes(f"{where}/0")
  drop_cache(f"{where}/0")
  read = timed(lambda: target.restore(0))
  target.close()
  shutil.rmtree(where)
  return written, read, stored


if __name__ == "__main__":
  quiet()
  emit(**_measure(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])))
