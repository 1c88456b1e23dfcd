"""export_worker KIND SIDE SOURCE OUT: one measurement of `bench export`, as JSON on the last line."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

import ckpt_jax as ckpt
from ckpt_jax.bench.common import emit
from ckpt_jax.bench.worker import peak_rss, reset_peak, resident
from ckpt_jax.storage.durable import sync_file
from ckpt_jax.storage.paths import files_beneath


def export(side: str, source: str, out: str) -> None:
  """Writes bfloat16 parameters, durably."""
  if side.startswith("ckpt_jax"):
    quantize: Literal["int8"] | None = "int8" if side.endswith("int8") else None
    ckpt.export(source, 0, out, format="orbax" if side.endswith("orbax") else "safetensors", quantize=quantize)
  elif side == "read":
    left = 4 * sum(np.prod(x.shape) for x in jax.tree.leaves(_described(source)["params"]))
    buffer = memoryview(bytearray(4 << 20))
    for file in sorted(files_beneath(source), key=os.path.getsize, reverse=True):
      with open(file, "rb", buffering=0) as opened:
        while left > 0 and (count := opened.readinto(buffer)):
          left -= count
  else:
    import safetensors.flax

    described = _described(source)["params"]
    args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), described)
    restore = ocp.args.PyTreeRestore({"params": described}, {"params": args}, partial_restore=True)
    params = ocp.Checkpointer(ocp.PyTreeCheckpointHandler()).restore(f"{source}/0/default", args=restore)["params"]
    flat = {f"{i}.{n}": jnp.asarray(x).astype(jnp.bfloat16) for i, layer in params.items() for n, x in layer.items()}
    os.makedirs(out)
    safetensors.flax.save_file(flat, f"{out}/model.safetensors")
    sync_file(f"{out}/model.safetensors")


def _described(source: str):
  return ocp.PyTreeCheckpointHandler().metadata(epath.Path(f"{source}/0/default")).tree


def load(side: str, source: str, out: str) -> None:
  """Loads bfloat16 parameters onto the device."""
  del out
  if side == "safetensors":
    import safetensors.flax

    jax.block_until_ready(safetensors.flax.load_file(f"{source}/model.safetensors"))
    return
  with open(f"{source}/model.safetensors", "rb") as file:
    header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
  sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  flat = {
    name: jax.ShapeDtypeStruct(tuple(entry["shape"]), jnp.bfloat16, sharding=sharding)
    for name, entry in header.items()
    if name != "__metadata__"
  }
  if side == "orbax":
    from orbax.checkpoint.experimental import v1

    with v1.Context(checkpoint_layout=v1.options.CheckpointLayout.SAFETENSORS):
      jax.block_until_ready(v1.load(source, flat))
    return
  like: dict[str, dict[str, jax.ShapeDtypeStruct]] = {}
  for name, leaf in flat.items():
    layer, last = name.split(".")
    like.setdefault(layer, {})[last] = leaf
  jax.block_until_ready(ckpt.load_safetensors(source, like=like))


def main(kind: str, side: str, source: str, out: str) -> None:
  """Measures one side."""
  work: Callable[[str, str, str], None] = {"export": export, "load": load}[kind]
  jax.devices()
  if side.startswith("ckpt_jax"):
    _ = (ckpt.export, ckpt.load_safetensors)  # imported before the clock starts, as Orbax is
  before = resident()
  reset_peak()
  started, cpu = time.perf_counter(), time.process_time()
  work(side, source, out)
  found = {"seconds": time.perf_counter() - started, "cpu": time.process_time() - cpu}
  peak = peak_rss()
  assert before is not None and peak is not None, "the kernel does not report resident memory"
  emit(**found, memory=peak - before)


if __name__ == "__main__":
  main(*sys.argv[1:])
