"""The plan of a Checkpointer: made when it first sees a state, from quick measurements, alike on all processes."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from ckpt_jax.config import Config
from ckpt_jax.layout.structure import Flat, flatten
from ckpt_jax.storage.kinds import StorageKind
from ckpt_jax.storage.probe import StorageProfile, quick_probe
from ckpt_jax.tuning.assumed import is_assumed
from ckpt_jax.tuning.choices import Facts, nbytes_text, seconds_text
from ckpt_jax.tuning.plan import Plan, decide, known_profile
from ckpt_jax.tuning.profile import StateProfile, profile_host, profile_state, sample_state

_log = logging.getLogger(__name__)
PyTree = Any
# Smaller states are saved in less time than measuring takes.
_WORTH_MEASURING_NBYTES = 32 << 20
# Of how many leaves the sharding is looked at to see that a state is the one planned for.
_COMPARED_LEAVES = 64


class Planner:
  """Plans for the states that one Checkpointer saves and restores. All processes call it at the same points.

  Measures under a second in all, once for a host and its storage (the results are remembered on disk), and nothing for
  states below 32 MiB. Values are sampled again at the 2nd, 4th, 8th ... save: optimizer moments are zeros at first, and
  compress as they never will again.

  Attributes:
    plan: the one in force; None before the first save or restore.
  """

  def __init__(
    self,
    directory: str | os.PathLike[str],
    config: Config,
    kind: StorageKind,
    agree: Callable[[Sequence[int]], list[int]],
  ):
    """Measures nothing yet.

    Args:
      directory: the run.
      config: the user's settings, which win.
      kind: what the run lies on.
      agree: gives process 0's numbers to all processes.
    """
    self.plan: Plan | None = None
    self._directory = directory
    self._user = config
    self._kind = kind
    self._agree = agree
    self._planned_for: Any = None
    self._saves = 0

  @property
  def config(self) -> Config:
    """The settings in force: the user's, with the plan's where those say `auto`."""
    return self.unplanned if self.plan is None else self.plan.apply(self._user)

  @property
  def unplanned(self) -> Config:
    """The user's settings, with those that cannot stay `auto`."""
    timeouts = self._user.timeouts
    known = timeouts.model_copy(update={"save": timeouts.save_s, "restore": timeouts.restore_s})
    return self._user.model_copy(update={"timeouts": known})

  def for_save(self, state: PyTree | Flat) -> Config:
    """The settings to save `state` with."""
    self._saves += 1
    flat = flatten(state)
    again = self._saves & (self._saves - 1) == 0
    signature = _signature(flat)
    sample = self._user.layout.compression == "auto"
    if signature != self._planned_for or (again and sample and signature[1] >= _WORTH_MEASURING_NBYTES):
      self._make(flat.tree, signature, sample=sample)
      self._planned_for = signature
    return self.config

  def for_restore(self, like: PyTree | None) -> Config:
    """The settings to restore with; without `like` nothing is known of the sizes, and the user's are taken."""
    if like is None:
      return self.unplanned
    if self.plan is None or _signature(like) != self._planned_for:
      before, planned_for = self.plan, self._planned_for
      self._make(like, _signature(like), sample=False)
      config = self.config
      if planned_for is not None:  # the plan of the saves stays in force
        self.plan = before
      return config
    return self.config

  def _make(self, state: PyTree, signature: Any, *, sample: bool) -> None:
    started = time.perf_counter()
    plan = None
    if jax.process_index() == 0:
      known = self.plan.state if self.plan is not None and signature == self._planned_for else None
      plan = self._decide(state, known, sample and signature[1] >= _WORTH_MEASURING_NBYTES, signature[1])
    if jax.process_count() > 1:
      # One process's plan for all: a step has one layout.
      sent = self._agree(list(json.dumps(plan.to_dict()).encode()) if plan else [])
      plan = plan or (Plan.from_dict(json.loads(bytes(sent))) if sent else None)
    if plan is None:
      return  # told below; what was in force stays
    if self.plan is not None and signature == self._planned_for:
      # The same state sampled again: a timeout that moves with the expectation is not worth another manager.
      before = {c.key: c for c in self.plan.choices}
      kept = tuple(before[c.key] if c.key.startswith("timeouts.") else c for c in plan.choices)
      plan = dataclasses.replace(plan, choices=kept)
    changed = self.plan is None or plan.values != self.plan.values
    self.plan = plan
    if changed:
      chosen = ", ".join(f"{c.key.split('.')[-1]} {c.text}" for c in plan.choices if c.is_setting and c.value != "auto")
      _log.info(
        "%s: plan for %s in %d arrays, made in %.2f s: %s; expected: save blocks %s, commits in %s, restore %s "
        "(Checkpointer.plan.explain() gives the reasons)",
        self._directory,
        nbytes_text(plan.state.nbytes),
        plan.state.leaves,
        time.perf_counter() - started,
        chosen,
        *map(seconds_text, (plan.blocking_s, plan.commit_s, plan.restore_s)),
      )

  def _decide(self, state: PyTree, known: StateProfile | None, sample: bool, nbytes: int) -> Plan | None:
    try:
      profile = known or profile_state(state, sample=False)
      if sample:
        profile = dataclasses.replace(profile, compressibility=sample_state(state))
      return decide(Facts(profile, self._storage(nbytes), profile_host(), self._user))
    except Exception as e:  # a plan is worth less than the checkpoint that waits for it
      _log.warning(
        "%s: no plan (%s: %s); the settings are the user's and Orbax's", self._directory, type(e).__name__, e
      )
      return None

  def _storage(self, nbytes: int) -> StorageProfile:
    storage = known_profile(self._directory, self._kind)
    if is_assumed(storage) and nbytes >= _WORTH_MEASURING_NBYTES:
      try:
        storage = dataclasses.replace(quick_probe(self._directory), kind=self._kind)
      except Exception as e:  # no room, no permission: the run itself will say so, if it is its business
        _log.info("%s: not measured (%s); planned for a usual %s", self._directory, e, self._kind)
    return storage


def _signature(state: PyTree | Flat) -> tuple[Any, ...]:
  """What a plan depends on, of a state's structure."""
  flat = flatten(state)
  return flat.structure.once(_signature_of, flat.leaves)


def _signature_of(leaves: Sequence[Any]) -> tuple[Any, ...]:
  arrays = [x for x in leaves if hasattr(x, "dtype") and hasattr(x, "shape")]
  stride = max(1, len(arrays) // _COMPARED_LEAVES)
  shardings = tuple((x.shape, getattr(x, "sharding", None)) for x in arrays[::stride])
  return len(arrays), sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays), shardings
