"""Reads the state of a committed step: finds its leaves, matches them with `like`, and has a strategy fetch them.

`read_state` is the only entry. Whoever wants to look at the bytes as they come (fingerprints) passes `check`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import NamedSharding, Sharding

from ckpt_jax.config import Config
from ckpt_jax.config.arguments import check_request
from ckpt_jax.errors import CheckpointError, ConfigError, CorruptCheckpointError, StorageError, StructureMismatchError
from ckpt_jax.failures import is_damage, is_unreachable, root_cause
from ckpt_jax.integrity.fingerprint import label
from ckpt_jax.job.rendezvous import Rendezvous
from ckpt_jax.job.waits import Together, Worker
from ckpt_jax.layout import aggregate, contents, direct
from ckpt_jax.layout.forms import shared_names
from ckpt_jax.layout.handler import pytree_handler
from ckpt_jax.layout.keys import database_name
from ckpt_jax.layout.structure import path_name
from ckpt_jax.restore.exchange import compile_seconds, is_compiled
from ckpt_jax.restore.fetch import fetch
from ckpt_jax.restore.initial import Initialise, initial_value, initialisers, patterns_inside
from ckpt_jax.restore.item import item_to_read
from ckpt_jax.restore.leaf import AS_SAVED, LeafPlan, check_stored, finish_arrays, make_plan
from ckpt_jax.restore.match import castable, match
from ckpt_jax.restore.patterns import as_patterns, matches, rebuild, selected
from ckpt_jax.restore.routes import Route, plan_routes, totals
from ckpt_jax.restore.strategy import (
  STRATEGIES,
  Choice,
  choose,
  known_network,
  measure_network,
  remember_network,
  see_readers,
  seen_readers,
  speeds,
  worth_exchanging,
)
from ckpt_jax.run.steps import THINNED, newest_resumable, our_item, our_metadata
from ckpt_jax.storage.kinds import StorageKind
from ckpt_jax.tuning.plan import known_profile
from ckpt_jax.tuning.profile import available_memory

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Request:
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
class Read:
  """What was read.

  Attributes:
    state: the tree.
    casts: `{path: (saved dtype, dtype now)}` of the leaves that were cast.
    initialised: paths of the leaves that the step lacks.
    choice: the strategy, why, and what each was expected to take.
  """

  state: PyTree
  casts: dict[str, tuple[str, str]]
  initialised: tuple[str, ...]
  choice: Choice


@dataclasses.dataclass(frozen=True)
class _Planned:
  """What to read, what is there already, what is cast, and what makes a tree of it all."""

  plans: list[LeafPlan]
  kept: dict[str, Any]
  casts: dict[str, tuple[str, str]]
  assemble: Callable[[dict[str, Any]], PyTree]


def read_state(
  step_dir: epath.Path,
  config: Config,
  request: Request,
  together: Together | None = None,
  *,
  strategy: str = "direct",
  check: Callable[[str, Any], None] | None = None,
) -> Read:
  """The state of a step. All processes of the job call it alike, and an error on one is raised on all.

  Args:
    step_dir: a committed step.
    config: the settings.
    request: what is wanted.
    together: the waits of this restore; default: its own.
    strategy: `direct`, `gather`, `broadcast` or `auto`.
    check: called with path and value of each leaf as it is delivered; one that is cast, as it was before.

  Raises:
    StructureMismatchError: listing every difference between `like` and the step; nothing was read.
    CorruptCheckpointError: if the step cannot be read.
    RestoreTimeoutError: naming what was waited for, and the processes that did not come.
  """
  together = together or Together(Rendezvous(f"read {step_dir}"), config.timeouts.restore_s)
  error: BaseException | None = None
  planned: _Planned | None = None
  try:
    step = Step(step_dir, config, item_to_read(step_dir, config, request.item, request.like))
    planned = _plan(step, request)
  except Exception as e:
    error = e
  together.meet("all processes to compare like= with the step", error)
  assert planned is not None
  choice, routes = _choose(planned.plans, strategy, step_dir, config, together)
  values: dict[str, Any] = dict(planned.kept)
  as_stored = {p.name for p in planned.plans if p.note is None and p.cast is None}
  early: dict[str, Any] = {}

  def arrived(name: str, value: Any) -> None:
    # Most leaves are delivered as they are read: they are looked at beside the reading of the others.
    if check is not None and name in as_stored:
      check(name, value)
      early[name] = value

  def deliver(plan: LeafPlan, value: Any) -> None:
    check_stored(plan, value)
    saved = plan.decode(value)
    delivered = values[plan.name] = plan.convert(saved)
    if check is not None and early.pop(plan.name, None) is not delivered:
      # What is delivered, unless it is of another type: a number that became an array, a dtype that was cast.
      check(plan.name, delivered if label(delivered) == label(saved) else saved)

  error = None
  try:
    read_s = fetch(routes, Reader(step, config), together, _bound(config), deliver, arrived)
    if jax.process_index() == 0:
      see_readers(str(step_dir), jax.process_count(), totals(routes).read_nbytes, read_s)
  except Exception as e:
    error = e
  if error is not None and together.told(error):
    raise error
  together.meet("all processes to finish reading", error)
  finish_arrays(planned.plans, values)
  return Read(planned.assemble(values), planned.casts, tuple(planned.kept), choice)


def _bound(config: Config) -> int:
  """Bytes of leaves that may be under way beside the state."""
  limit = config.limits.host_memory
  return limit // 4 if isinstance(limit, int) else max(2**24, min(2**29, available_memory() // 8))


def _choose(
  plans: list[LeafPlan], strategy: str, step_dir: epath.Path, config: Config, together: Together
) -> tuple[Choice, list[Route]]:
  """The strategy, which process 0 decides for all, and the routes that follow."""
  processes = jax.process_count()
  if processes == 1:
    why = "one process reads everything once" if strategy == "auto" else "asked for"
    return Choice("direct" if strategy == "auto" else strategy, why, {}), plan_routes(plans, "direct")
  routes = {name: plan_routes(plans, name, processes) for name in STRATEGIES}
  if strategy == "direct":
    return Choice("direct", "asked for", {}), routes["direct"]
  costs = {name: totals(r) for name, r in routes.items()}
  nbytes = float(sum(p.nbytes for p in plans))
  speed = None
  if jax.process_index() == 0:
    kind = None if config.storage.kind == "auto" else StorageKind(config.storage.kind)
    speed = speeds(known_profile(str(step_dir), kind), known_network(), seen_readers(str(step_dir)))
  measure = speed is not None and speed.network is None and worth_exchanging(costs, nbytes, speed)
  if together.meet("process 0 to see whether to measure the network", text="measure" if measure else "")[0]:
    worker = Worker("ckpt_jax-network")
    try:
      network = together.wait("a measurement of the network", worker.submit(measure_network))
    finally:
      worker.close()
    remember_network(network)
    if speed is not None:
      speed = dataclasses.replace(speed, network=network)
  text = ""
  if speed is not None:
    compile_s = {name: _compile_seconds(r) for name, r in routes.items()}
    choice = choose(costs, nbytes, speed, compile_s, processes)
    if strategy != "auto":
      choice = Choice(strategy, "asked for", choice.predicted)
    text = json.dumps(dataclasses.asdict(choice))
  choice = Choice(**json.loads(together.meet("process 0 to choose a strategy", text=text)[0]))
  together.expected_s = choice.predicted[choice.strategy]
  return choice, routes[choice.strategy]


def _compile_seconds(routes: list[Route]) -> float:
  """What is left to compile for the routes."""
  left = set()
  for r in routes:
    target = r.plan.sharding
    if r.way in ("spread", "replica") and isinstance(target, NamedSharding):
      left.add((r.plan.shape, str(r.plan.dtype), target, r.spec))
  return sum(not is_compiled(*program) for program in left) * compile_seconds()


class Step:
  """A step's item, as Orbax describes it, with its arrays open for a restore within the limits of `config`."""

  def __init__(self, step_dir: epath.Path, config: Config, item: str | None = None):
    self.name = str(step_dir)
    ours = our_metadata(step_dir)
    name = contents.item_name(step_dir, item, ours)
    self.item_dir = step_dir / name
    self.item = contents.describe_item(self.item_dir, config)
    self.notes: dict[str, Any] = contents.encoded_leaves(ours, name)
    weak = ours.get("weak") if our_item(ours) == name else None
    self._weak: frozenset[str] | None = None if weak is None else frozenset(weak)
    self.thinned: list[str] | None = (ours.get(THINNED) or {}).get("keep")
    leaves, structure = jax.tree_util.tree_flatten_with_path(self.item.tree)
    self.treedef: Any = structure  # jax's stubs do not know its methods
    self.paths = {path_name(path): path for path, _ in leaves}
    _refuse_shared(self.paths, leaves, self.name)
    self.meta: dict[str, Any] = dict(zip(self.paths, (meta for _, meta in leaves), strict=True))
    self.infos = {info.path: info for info in contents.leaf_infos(self.item.tree, self.notes)}

  def plan(self, name: str, like: Any, casts: Mapping[str, tuple[str, str]]) -> LeafPlan:
    """How to read a leaf, given the one wanted and, of those whose dtype changes, the old and the new one."""
    weak = None if self._weak is None else name in self._weak
    return make_plan(name, self.meta[name], self.notes.get(name), like, casts[name][1] if name in casts else None, weak)


