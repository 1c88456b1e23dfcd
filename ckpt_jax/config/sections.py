"""The sections of the configuration: every key, its type, its default and what it does."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypedDict, Unpack

import pydantic
from pydantic import Field, StrictBool, StrictInt, StrictStr

from ckpt_jax.config.explain import config_error
from ckpt_jax.config.units import (
  AutoOrBytes,
  AutoOrCount,
  AutoOrDuration,
  AutoOrOff,
  Bytes,
  Compression,
  Count,
  Duration,
  FileMode,
  ItemName,
  LeafPaths,
  LearnedOrDuration,
  Price,
  Share,
  StepNumber,
  Switch,
)

# The shortest timeout that `auto` means: a hung save should end the job in minutes, not in days.
TIMEOUT_FLOOR_S = 1200.0

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


class Section(pydantic.BaseModel):
  """Settings by name, frozen and strict; raises ConfigError where pydantic would raise its own error."""

  model_config = pydantic.ConfigDict(frozen=True, extra="forbid", validate_default=False)

  if not TYPE_CHECKING:

    def __init__(self, **data):
      try:
        self.__pydantic_validator__.validate_python(data, self_instance=self)
      except pydantic.ValidationError as e:
        raise config_error(type(self), e) from None

    # Without this mark pydantic would call __init__ for nested sections too, and their ConfigError, a ValueError, would
    # reach the root without its key path (tests/config/test_config.py fails if the mark changes).
    __init__.__pydantic_base_init__ = True


class ScheduleConfig(Section):
  """When to save: at most one rule; without one, at each call of `save`. A preemption notice saves in any case.

  Attributes:
    every_steps: save at each step that is a multiple of this.
    every: seconds between the starts of two saves.
    at_steps: save at these steps.
    never: save only what `force=True`, or a preemption notice, asks for.
    last: the last step of training, which is saved too, whatever the rule says.
    any, all: a list of schedules of which one, or all, must be due.
    overhead: the largest share of training time that saving may take, 0 to 1; the interval follows from the measured
      cost of a save.
    mtti: mean time to interruption of the whole job, in seconds, or `learned` from this run's restarts.
    node_mtti: mean time to interruption of one process's node; `mtti` is this, divided by the number of processes.
  """

  every_steps: Count | None = None
  every: Duration | None = None
  overhead: Share | None = None
  mtti: LearnedOrDuration | None = None
  node_mtti: Duration | None = None
  at_steps: tuple[StepNumber, ...] | None = None
  last: StepNumber | None = None
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
    if self.last is not None and not given:
      raise ValueError(
        "last names the last step of training and goes with a rule such as every_steps; without a rule every step is "
        "saved. How many steps to keep is retention.last"
      )
    if self.mtti is not None and self.node_mtti is not None:
      raise ValueError("mtti and node_mtti exclude each other; keep one")
    return self


class BestConfig(Section):
  """Keep the `n` steps with the best value of a metric.

  Attributes:
    metric: a name in the `metrics` given to `save`.
    mode: `min` if a lower value is better, `max` if a higher one is.
    n: how many steps to keep.
    keep_missing: keep also the steps that lack the metric or have NaN for it.
  """

  metric: Annotated[StrictStr, Field(min_length=1)]
  mode: Literal["min", "max"] = "min"
  n: Count = 1
  keep_missing: StrictBool = False


class ThinConfig(Section):
  """Removes a part of the state from older steps: two thirds of a step are optimizer state.

  Training cannot go on from a thinned step. The newest step, the newest healthy one, pinned steps and those being
  restored are never thinned.

  Attributes:
    after: seconds, counted back from the newest step, after which a step is thinned.
    keep: paths in the state whose leaves stay.
  """

  after: Duration
  keep: LeafPaths = ("params",)


class RetentionConfig(Section):
  """Which steps to keep, in the words of restic's `forget`: a step that no rule keeps is deleted.

  Without a rule every step stays.

  Attributes:
    last: keeps this many of the newest steps.
    hourly, daily, weekly, monthly: keep the newest step of each of this many hours, days, weeks, months.
    within: keeps every step younger than this, in seconds.
    every_steps: keeps every step that is a multiple of this.
    best: keeps the best steps by a metric.
    budget: bytes that all steps of the run may take together, what they share on a disk counted once; the oldest are
      deleted first, those of `best` last.
    thin: what is removed from older steps that are kept.
    delete_rate: the most files to delete in a second on a file system whose metadata server others need too; unset: no
      limit. Buckets delete up to 1,000 objects with one request.
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

  @pydantic.model_validator(mode="before")
  @classmethod
  def _policy_is_section(cls, data: Any) -> Any:
    # `policies.Retention(last=3)`, which this room may not import, has the same fields.
    if type(data).__name__ != "Retention" or not dataclasses.is_dataclass(data):
      return data
    return {name: value for name, value in vars(data).items() if value is not None}


