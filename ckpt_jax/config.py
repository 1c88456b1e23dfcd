"""Typed, strict configuration: in Python `Config(retention={"last": 2})`, in a file `load_config("run.yaml")`.

Every key is optional. A key that is not known is refused with the nearest right name: a misspelt `keep_last` that is
silently ignored costs a disk, or a checkpoint. All problems of a file are reported at once, each with its line.

Units: durations are seconds (`600`, or `"10m"`, `"1h30m"`, `"2d6h"` with the units ms, s, m, h, d, w), sizes are bytes
(`2199023255552`, or `"2TiB"`; MB is 10**6, MiB is 2**20), shares are fractions (`0.01`, or `"1%"`).
"""

from __future__ import annotations

import difflib
import math
import os
import pathlib
import re
import types
import typing
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

import pydantic
import yaml
from pydantic import BeforeValidator, Field, StrictBool, StrictInt, StrictStr

from ckpt_jax.errors import ConfigError

# Key path -> what this version does with it. `Config.unimplemented` reports those that a user set, so that no setting
# is accepted in silence and then ignored.
_LATER = "accepted, not acted upon yet"
NOT_YET: dict[str, str] = {}
# Values that ask for what happens anyway.
_TODAYS_VALUES: dict[str, tuple[Any, ...]] = {}

# The shortest that a timeout is when left to the plan: a hung save should end the job in minutes, not in days.
TIMEOUT_FLOOR_S = 1200.0

_SECONDS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}
_BYTES = {"": 1, "b": 1} | {
  prefix + suffix: base**power
  for power, prefix in enumerate("kmgtp", start=1)
  for suffix, base in (("b", 1000), ("ib", 1024))
}
_NUMBER = r"\d+(?:\.\d*)?(?:e[+-]?\d+)?|\.\d+"


def _plain_number(value: Any) -> float | None:
  if isinstance(value, (int, float)) and not isinstance(value, bool):
    return value
  if isinstance(value, str) and re.fullmatch(_NUMBER, value.strip().lower()):
    return float(value)
  return None


def parse_duration(value: Any) -> float:
  """Seconds from a number of seconds or from text such as `90s`, `10m`, `1h30m`, `2d6h` (m is minutes).

  Raises:
    ValueError: if `value` is neither, or not above zero.
  """
  seconds = _plain_number(value)
  if seconds is None and isinstance(value, str):
    parts = re.findall(rf"({_NUMBER})\s*(ms|[smhdw])\s*", value.strip().lower())
    if parts and re.fullmatch(rf"(?:(?:{_NUMBER})\s*(?:ms|[smhdw])\s*)+", value.strip().lower()):
      seconds = sum(float(count) * _SECONDS[unit] for count, unit in parts)
  if seconds is None:
    raise ValueError(f"{value!r} is no duration; write seconds or text such as 90s, 10m, 1h30m, 2d6h")
  return _positive(seconds, value, "a duration")


def parse_bytes(value: Any) -> int:
  """Bytes from a whole number or from text such as `512MiB`, `2TiB` (powers of 1024) or `1.5GB` (powers of 1000).

  Raises:
    ValueError: if `value` is neither, or below one byte.
  """
  size = _plain_number(value)
  if size is None and isinstance(value, str):
    match = re.fullmatch(rf"({_NUMBER})\s*([a-z]*)", value.strip().lower())
    if match and match[2] in _BYTES:
      size = float(match[1]) * _BYTES[match[2]]
  if size is None:
    raise ValueError(f"{value!r} is no size; write bytes or text such as 512MiB, 2TiB, 1.5GB")
  return int(_positive(size, value, "a size", least=1))


def parse_share(value: Any) -> float:
  """A fraction between 0 and 1, both excluded, from a number or from text such as `1%`.

  Raises:
    ValueError: if `value` is neither, or out of range.
  """
  share = _plain_number(value)
  if share is None and isinstance(value, str) and value.strip().endswith("%"):
    percent = _plain_number(value.strip()[:-1])
    share = None if percent is None else percent / 100
  if share is None or not 0 < share < 1:
    raise ValueError(f"{value!r} is no share between 0 and 1; write 0.01 or 1%")
  return float(share)


def _positive(number: float, value: Any, what: str, least: float = 0.0) -> float:
  # An int too big for a float is out of range too, hence the comparison before any conversion.
  if not (least <= number < 2**63) or number <= 0 or math.isnan(number):
    raise ValueError(f"{value!r} is out of range: {what} must be above zero and finite")
  return number if least else float(number)