class Reader:
  """Reads leaves of one item through Orbax's handler, as many calls as one likes, from any thread.

  It does not go through `ocp.Checkpointer`, whose restore ends in a barrier that waits for ever for a process that
  failed, and each process may ask for leaves of its own.
  """

  def __init__(self, step: Step, config: Config):
    self._step = step
    self._config = config

  def read(
    self, wanted: Sequence[tuple[LeafPlan, Sharding | None]], arrived: Callable[[str, Any], None] | None = None
  ) -> dict[str, Any]:
    """The stored values of leaves, by path.

    Args:
      wanted: which, and where each shall lie: see `LeafPlan.request`.
      arrived: told of arrays as they come, by path, before the others are there.

    Raises:
      StorageError: if storage does not answer.
      CorruptCheckpointError: if it holds something else than its metadata says.
      CheckpointError: for whatever says nothing about the step, which then stays where it is.
    """
    step = self._step
    here = [(plan, sharding) for plan, sharding in wanted if plan.name in step.item.values]
    if here:
      found = {p.name: aggregate.as_asked(step.item.values[p.name], p.scalar, sharding) for p, sharding in here}
      return found | self.read([w for w in wanted if w[0].name not in found], arrived)
    if not wanted:
      return {}
    try:
      return self._read_tree(wanted, arrived) if step.item.info is None else self._read_directly(wanted, arrived)
    except (MemoryError, CheckpointError):
      raise
    except Exception as e:
      if "more bytes than we reserved" in str(e):
        raise ConfigError(f"{step.item_dir}: {root_cause(e)}") from e
      if is_unreachable(e):
        raise StorageError(f"{step.item_dir}: {root_cause(e)}") from e
      if is_damage(e):
        raise CorruptCheckpointError(f"{step.item_dir}: cannot be read: {root_cause(e)}") from e
      raise CheckpointError(f"{step.item_dir}: cannot be read: {type(e).__name__}: {root_cause(e)}") from e

  def _read_directly(self, wanted: Sequence[tuple[LeafPlan, Sharding | None]], arrived: Any) -> dict[str, Any]:
    step, item = self._step, self._step.item
    rows = {}
    for plan, sharding in wanted:
      keys = step.paths[plan.name]
      args = functools.partial(plan.restore_args, sharding)
      rows[database_name(keys)] = direct.Wanted(plan.name, keys, sharding, args)
    found = direct.read(item.info, rows, item.index, item.stores, self._config, arrived)
    return {plan.name: found[name] for (plan, _), name in zip(wanted, rows, strict=True)}

  def _read_tree(self, wanted: Sequence[tuple[LeafPlan, Sharding | None]], arrived: Any) -> dict[str, Any]:
    step = self._step
    nothing = (ocp.PLACEHOLDER, ocp.RestoreArgs())
    requests = {plan.name: plan.request(sharding) for plan, sharding in wanted}
    pairs = [requests.get(name, nothing) for name in step.meta]
    item = step.treedef.unflatten([item for item, _ in pairs])
    args = step.treedef.unflatten([args for _, args in pairs])
    handler = pytree_handler(self._config, arrived=arrived)
    read = handler.restore(step.item_dir, args=ocp.args.PyTreeRestore(item=item, restore_args=args))
    values = step.treedef.flatten_up_to(read)
    return {name: value for name, value in zip(step.meta, values, strict=True) if name in requests}


