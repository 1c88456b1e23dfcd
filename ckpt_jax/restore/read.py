"""Reads the state of a committed step: finds its leaves, matches them with `like`, and has a strategy fetch them.

`read_state` is the only entry. Whoever wants to look at the bytes as they come (fingerprints) passes `check`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import Sharding

from ckpt_jax import run
from ckpt_jax.config import Config
from ckpt_jax.errors import CheckpointError, ConfigError, CorruptCheckpointError, StorageError, StructureMismatchError
from ckpt_jax.failures import is_unreachable, root_cause
from ckpt_jax.layout.encoding import decode_leaf, path_name
from ckpt_jax.layout.handler import pytree_handler
from ckpt_jax.restore.leaf import AS_SAVED, LeafPlan, check_stored, host_sharding, make_plan
from ckpt_jax.restore.match import castable, match
from ckpt_jax.restore.paths import as_patterns, matches, rebuild, selected

PyTree = Any
Initialise = Callable[[str, Any], Any]


@dataclasses.dataclass(frozen=True)
class Request:
  """What of a step is wanted, and in which form. See `Checkpointer.restore` for the meaning of each."""

  like: PyTree | None = None
  only: str | Iterable[str] | None = None
  init_missing: str | Iterable[str] | Mapping[str, Initialise] | None = None
  cast: bool | Mapping[str, Any] | None = None


@dataclasses.dataclass(frozen=True)
class Read:
  """What was read.

  Attributes:
    state: the tree.
    casts: `{path: (saved dtype, dtype now)}` of the leaves that were cast.
    initialised: paths of the leaves that the step lacks.
  """

  state: PyTree
  casts: dict[str, tuple[str, str]]
  initialised: tuple[str, ...]


def read_state(
  step_dir: epath.Path,
  config: Config,
  request: Request,
  *,
  check: Callable[[str, Any], None] | None = None,
) -> Read:
  """The state of a step.

  Args:
    step_dir: a committed step.
    config: the settings.
    request: what is wanted.
    check: called with path and value of each leaf as it is delivered; one that is cast, as it was before.

  Raises:
    StructureMismatchError: listing every difference between `like` and the step; nothing was read.
    CorruptCheckpointError: if the step cannot be read.
  """
  step = _Step(step_dir)
  plans, kept, casts, assemble = _plan(step, request)
  values: dict[str, Any] = {}
  reader = Reader(step, config)
  stored = reader.read({p.name: p.request(_read_sharding(p)) for p in plans})
  for plan in plans:
    value = stored.pop(plan.name)
    check_stored(plan, value)
    values[plan.name] = plan.finish(value)
    if check is not None:
      check(plan.name, values[plan.name] if plan.cast is None else decode_leaf(value, plan.note))
  return Read(assemble(values | kept), casts, tuple(kept))


class _Step:
  """A step's item, as Orbax describes it."""

  def __init__(self, step_dir: epath.Path):
    self.name = str(step_dir)
    self.item_dir = run.item_directory(step_dir)
    self.tree = run.item_tree(self.item_dir)
    ours = run.our_metadata(step_dir)
    self.notes: dict[str, Any] = ours.get("encoded", {})
    self.thinned: list[str] | None = (ours.get(run.THINNED) or {}).get("keep")
    leaves, structure = jax.tree_util.tree_flatten_with_path(self.tree)
    self.treedef: Any = structure  # jax's stubs do not know its methods
    self.meta: dict[str, Any] = {path_name(path): meta for path, meta in leaves}
    self.infos = {info.path: info for info in run.leaf_infos(self.tree, self.notes)}


