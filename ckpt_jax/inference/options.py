"""What an export makes of the parameters of a step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from ckpt_jax.errors import ConfigError
from ckpt_jax.inference.quantize import check_quantize
from ckpt_jax.inference.rename import Rules

PyTree = Any
FLOATS = ("float32", "bfloat16", "float16")
FORMATS = ("orbax", "safetensors")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """What an export makes of the parameters.

  Attributes:
    dtype: of floating-point leaves that are not quantised: float32, bfloat16 or float16; None keeps that of each.
    quantize: `int8` or `int4` for matrices; None for none.
    format: `orbax` or `safetensors`.
    group: values that share a scale of int4: 32, 64 or 128.
    keep: paths or globs, below the parameters, of leaves that are not quantised.
    subtree: the node of the state to export; `.` for all of it. Default: the parameters, see `inference.source`.
    ema: export the averaged parameters.
    item: the item that holds the state, in steps with several.
    rename: rules for the names of safetensors, see `inference.rename`.
    metadata: of each safetensors file. transformers loads those whose `format` is `pt`.
    shard_size: bytes of a safetensors file at most, unless one leaf is larger.
    overflow: write numbers that float16 cannot hold as infinite, instead of refusing them.
    overwrite: replace what is at the target.
    memory: bytes of values that may be in memory at a time, about; a chunk of the step is read whole.
    evaluate: `module:function`, or a function: given the parameters, it returns a loss, of which the report has the
      values before and after.
    progress: called with bytes read and bytes in all.
  """

  dtype: str | None = "bfloat16"
  quantize: str | None = None
  format: str = "orbax"
  group: int = 64
  keep: Sequence[str] = ()
  subtree: str | None = None
  ema: bool = False
  item: str | None = None
  rename: Rules = ()
  metadata: Mapping[str, str] = dataclasses.field(default_factory=lambda: {"format": "pt"})
  shard_size: int = 5 * 10**9
  overflow: bool = False
  overwrite: bool = False
  memory: int = 128 << 20
  evaluate: str | Callable[[PyTree], Any] | None = None
  progress: Callable[[int, int], None] = lambda done, total: None

  def __post_init__(self):
    if self.dtype is not None and (name := jnp.dtype(self.dtype).name) not in FLOATS:
      raise ConfigError(f"dtype: {name}: expected {', '.join(FLOATS)} or None")
    if self.format not in FORMATS:
      raise ConfigError(f"format: expected {' or '.join(FORMATS)}, got {self.format!r:.40}")
    check_quantize(self.quantize, self.group)
    if self.rename and self.format != "safetensors":
      raise ConfigError("rename: names are those of the state in Orbax's format; use format='safetensors'")