class LayoutConfig(Section):
  """How a state is laid out in storage.

  Attributes:
    compression: codec of the chunks: `off`, `zstd` as Orbax has it, or `shuffled` (also `on`): zstd on the bytes of the
      numbers side by side, which plain Orbax reads too. `auto` decides for each kind of leaf by its values and by how
      fast the storage is. Or a codec for some kinds, as the plan names them, `{mu float32: shuffled}`.
    target_file_size: bytes of an OCDBT data file.
    chunk_size: bytes of the pieces that each shard is stored in; reads fetch whole chunks, several in parallel.
    pack: concatenates small leaves into few arrays. Plain Orbax cannot read a packed checkpoint. Each process keeps
      64 MiB of memory for packing.
    replica_parallel: lets each replica of a leaf write a part of it, instead of one replica all of it.
    min_slice_for_replica_parallel: bytes below which such a part is not worth a request of its own.
    reshard: cuts what a process writes across its rows too, so that a restore onto an orthogonal mesh (rows ->
      columns) reads little more than it needs.
    unchanged: leaves that are bit for bit as in the step before are not written again; see docs/format.md.
  """

  compression: Compression = "auto"
  target_file_size: AutoOrBytes = "auto"
  chunk_size: AutoOrBytes = "auto"
  pack: Switch = "off"
  replica_parallel: Switch = "auto"
  min_slice_for_replica_parallel: AutoOrBytes = "auto"
  reshard: Switch = "auto"
  unchanged: AutoOrOff = "auto"


class LimitsConfig(Section):
  """What saving and restoring may take from the host, per process.

  Attributes:
    host_memory: bytes of RAM for copies of the state that wait to be written, and for what a restore has on its way to
      the devices; auto: what the host or cgroup has free.
    save_concurrency: bytes in flight while writing.
    restore_concurrency: bytes in flight while reading.
    file_io_concurrency: file reads in flight while restoring (TensorStore's `file_io_concurrency`).
    data_copy_concurrency: threads that copy and decompress meanwhile (TensorStore's `data_copy_concurrency`).
    file_io: `buffered` leaves what is written and read in the page cache; `direct` leaves nothing there: what is
      written is dropped once the disk has it, and a job of one process reads with O_DIRECT.
  """

  host_memory: AutoOrBytes = "auto"
  save_concurrency: AutoOrBytes = "auto"
  restore_concurrency: AutoOrBytes = "auto"
  file_io_concurrency: AutoOrCount = "auto"
  data_copy_concurrency: AutoOrCount = "auto"
  file_io: Literal["auto", "buffered", "direct"] = "auto"


