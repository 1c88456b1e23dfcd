"""Typed, strict configuration: in Python `Config(retention={"last": 2})`, in a file `load_config("run.yaml")`.

Every key is optional. An unknown key is refused with the nearest right name: ignoring a misspelt `keep_last` would cost
a disk, or a checkpoint. All problems of a file are reported at once, each with its line.

Units: durations are seconds (`600`, or `"10m"`, `"1h30m"`, `"2d6h"` with the units ms, s, m, h, d, w), sizes are bytes
(`2199023255552`, or `"2TiB"`; MB is 10**6, MiB is 2**20), shares are fractions (`0.01`, or `"1%"`).
"""

from ckpt_jax.config.explain import did_you_mean
from ckpt_jax.config.loading import as_config, load_config
from ckpt_jax.config.sections import (
  TIMEOUT_FLOOR_S,
  BestConfig,
  Config,
  HealthConfig,
  LayoutConfig,
  LimitsConfig,
  ObserveConfig,
  PreemptionConfig,
  RestoreConfig,
  RetentionConfig,
  RetryConfig,
  ScheduleConfig,
  StorageConfig,
  ThinConfig,
  TimeoutsConfig,
)
from ckpt_jax.config.units import parse_bytes, parse_duration, parse_share

__all__ = [
  "TIMEOUT_FLOOR_S",
  "BestConfig",
  "Config",
  "HealthConfig",
  "LayoutConfig",
  "LimitsConfig",
  "ObserveConfig",
  "PreemptionConfig",
  "RestoreConfig",
  "RetentionConfig",
  "RetryConfig",
  "ScheduleConfig",
  "StorageConfig",
  "ThinConfig",
  "TimeoutsConfig",
  "as_config",
  "did_you_mean",
  "load_config",
  "parse_bytes",
  "parse_duration",
  "parse_share",
]
