"""The sections of the configuration: every key, its type, its default and what it does."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

import pydantic
from pydantic import BeforeValidator, Field, StrictBool, StrictInt, StrictStr

from ckpt_jax.config.explain import config_error
from ckpt_jax.config.units import (
  AutoOrBytes,
  AutoOrCount,
  AutoOrDuration,
  Bytes,
  Count,
  Duration,
  ItemName,
  LeafPaths,
  Price,
  Share,
  StepNumber,
  Switch,
  file_mode,
  learned_or_duration,
)

# The shortest that a timeout is when left to the plan: a hung save should end the job in minutes, not in days.
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


class _Section(pydantic.BaseModel):
  """Frozen, strict, and with ConfigError for what pydantic would raise."""

  model_config = pydantic.ConfigDict(frozen=True, extra="forbid", validate_default=False)

  if not TYPE_CHECKING:

    def __init__(self, **data):
      try:
        self.__pydantic_validator__.validate_python(data, self_instance=self)
      except pydantic.ValidationError as e:
        raise config_error(type(self), e) from None

    # Without this mark pydantic would call __init__ for nested sections too, and the ConfigError of a section, a
    # ValueError, would reach the root with its key path lost (tests/config/test_config.py fails if the mark changes).
    __init__.__pydantic_base_init__ = True


class ScheduleConfig(_Section):
  """When to save. At most one rule; all unset means at each call of `save`.

  A preemption notice saves whatever the schedule says.

  Attributes:
    every_steps: save at each step that is a multiple of this.
    every: seconds between the starts of two saves.
    at_steps: save at these steps.
    never: save only what `force=True`, or a preemption notice, asks for.
    last: the last step of training, which is saved too, whatever the rule says.
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
  mtti: Annotated[float | Literal["learned"], BeforeValidator(learned_or_duration)] | None = None
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
        "last names the last step of training and goes with a rule such as every_steps; without one each "
        "step is saved. How many steps to keep is retention.last"
      )
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

  Without a rule every step stays.

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

  @pydantic.model_validator(mode="before")
  @classmethod
  def _policy_is_section(cls, data: Any) -> Any:
    """`policies.Retention(last=3)`, a room below, has the same fields."""
    if dataclasses.is_dataclass(data) and not isinstance(data, type) and type(data).__name__ == "Retention":
      values = ((field.name, getattr(data, field.name)) for field in dataclasses.fields(data))
      return {name: value for name, value in values if value is not None}
    return data


class LayoutConfig(_Section):
  """How a state lies in storage.

  Attributes:
    compression: zstd on the chunks. Trained float32 weights hardly shrink (8%) and the commit takes 2.3x as long.
    target_file_size: bytes of an OCDBT data file.
    chunk_size: bytes of the pieces that each shard is stored in; a read fetches whole chunks, and several in parallel.
    pack: concatenate small leaves into few arrays. A packed checkpoint cannot be read by plain Orbax. A process keeps
      64 MiB of memory for it from save to save.
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
    nonfinite: `refuse` to save it, save it with a `tag`, or `ignore` it. Infinities that a leaf holds at the run's
      first save of it are meant to be there, in that number, and count as healthy; see docs/integrity.md.
  """

  nonfinite: Literal["refuse", "tag", "ignore"] = "refuse"


class PreemptionConfig(_Section):
  """What SIGTERM does, from the first call of `save` until the Checkpointer is closed; see `ckpt_jax.preemption`.

  Attributes:
    enabled: save at the next call of `save` after the notice, wait for the commit, and exit. False: SIGTERM does what
      it does without ckpt_jax.
    exit_code: with which code the process exits then, 0 to 255. 143 is what a shell reports for a process that SIGTERM
      ended. With 0 a Kubernetes Job, or any other scheduler, takes the work for done and never starts it again.
  """

  enabled: StrictBool = True
  exit_code: Annotated[StrictInt, Field(ge=0, le=255)] = 143


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
  mode: Annotated[str, BeforeValidator(file_mode)] | None = None
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
    item: the item of a step that holds the state, as in the runs of other programs: `items` of MaxText, `state` of
      Orbax v1. It is restored, and saved under that name. Null: the one that the run's newest step has, and `default`
      in a new run, which plain `ocp.CheckpointManager` asks for.

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
  item: ItemName | None = None

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
      item: str | None = ...,
    ) -> None: ...

  @pydantic.model_validator(mode="before")
  @classmethod
  def _empty_section_is_default(cls, data: Any) -> Any:
    # `schedule:` with all its lines commented out reads as null.
    if not isinstance(data, Mapping):
      return data
    return {k: v for k, v in data.items() if not (v is None and k in cls.model_fields)}

  def to_dict(self) -> dict[str, Any]:
    """All settings, defaults included, as JSON-able data; `Config(**config.to_dict()) == config`."""
    return self.model_dump(mode="json")
