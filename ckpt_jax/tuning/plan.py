"""From profiles to a Plan: a value for each setting that is left at `auto`, the reason in figures, and what to expect.

`make_plan` first measures what it is not given; `decide` is then a pure function of frozen profiles.
"""

from __future__ import annotations

import dataclasses
import operator
import os
from collections.abc import Mapping
from typing import Any

import pydantic

from ckpt_jax.config import Config, as_config, did_you_mean
from ckpt_jax.config.arguments import check_type
from ckpt_jax.config.html import html_table
from ckpt_jax.config.units import count, decimal_text, duration_text
from ckpt_jax.layout.staging import PINNED_LIMIT
from ckpt_jax.storage.connect import connect
from ckpt_jax.storage.kinds import StorageKind, detect
from ckpt_jax.storage.paths import given
from ckpt_jax.storage.probe import StorageProfile, cached_profile, quick_probe
from ckpt_jax.tuning.assumed import assumed_profile, is_assumed
from ckpt_jax.tuning.choices import CHOICES, Choice, Facts, rate_text, value_text
from ckpt_jax.tuning.costs import ORBAX, Layout, Prediction, predict
from ckpt_jax.tuning.profile import HostProfile, StateProfile, profile_host, profile_state

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Plan(Prediction):
  """Settings for one state, storage and host, the reasons, and what a save and a restore should cost with them.

  Attributes:
    choices: a value with its reason for each setting; the user's own are among them.
    state, storage, host: the profiles that it was made from.
  """

  choices: tuple[Choice, ...]
  state: StateProfile
  storage: StorageProfile
  host: HostProfile

  @property
  def values(self) -> dict[str, Any]:
    """`{key path: value}` of the choices that are settings."""
    return {c.key: c.value for c in self.choices if c.is_setting}

  @property
  def config(self) -> Config:
    """The defaults with the plan's values in place of `auto`."""
    return self.apply(Config())

  def apply(self, config: Config) -> Config:
    """`config` with the plan's values in place of each `auto`; what the user chose stays."""
    decided = {path: value for path, value in self.values.items() if value != "auto"}
    return config.changed({p: value for p, value in decided.items() if operator.attrgetter(p)(config) == "auto"})

  def summary(self) -> str:
    """State, storage, the settings that were decided and what to expect, in one line."""
    decided = (f"{c.key.split('.')[-1]} {c.text}" for c in self.choices if c.is_setting and c.value != "auto")
    return (
      f"for {decimal_text(self.state.nbytes)} in {count(self.state.leaves, 'array')} on {self.storage.kind}: "
      f"{', '.join(decided)}; expected: save blocks {duration_text(self.blocking_s)}, commits in "
      f"{duration_text(self.commit_s)}, restore {duration_text(self.restore_s)}"
    )

  def __repr__(self) -> str:
    return f"Plan({self.summary()}; explain() gives the reasons)"

  def _repr_html_(self) -> str:
    rows = [(c.key, c.text, f"{'set by you; ' if c.by_user else ''}{c.reason}", c.default) for c in self.choices]
    return html_table(("setting", "value", "why", "Orbax by default"), rows, f"Plan {self.summary()}")

  def explain(self) -> str:
    """What was measured, what to expect, and a line for each choice: value, reason, Orbax's default and its cost."""
    s, h = self.state, self.host
    orbax = predict(s, self.storage, h, Layout(), ORBAX)
    lines = [
      f"state: {decimal_text(s.nbytes)} in {count(s.leaves, 'array')} and {count(s.shards, 'piece')}, largest "
      f"{decimal_text(s.largest_leaf_nbytes)}; {s.small_leaves:,} below 1 MiB hold {decimal_text(s.small_nbytes)}",
      f"storage: {self.storage.kind} at {self.storage.path}: writes {rate_text(self.storage.write_bytes_per_s)}, "
      f"reads {rate_text(self.storage.read_bytes_per_s)}, {_source(self.storage)}",
      f"host: {count(h.cores, 'core')}, {decimal_text(h.memory_nbytes)} of memory, copies at "
      f"{rate_text(h.copy_bytes_per_s)}; {count(h.processes, 'process')} with "
      f"{count(h.devices_per_process, 'device')} each",
      f"expected: save blocks {duration_text(self.blocking_s)} and commits in {duration_text(self.commit_s)}, restore "
      f"{duration_text(self.restore_s)}; {decimal_text(self.nbytes)} in {count(self.files, 'file')}, "
      f"{count(self.requests, 'read')}, {decimal_text(self.peak_host_bytes)} of host memory besides the state",
      f"plain Orbax with its defaults: blocks {duration_text(orbax.blocking_s)}, commits in "
      f"{duration_text(orbax.commit_s)}, restore {duration_text(orbax.restore_s)}; {decimal_text(orbax.nbytes)}",
    ]
    if s.accelerator_nbytes:
      lines.insert(4, self._snapshot_line())
    return "\n".join(lines + [c.line() for c in self.choices])

  def _snapshot_line(self) -> str:
    """What a save from accelerators costs."""
    link = self.host.link
    if link is None:
      return f"snapshot: {duration_text(self.snapshot_s)}, assumed: the link to the accelerators was not measured"
    sent = f"{decimal_text(self.pinned_bytes)} of pinned" if self.pinned_bytes else "ordinary"
    rate = (link.to_pinned if self.pinned_bytes else None) or link.to_pageable
    line = (
      f"snapshot: into {sent} host memory in {duration_text(self.snapshot_s)} at {rate_text(rate)}; a step that "
      "donates the state right after save waits for it"
    )
    if self.pinned_bytes and link.first_pinned:
      line += f"; {duration_text(self.pinned_bytes / link.first_pinned)} the first time, which pins the memory"
    if self.pinned_bytes and (limit := self.host.pinned_limit) is not None:
      line += f"; {PINNED_LIMIT} allows {decimal_text(limit)}"
      if limit < self.pinned_bytes:
        line += ", so that it is sent in turns and training waits"
    return line

  def to_dict(self) -> dict[str, Any]:
    """JSON-able data: choices, predictions and profiles."""
    return dataclasses.asdict(self) | {"storage": self.storage.to_dict()}

  @classmethod
  def from_dict(cls, data: Mapping[str, Any]) -> Plan:
    """The inverse of `to_dict`."""
    return pydantic.TypeAdapter(cls).validate_python(data)