def _refuse_shared(by_name: Collection[str], leaves: Sequence[tuple[tuple[Any, ...], Any]], where: str) -> None:
  """Leaves are found by their names: `{"a": {"b": 1}, "a/b": 2}` has two of one name, which `save` refuses."""
  if len(by_name) < len(leaves):
    paths = [path for path, _ in leaves]
    shared = "\n  ".join(shared_names(paths, [path_name(path) for path in paths]))
    raise StructureMismatchError(f"{where}: some leaves have a name in common; nothing was read:\n  {shared}")


# -- what is wanted


def _plan(step: Step, request: Request) -> _Planned:
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
    plans = [step.plan(name, AS_SAVED, casts) for name in infos]
    return _Planned(plans, {}, casts, lambda values: rebuild(step.item.tree, values))
  initialise, patterns = initialisers(request.init_missing)
  like, prefix = _by_path(request.like, only, infos)
  chosen = like
  if only is not None:
    chosen = {n: leaf for n, leaf in like.items() if any(matches(p, n) for p in only)}
  inside, outside = patterns_inside(patterns, chosen, like)
  _refuse_thinned(step, {n for n in chosen if n not in infos and not any(matches(p, n) for p in inside)})
  found = match(chosen, infos, step.name, init_missing=inside, cast=cast, initial=request.initial)
  kept = {name: initial_value(name, leaf, initialise) for name, leaf in (found.kept | outside).items()}
  plans = [step.plan(name, leaf, found.casts) for name, leaf in found.both.items()]
  tree = request.like

  def assemble(values: dict[str, Any]) -> PyTree:
    return rebuild(tree, {name.removeprefix(prefix): value for name, value in values.items()})

  return _Planned(plans, kept, found.casts, assemble)


