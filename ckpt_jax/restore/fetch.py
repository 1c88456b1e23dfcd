"""Fetches leaves along their routes: reads the next part while the last one is exchanged between the processes."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import NamedSharding, Sharding

from ckpt_jax.job.waits import Together, Worker
from ckpt_jax.layout.encoding import is_prng_key
from ckpt_jax.layout.memory import to_be_copied
from ckpt_jax.restore import exchange
from ckpt_jax.restore.leaf import LeafPlan
from ckpt_jax.restore.routes import DIRECT, REPLICA, SPREAD, WHOLE, Route, primary_mesh, process_grid

_log = logging.getLogger(__name__)
_LEAST_PART = 16 * 2**20
_PARTS = 8
Arrived = Callable[[str, Any], None]


class Reads(Protocol):
  """What `read.Reader` does: the stored values of leaves, each where it shall lie, by path."""

  def read(
    self, wanted: Sequence[tuple[LeafPlan, Sharding | None]], arrived: Arrived | None = None
  ) -> dict[str, Any]: ...


@dataclasses.dataclass(frozen=True)
class Part:
  """Leaves that are read and exchanged together."""

  routes: tuple[Route, ...]

  @property
  def exchanges(self) -> bool:
    """Whether anything of it goes between processes."""
    return any(r.way != DIRECT for r in self.routes)


def fetch(
  routes: Sequence[Route],
  reader: Reads,
  together: Together,
  bound: int,
  deliver: Callable[[LeafPlan, Any], None],
  arrived: Arrived | None = None,
) -> float:
  """Reads all leaves, and returns the seconds until all processes had read. All processes call it alike.

  Args:
    routes: one a leaf.
    reader: reads from storage; used from one thread at a time.
    together: waits, and agrees on errors.
    bound: bytes of leaves that may be under way beside the state itself; one leaf that is larger goes alone.
    deliver: given each plan and its value, in the stored form and where the plan wants it.
    arrived: told before, on the reading thread, of those leaves that are not exchanged: path and what was read.
  """
  started = time.perf_counter()
  read_s = 0.0
  parts = divide(routes, bound)
  reading, exchanging = Worker("ckpt_jax-read"), Worker("ckpt_jax-exchange")
  try:
    ahead = reading.submit(functools.partial(_read, parts[0], reader, arrived)) if parts else None
    under_way: concurrent.futures.Future[list[tuple[LeafPlan, Any]]] | None = None
    if parts and parts[0].exchanges:
      exchanging.submit(functools.partial(_compile, parts[0]))
    for i, part in enumerate(parts):
      assert ahead is not None
      what = f"part {i + 1} of {len(parts)}"
      values, error = _outcome(together, f"storage to read {what}", ahead)
      if under_way is not None:
        _deliver(together.wait(f"the exchange of part {i} of {len(parts)}", under_way), deliver)
      if i + 1 < len(parts):
        # Not before the last part has arrived: two parts at a time are in memory, not three.
        ahead = reading.submit(functools.partial(_read, parts[i + 1], reader, arrived))
      if error is not None or part.exchanges or i + 1 == len(parts):
        together.meet(f"all processes to read {what}", error)
        together.step_done()
        read_s = time.perf_counter() - started
      under_way = exchanging.submit(functools.partial(_exchange, part, values))
      if i + 1 < len(parts) and parts[i + 1].exchanges:
        exchanging.submit(functools.partial(_compile, parts[i + 1]))
    if under_way is not None:
      _deliver(together.wait("the last exchange", under_way), deliver)
  finally:
    reading.close()
    exchanging.close()
  return read_s


def divide(routes: Sequence[Route], bound: int) -> list[Part]:
  """Parts of similar size, those that go between processes first; the same on all processes."""
  total = sum(r.plan.nbytes for r in routes)
  size = max(1, min(max(total // _PARTS, _LEAST_PART), bound))
  moved = [r for r in routes if r.way != DIRECT]
  # Leaves that share a program stay together, and the largest go first.
  moved.sort(key=lambda r: (r.way, -r.plan.nbytes, str(r.plan.dtype), r.plan.shape))
  parts: list[Part] = []
  current: list[Route] = []
  nbytes = 0
  for route in moved:
    if current and nbytes + route.plan.nbytes > size:
      parts.append(Part(tuple(current)))
      current, nbytes = [], 0
    current.append(route)
    nbytes += route.plan.nbytes
  if current:
    parts.append(Part(tuple(current)))
  direct = tuple(r for r in routes if r.way == DIRECT)
  return [*parts, Part(direct)] if direct or not parts else parts


def _outcome(
  together: Together, what: str, future: concurrent.futures.Future[dict[str, Any]]
) -> tuple[dict[str, Any], BaseException | None]:
  try:
    return together.wait(what, future), None
  except Exception as e:
    if not future.done():
      raise  # the wait itself failed, and has told the others
    return {}, e


def _deliver(values: list[tuple[LeafPlan, Any]], deliver: Callable[[LeafPlan, Any], None]) -> None:
  while values:
    deliver(*values.pop())


# -- on the reading thread


def _read(part: Part, reader: Reads, arrived: Arrived | None) -> dict[str, Any]:
  """What this process reads of a part."""
  wanted = [(route.plan, where) for route in part.routes if (where := _reads_into(route)) is not _NOT_HERE]
  values = reader.read(wanted, None if part.exchanges else arrived)
  for route in part.routes:
    value: Any = values.get(route.plan.name)
    if route.way != DIRECT and is_prng_key(value):
      values[route.plan.name] = jax.random.key_data(value)
  jax.block_until_ready([v for v in values.values() if isinstance(v, jax.Array)])
  return values


_NOT_HERE: Any = object()


def _reads_into(route: Route) -> Sharding | None:
  plan = route.plan
  if route.way == DIRECT:
    return plan.sharding
  if route.way == WHOLE:
    return None if route.owner == jax.process_index() else _NOT_HERE
  target = plan.sharding
  assert isinstance(target, NamedSharding)
  if route.way == SPREAD:
    assert route.spec is not None
    return NamedSharding(exchange.plain_mesh(target.mesh), route.spec)
  here = jax.process_index() in process_grid(primary_mesh(target))
  return exchange.on_primary(target) if here else _NOT_HERE


# -- on the exchanging thread


def _compile(part: Part) -> None:
  for route in part.routes:
    target = route.plan.sharding
    if route.way == SPREAD:
      exchange.spread_program(route.plan.shape, route.plan.dtype, target, route.spec)  # type: ignore[arg-type]
    elif route.way == REPLICA:
      exchange.replica_program(route.plan.shape, route.plan.dtype, target)  # type: ignore[arg-type]


def _exchange(part: Part, values: dict[str, Any]) -> list[tuple[LeafPlan, Any]]:
  out: list[tuple[LeafPlan, Any]] = []
  whole = [r for r in part.routes if r.way == WHOLE]
  for route in part.routes:
    plan = route.plan
    if route.way == WHOLE:
      continue
    value = values.pop(plan.name, None)
    if route.way == SPREAD:
      value = exchange.spread(value, plan.sharding, route.spec)  # type: ignore[arg-type]
    elif route.way == REPLICA:
      value = exchange.replicate(plan.shape, plan.dtype, plan.sharding, value)  # type: ignore[arg-type]
    out.append((plan, value))
  if whole:
    out += _exchange_whole(whole, values)
  jax.block_until_ready([v for _, v in out if isinstance(v, jax.Array)])
  return out


def _exchange_whole(routes: Sequence[Route], values: dict[str, Any]) -> list[tuple[LeafPlan, Any]]:
  by_owner = [[r for r in routes if r.owner == p] for p in range(jax.process_count())]
  mine = []
  for route in by_owner[jax.process_index()]:
    array = np.ascontiguousarray(np.asarray(values.pop(route.plan.name)))
    mine.append(array.reshape(-1).view(np.uint8))
  received = exchange.exchange_bytes(mine, [[r.plan.nbytes for r in owned] for owned in by_owner])
  out = []
  for owned, pieces in zip(by_owner, received, strict=True):
    for route, piece in zip(owned, pieces, strict=True):
      plan = route.plan
      # jax copies it, so that a small leaf does not keep what came with it in memory.
      array = piece.view(np.dtype(plan.dtype)).reshape(plan.shape)
      out.append((plan, _put(array, plan.sharding)))
  return out


def _put(array: np.ndarray, sharding: Sharding | None) -> jax.Array:
  assert sharding is not None
  return jax.make_array_from_callback(array.shape, sharding, lambda index: to_be_copied(array[index]))
