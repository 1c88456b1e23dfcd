"""One side of `ckpt-jax bench accelerator` in a process of its own: measures what it is asked, and prints it as JSON.

Where there is no accelerator, CPU devices stand in for one: the same code, other figures.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import pathlib
import runpy
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import ckpt_jax
from ckpt_jax.bench.common import emit, quiet
from ckpt_jax.bench.variants import VARIANTS, Target, jax_target
from ckpt_jax.bench.worker import give_memory_back, peak_rss, reset_peak, resident
from ckpt_jax.layout import staging
from ckpt_jax.layout.sharding import global_nbytes

_LAYERS, _WIDTH_STEP = 50, 64
_A_LAYER = 3 * 12 * 4  # bytes of a layer of width 1, with its moments
_COMMIT_S = 120.0  # the longest wait for a commit
_WARM_UP = 20  # saves before memory has to stay flat
_KEPT = 2  # steps
_SAMPLE_S = 0.002
_EXAMPLE = "ckpt_jax.examples.lm"
PyTree = Any


@dataclasses.dataclass(frozen=True)
class Work:
  """What to measure.

  Attributes:
    what: `saves`, `restores`, `growth`, `bounded` or `example`.
    variant: one of `variants.VARIANTS`.
    directory: the run.
    nbytes: size of the state.
    repeats: saves, or restores, after the first.
    config: settings of ckpt_jax.
  """

  what: str
  variant: str
  directory: str
  nbytes: int
  repeats: int = 3
  config: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def target(self, state: PyTree, **config: Any) -> Target:
    """The side that saves and restores `state`."""
    return jax_target(VARIANTS[self.variant], state, self.directory, _KEPT, {**self.config, **config})


# -- the state and the training beside it


def shapes(nbytes: int) -> PyTree:
  """Parameters and Adam's moments, float32, in at most 901 arrays that are divided over the local devices."""
  layers = min(_LAYERS, max(1, nbytes // (_A_LAYER * _WIDTH_STEP**2)))
  width = max(1, round((nbytes / layers / _A_LAYER) ** 0.5 / _WIDTH_STEP)) * _WIDTH_STEP
  devices = jax.local_devices()
  mesh = jax.sharding.Mesh(np.array(devices), ("fsdp",))
  everywhere: jax.sharding.Sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
  if len(devices) == 1:
    everywhere = jax.sharding.SingleDeviceSharding(devices[0])
  spread = len(devices) > 1 and _WIDTH_STEP % len(devices) == 0
  of = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32, sharding=rows if spread else everywhere)
  layer = {"qkv": of((width, 3 * width)), "out": of((width, width)), "up": of((width, 4 * width))}
  layer |= {"down": of((4 * width, width)), "norm": of((width,)), "bias": of((4 * width,))}
  tree = {f"layer_{i}": layer for i in range(layers)}
  step = jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere)
  return {"params": tree, "mu": tree, "nu": tree, "step": step}


def values(like: PyTree) -> PyTree:
  """The same random values in each process, made on the devices by one program a shape."""

  @functools.cache
  def program(shape: tuple[int, ...], dtype: Any, sharding: Any) -> Callable[[Any], jax.Array]:
    make = (
      jax.random.normal if jnp.issubdtype(dtype, jnp.floating) else (lambda key, shape, dtype: jnp.zeros(shape, dtype))
    )
    return jax.jit(lambda key: make(key, shape, dtype), out_shardings=sharding)

  leaves, tree = jax.tree.flatten(like)
  made = [program(x.shape, x.dtype, x.sharding)(jax.random.key(i)) for i, x in enumerate(leaves)]
  return jax.block_until_ready(jax.tree.unflatten(tree, made))


_copy = jax.jit(lambda x: x + 0)
_update = jax.jit(lambda x: x * 2, donate_argnums=0)


def copied(state: PyTree) -> PyTree:
  """A state of its own to save, so that it can be donated."""
  return jax.block_until_ready(jax.tree.map(_copy, state))


class Training:
  """Steps of matrix products on the first device, in place of a model's."""

  def __init__(self) -> None:
    on_cpu = jax.default_backend() == "cpu"
    size, dtype = (512, jnp.float32) if on_cpu else (8192, jnp.bfloat16)
    self._w = w = jax.random.normal(jax.random.key(0), (size, size), dtype)

    @jax.jit
    def step(x: jax.Array) -> jax.Array:
      for _ in range(8):
        x = (x @ w) * 0.01
      return x

    self._step = step
    jax.block_until_ready(step(w))
    ends = time.perf_counter() + 1.0
    self.alone_s = self.steps(lambda: time.perf_counter() > ends)

  def steps(self, is_over: Callable[[], bool]) -> float:
    """Mean seconds of a step until it is over."""
    started, count, x = time.perf_counter(), 0, self._w
    while count == 0 or not is_over():
      x = jax.block_until_ready(self._step(x))
      count += 1
    return (time.perf_counter() - started) / count


# -- what is measured


def saves(work: Work) -> dict[str, Any]:
  """The first save of a process and the next ones: blocking, until donation is done, until the commit; steps beside."""
  state = values(shapes(work.nbytes))
  training = Training()
  jax.block_until_ready(jax.tree.map(_update, copied(state)))  # compiled
  given = copied(state)
  started = time.perf_counter()
  jax.block_until_ready(jax.tree.map(_update, given))
  found: dict[str, Any] = {"update_s": time.perf_counter() - started, "step_s": training.alone_s, "saves": []}
  del given
  give_memory_back()
  before = resident()
  reset_peak()
  target = work.target(shapes(work.nbytes))
  for step in range(work.repeats + 1):
    found["saves"].append(_save(target, step, copied(state), training, work.directory))
  found["rss"] = _beside(peak_rss(), before)
  target.state = copied(state)
  with _pinned() as most:
    target.save(work.repeats + 1)
    target.state = None
    target.wait()
  found["pinned"] = max(most)
  target.close()
  return found


