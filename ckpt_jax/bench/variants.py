"""The variants of a comparison: raw Orbax, ckpt_jax, and alternatives. Each runs in a process of its own (worker.py).

The parent calls `left_out` to see which can run here; the process makes the target by its `kind`. jax, torch and Orbax
are imported only there.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from ckpt_jax.bench import suites
from ckpt_jax.bench.suites import Suite

TORCH_PYTHON = "CKPT_JAX_BENCH_TORCH_PYTHON"
_PROBE_SECONDS = 10.0


@dataclasses.dataclass(frozen=True)
class Variant:
  """A way to save and restore.

  Attributes:
    name, title: for commands and for tables.
    kind: the class below that implements it.
    options: its arguments.
    package: the package that must be installed.
  """

  name: str
  title: str
  kind: str
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  package: str | None = None


VARIANTS: dict[str, Variant] = {
  v.name: v
  for v in (
    Variant(suites.ORBAX, "Orbax, defaults", "orbax"),
    Variant(suites.ORBAX_PLAIN, "Orbax, use_compression=False", "orbax", {"use_compression": False}),
    Variant(suites.OURS, "ckpt_jax, defaults", "ckpt_jax"),
    Variant(suites.PACKED, "ckpt_jax, packed", "ckpt_jax", {"layout": {"pack": "on"}}),
    Variant(suites.ZSTD, "ckpt_jax, compression zstd", "ckpt_jax", {"layout": {"compression": "zstd"}}),
    Variant(suites.PLAIN, "ckpt_jax, compression off", "ckpt_jax", {"layout": {"compression": "off"}}),
    Variant(suites.TUNED, "ckpt_jax, tuned", "tuned"),
    Variant(suites.DCP, "torch DCP save", "dcp", package="torch"),
    Variant(suites.DCP_ASYNC, "torch DCP async_save", "dcp", {"background": True}, package="torch"),
    Variant(suites.SAFETENSORS, "safetensors", "safetensors", package="safetensors"),
    Variant(suites.RAW, "raw file + fsync", "raw"),
  )
}


def python_of(variant: Variant) -> str:
  """The interpreter that runs a variant; torch may be installed in an environment of its own."""
  return os.environ.get(TORCH_PYTHON, sys.executable) if variant.package == "torch" else sys.executable


def left_out(variant: Variant, suite: Suite) -> str | None:
  """Why a variant cannot be measured here; None if it can."""
  if variant.kind == "orbax" and suite.storage == "s3":
    return "Orbax cannot write to s3:// (google/orbax#2739)"
  if variant.package == "torch" and TORCH_PYTHON in os.environ:
    command = [python_of(variant), "-c", "import torch, numpy"]
    try:
      done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    except (OSError, subprocess.TimeoutExpired) as e:
      return f"{TORCH_PYTHON}: {e}"
    if done.returncode:
      last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
      return f"{TORCH_PYTHON}={command[0]}: {last[0]}"
    return None
  if variant.package and importlib.util.find_spec(variant.package) is None:
    extra = "torch" if variant.package == "torch" else "bench"
    return f'{variant.package} is not installed: pip install "ckpt_jax[{extra}]"'
  return None


class Target:
  """What the process of a variant does. `save` returns once the state may be overwritten, `wait` once it is committed.

  Attributes:
    state: what is saved; it may be replaced by one of the same shapes.
    sizes: bytes of each leaf.
  """

  state: Any
  sizes: list[int]

  def prepare(self) -> None:
    """Prepares the first save, while no other variant runs."""

  def save(self, step: int) -> None:
    """Starts the save of a step."""
    raise NotImplementedError

  def wait(self) -> None:
    """Waits until the last save is committed."""

  def restore(self, step: int) -> Any:
    """The state of a step, in memory or on its devices."""
    raise NotImplementedError

  def same(self, restored: Any) -> bool:
    """Whether a restored state has every bit of the saved one."""
    raise NotImplementedError

  def about(self) -> dict[str, Any]:
    """The `settings` that it chose and its `predicted` costs; empty if it has none."""
    return {}

  def close(self) -> None:
    """Releases what the target holds."""


def make_target(variant: Variant, suite: Suite, directory: str) -> Target:
  """The variant's target, with the suite's state in the form that it saves."""
  state = suites.state_of(suite)
  if variant.kind == "dcp":
    return _Dcp(state, directory, **variant.options)
  if variant.kind == "safetensors":
    return _Safetensors(state, directory)
  if variant.kind == "raw":
    return _RawFile(state, directory)
  return jax_target(variant, on_devices(state, suite), directory)


def jax_target(
  variant: Variant,
  state: Any,
  directory: str | os.PathLike[str],
  keep: int | None = None,
  config: Mapping[str, Any] | None = None,
) -> Target:
  """The target of raw Orbax or ckpt_jax.

  Args:
    variant: one of the two kinds.
    state: on its devices, or `jax.ShapeDtypeStruct`s to restore only.
    directory: the run.
    keep: steps to keep; None for all.
    config: further settings for ckpt_jax.
  """
  if variant.kind == "orbax":
    return _Orbax(state, directory, keep, **variant.options)
  retention = {"retention": {"last": keep}, **(config or {})}
  if variant.kind == "tuned":
    # The default plan rests on a measurement of less than a second, and packing is off in it.
    return _CkptJax(state, directory, {"layout": {"pack": "auto"}, **retention}, probe=True)
  return _CkptJax(state, directory, {**variant.options, **retention})


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
  """Whether two arrays have the same dtype, shape and bits."""
  if a.dtype != b.dtype or a.shape != b.shape:
    return False
  return np.array_equal(np.ascontiguousarray(a).reshape(-1).view(np.uint8), b.reshape(-1).view(np.uint8))


# -- jax


def on_devices(state: suites.Tree, suite: Suite) -> Any:
  """The state on the suite's devices."""
  import jax
  from jax.sharding import NamedSharding, PartitionSpec

  if not suite.mesh:
    placed = jax.tree.map(lambda x: jax.device_put(x, jax.devices()[0]), state)
  else:
    names, sizes = zip(*suite.mesh, strict=True)
    mesh = jax.make_mesh(sizes, names)
    parts = dict(suite.mesh)["fsdp"]

    def place(x: np.ndarray) -> Any:
      split = x.ndim and x.shape[0] % parts == 0
      sharding = NamedSharding(mesh, PartitionSpec("fsdp") if split else PartitionSpec())
      return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    placed = jax.tree.map(place, state)
  return jax.block_until_ready(placed)


