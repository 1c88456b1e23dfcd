"""The codec of each leaf: by its kind, and in the words of zarr.

`zstd` is Orbax's default. `shuffled` stores the first bytes of all numbers of a block, then the second ones, and so on,
and applies zstd to that: signs and exponents of weights are alike, and are no longer buried in the noise of their
mantissas. It is zarr's `blosc` codec, which plain Orbax reads as well as any other.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

from ckpt_jax.layout.encoding import dtype_name

OFF, ZSTD, SHUFFLED = "off", "zstd", "shuffled"
Compression = str | Mapping[str, str]  # `layout.compression`: of all leaves, or of each kind; other kinds are off
# The most that c-blosc 1 compresses at a time: INT_MAX, less a header of 16 bytes.
SHUFFLE_LIMIT = 2**31 - 1 - 16
# Numbers in a block: each of their bytes fills two of zstd's blocks, whose statistics then are those of one byte alone.
# c-blosc's own choice is 32 KiB, where nothing is gained over zstd.
_BLOCK_ITEMS = 2**18
# What optax and others call the values that an optimizer keeps for each parameter.
_ROLES = frozenset(
  ("mu", "nu", "trace", "momentum", "ema", "v_row", "v_col", "sum_of_squares", "exp_avg", "exp_avg_sq")
)
_OPTIMIZERS = frozenset(("opt", "opt_state", "optimizer", "optimizer_state"))


@functools.lru_cache(maxsize=1 << 16)
def kind_of(name: str, dtype: Any) -> str:
  """The kind of a leaf, whose values compress alike: `float32`, `embeddings bfloat16`, `mu float32`.

  A parameter's kind is its dtype alone, wherever it is; an optimizer's values have their name before it.

  Args:
    name: its path, joined by slashes or dots.
    dtype: of its array.
  """
  keys = name.replace("/", ".").split(".")
  role = next((key for key in keys if key in _ROLES), "optimizer" * bool(_OPTIMIZERS.intersection(keys)))
  embeds = any("embed" in key.lower() for key in keys)
  return " ".join(filter(None, (role, "embeddings" * embeds, dtype_name(dtype))))


def codec_of(compression: Compression, name: str, dtype: Any) -> str:
  """OFF, ZSTD or SHUFFLED for a leaf; numbers of one byte have nothing to shuffle."""
  found = codec_of_kind(compression, "" if isinstance(compression, str) else kind_of(name, dtype))
  return ZSTD if found == SHUFFLED and dtype.itemsize == 1 else found


def codec_of_kind(compression: Compression, kind: str) -> str:
  """OFF, ZSTD or SHUFFLED for the leaves of a kind. Without a plan, `auto` is off."""
  if isinstance(compression, str):
    return {"on": SHUFFLED, "auto": OFF}.get(compression, compression)
  return compression.get(kind, OFF)


def set_codec(metadata: dict[str, Any], codec: str, itemsize: int) -> None:
  """Puts a codec into the zarr metadata of an array, of version 2 or 3, as Orbax composes it.

  Chunks beyond `SHUFFLE_LIMIT`, which a plan does not make, get zstd in place of `shuffled`.
  """
  settings = {"cname": "zstd", "clevel": 1, "blocksize": _BLOCK_ITEMS * itemsize}
  if codec == SHUFFLED and math.prod(chunk_shape(metadata)) * itemsize > SHUFFLE_LIMIT:
    codec = ZSTD
  if "compressor" in metadata:
    by_name = {ZSTD: {"id": "zstd", "level": 1}, SHUFFLED: {"id": "blosc", "shuffle": 1, **settings}}
    metadata["compressor"] = by_name.get(codec)
    return
  chain = metadata["codecs"][0]["configuration"]["codecs"]  # of the chunks within a shard; the first one makes bytes
  shuffled = {"shuffle": "shuffle", "typesize": itemsize, **settings}
  named = {ZSTD: ("zstd", {"level": 1}), SHUFFLED: ("blosc", shuffled)}.get(codec)
  chain[1:] = [{"name": named[0], "configuration": named[1]}] if named else []


def chunk_shape(metadata: Mapping[str, Any]) -> tuple[int, ...]:
  """The shape of the chunks that the zarr metadata of an array describes."""
  return tuple(metadata["chunks"] if "chunks" in metadata else metadata["chunk_grid"]["configuration"]["chunk_shape"])
