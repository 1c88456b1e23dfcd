"""Plans what a restore reads of a step, and reads it: the leaves, matched with `like`, fetched by a strategy."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
from etils import epath

from ckpt_jax.config import Config
from ckpt_jax.config.arguments import check_request
from ckpt_jax.errors import ConfigError, StructureMismatchError
from ckpt_jax.integrity.fingerprint import label
from ckpt_jax.job.rendezvous import Rendezvous
from ckpt_jax.job.waits import Together
from ckpt_jax.layout.contents import LeafInfo
from ckpt_jax.layout.shared import other_names, reunited, shared_nodes
from ckpt_jax.layout.structure import path_name, rebuild
from ckpt_jax.restore.choice import StrategyChoice, agree_on_strategy, see_readers
from ckpt_jax.restore.fetch import fetch
from ckpt_jax.restore.leaf import LeafPlan, check_stored, finish_arrays
from ckpt_jax.restore.like import Initialise, initial_value, initialisers, patterns_inside
from ckpt_jax.restore.match import castable, match
from ckpt_jax.restore.patterns import as_patterns, matches, selected
from ckpt_jax.restore.step import Step, refuse_shared
from ckpt_jax.restore.strategies import totals
from ckpt_jax.run.steps import newest_resumable
from ckpt_jax.tuning.profile import available_memory

PyTree = Any


@dataclasses.dataclass(frozen=True)
class RestoreRequest:
  """What of a step is wanted, and in which form. See `Checkpointer.restore` for the meaning of each.

  Attributes:
    initial: whether `like` is what `init_fn` of `restore_or_init` makes.
  """

  like: PyTree | None = None
  only: str | Iterable[str] | None = None
  init_missing: str | Iterable[str] | Mapping[str, Initialise] | None = None
  cast: bool | Mapping[str, Any] | None = None
  item: str | None = None
  initial: bool = False

  def __post_init__(self):
    check_request(self.only, self.init_missing, self.cast, self.item)


@dataclasses.dataclass(frozen=True)
class Reading:
  """What a restore reads of a step.

  Attributes:
    plans: the leaves to read.
    kept: values, by path, of the leaves that the step lacks and that `init_missing` names.
    casts: `{path: (saved dtype, dtype now)}` of the leaves that are cast.
    assemble: makes the tree of all values by path.
  """

  plans: list[LeafPlan]
  kept: dict[str, Any]
  casts: dict[str, tuple[str, str]]
  assemble: Callable[[dict[str, Any]], PyTree]


def read_state(step_dir: epath.Path, config: Config, request: RestoreRequest) -> PyTree:
  """The state of a step, read directly and not compared with what was saved: for one process without a Checkpointer.

  Raises:
    StructureMismatchError, CorruptCheckpointError: as `plan_reading` and `fetch_state`.
  """
  step = Step(step_dir, config, request.item, request.like)
  together = Together(Rendezvous(f"read {step_dir}"), config.timeouts.restore_s)
  return fetch_state(step, plan_reading(step, request), config, together)[0]


def fetch_state(
  step: Step,
  reading: Reading,
  config: Config,
  together: Together,
  strategy: str = "direct",
  check: Callable[[str, Any], None] | None = None,
) -> tuple[PyTree, StrategyChoice]:
  """Reads a state. All processes of the job call it alike, and an error on one is raised on all.

  `check` is called with path and value of each leaf as it is delivered; before the cast, if it is cast.

  Raises:
    CorruptCheckpointError: if the step cannot be read.
    RestoreTimeoutError: naming what was waited for, and the processes that did not come.
  """
  choice, routes = agree_on_strategy(reading.plans, strategy, str(step), config, together)
  values: dict[str, Any] = dict(reading.kept)
  as_stored = {p.name for p in reading.plans if p.note is None and p.cast is None}
  checked: set[str] = set()

  def arrived(name: str, value: Any) -> None:
    # Most leaves are delivered as they are read: they are checked while the others are read.
    if check is not None and name in as_stored:
      check(name, value)
      checked.add(name)

  def deliver(plan: LeafPlan, value: Any) -> None:
    check_stored(plan, value)
    saved = plan.decode(value)
    delivered = values[plan.name] = plan.convert(saved)
    if check is not None and not (plan.name in checked and delivered is value):
      # What is delivered, unless it is of another type: a number that became an array, a dtype that was cast.
      check(plan.name, delivered if label(delivered) == label(saved) else saved)

  error: Exception | None = None
  try:
    read_s = fetch(routes, step.read, together, _bound(config), deliver, arrived)
    if jax.process_index() == 0:
      see_readers(str(step), jax.process_count(), totals(routes).read_nbytes, read_s)
  except Exception as e:
    error = e
  if error is not None and together.told(error):
    raise error
  together.meet("all processes to finish reading", error)
  finish_arrays(reading.plans, values)
  return reading.assemble(values), choice


def _bound(config: Config) -> int:
  """Bytes of leaves that may be under way beside the state."""
  limit = config.limits.host_memory
  return limit // 4 if isinstance(limit, int) else max(2**24, min(2**29, available_memory() // 8))


def plan_reading(step: Step, request: RestoreRequest) -> Reading:
  """Matches what is wanted with what a step holds; reads no values.

  Raises:
    StructureMismatchError: listing every difference between `like` and the step.
    ConfigError: if arguments contradict each other.
  """
  only = None if request.only is None else as_patterns(request.only, "only")
  infos = step.infos
  if only is not None:
    wanted = selected(only, infos, "only", str(step))
    infos = {name: info for name, info in infos.items() if name in wanted}
  cast = request.cast or False
  if request.like is None:
    if request.init_missing is not None:
      raise ConfigError("init_missing= says which leaves of like= the checkpoint may lack; pass like= too")
    if cast is True:
      raise ConfigError("cast=True casts to the dtypes of like=; pass like=, or cast={'params': 'bfloat16'}")
    casts = _casts_as_saved(step, infos, cast)
    plans = [step.plan(name, casts=casts) for name in infos]
    return Reading(plans, {}, casts, lambda values: rebuild(step.item.tree, values))
  initialise = initialisers(request.init_missing)
  like, prefix = _by_path(request.like, only, infos)
  tree, shared = request.like, shared_nodes(request.like)
  others = other_names([name.removeprefix(prefix) for name in like], shared)
  like = {name: leaf for name, leaf in like.items() if name.removeprefix(prefix) not in others}
  chosen = like
  if only is not None:
    chosen = {n: leaf for n, leaf in like.items() if any(matches(p, n) for p in only)}
  inside, outside = patterns_inside(initialise, chosen, like)
  _refuse_thinned(step, {n for n in chosen if n not in infos and not any(matches(p, n) for p in inside)})
  found = match(chosen, infos, str(step), init_missing=inside, cast=cast, initial=request.initial)
  kept = {name: initial_value(name, leaf, initialise) for name, leaf in (found.kept | outside).items()}
  plans = [step.plan(name, leaf, found.casts) for name, leaf in found.both.items()]

  def assemble(values: dict[str, Any]) -> PyTree:
    found = {name.removeprefix(prefix): value for name, value in values.items()}
    found |= {name: found[stored] for name, stored in others.items() if stored in found}
    return reunited(rebuild(tree, found), shared)

  return Reading(plans, kept, found.casts, assemble)


def _refuse_thinned(step: Step, missing: set[str]) -> None:
  """One sentence in place of a list of all the leaves that a thinned step has lost."""
  if step.thinned is None or not missing:
    return
  directory = epath.Path(str(step))
  newest = newest_resumable(directory.parent)
  resume = "no step of this run can" if newest is None else f"the newest that can is step {newest}"
  kept = ", ".join(step.thinned)
  raise StructureMismatchError(
    f"{directory}: this step was thinned (retention.thin): it holds {kept} alone, and training cannot go on from it; "
    f'{resume}. To read what is there pass only="{step.thinned[0]}", or a like= of {kept} alone; init_missing= makes '
    "the rest anew",
    topic="thinned-step",
  )


def _by_path(like: PyTree, only: tuple[str, ...] | None, infos: Mapping[str, LeafInfo]) -> tuple[dict[str, Any], str]:
  """The leaves of `like` by their path in the checkpoint, and the prefix that was put before them.

  With `only="params"`, `like` may be a whole state, `{"params": ...}`, or the leaves below params.
  """
  found = jax.tree_util.tree_flatten_with_path(like)[0]
  leaves = {path_name(path): leaf for path, leaf in found}
  refuse_shared(leaves, found, "like=")
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
  step: Step, infos: Mapping[str, LeafInfo], cast: bool | Mapping[str, Any]
) -> dict[str, tuple[str, str]]:
  if not isinstance(cast, Mapping):
    return {}
  selected(tuple(cast), infos, "cast", str(step))
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