def _auto_or_bytes(value: Any) -> Any:
  if value == "auto":
    return value
  try:
    return parse_bytes(value)
  except ValueError as e:
    raise ValueError(f"{e}, or auto") from None


def _auto_or_duration(value: Any) -> Any:
  if value == "auto":
    return value
  try:
    return parse_duration(value)
  except ValueError as e:
    raise ValueError(f"{e}, or auto") from None


def _auto_or_count(value: Any) -> Any:
  if value == "auto":
    return value
  number = _whole(value)
  if isinstance(number, bool) or not isinstance(number, int) or number < 1:
    raise ValueError(f"{value!r} is no count; write a whole number from 1, or auto")
  return number


def _learned_or_duration(value: Any) -> Any:
  return value if value == "learned" else parse_duration(value)


def _switch(value: Any) -> Any:
  # YAML 1.1 reads a bare on or off as a boolean.
  if value is True:
    return "on"
  return "off" if value is False else value


def _mode(value: Any) -> Any:
  if isinstance(value, str) and re.fullmatch(r"(0o?)?[0-7]{3}", value.strip()):
    bits = int(value.strip().replace("o", ""), 8)
    if bits & 0o600 != 0o600:
      raise ValueError(f"{value!r} takes reading or writing from the owner, who could not save or delete any more")
    if bits & 0o002:
      raise ValueError(f"{value!r} lets the whole world write checkpoints")
    return f"{bits:04o}"
  if isinstance(value, int) and not isinstance(value, bool):
    # YAML 1.1 reads 0640 as 416 and 640 as 640; only text says which was meant.
    raise ValueError(f'{value!r} is ambiguous; write permission bits in quotes, e.g. "0640"')
  raise ValueError(f'{value!r} is no mode; write octal permission bits in quotes, e.g. "0640"')


def _price(value: Any) -> float:
  price = _plain_number(value)
  if price is None or not 0 < price < math.inf:
    raise ValueError(f"{value!r} is no price; write a number above zero, such as 0.02")
  return float(price)


def _leaf_paths(value: Any) -> Any:
  paths = (value,) if isinstance(value, str) else value
  if not isinstance(paths, (list, tuple)) or not paths or not all(isinstance(p, str) and p.strip("/") for p in paths):
    raise ValueError(f"{value!r} names no leaves; write a path in the state such as params, or a list of them")
  return tuple(paths)


def _whole(value: Any) -> Any:
  # JSON and YAML 1.2 writers may spell 1000 as 1e3 or 1000.0; PyYAML reads the first as text.
  number = _plain_number(value)
  if isinstance(value, str) and number is not None and math.isfinite(number) and number == int(number):
    return int(number)
  return value


Duration = Annotated[float, BeforeValidator(parse_duration)]
Share = Annotated[float, BeforeValidator(parse_share)]
Bytes = Annotated[int, BeforeValidator(parse_bytes)]
Count = Annotated[StrictInt, BeforeValidator(_whole), Field(gt=0)]
StepNumber = Annotated[StrictInt, BeforeValidator(_whole), Field(ge=0)]
Price = Annotated[float, BeforeValidator(_price)]
LeafPaths = Annotated[tuple[StrictStr, ...], BeforeValidator(_leaf_paths)]
AutoOrBytes = Annotated[int | Literal["auto"], BeforeValidator(_auto_or_bytes)]
AutoOrDuration = Annotated[float | Literal["auto"], BeforeValidator(_auto_or_duration)]
AutoOrCount = Annotated[int | Literal["auto"], BeforeValidator(_auto_or_count)]
Switch = Annotated[Literal["auto", "on", "off"], BeforeValidator(_switch)]
StorageName = Literal[
  "auto",
  "local",
  "network_disk",
  "tmpfs",
  "nfs",
  "lustre",
  "glusterfs",
  "cephfs",
  "gpfs",
  "wekafs",
  "beegfs",
  "smb",
  "gcs",
  "s3",
  "bucket_mount",
]


