"""The plan of a Checkpointer: made from quick measurements when it first sees a state, the same on all processes."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from ckpt_jax.config import Config
from ckpt_jax.job.threads import Worker
from ckpt_jax.layout.structure import Flat, flatten
from ckpt_jax.storage.kinds import StorageKind
from ckpt_jax.storage.probe import StorageProfile, quick_probe
from ckpt_jax.tuning.assumed import is_assumed
from ckpt_jax.tuning.choices import Facts
from ckpt_jax.tuning.plan import NoPlan, Plan, decide, known_profile
from ckpt_jax.tuning.profile import profile_host, profile_state
from ckpt_jax.tuning.sampling import Kind, measure_kinds, sample_kinds, take_sample

_log = logging.getLogger(__name__)
PyTree = Any
# Smaller states are saved in less time than measuring takes.
_WORTH_MEASURING_NBYTES = 32 << 20
# How many leaves' shardings are compared to recognize the state that was planned for.
_COMPARED_LEAVES = 64
# What a plan depends on in a state's structure: array leaves, bytes, some shapes and shardings.
_Signature = tuple[int, int, tuple[Any, ...]]
_Sampled = concurrent.futures.Future[tuple[Kind, ...]]
_Kinds = Callable[[], tuple[Kind, ...]]
_SAMPLE_S = 10.0  # the most that a save waits for the sample of the one before, on a busy machine


class Planner:
  """Plans for the states that one Checkpointer saves and restores. All processes call it at the same points.

  It measures for under a second in all, once for a host and its storage (results are kept on disk), and not at all for
  states below 32 MiB. Values are sampled again at the 2nd, 4th, 8th ... save: optimizer moments are zeros at first and
  compress as they never will again. Those samples are compressed behind training, and the next save goes by them.

  Attributes:
    plan: the one in force; None before the first save or restore.
    no_plan: what is known while there is none.
  """

  def __init__(
    self,
    directory: str | os.PathLike[str],
    config: Config,
    kind: StorageKind,
    agree: Callable[[Callable[[], Any]], Any],
  ):
    """Measures nothing yet.

    Args:
      directory: the run.
      config: the user's settings, which win.
      kind: the storage of the run.
      agree: gives process 0's numbers to all processes.
    """
    self.plan: Plan | None = None
    self.no_plan = NoPlan(config)
    self._directory = directory
    self._user = config
    self._kind = kind
    self._agree = agree
    self._planned_for: _Signature | None = None
    self._saves = 0
    self._sampled: _Sampled | None = None  # what the next save goes by

  @property
  def config(self) -> Config:
    """The settings in force: the user's, with the plan's in place of `auto`."""
    return self.unplanned if self.plan is None else self.plan.apply(self._user)

  @property
  def unplanned(self) -> Config:
    """The user's settings, with values for those that cannot stay `auto`."""
    timeouts = self._user.timeouts
    return self._user.changed({"timeouts.save": timeouts.save_s, "timeouts.restore": timeouts.restore_s})

  def for_save(self, state: PyTree | Flat) -> Config:
    """The settings to save `state` with."""
    self._saves += 1
    flat = flatten(state)
    signature = _signature(flat)
    sample = self._user.layout.compression == "auto" and signature[1] >= _WORTH_MEASURING_NBYTES
    sampled, self._sampled = self._sampled, None
    if signature != self._planned_for:
      self.plan = self._make(flat, signature, lambda: sample_kinds(flat) if sample else ())
      self._planned_for = signature
    elif sampled is not None:
      self.plan = self._make(flat, signature, lambda: sampled.result(_SAMPLE_S))
    elif sample and self._saves & (self._saves - 1) == 0:
      self._sampled = _compressed_behind(flat)
    return self.config

  def for_restore(self, like: PyTree | None) -> Config:
    """The settings to restore with; the user's without `like`, since nothing is then known of the sizes."""
    if like is None:
      return self.unplanned
    flat = flatten(like)
    signature = _signature(flat)
    if self.plan is not None and signature == self._planned_for:
      return self.config
    plan = self._make(flat, signature)
    if self._planned_for is None:  # else the plan of the saves stays in force
      self.plan = plan
    return self.unplanned if plan is None else plan.apply(self._user)

  def _make(self, state: Flat, signature: _Signature, kinds: _Kinds = tuple) -> Plan | None:
    """A plan, or the one in force if there is none to be had; `kinds` returns how values compress, if it is known."""
    started = time.perf_counter()
    again = self.plan if signature == self._planned_for else None
    decided: list[Plan | None] = []

    def decide() -> dict[str, Any] | None:
      decided.append(plan := self._decide(state, again, signature[1], kinds))
      return None if plan is None else plan.to_dict()

    sent = self._agree(decide)  # one process's plan for all: a step has one layout
    plan = decided[0] if decided else sent and Plan.from_dict(sent)
    if plan is None:
      return self.plan
    if again is not None:
      # The same state sampled again: a timeout that follows the expectation is not worth another manager.
      before = {c.key: c for c in again.choices}
      kept = tuple(before[c.key] if c.key.startswith("timeouts.") else c for c in plan.choices)
      plan = dataclasses.replace(plan, choices=kept)
    if self.plan is None or plan.values != self.plan.values:
      self._report(plan, time.perf_counter() - started)
    return plan

  def _report(self, plan: Plan, seconds: float) -> None:
    _log.info(
      "%s: plan %s; made in %.2f s (Checkpointer.plan.explain() gives the reasons)",
      self._directory,
      plan.summary(),
      seconds,
    )

  def _decide(self, state: Flat, again: Plan | None, nbytes: int, kinds: _Kinds) -> Plan | None:
    try:
      profile = again.state if again is not None else profile_state(state.structure.abstract, sample=False)
      profile = dataclasses.replace(profile, kinds=kinds() or profile.kinds)
      return decide(Facts(profile, self._storage(nbytes), profile_host(), self._user))
    except Exception as e:  # the checkpoint that waits for it is worth more than a plan
      reason = f"{type(e).__name__}: {e}"
      _log.warning("%s: no plan could be made (%s); `auto` means Orbax's defaults", self._directory, reason)
      self.no_plan = NoPlan(self._user, f"could not be made ({reason}); `auto` means Orbax's defaults")
      return None

  def _storage(self, nbytes: int) -> StorageProfile:
    storage = known_profile(self._directory, self._kind)
    if is_assumed(storage) and nbytes >= _WORTH_MEASURING_NBYTES:
      try:
        storage = dataclasses.replace(quick_probe(self._directory), kind=self._kind)
      except Exception as e:  # no room, no permission: the save itself reports it, where it matters
        _log.info("%s: could not be measured (%s); planned with usual figures of %s", self._directory, e, self._kind)
    return storage


def _compressed_behind(state: Flat) -> _Sampled:
  """Samples a state for process 0, which decides, and compresses the sample in the background."""
  if jax.process_index() > 0:
    return concurrent.futures.Future()
  worker = Worker("ckpt_jax_sample")
  found = worker.submit(functools.partial(measure_kinds, take_sample(state)))
  worker.submit(worker.close)
  return found


def _signature(state: Flat) -> _Signature:
  return state.structure.once(_signature_of, state.structure.abstract)


def _signature_of(leaves: Sequence[Any]) -> _Signature:
  arrays = [x for x in leaves if x is not None]
  stride = max(1, len(arrays) // _COMPARED_LEAVES)
  shardings = tuple((x.shape, getattr(x, "sharding", None)) for x in arrays[::stride])
  return len(arrays), sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays), shardings
