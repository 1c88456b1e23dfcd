"""Reads the state of a committed step through Orbax."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from ckpt_jax import run
from ckpt_jax.config import Config
from ckpt_jax.errors import CheckpointError, ConfigError, CorruptCheckpointError, StorageError, StructureMismatchError
from ckpt_jax.failures import is_unreachable, root_cause
from ckpt_jax.layout.encoding import decode_leaf, path_name
from ckpt_jax.layout.handler import pytree_handler
from ckpt_jax.restore.match import plan_leaves

PyTree = Any


def read_like(step_dir: epath.Path, like: PyTree, config: Config) -> PyTree:
  """The state of a step with the structure, types and shardings of `like`.

  Raises:
    StructureMismatchError: listing every difference; nothing was read.
    CorruptCheckpointError: if the step cannot be read.
  """
  _refuse_thinned(step_dir, like)
  plans, treedef = plan_leaves(like, run.saved_leaves(step_dir), _notes(step_dir), str(step_dir))
  read = _read(
    step_dir, treedef.unflatten([p.item for p in plans]), treedef.unflatten([p.restore_args for p in plans]), config
  )
  return treedef.unflatten([p.finish(v) for p, v in zip(plans, treedef.flatten_up_to(read), strict=True)])


def read_as_saved(step_dir: epath.Path, config: Config) -> PyTree:
  """The state of a step as nested dicts, lists and tuples of numpy arrays and scalars (PRNG keys stay jax arrays).

  Raises:
    CorruptCheckpointError: if the step cannot be read.
  """
  notes = _notes(step_dir)
  tree = run.item_tree(run.item_directory(step_dir))
  leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
  treedef: Any = structure  # jax's stubs do not know its methods
  names = [path_name(path) for path, _ in leaves]
  items: list[Any] = []
  args: list[Any] = []
  for name, (_, meta) in zip(names, leaves, strict=True):
    kind = type(meta).__name__
    if kind in ("StringMetadata", "ScalarMetadata"):
      items.append("" if kind == "StringMetadata" else 0)
      args.append(ocp.RestoreArgs())
    elif notes.get(name, {}).get("kind") == "prng_key":
      where = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
      key = jax.ShapeDtypeStruct(tuple(meta.shape), meta.dtype, sharding=where)
      items.append(key)
      args.append(ocp.ArrayRestoreArgs(restore_type=jax.Array, sharding=where))
    else:
      items.append(np.zeros((), np.uint8))
      args.append(ocp.RestoreArgs(restore_type=np.ndarray))
  read = _read(step_dir, treedef.unflatten(items), treedef.unflatten(args), config)
  return treedef.unflatten(
    [decode_leaf(value, notes.get(name)) for name, value in zip(names, treedef.flatten_up_to(read), strict=True)]
  )


def _refuse_thinned(step_dir: epath.Path, like: PyTree) -> None:
  kept = run.thinned_to(step_dir)
  if kept is None:
    return
  names = [path_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(like)[0]]
  if all(any(name == k or name.startswith(k + "/") for k in kept) for name in names):
    return
  newest = run.newest_resumable(step_dir.parent)
  resume = "no step of this run can" if newest is None else f"the newest that can is step {newest}"
  what = ", ".join(kept)
  raise StructureMismatchError(
    f"{step_dir}: this step was thinned (retention.thin): it holds {what} alone, and training cannot go on from it; "
    f'{resume}. To read what is there pass only="{kept[0]}", or a like= of {what} alone'
  )


def _notes(step_dir: epath.Path) -> dict[str, Any]:
  return run.our_metadata(step_dir).get("encoded", {})


def _read(step_dir: epath.Path, item: PyTree, restore_args: PyTree, config: Config) -> PyTree:
  item_dir = run.item_directory(step_dir)
  try:
    with ocp.Checkpointer(pytree_handler(config)) as reader:
      return reader.restore(item_dir, args=ocp.args.PyTreeRestore(item=item, restore_args=restore_args))
  except (MemoryError, CheckpointError):
    raise
  except Exception as e:
    if "more bytes than we reserved" in str(e):
      raise ConfigError(f"{item_dir}: {root_cause(e)}") from e
    if is_unreachable(e):
      raise StorageError(f"{item_dir}: {root_cause(e)}") from e
    raise CorruptCheckpointError(f"{item_dir}: cannot be read: {root_cause(e)}") from e