class _Section(pydantic.BaseModel):
  """Frozen, strict, and with ConfigError for what pydantic would raise."""

  model_config = pydantic.ConfigDict(frozen=True, extra="forbid", validate_default=False)

  if not TYPE_CHECKING:

    def __init__(self, **data):
      try:
        self.__pydantic_validator__.validate_python(data, self_instance=self)
      except pydantic.ValidationError as e:
        raise _config_error(type(self), e) from None

    # Without this mark pydantic would call __init__ for nested sections too, and the ConfigError of a section, a
    # ValueError, would reach the root with its key path lost (tests/test_config.py fails if the mark changes).
    __init__.__pydantic_base_init__ = True


class ScheduleConfig(_Section):
  """When to save. At most one rule; all unset means at each call of `save`.

  A preemption notice saves whatever the schedule says.

  Attributes:
    every_steps: save at each step that is a multiple of this.
    every: seconds between the starts of two saves.
    at_steps: save at these steps.
    never: save only what `force=True`, or a preemption notice, asks for.
    any: a list of schedules of which one must be due.
    all: a list of schedules of which all must be due.
    overhead: the largest share of training time that saving may take, 0 to 1; the interval follows from the measured
      cost of a save.
    mtti: mean time to interruption of the whole job, in seconds, or `learned` from this run's restarts; only with
      `overhead`.
    node_mtti: mean time to interruption of one process's node, in place of `mtti`: it is divided by the number of
      processes.
  """

  every_steps: Count | None = None
  every: Duration | None = None
  overhead: Share | None = None
  mtti: Annotated[float | Literal["learned"], BeforeValidator(_learned_or_duration)] | None = None
  node_mtti: Duration | None = None
  at_steps: tuple[StepNumber, ...] | None = None
  never: StrictBool | None = None
  any: tuple[ScheduleConfig, ...] | None = None
  all: tuple[ScheduleConfig, ...] | None = None

  @pydantic.model_validator(mode="after")
  def _one_rule(self) -> ScheduleConfig:
    rules = ("every_steps", "every", "overhead", "at_steps", "never", "any", "all")
    given = [k for k in rules if getattr(self, k) not in (None, False)]
    if len(given) > 1:
      raise ValueError(f"{' and '.join(given)} exclude each other; keep one, or list them under any: or all:")
    for name in ("at_steps", "any", "all"):
      if getattr(self, name) == ():
        raise ValueError(f"{name} names nothing; to save nothing but what is forced, write never: true")
    for name in ("mtti", "node_mtti"):
      if getattr(self, name) is not None and self.overhead is None:
        raise ValueError(f"{name} goes with overhead; add overhead, or remove {name}")
    if self.mtti is not None and self.node_mtti is not None:
      raise ValueError("mtti and node_mtti exclude each other; keep one")
    return self


class BestConfig(_Section):
  """Keep the `n` steps with the best value of a metric.

  Attributes:
    metric: a name in the `metrics` given to `save`.
    mode: `min` if a lower value is better, `max` if a higher one is.
    n: how many steps to keep.
    keep_missing: keep the steps that lack the metric, or have NaN for it, too.
  """

  metric: Annotated[StrictStr, Field(min_length=1)]
  mode: Literal["min", "max"] = "min"
  n: Count = 1
  keep_missing: StrictBool = False


class ThinConfig(_Section):
  """Older kept steps lose all but a part of their state: two thirds of a step are optimizer state.

  Training cannot go on from a thinned step. The newest, the newest healthy, pinned ones and those being restored are
  never thinned.

  Attributes:
    after: seconds, counted back from the newest step, after which a step is thinned.
    keep: path in the state, or several, whose leaves stay.
  """

  after: Duration
  keep: LeafPaths = ("params",)


class RetentionConfig(_Section):
  """Which steps to keep: each rule keeps some, and what no rule keeps is deleted (the words are restic's `forget`).

  `RetentionConfig()` keeps the last 3. To keep every step, write `last: null` and no other rule.

  Attributes:
    last: the newest steps, this many.
    hourly, daily, weekly, monthly: the newest step of each of so many hours, days, weeks, months.
    within: every step younger than this, in seconds.
    every_steps: every step that is a multiple of this, for ever.
    best: the best steps by a metric.
    budget: bytes that all steps of the run may take together; the oldest go first, those that `best` keeps last.
    thin: what older kept steps lose.
    delete_rate: the most files removed in a second on a file system, where others may need its metadata server; unset:
      no limit. Buckets remove up to 1,000 objects with one request.
  """

  last: Count | None = None
  hourly: Count | None = None
  daily: Count | None = None
  weekly: Count | None = None
  monthly: Count | None = None
  within: Duration | None = None
  every_steps: Count | None = None
  best: BestConfig | None = None
  budget: Bytes | None = None
  thin: ThinConfig | None = None
  delete_rate: Count | None = None

  @pydantic.model_validator(mode="after")
  def _keep_three_unless_told(self) -> RetentionConfig:
    rules = (getattr(self, name) for name in type(self).model_fields if name not in ("thin", "delete_rate"))
    if "last" not in self.model_fields_set and all(rule is None for rule in rules):
      self.__dict__["last"] = 3  # the model is frozen, and `last` must not count as set by the user
    return self