def _refuse_thinned(step: Step, missing: set[str]) -> None:
  """One sentence in place of a list of all the leaves that a thinned step has lost."""
  if step.thinned is None or not missing:
    return
  directory = epath.Path(step.name)
  newest = newest_resumable(directory.parent)
  resume = "no step of this run can" if newest is None else f"the newest that can is step {newest}"
  kept = ", ".join(step.thinned)
  raise StructureMismatchError(
    f"{directory}: this step was thinned (retention.thin): it holds {kept} alone, and training cannot go on from it; "
    f'{resume}. To read what is there pass only="{step.thinned[0]}", or a like= of {kept} alone; init_missing= makes '
    "the rest anew"
  )


def _by_path(
  like: PyTree, only: tuple[str, ...] | None, infos: Mapping[str, contents.LeafInfo]
) -> tuple[dict[str, Any], str]:
  """The leaves of `like` by their path in the checkpoint, and the prefix that was put before them.

  With `only="params"`, `like` may be a whole state, `{"params": ...}`, or what lies below params.
  """
  found = jax.tree_util.tree_flatten_with_path(like)[0]
  leaves = {path_name(path): leaf for path, leaf in found}
  _refuse_shared(leaves, found, "like=")
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
  step: Step, infos: Mapping[str, contents.LeafInfo], cast: bool | Mapping[str, Any]
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