@dataclasses.dataclass(frozen=True)
class NoPlan:
  """Stands for a plan that there is not, and counts as false.

  Attributes:
    config: the user's settings.
    why: the reason that there is none.
  """

  config: Config
  why: str = "not made yet; it follows from the first state that is saved, or restored with like="

  def __bool__(self) -> bool:
    return False

  @property
  def values(self) -> dict[str, Any]:
    """Nothing is decided."""
    return {}

  def summary(self) -> str:
    """The reason."""
    return self.why

  def explain(self) -> str:
    """Why there is no plan, the settings that one will decide, and those that are set already."""
    open_, given = [], []
    for section in ("layout", "limits", "restore", "timeouts"):
      values = getattr(self.config, section)
      for key in type(values).model_fields:
        path, value = f"{section}.{key}", getattr(values, key)
        if value == "auto":
          open_.append(path)
        elif key in values.model_fields_set:
          given.append(f"{path}: {value_text(path, value)}")
    lines = [
      f"plan: {self.why}",
      f"it will decide {', '.join(open_)}, by the state's shapes, this storage and this host",
    ]
    return "\n".join(lines + [f"set by you: {', '.join(given)}"] * bool(given))

  def __repr__(self) -> str:
    return f"NoPlan({self.why}; explain() lists what it will decide)"


def make_plan(
  state: PyTree | StateProfile,
  storage: StorageProfile | StorageKind | str | os.PathLike[str],
  host: HostProfile | None = None,
  config: Config | Mapping[str, Any] | str | os.PathLike[str] | None = None,
) -> Plan:
  """Decides how to save and restore a state.

  Args:
    state: a pytree of arrays, or of `jax.ShapeDtypeStruct`s (assumed not to compress), or its profile.
    storage: a profile from `probe`; or a path, for which the last measurement is used, or a quick one made (under a
      second); or a StorageKind or its name, whose usual figures are used.
    host: None measures this one (0.2 s, once after each start of the host).
    config: settings that are made already, as for `Checkpointer`; the plan is made around them.

  Raises:
    ConfigError: if `config` is wrong, or `storage` neither a directory nor a kind but like one.
    StorageError: if the path cannot be reached.
  """
  config = as_config(config)
  check_type("host", host, host is None or isinstance(host, HostProfile), "the HostProfile of profile_host(), or None")
  if not isinstance(state, StateProfile):
    state = profile_state(state)
  if isinstance(storage, str) and storage in set(StorageKind):
    storage = StorageKind(storage)
  if isinstance(storage, StorageKind):
    storage = assumed_profile(storage)
  elif not isinstance(storage, StorageProfile):
    path = given(storage)
    near = "" if os.path.exists(path) else did_you_mean(path, StorageKind)
    check_type("storage", storage, not near, f"a path, a StorageProfile or a kind of storage{near}")
    connect(path)
    storage = cached_profile(path) or quick_probe(path)
  return decide(Facts(state, storage, host or profile_host(), config))


def decide(facts: Facts) -> Plan:
  """The plan for profiles and the user's settings; nothing is measured."""
  choices = []
  for choose in CHOICES:
    choices.append(choose(facts))
    facts = facts.after(choices[-1])
  expected = dataclasses.asdict(facts.predict())
  return Plan(**expected, choices=tuple(choices), state=facts.state, storage=facts.storage, host=facts.host)


def known_profile(path: str | os.PathLike[str], kind: StorageKind | None = None) -> StorageProfile:
  """What was measured before, or the usual figures of the kind: no request, no write."""
  return cached_profile(path) or assumed_profile(kind or detect(path), os.fspath(path))


def _source(profile: StorageProfile) -> str:
  if is_assumed(profile):
    return "assumed: not measured here, see ckpt-jax probe"
  return f"measured {profile.age_s / 3600:.1f} h ago in {profile.seconds:.1f} s"