def _save(target: Target, step: int, state: PyTree, training: Training, directory: str) -> dict[str, float]:
  leaves, target.state = jax.tree.leaves(state), state
  started = time.perf_counter()
  target.save(step)
  blocked = time.perf_counter()
  updated = [_update(leaf) for leaf in leaves]  # as a training step that donates its state
  jax.block_until_ready(updated)
  donated = time.perf_counter()
  target.state = None
  del state, leaves, updated
  place, ends = pathlib.Path(directory, str(step)), started + _COMMIT_S
  each_s = training.steps(lambda: place.exists() or time.perf_counter() > ends)
  committed = time.perf_counter()
  target.wait()
  return {
    "blocking_s": blocked - started,
    "donated_s": donated - started,
    "commit_s": committed - started,
    "slowdown": each_s / training.alone_s,
  }


def restores(work: Work) -> dict[str, Any]:
  """The first restore of a process and the next ones, and whether every bit is right."""
  like = shapes(work.nbytes)
  jax.block_until_ready(jnp.zeros(8))  # the devices are up
  before = resident()
  reset_peak()
  target = work.target(like)
  step = max(int(p.name) for p in pathlib.Path(work.directory).iterdir() if p.name.isdigit())
  seconds, restored = [], None
  for _ in range(work.repeats + 1):
    del restored
    started = time.perf_counter()
    restored = jax.block_until_ready(target.restore(step))
    seconds.append(time.perf_counter() - started)
  found = {"seconds": seconds, "rss": _beside(peak_rss(), before)}
  target.state = values(like)
  found["bitwise"] = target.same(restored)
  target.close()
  return found


def growth(work: Work) -> dict[str, Any]:
  """Bytes of resident memory that a save adds once memory has warmed up."""
  state = values(shapes(work.nbytes))
  target = work.target(shapes(work.nbytes))
  warm: int | None = None
  for step in range(_WARM_UP + work.repeats):
    if step == _WARM_UP:
      give_memory_back()
      warm = resident()
    target.state = copied(state)
    target.save(step)
    target.state = None
    target.wait()
  give_memory_back()
  total = _beside(resident(), warm)
  target.close()
  return {"saves": work.repeats, "a_save": None if total is None else total / work.repeats}


def bounded(work: Work) -> dict[str, Any]:
  """Peaks of resident memory beside the state under `limits.host_memory` of a quarter of it."""
  state = values(shapes(work.nbytes))
  nbytes = global_nbytes(state)
  limit = nbytes // 4
  target = work.target(state, limits={"host_memory": limit})
  give_memory_back()
  before = resident()
  reset_peak()
  started = time.perf_counter()
  target.save(0)
  blocking_s = time.perf_counter() - started
  target.wait()
  saving = _beside(peak_rss(), before)
  give_memory_back()
  before = resident()
  reset_peak()
  restored = jax.block_until_ready(target.restore(0))
  restoring = _beside(peak_rss(), before)
  if restoring is not None and jax.default_backend() == "cpu":
    restoring = max(0, restoring - nbytes)  # the state itself
  found = {"limit": limit, "saving": saving, "restoring": restoring, "blocking_s": blocking_s}
  found["bitwise"] = target.same(restored)
  target.close()
  return found


def example(work: Work) -> dict[str, Any]:
  """Blocking seconds of the saves of the example, which runs as the program that it is."""
  with tempfile.TemporaryDirectory() as notes:
    sys.argv = [_EXAMPLE, "--run", work.directory, "--steps", "40", "--notes", notes]
    with contextlib.redirect_stdout(sys.stderr):
      runpy.run_module(_EXAMPLE, run_name="__main__")
    records = [json.loads(file.read_text()) for file in pathlib.Path(notes).glob("save-*.json")]
  return {"blocking_s": [record["blocking_s"] for record in sorted(records, key=lambda record: record["step"])]}


def _beside(bytes_now: int | None, before: int | None) -> int | None:
  return None if bytes_now is None or before is None else max(0, bytes_now - before)


@contextlib.contextmanager
def _pinned() -> Iterator[list[int]]:
  """Bytes of pinned arrays, sampled until the end of the block. Sampling takes time: not for what is timed."""
  found, over = [0], threading.Event()

  def sample() -> None:
    while not over.wait(_SAMPLE_S):
      arrays = [x for x in jax.live_arrays() if x.sharding.memory_kind == "pinned_host"]
      found.append(sum(x.nbytes for x in arrays))

  thread = threading.Thread(target=sample, name="pinned")
  thread.start()
  try:
    yield found
  finally:
    over.set()
    thread.join()


def about(work: Work) -> dict[str, Any]:
  """The devices, whether CPU devices stand in for accelerators, and the state."""
  device = jax.local_devices()[0]
  return {
    "device": device.device_kind,
    "devices": jax.local_device_count(),
    "stand_in": device.platform == "cpu",
    "jax": jax.__version__,
    "ckpt_jax": ckpt_jax.__version__,
    "leaves": len(jax.tree.leaves(shapes(work.nbytes))),
    "state_nbytes": global_nbytes(shapes(work.nbytes)),
  }


MEASUREMENTS = {f.__name__: f for f in (saves, restores, growth, bounded, example)}


def main() -> None:
  """Measures what the command line says."""
  quiet()
  work = Work(**json.loads(sys.argv[1]))
  staging.as_accelerators = jax.default_backend() == "cpu"
  found = MEASUREMENTS[work.what](work)
  emit(about=about(work), **found)


if __name__ == "__main__":
  main()