class LayoutConfig(_Section):
  """How a state lies in storage.

  Attributes:
    compression: zstd on the chunks. Trained float32 weights hardly shrink (8%) and the commit takes 2.3x as long.
    target_file_size: bytes of an OCDBT data file.
    chunk_size: bytes of the pieces that each shard is stored in; a read fetches whole chunks, and several in parallel.
    pack: concatenate small leaves into few arrays. A packed checkpoint cannot be read by plain Orbax.
    replica_parallel: replicas of a leaf each write a part of it, rather than one replica all of it.
    min_slice_for_replica_parallel: bytes below which such a part is not worth a request of its own.
  """

  compression: Switch = "auto"
  target_file_size: AutoOrBytes = "auto"
  chunk_size: AutoOrBytes = "auto"
  pack: Switch = "off"
  replica_parallel: Switch = "auto"
  min_slice_for_replica_parallel: AutoOrBytes = "auto"


class LimitsConfig(_Section):
  """What saving and restoring may take from the host: bytes per process, and threads.

  Attributes:
    host_memory: RAM for the copies of the state that wait to be written; auto is what the host (or cgroup) has free.
    save_concurrency: bytes in flight while writing.
    restore_concurrency: bytes in flight while reading.
    file_io_concurrency: reads of files in flight at a time while restoring (TensorStore's `file_io_concurrency`).
    data_copy_concurrency: threads that copy and decompress meanwhile (TensorStore's `data_copy_concurrency`).
  """

  host_memory: AutoOrBytes = "auto"
  save_concurrency: AutoOrBytes = "auto"
  restore_concurrency: AutoOrBytes = "auto"
  file_io_concurrency: AutoOrCount = "auto"
  data_copy_concurrency: AutoOrCount = "auto"


class RestoreConfig(_Section):
  """How a step is read back.

  Attributes:
    strategy: `direct`: each process reads the shards it needs; `gather`: each reads 1/N and all exchange; `broadcast`:
      one replica reads and sends.
    verify: check what was read against the fingerprints of what was saved.
    on_corruption: `fallback` to the newest sound step, or `raise`.
  """

  strategy: Literal["auto", "direct", "gather", "broadcast"] = "auto"
  verify: StrictBool = True
  on_corruption: Literal["fallback", "raise"] = "fallback"


class HealthConfig(_Section):
  """What to do with a state that holds NaN or inf.

  Attributes:
    nonfinite: `refuse` to save it, save it with a `tag`, or `ignore` it.
  """

  nonfinite: Literal["refuse", "tag", "ignore"] = "refuse"


class PreemptionConfig(_Section):
  """What SIGTERM does.

  Attributes:
    enabled: save at the next step after the notice, wait for the commit, and exit.
    exit_code: with which code the process exits then, 0 to 255; some schedulers restart a job only on a code of their
      own.
  """

  enabled: StrictBool = True
  exit_code: Annotated[StrictInt, Field(ge=0, le=255)] = 0


class TimeoutsConfig(_Section):
  """How long to wait before an operation counts as failed, in seconds.

  Attributes:
    save: from the call of `save` to the commit; auto is 20 times what the plan expects, and 20 minutes at least.
    restore: the whole of a restore; auto as above.
    delete: how long `close` waits for old steps to be removed. What is left is marked, and the next open goes on.
    lease: how long the heartbeat of a job on another host must stand still before its claim to the run is void.
  """

  save: AutoOrDuration = "auto"
  restore: AutoOrDuration = "auto"
  delete: Duration = 60.0
  lease: Duration = 60.0

  @property
  def save_s(self) -> float:
    """Seconds; what auto means as long as there is no plan."""
    return TIMEOUT_FLOOR_S if self.save == "auto" else self.save

  @property
  def restore_s(self) -> float:
    """Seconds; what auto means as long as there is no plan."""
    return TIMEOUT_FLOOR_S if self.restore == "auto" else self.restore