class _Jax(Target):
  """A state on jax devices, and the check of a restored one."""

  def __init__(self, state: Any):
    import jax

    self.state = state
    self.sizes = [x.size * x.dtype.itemsize for x in jax.tree.leaves(state)]
    self.like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)

  def same(self, restored: Any) -> bool:
    import jax

    a_tree: Any = jax.tree.structure(restored)
    if a_tree != jax.tree.structure(self.state):
      return False
    return all(
      a.sharding == b.sharding
      and all(
        same_bits(np.asarray(x.data), np.asarray(y.data))
        for x, y in zip(a.addressable_shards, b.addressable_shards, strict=True)
      )
      for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(self.state), strict=True)
    )


class _Orbax(_Jax):
  """CheckpointManager with Orbax's defaults but for `handler`: options of its PyTreeCheckpointHandler."""

  def __init__(self, state: Any, directory: str | os.PathLike[str], keep: int | None = None, **handler: Any):
    import orbax.checkpoint as ocp

    super().__init__(state)
    self._ocp = ocp
    self._manager = ocp.CheckpointManager(
      directory,
      options=ocp.CheckpointManagerOptions(max_to_keep=keep),
      item_handlers=ocp.PyTreeCheckpointHandler(**handler),
    )
    self._restore_args = ocp.checkpoint_utils.construct_restore_args(self.like)

  def save(self, step: int) -> None:
    self._manager.save(step, args=self._ocp.args.PyTreeSave(self.state))

  def wait(self) -> None:
    self._manager.wait_until_finished()

  def restore(self, step: int) -> Any:
    import jax

    args = self._ocp.args.PyTreeRestore(item=self.like, restore_args=self._restore_args)
    return jax.block_until_ready(self._manager.restore(step, args=args))

  def close(self) -> None:
    self._manager.close()


