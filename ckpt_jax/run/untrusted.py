"""Checks of the JSON in a checkpoint, made before Orbax reads it, because a checkpoint may come from anywhere.

Nothing in a checkpoint is ever run or unpickled. What remains for a hostile or damaged one is to name files elsewhere,
to nest without end, and to claim more than memory holds. Each of these raises CorruptCheckpointError in bounded time
and memory.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable
from typing import Any

from etils import epath

from ckpt_jax.errors import CorruptCheckpointError
from ckpt_jax.orbax.format import KEY, KEYS, TREE, VALUE
from ckpt_jax.storage import look

# A state of a million leaves takes 300 MB of `_METADATA`; the Python objects take several times as much.
MAX_JSON_BYTES = 1 << 30
MAX_DEPTH = 200  # jax and Orbax recurse over trees
# zstd stores 128 KiB of zeros in 4 bytes at best (RFC 8878, RLE blocks).
MAX_COMPRESSION = 1 << 15
FREE_CLAIM = 1 << 30  # bytes that any file may claim: too few to do harm


def read_json(file: epath.Path, is_intact: Callable[[bytes], bool] = lambda text: True) -> Any:
  """The content of a JSON file, if `is_intact` finds its bytes as they were written.

  Raises:
    FileNotFoundError: if it does not exist.
    StorageError: if it cannot be read for now.
    CorruptCheckpointError: if it is not JSON, or larger or deeper than that of any checkpoint.
  """
  if (size := look.file_nbytes(file)) > MAX_JSON_BYTES:
    raise CorruptCheckpointError(f"{file}: {size / 1e9:.1f} GB of JSON; no checkpoint has as much")
  try:
    text = look.read_bytes(file)
  except FileNotFoundError:
    if os.path.isdir(file):
      raise CorruptCheckpointError(f"{file}: not JSON: a directory is in its place") from None
    raise
  try:
    data = json.loads(text)
  except RecursionError:
    raise CorruptCheckpointError(f"{file}: not JSON of a checkpoint: nested too deep") from None
  except ValueError as e:  # UnicodeDecodeError and integers of thousands of digits among them
    raise CorruptCheckpointError(f"{file}: not JSON: {e}") from e
  if not is_intact(text):
    raise CorruptCheckpointError(f"{file}: its bits are not those that were written")
  return data


def check_name(name: str) -> str | None:
  """The problem with the name of a leaf or subtree, from which Orbax builds paths; None if there is none."""
  if name.startswith("/") or ".." in name.split("/") or "\0" in name:
    return f"the name {name!r} leads out of the checkpoint"
  return None


def check_object(data: Any, where: str) -> None:
  """Raises CorruptCheckpointError if `data` is not a JSON object."""
  if not isinstance(data, dict):
    raise CorruptCheckpointError(f"{where}: expected a JSON object, found {data!r:.60}")


def check_tree(data: Any, where: str) -> None:
  """Checks Orbax's `_METADATA`: a name and a type for each leaf.

  Raises:
    CorruptCheckpointError: naming the entry.
  """
  check_object(data, where)
  tree = data.get(TREE, {})
  check_object(tree, f"{where}: {TREE}")
  for name, entry in tree.items():
    if (problem := _entry_problem(entry)) is not None:
      raise CorruptCheckpointError(f"{where}: the entry {name!r:.80} {problem:.150}")


def _entry_problem(entry: Any) -> str | None:
  if not isinstance(entry, dict):
    return "is not a JSON object"
  keys, value = entry.get(KEYS), entry.get(VALUE)
  if not isinstance(keys, list) or not isinstance(value, dict):
    return f"has no {KEYS} or no {VALUE}"
  if len(keys) > MAX_DEPTH:
    return f"is nested {len(keys)} deep; {MAX_DEPTH} is the limit"
  for key in keys:
    if not isinstance(key, dict) or not isinstance(key.get(KEY), (str, int)):
      return "has a key that is not a name"
    if problem := check_name(str(key[KEY])):
      return f"is refused: {problem}"
  return None


def claimed_bytes(shapes: Iterable[tuple[Any, int]], where: str) -> int:
  """Bytes of arrays with these shapes and item sizes.

  Raises:
    CorruptCheckpointError: if a shape is not one.
  """
  total = 0
  for shape, itemsize in shapes:
    if not isinstance(shape, (list, tuple)) or not all(isinstance(n, int) and 0 <= n < 2**63 for n in shape):
      raise CorruptCheckpointError(f"{where}: {shape!r:.80} is not the shape of an array")
    total += math.prod(shape) * itemsize
  return total


def check_claim(claimed: int, stored: int, where: str) -> None:
  """Raises CorruptCheckpointError if files of `stored` bytes cannot hold arrays of `claimed` bytes."""
  if claimed > FREE_CLAIM + stored * MAX_COMPRESSION:
    raise CorruptCheckpointError(
      f"{where}: claims {claimed / 1e9:.0f} GB of arrays in files of {stored / 1e6:.3f} MB; no compression "
      "achieves that"
    )