class RetryConfig(_Section):
  """How requests that an object store refuses (429, 503) or does not answer are sent again, in seconds.

  Attributes:
    initial_delay: the longest wait before the first retry; each further one may wait twice as long.
    max_delay: the longest wait of all.
    deadline: when a request that keeps failing is given up.
  """

  initial_delay: Duration = 0.05
  max_delay: Duration = 8.0
  deadline: Duration = 60.0


class StorageConfig(_Section):
  """The storage that the run lies on. A plain name is short for `{kind: NAME}`.

  Attributes:
    kind: what it is; `auto` finds out.
    endpoint: address of an object store, `https://host[:port]`; null: as the standard variables say (AWS_ENDPOINT_URL,
      STORAGE_EMULATOR_HOST).
    region: AWS region; null: AWS_REGION or the profile's.
    path_style: whether the bucket is in the path rather than in the host name; null: as the endpoint wants.
    profile: name of an AWS profile. Keys themselves do not belong into this file.
    anonymous: send no credentials.
    driver: TensorStore's driver for gs://, `gcs` or `gcs_grpc`.
    requests: requests in flight at a time and process; `auto` leaves it to TensorStore.
    retry: how failed requests are sent again.
    fsync: sync every file and directory of a step before it counts as committed, so that it survives a power cut;
      `auto`: where the storage does not do so by itself. `off` for scratch disks.
    mode: permission bits of a step's files, as octal text, e.g. "0640"; directories also get x where r is. Null: as the
      umask says. Nothing is writable for the world either way.
    price_per_gib_month: what a GiB costs a month, in your currency: `prune` and `simulate` tell what retention costs.
  """

  kind: StorageName = "auto"
  endpoint: StrictStr | None = None
  region: StrictStr | None = None
  path_style: StrictBool | None = None
  profile: StrictStr | None = None
  anonymous: StrictBool | None = None
  driver: Literal["gcs", "gcs_grpc"] | None = None
  requests: Annotated[StrictInt, Field(ge=1)] | Literal["auto"] = "auto"
  retry: RetryConfig = Field(default_factory=RetryConfig)
  fsync: Switch = "auto"
  mode: Annotated[str, BeforeValidator(_mode)] | None = None
  price_per_gib_month: Price | None = None

  @pydantic.model_validator(mode="before")
  @classmethod
  def _name_is_kind(cls, data: Any) -> Any:
    return {"kind": data} if isinstance(data, str) else data


class Config(_Section):
  """All settings of a Checkpointer; each section is a dict or its typed object. Immutable.

  Attributes:
    schedule: when to save.
    retention: which steps to keep.
    layout: how a state lies in storage.
    limits: what saving and restoring may take from the host.
    restore: how a step is read back.
    health: what to do with non-finite states.
    preemption: what SIGTERM does.
    timeouts: when an operation counts as failed.
    storage: what the run lies on, and how to reach it.

  Raises:
    ConfigError: for an unknown key (with the nearest right one) or a wrong value; all of them at once.
  """

  schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)
  retention: RetentionConfig = Field(default_factory=RetentionConfig)
  layout: LayoutConfig = Field(default_factory=LayoutConfig)
  limits: LimitsConfig = Field(default_factory=LimitsConfig)
  restore: RestoreConfig = Field(default_factory=RestoreConfig)
  health: HealthConfig = Field(default_factory=HealthConfig)
  preemption: PreemptionConfig = Field(default_factory=PreemptionConfig)
  timeouts: TimeoutsConfig = Field(default_factory=TimeoutsConfig)
  storage: StorageConfig = Field(default_factory=StorageConfig)

  if TYPE_CHECKING:  # a section may be given as a dict, which the synthesized signature would not allow

    def __init__(
      self,
      *,
      schedule: ScheduleConfig | Mapping[str, Any] = ...,
      retention: RetentionConfig | Mapping[str, Any] = ...,
      layout: LayoutConfig | Mapping[str, Any] = ...,
      limits: LimitsConfig | Mapping[str, Any] = ...,
      restore: RestoreConfig | Mapping[str, Any] = ...,
      health: HealthConfig | Mapping[str, Any] = ...,
      preemption: PreemptionConfig | Mapping[str, Any] = ...,
      timeouts: TimeoutsConfig | Mapping[str, Any] = ...,
      storage: StorageConfig | StorageName | Mapping[str, Any] = ...,
    ) -> None: ...

  @pydantic.model_validator(mode="before")
  @classmethod
  def _empty_section_is_default(cls, data: Any) -> Any:
    # `schedule:` with all its lines commented out reads as null.
    if not isinstance(data, Mapping):
      return data
    return {k: v for k, v in data.items() if not (v is None and k in cls.model_fields)}

  def unimplemented(self) -> list[str]:
    """The settings that the user made and this version accepts but does not act upon, as `key path: why`."""
    found = []
    for path, why in NOT_YET.items():
      value: Any = self
      explicit = True
      for key in path.split("."):
        explicit = explicit and key in value.model_fields_set
        value = getattr(value, key)
      if explicit and value is not None and value not in _TODAYS_VALUES.get(path, ()):
        found.append(f"{path}: {why}")
    return found

  def to_dict(self) -> dict[str, Any]:
    """All settings, defaults included, as JSON-able data; `Config(**config.to_dict()) == config`."""
    return self.model_dump(mode="json")