class RestoreConfig(Section):
  """How a step is read back.

  Attributes:
    strategy: `direct`: each process reads the shards it needs; `gather`: each reads 1/N and all exchange; `broadcast`:
      one replica reads and sends.
    verify: whether to compare what was read with the fingerprints of what was saved.
    on_corruption: `fallback` to the newest sound step, or `raise`.
  """

  strategy: Literal["auto", "direct", "gather", "broadcast"] = "auto"
  verify: StrictBool = True
  on_corruption: Literal["fallback", "raise"] = "fallback"


class HealthConfig(Section):
  """What to do with a state that holds NaN or inf.

  Attributes:
    nonfinite: `refuse` to save it, save it with a `tag`, or `ignore` it. As many infinities as a leaf holds at its
      first save in the run count as intended, and healthy; see docs/integrity.md.
  """

  nonfinite: Literal["refuse", "tag", "ignore"] = "refuse"


class PreemptionConfig(Section):
  """What SIGTERM does, from the first call of `save` until the Checkpointer is closed; see `ckpt_jax.preemption`.

  Attributes:
    enabled: save at the next call of `save` after the notice, wait for the commit, and exit. False: SIGTERM does what
      it does without ckpt_jax.
    exit_code: the exit code of the process then, 0 to 255. 143 is what a shell reports for a process that SIGTERM
      ended. After 0 a Kubernetes Job, or any other scheduler, takes the work for done and never starts it again.
  """

  enabled: StrictBool = True
  exit_code: Annotated[StrictInt, Field(ge=0, le=255)] = 143


class TimeoutsConfig(Section):
  """How long to wait before an operation counts as failed, in seconds.

  Attributes:
    save: from the call of `save` to the commit; auto: 20 times what the plan expects, and at least 20 minutes.
    restore: a whole restore; auto as above.
    delete: how long `close` waits for the deletion of old steps, which the next open continues.
    lease: how long the heartbeat of a job on another host must be missing before its claim to the run is void.
  """

  save: AutoOrDuration = "auto"
  restore: AutoOrDuration = "auto"
  delete: Duration = 60.0
  lease: Duration = 60.0

  @property
  def save_s(self) -> float:
    """Seconds; the least that `auto` means as long as there is no plan."""
    return TIMEOUT_FLOOR_S if self.save == "auto" else self.save

  @property
  def restore_s(self) -> float:
    """Seconds; the least that `auto` means as long as there is no plan."""
    return TIMEOUT_FLOOR_S if self.restore == "auto" else self.restore


class ObserveConfig(Section):
  """What is recorded of a run, and who else hears of it; on process 0.

  Attributes:
    events: keep a record of each save, restore, deletion, failure and restart in the run, `.ckpt_jax/events`. Without
      them goodput, `mtti: learned` and `ckpt-jax report` know nothing of this job.
    tensorboard: directory for scalars of each save and restore (needs the extra `tensorboard`).
    prometheus: port to serve metrics on; 0: only register them, for a server of your own (extra `prometheus`).
    opentelemetry: a span for each save and restore, by the tracer provider that you have set (extra `opentelemetry`).
    progress: show a bar while a restore is read, and while `wait` and `close` wait for a write.
  """

  events: StrictBool = True
  tensorboard: StrictStr | None = None
  prometheus: Annotated[StrictInt, Field(ge=0, le=65535)] | None = None
  opentelemetry: StrictBool = False
  progress: StrictBool = False


class RetryConfig(Section):
  """How to retry requests that an object store refuses (429, 503) or does not answer; all in seconds.

  Attributes:
    initial_delay: the longest wait before the first retry; it doubles with each further one.
    max_delay: the longest wait before any retry.
    deadline: how long to retry a request that keeps failing.
  """

  initial_delay: Duration = 0.05
  max_delay: Duration = 8.0
  deadline: Duration = 60.0