class _CkptJax(_Jax):
  """A Checkpointer; with `probe` the storage is measured thoroughly before the plan is made."""

  def __init__(self, state: Any, directory: str | os.PathLike[str], config: Mapping[str, Any], probe: bool = False):
    import ckpt_jax

    super().__init__(state)
    self._directory, self._probe = directory, probe
    # The state is the same in each save, and is to be written each time.
    layout = {"unchanged": "off", **config.get("layout", {})}
    self._checkpointer = ckpt_jax.Checkpointer(directory, {**config, "layout": layout})

  def prepare(self) -> None:
    import jax

    import ckpt_jax

    if self._probe and jax.process_index() == 0:
      ckpt_jax.probe(self._directory, budget=_PROBE_SECONDS)

  def save(self, step: int) -> None:
    self._checkpointer.save(step, self.state)

  def wait(self) -> None:
    self._checkpointer.wait()

  def restore(self, step: int) -> Any:
    return self._checkpointer.restore(step, like=self.like).state

  def about(self) -> dict[str, Any]:
    plan = self._checkpointer.plan
    if not plan:
      return {}
    return {
      "settings": {key: value for key, value in plan.values.items() if value != "auto"},
      "predicted": {name: getattr(plan, name) for name in ("blocking_s", "commit_s", "restore_s")},
    }

  def close(self) -> None:
    self._checkpointer.close()


# -- others


class _Flat(Target):
  """A state in host memory under flat names, and the check of a restored one."""

  def __init__(self, state: suites.Tree, directory: str):
    self.directory = directory
    self.state = {name: np.asarray(x) for name, x in suites.leaves(state)}
    self.sizes = [x.nbytes for x in self.state.values()]

  def path(self, step: int) -> str:
    return f"{self.directory}/{step}"

  def same(self, restored: Any) -> bool:
    return restored.keys() == self.state.keys() and all(
      same_bits(np.asarray(restored[name]), x) for name, x in self.state.items()
    )


class _Dcp(_Flat):
  """torch.distributed.checkpoint, one process."""

  def __init__(self, state: suites.Tree, directory: str, background: bool = False):
    import torch
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp

    super().__init__(state, directory)
    self._torch, self._dcp, self._background = torch, dcp, background
    self._meeting = tempfile.mkdtemp()
    dist.init_process_group("gloo", init_method=f"file://{self._meeting}/peers", rank=0, world_size=1)
    self._tensors = {name: torch.from_numpy(x) for name, x in self.state.items()}
    self._future: Any = None

  def save(self, step: int) -> None:
    if self._background:
      self._future = self._dcp.async_save(self._tensors, checkpoint_id=self.path(step))
    else:
      self._dcp.save(self._tensors, checkpoint_id=self.path(step))

  def wait(self) -> None:
    if self._future is not None:
      self._future.result()
      self._future = None

  def restore(self, step: int) -> Any:
    tensors = {name: self._torch.empty_like(t) for name, t in self._tensors.items()}
    self._dcp.load(tensors, checkpoint_id=self.path(step))
    return tensors

  def close(self) -> None:
    self._torch.distributed.destroy_process_group()
    shutil.rmtree(self._meeting, ignore_errors=True)


class _Safetensors(_Flat):
  """One file, written without fsync: only commit + sync can be compared."""

  def save(self, step: int) -> None:
    from safetensors.numpy import save_file

    os.makedirs(self.path(step))
    save_file(self.state, f"{self.path(step)}/model.safetensors")

  def restore(self, step: int) -> Any:
    from safetensors.numpy import load_file

    return load_file(f"{self.path(step)}/model.safetensors")


def _view(array: np.ndarray) -> memoryview:
  return memoryview(array.reshape(-1).view(np.uint8).data)


class _RawFile(_Flat):
  """All bytes in one file, with fsync: the speed of the disk."""

  def save(self, step: int) -> None:
    os.makedirs(self.path(step))
    with open(f"{self.path(step)}/bytes", "wb", buffering=0) as file:
      for x in self.state.values():
        view = _view(x)
        while view.nbytes:
          view = view[file.write(view) :]
      os.fsync(file.fileno())

  def restore(self, step: int) -> Any:
    path = pathlib.Path(f"{self.path(step)}/bytes")
    buffer = np.empty(path.stat().st_size, np.uint8)
    with open(path, "rb", buffering=0) as file:
      view = _view(buffer)
      while view.nbytes:
        view = view[file.readinto(view) or 0 :]
    restored, at = {}, 0
    for name, x in self.state.items():
      restored[name] = buffer[at : at + x.nbytes].view(x.dtype).reshape(x.shape)
      at += x.nbytes
    return restored
