"""Buckets, raw Orbax beside ckpt_jax: requests of save, restore and open; saves while requests fail; a mounted bucket.

Each variant runs in a process of its own, since ckpt_jax changes how Orbax reaches object stores for the whole process.
Servers are emulators on this machine: request counts and ratios are meaningful, seconds are not.
"""

from __future__ import annotations

import contextlib
import functools
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

from ckpt_jax.bench.buckets import Bucket, control, gcs_server, s3_server
from ckpt_jax.bench.common import CPU, answer, emit, quiet, timed
from ckpt_jax.errors import CheckpointError

_LEAVES = 64
PARTS = ("requests", "faults", "mount")
_MEGABYTES = 268


def run(part: str, repeats: int = 3, progress: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
  """Runs one of PARTS. Returns JSON-able data.

  Args:
    part: which.
    repeats: saves while requests fail; raw Orbax, which then takes a minute a save, makes one.
    progress: called with a line before each measurement.
  """
  result: dict[str, Any] = {"leaves": _LEAVES, "cpus": os.cpu_count()}
  if part == "mount":
    if not shutil.which("s3fs") or os.geteuid():
      raise CheckpointError("mounting a bucket needs root and s3fs")
    progress("s3:// and the s3fs mount, interleaved")
    return result | {"commit_s": _mounted(repeats)}
  for scheme, variants in (("gs", ("orbax", "ckpt_jax")), ("s3", ("ckpt_jax",))):
    for variant in variants:
      progress(f"{scheme}:// {variant}: {part}")
      count = repeats if variant == "ckpt_jax" else 1
      with _server(scheme) as bucket:
        result[f"{scheme} {variant}"] = _child(bucket, variant, part, f"{bucket.url}/run", count, _MEGABYTES)
  return result


@contextlib.contextmanager
def _server(scheme: str) -> Iterator[Bucket]:
  with tempfile.TemporaryDirectory() as objects, gcs_server(objects) if scheme == "gs" else s3_server() as bucket:
    yield bucket


def _child(bucket: Bucket, variant: str, part: str, run_url: str, count: int, megabytes: int) -> Any:
  command = [__name__, variant, part, run_url, bucket.endpoint, str(count), str(megabytes)]
  return answer(f"{variant} {part}", command, CPU | bucket.env)


def _mounted(repeats: int) -> dict[str, Any]:
  """Seconds to commit 33 MB natively and onto a FUSE mount of the same bucket, one after the other."""
  with s3_server() as bucket, tempfile.TemporaryDirectory() as mount:
    options = f"url={bucket.endpoint},use_path_request_style,passwd_file={mount}.passwd"
    password = pathlib.Path(f"{mount}.passwd")
    password.write_text("testing:testing")
    password.chmod(0o600)
    try:
      subprocess.run(["s3fs", bucket.url.removeprefix("s3://"), mount, "-o", options], check=True, timeout=60)
      seconds: dict[str, list[float]] = {"s3": [], "s3fs": []}
      for i in range(repeats):
        for name, where in (("s3", f"{bucket.url}/native{i}"), ("s3fs", f"{mount}/mounted{i}")):
          seconds[name] += [_child(bucket, "ckpt_jax", "commit", where, 1, 33)["commit_s"]]
    finally:
      subprocess.run(["umount", mount], check=False, timeout=60)
      password.unlink()
  return {name: {"median": statistics.median(values), "all": values} for name, values in seconds.items()}


# -- in the child


class _Raw:
  """Plain Orbax with compression off, behind the calls that are measured."""

  def __init__(self, url: str, keep: int | None):
    import orbax.checkpoint as ocp

    self._ocp = ocp
    self._manager = ocp.CheckpointManager(
      url,
      item_handlers=ocp.PyTreeCheckpointHandler(use_compression=False),
      options=ocp.CheckpointManagerOptions(max_to_keep=keep),
    )

  def save(self, step: int, state: Any) -> None:
    self._manager.save(step, args=self._ocp.args.PyTreeSave(state))

  def wait(self) -> None:
    self._manager.wait_until_finished()

  def restore(self, state: Any) -> Any:
    args = self._ocp.checkpoint_utils.construct_restore_args(state)
    return self._manager.restore(None, args=self._ocp.args.PyTreeRestore(item=state, restore_args=args))

  def close(self) -> None:
    self._manager.close()


class _Ours:
  def __init__(self, url: str, keep: int | None):
    import ckpt_jax

    # The state is the same in each save, and is to be written each time.
    self._checkpointer = ckpt_jax.Checkpointer(url, {"retention": {"last": keep}, "layout": {"unchanged": "off"}})

  def save(self, step: int, state: Any) -> None:
    self._checkpointer.save(step, state)

  def wait(self) -> None:
    self._checkpointer.wait()

  def restore(self, state: Any) -> Any:
    return self._checkpointer.restore(like=state).state

  def close(self) -> None:
    self._checkpointer.close()


def make_side(variant: str, url: str, keep: int | None) -> Any:
  """ckpt_jax or raw Orbax in a bucket: an object with save, wait, restore and close."""
  return (_Raw if variant == "orbax" else _Ours)(url, keep)


def _state(megabytes: float, seed: int) -> dict[str, Any]:
  import jax.numpy as jnp
  import numpy as np

  rng = np.random.default_rng(seed)
  rows = max(1, int(megabytes * 1e6 / _LEAVES / 4096))
  return {f"leaf{i}": jnp.asarray(rng.standard_normal((rows, 1024), dtype=np.float32)) for i in range(_LEAVES)}


def _count_requests(make: Callable[[str, int | None], Any], url: str, endpoint: str) -> dict[str, Any]:
  state = _state(16, 0)
  found: dict[str, Any] = {}
  target = make(url, None)
  for step in range(50):
    control(endpoint)
    target.save(step, state if step > 47 else {"leaf0": state["leaf0"]})
    found["save, before it returns"] = control(endpoint)["requests"]
    target.wait()
    found["save, in the background"] = control(endpoint)["requests"]
  target.restore(state)
  found["restore"] = control(endpoint)["requests"]
  target.close()
  control(endpoint)
  target = make(url, None)
  found["open with 50 steps"] = control(endpoint)["requests"]
  target.close()
  return found


def _save_under_faults(
  make: Callable[[str, int | None], Any], url: str, endpoint: str, count: int, megabytes: int
) -> dict[str, Any]:
  import numpy as np

  found: dict[str, dict[str, list[float]]] = {}
  target = make(url, 2)
  target.save(0, _state(megabytes, 0))
  target.wait()
  step = 0
  for _ in range(count):
    for name, share in (("fault-free", 0.0), ("20% fail", 0.2)):
      control(endpoint, share)
      step += 1
      state = _state(megabytes, step)
      figures = found.setdefault(name, {"blocking_s": [], "commit_s": [], "restore_s": [], "bitwise": []})
      started = time.perf_counter()
      figures["blocking_s"].append(timed(lambda: target.save(step, state)))  # noqa: B023 - called at once
      target.wait()
      figures["commit_s"].append(time.perf_counter() - started)
      got: list[Any] = []
      figures["restore_s"].append(timed(lambda: got.append(target.restore(state))))  # noqa: B023
      same = all(np.asarray(got[0][k]).tobytes() == np.asarray(v).tobytes() for k, v in state.items())
      figures["bitwise"].append(float(same))
      control(endpoint, 0.0)
  target.close()
  return {name: {k: {"median": statistics.median(v), "all": v} for k, v in f.items()} for name, f in found.items()}


def _main() -> None:
  quiet()
  variant, part, url, endpoint, count, megabytes = sys.argv[1:]
  make = functools.partial(make_side, variant)
  if part == "requests":
    found = _count_requests(make, url, endpoint)
  elif part == "faults":
    found = _save_under_faults(make, url, endpoint, int(count), int(megabytes))
  else:
    target, state = make(url, None), _state(int(megabytes), 0)
    target.save(0, state)
    target.wait()

    def save() -> None:
      target.save(1, state)
      target.wait()

    found = {"commit_s": timed(save)}
    target.close()
  emit(**found)


if __name__ == "__main__":
  _main()
