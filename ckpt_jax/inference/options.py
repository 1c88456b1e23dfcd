"""What an export makes of the parameters of a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

import pydantic
from pydantic import BeforeValidator, Field, StrictBool, StrictStr

from ckpt_jax.config.sections import Section
from ckpt_jax.config.units import Bytes, LeafPaths, parse_dtype
from ckpt_jax.errors import ConfigError

PyTree = Any


class Options(Section):
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

  dtype: Annotated[Literal["float32", "bfloat16", "float16"], BeforeValidator(parse_dtype)] | None = "bfloat16"
  quantize: Literal["int8", "int4"] | None = None
  format: Literal["orbax", "safetensors"] = "orbax"
  group: Literal[32, 64, 128] = 64
  keep: LeafPaths | tuple[()] = ()
  subtree: StrictStr | None = None
  ema: StrictBool = False
  item: StrictStr | None = None
  rename: Any = ()
  metadata: dict[str, StrictStr] = Field(default_factory=lambda: {"format": "pt"})
  shard_size: Bytes = 5 * 10**9
  overflow: StrictBool = False
  overwrite: StrictBool = False
  memory: Bytes = 128 << 20
  evaluate: str | Callable[[PyTree], Any] | None = None
  progress: Callable[[int, int], None] = lambda done, total: None

  @pydantic.model_validator(mode="after")
  def _names_of_safetensors(self) -> Options:
    if self.rename and self.format != "safetensors":
      raise ConfigError("rename: names are those of the state in Orbax's format; use format='safetensors'")
    return self
