"""Fetches leaves along their routes: reads the next part while the last one is exchanged between the processes."""

from __future__ import annotations

import concurrent.futures
import functools
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from ckpt_jax.job.threads import Worker
from ckpt_jax.job.waits import Together
from ckpt_jax.layout.encoding import is_prng_key
from ckpt_jax.layout.placing import Unplaced, place
from ckpt_jax.restore import exchange
from ckpt_jax.restore.leaf import LeafPlan
from ckpt_jax.restore.strategies import NOT_HERE, Route, Whole

_LEAST_PART = 16 * 2**20
_PARTS = 8
Part = Sequence[Route]  # leaves that are read and exchanged together
Arrived = Callable[[str, Any], None]
Read = Callable[[Sequence[tuple[LeafPlan, Any]], Arrived | None], dict[str, Any]]


def fetch(
  routes: Sequence[Route],
  read: Read,
  together: Together,
  bound: int,
  deliver: Callable[[LeafPlan, Any], None],
  arrived: Arrived | None = None,
) -> float:
  """Reads all leaves, and returns the seconds until all processes had read. All processes call it alike.

  Args:
    routes: one for each leaf.
    read: `Step.read`; called from one thread at a time.
    together: waits, and agrees on errors.
    bound: bytes of leaves that may be under way beside the state itself; one leaf that is larger goes alone.
    deliver: given each plan and its value, in the stored form and where the plan wants it.
    arrived: given path and value of each leaf that is not exchanged, before `deliver`, on the reading thread.
  """
  started = time.perf_counter()
  read_s = 0.0
  parts = divide(routes, bound)
  reading, exchanging = Worker("ckpt_jax-read"), Worker("ckpt_jax-exchange")
  try:
    ahead = reading.submit(functools.partial(_read, parts[0], read, arrived))
    exchanging.submit(functools.partial(_compile, parts[0]))
    under_way: concurrent.futures.Future[list[tuple[LeafPlan, Any]]] | None = None
    for i, (part, following) in enumerate(itertools.pairwise([*parts, ()]), 1):
      what = f"part {i} of {len(parts)}"
      values, error = _outcome(together, f"storage to read {what}", ahead)
      if under_way is not None:
        _deliver(together.wait(f"the exchange of part {i - 1} of {len(parts)}", under_way), deliver)
      # Not before the last part has arrived: two parts at a time are in memory, not three.
      ahead = reading.submit(functools.partial(_read, following, read, arrived))
      if error is not None or moves(part) or i == len(parts):
        together.meet(f"all processes to read {what}", error)
        together.step_done()
        read_s = time.perf_counter() - started
      under_way = exchanging.submit(functools.partial(_exchange, part, values))
      exchanging.submit(functools.partial(_compile, following))
    assert under_way is not None
    _deliver(together.wait("the last exchange", under_way), deliver)
  finally:
    reading.close()
    exchanging.close()
  return read_s


def divide(routes: Sequence[Route], bound: int) -> list[Part]:
  """Parts of similar size, those that go between processes first; the same on all processes."""
  size = max(1, min(max(sum(r.plan.nbytes for r in routes) // _PARTS, _LEAST_PART), bound))
  # Leaves that share a program stay together, and the largest go first.
  moved = sorted(
    (r for r in routes if r.moves),
    key=lambda r: (type(r).__name__, -r.plan.nbytes, str(r.plan.dtype), r.plan.shape),
  )
  parts: list[list[Route]] = []
  nbytes = 0
  for route in moved:
    if not parts or nbytes + route.plan.nbytes > size:
      parts.append([])
      nbytes = 0
    parts[-1].append(route)
    nbytes += route.plan.nbytes
  direct = [r for r in routes if not r.moves]
  return [*parts, direct] if direct or not parts else [*parts]


def moves(part: Part) -> bool:
  """Whether anything of it goes between processes."""
  return any(r.moves for r in part)


def _outcome(
  together: Together, what: str, future: concurrent.futures.Future[dict[str, Any]]
) -> tuple[dict[str, Any], BaseException | None]:
  try:
    return together.wait(what, future), None
  except Exception as e:
    if not future.done():
      raise  # the wait itself failed, and the other processes know
    return {}, e


def _deliver(values: list[tuple[LeafPlan, Any]], deliver: Callable[[LeafPlan, Any], None]) -> None:
  while values:
    deliver(*values.pop())


# -- on the reading thread


def _read(part: Part, read: Read, arrived: Arrived | None) -> dict[str, Any]:
  """What this process reads of a part."""
  wanted = [(route.plan, where) for route in part if (where := route.reads_into()) is not NOT_HERE]
  values = read(wanted, None if moves(part) else arrived)
  for route in part:
    value: Any = values.get(route.plan.name)
    if route.moves and is_prng_key(value):
      values[route.plan.name] = jax.random.key_data(value)
  jax.block_until_ready([v for v in values.values() if isinstance(v, jax.Array)])
  return values


# -- on the exchanging thread


def _compile(part: Part) -> None:
  for route in part:
    if (program := route.program()) is not None:
      program.compile()


def _exchange(part: Part, values: dict[str, Any]) -> list[tuple[LeafPlan, Any]]:
  out = [(r.plan, r.move(values.pop(r.plan.name, None))) for r in part if not isinstance(r, Whole)]
  if whole := [r for r in part if isinstance(r, Whole)]:
    out += _exchange_whole(whole, values)
  jax.block_until_ready([v for _, v in out if isinstance(v, jax.Array)])
  return out


def _exchange_whole(routes: Sequence[Whole], values: dict[str, Any]) -> list[tuple[LeafPlan, Any]]:
  by_owner = [[r.plan for r in routes if r.owner == p] for p in range(jax.process_count())]
  mine = [
    np.ascontiguousarray(np.asarray(values.pop(plan.name))).reshape(-1).view(np.uint8)
    for plan in by_owner[jax.process_index()]
  ]
  received = exchange.exchange_bytes(mine, [[plan.nbytes for plan in owned] for owned in by_owner])
  plans = [plan for owned in by_owner for plan in owned]
  unplaced = []
  for plan, piece in zip(plans, itertools.chain(*received), strict=True):
    assert plan.sharding is not None
    unplaced.append(Unplaced.whole(piece.view(np.dtype(plan.dtype)).reshape(plan.shape), plan.sharding))
  # jax copies them, so that a small leaf does not keep what came with it in memory.
  return list(zip(plans, place(unplaced), strict=True))