class StorageConfig(Section):
  """The storage that holds the run. A plain name is short for `{kind: NAME}`.

  Attributes:
    kind: the kind of storage; `auto` detects it.
    endpoint: address of an object store, `https://host[:port]`; null: from the standard variables (AWS_ENDPOINT_URL,
      STORAGE_EMULATOR_HOST).
    region: AWS region; null: AWS_REGION or the profile's.
    path_style: whether the bucket is in the path rather than in the host name; null: as the endpoint wants.
    profile: name of an AWS profile. Keys themselves do not belong in this file.
    anonymous: send no credentials.
    driver: TensorStore's driver for gs://, `gcs` or `gcs_grpc`.
    requests: requests in flight per process; `auto` leaves it to TensorStore.
    retry: how failed requests are retried.
    fsync: sync every file and directory of a step before it counts as committed, so that it survives a power cut;
      `auto`: where the storage does not do so by itself. `off` for scratch disks.
    mode: permission bits of a step's files, as octal text, e.g. "0640"; directories also get x where r is. Null: from
      the umask. The world may never write.
    price_per_gib_month: price of a GiB for a month in your currency, from which `prune` and `simulate` compute costs.
  """

  kind: StorageName = "auto"
  endpoint: StrictStr | None = None
  region: StrictStr | None = None
  path_style: StrictBool | None = None
  profile: StrictStr | None = None
  anonymous: StrictBool | None = None
  driver: Literal["gcs", "gcs_grpc"] | None = None
  requests: AutoOrCount = "auto"
  retry: RetryConfig = Field(default_factory=RetryConfig)
  fsync: Switch = "auto"
  mode: FileMode | None = None
  price_per_gib_month: Price | None = None

  @pydantic.model_validator(mode="before")
  @classmethod
  def _name_is_kind(cls, data: Any) -> Any:
    return {"kind": data} if isinstance(data, str) else data


if TYPE_CHECKING:

  class _Sections(TypedDict, total=False):
    schedule: ScheduleConfig | Mapping[str, Any]
    retention: RetentionConfig | Mapping[str, Any]
    layout: LayoutConfig | Mapping[str, Any]
    limits: LimitsConfig | Mapping[str, Any]
    restore: RestoreConfig | Mapping[str, Any]
    health: HealthConfig | Mapping[str, Any]
    preemption: PreemptionConfig | Mapping[str, Any]
    timeouts: TimeoutsConfig | Mapping[str, Any]
    storage: StorageConfig | StorageName | Mapping[str, Any]
    observe: ObserveConfig | Mapping[str, Any]
    item: str | None


class Config(Section):
  """All settings of a Checkpointer. Each section is a dict or its class, whose docstring has the keys. Immutable.

  Attributes:
    item: the item of a step that holds the state, as in the runs of other programs: `items` of MaxText, `state` of
      Orbax v1. It is restored, and saved under that name. Null: as in the newest step of the run; in a new run
      `default`, which plain `ocp.CheckpointManager` expects.

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
  observe: ObserveConfig = Field(default_factory=ObserveConfig)
  item: ItemName | None = None

  if TYPE_CHECKING:  # the synthesized signature would not allow dicts

    def __init__(self, **sections: Unpack[_Sections]) -> None: ...

  @pydantic.model_validator(mode="before")
  @classmethod
  def _empty_section_is_default(cls, data: Any) -> Any:
    # `schedule:` with all its lines commented out reads as null.
    if not isinstance(data, Mapping):
      return data
    return {k: v for k, v in data.items() if not (v is None and k in cls.model_fields)}

  def changed(self, settings: Mapping[str, Any]) -> Config:
    """These settings with others at some key paths, `{"layout.pack": "on"}`, which then count as set."""
    sections: dict[str, dict[str, Any]] = {}
    for path, value in settings.items():
      section, key = path.split(".")
      sections.setdefault(section, {})[key] = value
    return self.model_copy(update={name: getattr(self, name).model_copy(update=of) for name, of in sections.items()})

  def to_dict(self) -> dict[str, Any]:
    """All settings, defaults included, as data for JSON; `Config(**config.to_dict()) == config`."""
    return self.model_dump(mode="json")
