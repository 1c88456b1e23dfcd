"""A tree of arrays in Orbax's form without OCDBT: a zarr array for each leaf, whose chunks are files of plain bytes.

    DIRECTORY/_METADATA                  the tree, leaf by leaf
    DIRECTORY/_CHECKPOINT_METADATA       the handler, by which `ocp.Checkpointer` and Orbax v1 know a checkpoint
    DIRECTORY/commit_success.txt         the checkpoint is complete
    DIRECTORY/params.layer.kernel/       .zarray, and one file a chunk: 0.0, 1.0, ...

Orbax writes this with `PyTreeCheckpointHandler(use_ocdbt=False)`. Its files depend on nothing but what is saved.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
import tensorstore as ts

from ckpt_jax.orbax.format import (
  ARRAY_TYPES,
  BEGUN_AT,
  COMMIT_MARKER,
  COMMITTED_AT,
  CUSTOM,
  ITEM_HANDLERS,
  ITEM_METADATA,
  KEY,
  KEY_TYPE,
  KEYS,
  STEP_METADATA,
  TREE,
  USE_OCDBT,
  USE_ZARR3,
  VALUE,
  VALUE_TYPE,
)

_HANDLER = "orbax.checkpoint._src.handlers.pytree_checkpoint_handler.PyTreeCheckpointHandler"
_SEQUENCE, _DICT = 1, 2  # types of keys
_CHUNK_NBYTES = 64 << 20  # a process that needs a part of an array reads whole chunks
_MOST_CHUNKS = 4  # times as many as would suffice, where the length has few divisors


def describing_files(paths: Iterable[Sequence[Any]], at_ns: int) -> dict[str, bytes]:
  """The files that describe a tree, by name; `commit_success.txt` is the last one to write.

  Args:
    paths: of the leaves, as keys of jax; dicts and sequences alone.
    at_ns: when the step that they come from was committed, in nanoseconds since the epoch: the same in each export.
  """
  tree = {}
  for path in paths:
    sequences = [isinstance(key, jax.tree_util.SequenceKey) for key in path]
    names = [str(key.idx if is_one else key.key) for key, is_one in zip(path, sequences, strict=True)]
    keys = [{KEY: name, KEY_TYPE: _SEQUENCE if s else _DICT} for name, s in zip(names, sequences, strict=True)]
    tree[str(tuple(names))] = {KEYS: keys, VALUE: {VALUE_TYPE: ARRAY_TYPES[1], "skip_deserialize": False}}
  item = {TREE: tree, USE_OCDBT: False, USE_ZARR3: False, "store_array_data_equal_to_fill_value": True, CUSTOM: None}
  step = {ITEM_HANDLERS: _HANDLER, "metrics": {}, "performance_metrics": {}, BEGUN_AT: at_ns, COMMITTED_AT: at_ns}
  return {
    ITEM_METADATA: json.dumps(item).encode(),
    STEP_METADATA: json.dumps(step | {CUSTOM: {}}).encode(),
    COMMIT_MARKER: b"Checkpoint commit was successful",
  }


def array_files(name: str, shape: Sequence[int], dtype: np.dtype) -> tuple[tuple[str, bytes], list[tuple[str, int]]]:
  """Name and content of the file that describes an array, and names and bytes of those of its chunks, in C order.

  Chunks are cut along the first axis, into equal parts of at most 64 MiB if its length has such divisors.
  """
  parts = _parts(shape, dtype.itemsize)
  chunks = [max(1, n) for n in shape]
  if parts > 1:
    chunks[0] //= parts
  data = {
    "chunks": chunks,
    "compressor": None,
    "dimension_separator": ".",
    "dtype": _zarr_name(dtype),
    "fill_value": None,
    "filters": None,
    "order": "C",
    "shape": list(shape),
    "zarr_format": 2,
  }
  nbytes = math.prod(shape) * dtype.itemsize
  names = [".".join([str(i), *["0"] * (len(shape) - 1)]) for i in range(parts)]
  files = [(f"{name}/{chunk}", nbytes // parts) for chunk in names] if nbytes else []
  return (f"{name}/.zarray", json.dumps(data).encode()), files


def is_storable(dtype: np.dtype) -> bool:
  """Whether zarr 2 has a name for a dtype."""
  try:
    return bool(_zarr_name(dtype))
  except (ValueError, TypeError):
    return False


def _zarr_name(dtype: np.dtype) -> str:
  """The name of a dtype in zarr 2; TensorStore has names of its own for those of ml_dtypes."""
  return dtype.str.replace("=", "<") if dtype.kind in "biufc" else ts.dtype(dtype).name


def _parts(shape: Sequence[int], itemsize: int) -> int:
  wanted = -(-math.prod(shape) * itemsize // _CHUNK_NBYTES)
  if wanted < 2:
    return 1
  return next((n for n in range(wanted, _MOST_CHUNKS * wanted + 1) if shape[0] % n == 0), 1)