def load_config(path: str | os.PathLike[str]) -> Config:
  """Reads a YAML file into a Config. An empty file gives the defaults.

  Raises:
    ConfigError: if the file cannot be read, is not YAML, or holds unknown, doubled or wrong keys: one line a problem,
      `file:line: key path: what is wrong`.
  """
  file = pathlib.Path(path).expanduser()
  try:
    text = file.read_text(encoding="utf-8")
  except FileNotFoundError:
    raise ConfigError(f"{file}: no such file{_nearest_file(file)}") from None
  except (OSError, UnicodeDecodeError) as e:
    raise ConfigError(f"{file}: cannot be read: {e}") from None

  problems: list[tuple[int, str]] = []
  lines: dict[tuple[str, ...], int] = {}
  try:
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    data = {} if root is None else _to_data(root, (), lines, problems)
  except yaml.MarkedYAMLError as e:
    mark = e.problem_mark or e.context_mark
    where = f"{file}:{mark.line + 1}" if mark else f"{file}"
    raise ConfigError(f"{where}: not YAML: {e.problem or e.context}") from None
  except (yaml.YAMLError, RecursionError) as e:
    raise ConfigError(f"{file}: not YAML: {' '.join(str(e).split())}") from None
  if data is None:
    data = {}
  if not isinstance(data, dict):
    raise ConfigError(f"{file}:1: expected sections such as `retention: {{last: 3}}`, got {data!r:.60}")

  try:
    config = Config.model_validate(data)
  except pydantic.ValidationError as e:
    problems += [(_line_of(keys, lines), message) for keys, message in _problems(Config, e)]
  if problems:
    raise ConfigError("\n".join(f"{file}:{line}: {message}" for line, message in sorted(problems)))
  return config


def _to_data(
  node: yaml.Node,
  keys: tuple[str, ...],
  lines: dict[tuple[str, ...], int],
  problems: list[tuple[int, str]],
) -> Any:
  """Plain data from YAML nodes; notes the line of each key in `lines` and doubled keys in `problems`."""
  if len(keys) > 16:  # an anchor that refers to itself has no end
    raise yaml.YAMLError(f"{'.'.join(keys[:3])}: nested too deep")
  if isinstance(node, yaml.SequenceNode):
    return [_to_data(v, (*keys, str(i)), lines, problems) for i, v in enumerate(node.value)]
  if not isinstance(node, yaml.MappingNode):
    try:
      constructor = yaml.constructor.SafeConstructor()
      if node.tag == "tag:yaml.org,2002:int" and ":" in node.value:
        return node.value  # YAML 1.1 reads 1:30 as ninety, base 60; whoever writes it means something else
      return constructor.construct_object(node)
    except (ValueError, KeyError):  # 2026-13-45, an integer of 5,000 digits, `!!bool x`
      return node.value
  data: dict[str, Any] = {}
  for key_node, value_node in node.value:
    line = key_node.start_mark.line + 1
    if not isinstance(key_node, yaml.ScalarNode):
      problems.append((line, f"{'.'.join(keys) or 'top level'}: a key must be a word"))
      continue
    here = (*keys, key_node.value)
    if here in lines:
      problems.append((line, f"{'.'.join(here)}: given twice, first on line {lines[here]}"))
      continue
    lines[here] = line
    data[key_node.value] = _to_data(value_node, here, lines, problems)
  return data


