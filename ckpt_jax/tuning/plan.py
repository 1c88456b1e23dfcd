"""From profiles to a Plan: a value for each setting that is left at `auto`, its reason in figures, and what to expect.

`make_plan` decides on frozen profiles only; it measures what it is not given, at the edge, before it decides.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from ckpt_jax.config import Config
from ckpt_jax.storage.connect import connect
from ckpt_jax.storage.kinds import StorageKind, detect
from ckpt_jax.storage.paths import given
from ckpt_jax.storage.probe import StorageProfile, cached_profile, quick_probe
from ckpt_jax.tuning.assumed import assumed_profile, is_assumed
from ckpt_jax.tuning.choices import CHOICES, Choice, Facts, nbytes_text, rate_text, seconds_text
from ckpt_jax.tuning.costs import ORBAX, Layout, Prediction, predict
from ckpt_jax.tuning.profile import HostProfile, StateProfile, profile_host, profile_state
from ckpt_jax.tuning.sampling import Compressibility

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Plan:
  """Settings for one state, storage and host, why, and what they should cost.

  Attributes:
    choices: a value with its reason for each setting; the user's own are among them.
    blocking_s: what `save` takes from training, in seconds.
    commit_s: from the call of `save` to the commit.
    restore_s: a restore from cold storage.
    nbytes: bytes of the stored arrays.
    files: files or objects of a step.
    requests: data requests of a restore, over all processes.
    peak_host_bytes: host memory of a process beside the state itself.
    state, storage, host: the profiles that it was made from.
  """

  choices: tuple[Choice, ...]
  blocking_s: float
  commit_s: float
  restore_s: float
  nbytes: int
  files: int
  requests: int
  peak_host_bytes: int
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
    """`config` with the plan's values wherever it says `auto`; what the user chose stays."""
    sections: dict[str, Any] = {}
    for path, value in self.values.items():
      section, key = path.split(".")
      if value != "auto" and getattr(getattr(config, section), key) == "auto":
        sections.setdefault(section, {})[key] = value
    updates = {name: getattr(config, name).model_copy(update=values) for name, values in sections.items()}
    return config.model_copy(update=updates)

  def explain(self) -> str:
    """What was measured, what to expect, and one line a choice: value, reason, what Orbax's default would cost."""
    s, h = self.state, self.host
    orbax = predict(s, self.storage, h, Layout(), ORBAX)
    lines = [
      f"state: {nbytes_text(s.nbytes)} in {s.leaves:,} arrays and {s.shards:,} pieces, largest "
      f"{nbytes_text(s.largest_leaf_nbytes)}; {s.small_leaves:,} below 1 MiB hold {nbytes_text(s.small_nbytes)}",
      f"storage: {self.storage.kind} at {self.storage.path}: writes {rate_text(self.storage.write_bytes_per_s)}, "
      f"reads {rate_text(self.storage.read_bytes_per_s)}, {_how_known(self.storage)}",
      f"host: {h.cores} cores, {nbytes_text(h.memory_nbytes)} of memory, copies at {rate_text(h.copy_bytes_per_s)}; "
      f"{h.processes} processes with {h.devices_per_process} devices each",
      f"expected: save blocks {seconds_text(self.blocking_s)} and commits in {seconds_text(self.commit_s)}, restore "
      f"{seconds_text(self.restore_s)}; {nbytes_text(self.nbytes)} in {self.files} files, "
      f"{self.requests:,} reads, {nbytes_text(self.peak_host_bytes)} of host memory beside the state",
      f"plain Orbax with its defaults: blocks {seconds_text(orbax.blocking_s)}, commits in "
      f"{seconds_text(orbax.commit_s)}, restore {seconds_text(orbax.restore_s)}; {nbytes_text(orbax.nbytes)}",
    ]
    return "\n".join(lines + [c.line() for c in self.choices])

  def to_dict(self) -> dict[str, Any]:
    """JSON-able data: choices, predictions and profiles."""
    return dataclasses.asdict(self) | {
      "storage": self.storage.to_dict(),
      "choices": [dataclasses.asdict(c) for c in self.choices],
    }

  @classmethod
  def from_dict(cls, data: Mapping[str, Any]) -> Plan:
    """The inverse of `to_dict`."""

    def zstd(found: Mapping[str, Any] | None) -> Compressibility | None:
      return None if found is None else Compressibility(**found)

    state = dict(data["state"])
    state["dtypes"] = tuple((name, nbytes) for name, nbytes in state["dtypes"])
    state["compressibility"] = zstd(state["compressibility"])
    return cls(
      **{k: v for k, v in data.items() if k not in ("choices", "state", "storage", "host")},
      choices=tuple(Choice(**c) for c in data["choices"]),
      state=StateProfile(**state),
      storage=StorageProfile.from_dict(data["storage"]),
      host=HostProfile(**(dict(data["host"]) | {"zstd": zstd(data["host"]["zstd"])})),
    )


def make_plan(
  state: PyTree | StateProfile,
  storage: StorageProfile | StorageKind | str | os.PathLike[str],
  host: HostProfile | None = None,
  config: Config | Mapping[str, Any] | None = None,
) -> Plan:
  """Decides how to save and restore a state.

  Args:
    state: a pytree of arrays, or of `jax.ShapeDtypeStruct`s (taken for values that do not compress), or its profile.
    storage: a profile from `probe`; or a path, of which the last measurement is taken, or a quick one made (under a
      second); or a StorageKind or its name, whose usual figures are taken.
    host: None measures this one (0.2 s, once after each start of the host).
    config: settings that are made already; the plan is made around them.

  Raises:
    ConfigError: if `config` is wrong.
    StorageError: if the path cannot be reached.
  """
  chosen = config if isinstance(config, Config) else Config(**(config or {}))
  facts = Facts(
    state if isinstance(state, StateProfile) else profile_state(state),
    storage_profile(storage),
    host or profile_host(),
    chosen,
  )
  return decide(facts)


def decide(facts: Facts) -> Plan:
  """The plan for profiles and the user's settings; nothing is measured."""
  layout = Layout()
  choices: list[Choice] = []
  for choose in CHOICES:
    choice, layout = choose(facts, layout)
    choices.append(choice)
  found = predict(facts.state, facts.storage, facts.host, layout)
  return Plan(
    choices=tuple(choices), state=facts.state, storage=facts.storage, host=facts.host, **dataclasses.asdict(found)
  )


def storage_profile(storage: StorageProfile | StorageKind | str | os.PathLike[str]) -> StorageProfile:
  """A profile of what `make_plan` takes for storage: measured before, measured now, or the usual one of a kind."""
  if isinstance(storage, StorageProfile):
    return storage
  if isinstance(storage, StorageKind) or (isinstance(storage, str) and storage in set(StorageKind)):
    return assumed_profile(StorageKind(storage))
  storage = given(storage)
  connect(storage)
  return cached_profile(storage) or quick_probe(storage)


def known_profile(path: str | os.PathLike[str], kind: StorageKind | None = None) -> StorageProfile:
  """What was measured before, or the usual figures: no request, no write."""
  return cached_profile(path) or assumed_profile(kind or detect(path), os.fspath(path))


def _how_known(profile: StorageProfile) -> str:
  if is_assumed(profile):
    return "assumed: not measured here, see ckpt-jax probe"
  return f"measured {profile.age_s / 3600:.1f} h ago in {profile.seconds:.1f} s"


__all__ = ["Choice", "Plan", "Prediction", "decide", "known_profile", "make_plan", "storage_profile"]