class Reader:
  """Reads leaves of one item through Orbax's handler, as many calls as one likes, from any thread.

  It does not go through `ocp.Checkpointer`, whose restore ends in a barrier that waits for ever for a process that
  failed, and each process may ask for leaves of its own.
  """

  def __init__(self, step: _Step, config: Config):
    self._step = step
    self._config = config

  def read(self, wanted: Mapping[str, tuple[Any, ocp.RestoreArgs]]) -> dict[str, Any]:
    """The stored values of the leaves named, each as its item and restore args say.

    Raises:
      StorageError: if storage does not answer.
      CorruptCheckpointError: if it holds something else than its metadata says.
    """
    if not wanted:
      return {}
    step = self._step
    nothing = (ocp.PLACEHOLDER, ocp.RestoreArgs())
    pairs = [wanted.get(name, nothing) for name in step.meta]
    item = step.treedef.unflatten([item for item, _ in pairs])
    args = step.treedef.unflatten([args for _, args in pairs])
    try:
      handler = pytree_handler(self._config)
      read = handler.restore(step.item_dir, args=ocp.args.PyTreeRestore(item=item, restore_args=args))
    except (MemoryError, CheckpointError):
      raise
    except Exception as e:
      if "more bytes than we reserved" in str(e):
        raise ConfigError(f"{step.item_dir}: {root_cause(e)}") from e
      if is_unreachable(e):
        raise StorageError(f"{step.item_dir}: {root_cause(e)}") from e
      raise CorruptCheckpointError(f"{step.item_dir}: cannot be read: {root_cause(e)}") from e
    values = step.treedef.flatten_up_to(read)
    return {name: value for name, value in zip(step.meta, values, strict=True) if name in wanted}


def _read_sharding(plan: LeafPlan) -> Sharding | None:
  """Where a leaf is read to when each process reads what it needs."""
  if plan.sharding is not None:
    return plan.sharding
  # For the default device through the CPU: one copy from there makes an array that is not committed to a device.
  return host_sharding() if isinstance(plan.like, (jax.Array, jax.ShapeDtypeStruct)) and plan.note is None else None


# -- what is wanted


def _plan(
  step: _Step, request: Request
) -> tuple[list[LeafPlan], dict[str, Any], dict[str, tuple[str, str]], Callable[[dict[str, Any]], PyTree]]:
  """Plans of the leaves to read, leaves that are there already, casts, and what makes a tree of them all."""
  only = None if request.only is None else as_patterns(request.only, "only")
  infos = step.infos
  if only is not None:
    wanted = selected(only, infos, "only", step.name)
    infos = {name: info for name, info in infos.items() if name in wanted}
  cast = request.cast or False
  if request.like is None:
    if request.init_missing is not None:
      raise ConfigError("init_missing= says which leaves of like= the checkpoint may lack; pass like= too")
    if cast is True:
      raise ConfigError("cast=True casts to the dtypes of like=; pass like=, or cast={'params': 'bfloat16'}")
    casts = _casts_as_saved(step, infos, cast)
    plans = [
      make_plan(name, step.meta[name], step.notes.get(name), AS_SAVED, casts[name][1] if name in casts else None)
      for name in infos
    ]
    return plans, {}, casts, lambda values: rebuild(step.tree, values)
  initialise, patterns = _initialisers(request.init_missing)
  like, prefix = _by_path(request.like, only, infos)
  chosen = like
  if only is not None:
    chosen = {n: leaf for n, leaf in like.items() if any(matches(p, n) for p in only)}
  _refuse_thinned(step, {n for n in chosen if n not in infos and not any(matches(p, n) for p in patterns)})
  found = match(chosen, infos, step.name, init_missing=tuple(p for p in patterns if _names_any(p, chosen)), cast=cast)
  outside = {n: leaf for n, leaf in like.items() if n not in chosen and any(matches(p, n) for p in patterns)}
  selected(patterns, like, "init_missing", "like") if patterns else None
  kept = {name: _initial(name, leaf, initialise) for name, leaf in (found.kept | outside).items()}
  plans = [
    make_plan(name, step.meta[name], step.notes.get(name), leaf, found.casts[name][1] if name in found.casts else None)
    for name, leaf in found.both.items()
  ]
  tree = request.like

  def assemble(values: dict[str, Any]) -> PyTree:
    return rebuild(tree, {name.removeprefix(prefix): value for name, value in values.items()})

  return plans, kept, found.casts, assemble