def _line_of(keys: tuple[str, ...], lines: Mapping[tuple[str, ...], int]) -> int:
  while keys and keys not in lines:
    keys = keys[:-1]
  return lines.get(keys, 1)


def _config_error(model: type[_Section], error: pydantic.ValidationError) -> ConfigError:
  return ConfigError("\n".join(message for _, message in _problems(model, error)))


def _problems(model: type[_Section], error: pydantic.ValidationError) -> list[tuple[tuple[str, ...], str]]:
  """(key path, message) of each error; the message starts with the key path."""
  found: dict[tuple[str, ...], str] = {}
  for detail in error.errors(include_url=False):
    keys, section = _key_path(model, detail["loc"])
    found.setdefault(keys, f"{'.'.join(keys) or model.__name__}: {_explain(model, section, keys, detail)}")
  return list(found.items())


def _key_path(model: type[_Section], loc: tuple[int | str, ...]) -> tuple[tuple[str, ...], type[_Section] | None]:
  """The part of `loc` that names keys, and the section that the last key stands in.

  pydantic adds the members of a union to `loc` (`target_file_size.int`), which no user has written.
  """
  keys: list[str] = []
  section: type[_Section] | None = model
  parent = section
  for part in loc:
    if section is None:
      break
    keys.append(str(part))
    if isinstance(part, int):  # a place in a list of sections
      continue
    parent = section
    section = _section_of(section, part)
  return tuple(keys), parent


def _section_of(section: type[_Section], key: str) -> type[_Section] | None:
  field = section.model_fields.get(key)
  if field is None:
    return None
  annotation = field.annotation
  options = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
  for option in [inner for o in options for inner in (typing.get_args(o) or (o,))]:
    if isinstance(option, type) and issubclass(option, _Section):
      return option
  return None


def _explain(model: type[_Section], section: type[_Section] | None, keys: tuple[str, ...], detail: Any) -> str:
  kind, value, context = detail["type"], detail["input"], detail.get("ctx", {})
  if kind == "extra_forbidden" and section is not None:
    return f"unknown key{_nearest_key(model, section, keys)}"
  if kind == "missing":
    return f"missing; {keys[-1]} is required here"
  if kind == "value_error":
    return str(context["error"])
  if kind == "literal_error":
    allowed = re.findall(r"'([^']*)'", context["expected"])
    return f"{value!r:.80} is not one of {', '.join(allowed)}{did_you_mean(str(value), allowed)}"
  if kind in ("model_type", "model_attributes_type", "dict_type"):
    return f"expected a mapping of keys, got {value!r:.80}"
  if kind.startswith("int"):
    return f"expected a whole number, got {value!r:.80}"
  if kind.startswith("bool"):
    return f"expected true or false, got {value!r:.80}"
  message = detail["msg"]
  return f"{message[:1].lower()}{message[1:]}, got {value!r:.80}"


def _nearest_key(model: type[_Section], section: type[_Section], keys: tuple[str, ...]) -> str:
  known = list(section.model_fields)
  wrong = keys[-1]
  near = difflib.get_close_matches(wrong.lower(), known, n=1)
  if near:
    return f"; did you mean {near[0]}?"
  # A right name in the wrong section, such as `every_steps` at the top level.
  elsewhere = list(_all_keys(model))
  moved = difflib.get_close_matches(wrong.lower(), [name for name, _ in elsewhere], n=1, cutoff=0.8)
  if moved:
    return f"; did you mean {' or '.join(path for name, path in elsewhere if name == moved[0])}?"
  return f"; known here: {', '.join(known)}"


def _all_keys(model: type[_Section], prefix: str = "") -> Iterable[tuple[str, str]]:
  for name in model.model_fields:
    yield name, prefix + name
    section = _section_of(model, name)
    if section is not None and section is not model:
      yield from _all_keys(section, f"{prefix}{name}.")


def did_you_mean(wrong: str, right: Iterable[str]) -> str:
  """`; did you mean X?`, or nothing if no name is near."""
  near = difflib.get_close_matches(wrong.lower(), list(right), n=1)
  return f"; did you mean {near[0]}?" if near else ""


def _nearest_file(file: pathlib.Path) -> str:
  try:
    names = [p.name for p in file.parent.iterdir()]
  except OSError:
    return ""
  near = difflib.get_close_matches(file.name, names, n=1)
  return f"; did you mean {file.parent / near[0]}?" if near else ""