def _refuse_thinned(step: _Step, missing: set[str]) -> None:
  """One sentence in place of a list of all the leaves that a thinned step has lost."""
  if step.thinned is None or not missing:
    return
  directory = epath.Path(step.name)
  newest = run.newest_resumable(directory.parent)
  resume = "no step of this run can" if newest is None else f"the newest that can is step {newest}"
  kept = ", ".join(step.thinned)
  raise StructureMismatchError(
    f"{directory}: this step was thinned (retention.thin): it holds {kept} alone, and training cannot go on from it; "
    f'{resume}. To read what is there pass only="{step.thinned[0]}", or a like= of {kept} alone; init_missing= makes '
    "the rest anew"
  )


def _names_any(pattern: str, names: Iterable[str]) -> bool:
  return any(matches(pattern, name) for name in names)


def _by_path(
  like: PyTree, only: tuple[str, ...] | None, infos: Mapping[str, run.LeafInfo]
) -> tuple[dict[str, Any], str]:
  """The leaves of `like` by their path in the checkpoint, and the prefix that was put before them.

  With `only="params"`, `like` may be a whole state, `{"params": ...}`, or what lies below params.
  """
  leaves = {path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(like)[0]}
  if only is None or any(matches(p, name) for p in only for name in leaves):
    return leaves, ""
  if len(only) == 1 and not set("*?[") & set(only[0]):
    prefix = only[0].strip("/") + "/"
    below = {prefix + name: leaf for name, leaf in leaves.items()}
    if any(name in infos for name in below):
      return below, prefix
  tops = sorted({name.split("/")[0] for name in leaves})
  raise StructureMismatchError(
    f"only={list(only)}: names no leaf of like, which has {', '.join(tops[:10])} at the top; nothing was read"
  )


def _casts_as_saved(
  step: _Step, infos: Mapping[str, run.LeafInfo], cast: bool | Mapping[str, Any]
) -> dict[str, tuple[str, str]]:
  if not isinstance(cast, Mapping):
    return {}
  selected(tuple(cast), infos, "cast", step.name)
  found: dict[str, tuple[str, str]] = {}
  for name, info in infos.items():
    for pattern, dtype in cast.items():
      wanted = jax.numpy.dtype(dtype).name
      if matches(pattern, name) and not info.scalar:
        if info.dtype != wanted:
          if not castable(info.dtype, wanted):
            raise StructureMismatchError(
              f"cast={{{pattern!r}: {wanted!r}}}: {name} is {info.dtype}, another kind of number"
            )
          found[name] = (info.dtype, wanted)
        break
  return found


def _initialisers(argument: Any) -> tuple[dict[str, Initialise | None], tuple[str, ...]]:
  if argument is None:
    return {}, ()
  if isinstance(argument, Mapping):
    for pattern, initialise in argument.items():
      if not callable(initialise):
        raise ConfigError(f"init_missing[{pattern!r}]: expected a function of path and leaf, got {initialise!r:.60}")
    return dict(argument), as_patterns(argument.keys(), "init_missing")
  patterns = as_patterns(argument, "init_missing")
  return dict.fromkeys(patterns), patterns


def _initial(name: str, leaf: Any, initialise: Mapping[str, Initialise | None]) -> Any:
  """The value of a leaf that the checkpoint lacks."""
  function = next(f for pattern, f in initialise.items() if matches(pattern, name))
  if function is None:
    if isinstance(leaf, jax.ShapeDtypeStruct):
      raise StructureMismatchError(
        f"{name}: init_missing keeps like's value, and like has only a shape there; put an array into like=, or a "
        "function: init_missing={'" + name + "': lambda path, leaf: ...}"
      )
    return leaf
  value = function(name, leaf)
  if hasattr(leaf, "dtype"):
    shape, dtype = np.shape(value), getattr(value, "dtype", None)
    if shape != tuple(leaf.shape) or dtype != leaf.dtype:
      raise StructureMismatchError(
        f"{name}: its init_missing function returned {dtype}{list(shape)}, like has {leaf.dtype}{list(leaf.shape)}"
      )
    sharding = getattr(leaf, "sharding", None)
    if isinstance(leaf, jax.Array) and not getattr(leaf, "committed", True):
      sharding = None
    if isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct)):
      if sharding is None:
        return value if isinstance(value, jax.Array) else jax.numpy.asarray(value)
      if isinstance(value, jax.Array):
        return jax.device_put(value, sharding)
      return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])
  return value
