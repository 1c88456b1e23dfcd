"""Checkpoints come from anywhere: what their JSON may hold, checked before Orbax is handed it.

Nothing in a checkpoint is ever run or unpickled; what is left to a hostile or damaged one is to name files elsewhere,
to nest without end, and to claim more than memory holds. Each is a CorruptCheckpointError here, in bounded time and
memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from typing import Any

from etils import epath

from ckpt_jax.errors import CorruptCheckpointError
from ckpt_jax.orbax.format import BEGUN_AT, COMMITTED_AT, CUSTOM, ITEM_HANDLERS, KEYS, TREE, VALUE
from ckpt_jax.storage import look

# A state of a million leaves takes 300 MB of `_METADATA`; Python's objects take several times the text.
MAX_JSON_BYTES = 1 << 30
MAX_DEPTH = 200  # jax and Orbax recurse over trees
# zstd stores 128 KiB of zeros in 4 bytes at best (RFC 8878, RLE blocks).
MAX_COMPRESSION = 1 << 15
FREE_CLAIM = 1 << 30  # what any file may claim: too little to harm
_LAST_NS = 253402300799 * 10**9  # the end of the year 9999, where datetime ends


def read_json(file: epath.Path, is_intact: Callable[[bytes], bool] = lambda text: True) -> Any:
  """The content of a JSON file.

  Args:
    file: where it is.
    is_intact: whether a text is as it was written.

  Raises:
    FileNotFoundError: if it is not there.
    StorageError: if it cannot be read for now.
    CorruptCheckpointError: if it is no JSON, or too large or too deep for one that was saved.
  """
  if (size := look.file_nbytes(file)) > MAX_JSON_BYTES:
    raise CorruptCheckpointError(f"{file}: {size / 1e9:.1f} GB of JSON; no checkpoint has as much")
  text = look.read_bytes(file)
  try:
    data = json.loads(text)
    if not is_intact(text):
      raise CorruptCheckpointError(f"{file}: its bits are not those that were written")
    return data
  except RecursionError:
    raise CorruptCheckpointError(f"{file}: not JSON of a checkpoint: nested too deep") from None
  except ValueError as e:  # UnicodeDecodeError and integers of thousands of digits among them
    raise CorruptCheckpointError(f"{file}: not JSON: {e}") from e


def check_name(name: str) -> str | None:
  """What is wrong with the name of a leaf or subtree, which Orbax makes paths of; None if nothing is."""
  if name.startswith("/") or ".." in name.split("/") or "\0" in name:
    return f"the name {name!r} leads out of the checkpoint"
  return None


def check_step_metadata(data: Any, where: str) -> None:
  """What Orbax's manager reads of each step when a run is opened; one step that it cannot read would stop it.

  Raises:
    CorruptCheckpointError: naming the entry.
  """
  if not isinstance(data, dict):
    raise CorruptCheckpointError(f"{where}: expected a JSON object")
  for key in (BEGUN_AT, COMMITTED_AT):
    stamp = data.get(key)
    if stamp is not None and not (isinstance(stamp, int) and not isinstance(stamp, bool) and 0 <= stamp <= _LAST_NS):
      raise CorruptCheckpointError(f"{where}: {key} is {stamp!r:.60}, no time")
  for key in (CUSTOM, "metrics", "performance_metrics"):
    _expect(data, key, dict, where)
  handlers = data.get(ITEM_HANDLERS)
  if handlers is not None and not isinstance(handlers, (str, dict)):
    raise CorruptCheckpointError(f"{where}: item_handlers is {handlers!r:.60}")
  if isinstance(handlers, dict) and not all(isinstance(v, str) for v in handlers.values()):
    raise CorruptCheckpointError(f"{where}: item_handlers holds something else than names")
  numbers = data.get("performance_metrics") or {}
  if not all(isinstance(v, (int, float)) or v is None for v in numbers.values()):
    raise CorruptCheckpointError(f"{where}: performance_metrics holds something else than numbers")


def check_metrics(data: Any, where: str) -> None:
  """Raises CorruptCheckpointError if a metrics file holds something else than an object."""
  if not isinstance(data, dict):
    raise CorruptCheckpointError(f"{where}: expected a JSON object of metrics")


def check_tree(data: Any, where: str) -> None:
  """Orbax's `_METADATA`: a name and a type for each leaf.

  Raises:
    CorruptCheckpointError: naming the entry.
  """
  if not isinstance(data, dict):
    raise CorruptCheckpointError(f"{where}: expected a JSON object")
  tree = data.get(TREE, {})
  if not isinstance(tree, dict):
    raise CorruptCheckpointError(f"{where}: tree_metadata is no JSON object")
  for name, entry in tree.items():
    if not isinstance(entry, dict):
      raise CorruptCheckpointError(f"{where}: the entry {name!r:.80} is no JSON object")
    keys, value = entry.get(KEYS), entry.get(VALUE)
    if not isinstance(keys, list) or not isinstance(value, dict):
      raise CorruptCheckpointError(f"{where}: the entry {name!r:.80} has no key_metadata or value_metadata")
    if len(keys) > MAX_DEPTH:
      raise CorruptCheckpointError(
        f"{where}: the entry {name!r:.80} is nested {len(keys)} deep; {MAX_DEPTH} is the limit"
      )
    for key in keys:
      if not isinstance(key, dict) or not isinstance(key.get("key"), (str, int)):
        raise CorruptCheckpointError(f"{where}: the entry {name!r:.80} has a key that is no name")
      if problem := check_name(str(key["key"])):
        raise CorruptCheckpointError(f"{where}: {problem}")


def _expect(data: dict[str, Any], key: str, kind: type, where: str) -> None:
  if data.get(key) is not None and not isinstance(data[key], kind):
    raise CorruptCheckpointError(f"{where}: {key} is {data[key]!r:.60}, expected a {kind.__name__}")


def claimed_bytes(shapes: Iterable[tuple[Any, int]], where: str) -> int:
  """Bytes that arrays of these shapes and item sizes take.

  Raises:
    CorruptCheckpointError: if a shape is none.
  """
  total = 0
  for shape, itemsize in shapes:
    if not isinstance(shape, (list, tuple)) or not all(isinstance(n, int) and 0 <= n < 2**63 for n in shape):
      raise CorruptCheckpointError(f"{where}: the shape {shape!r:.80} is none")
    total += math.prod(shape) * itemsize
  return total


def check_claim(claimed: int, stored: int, where: str) -> None:
  """Raises CorruptCheckpointError if files of `stored` bytes cannot hold arrays of `claimed`."""
  if claimed > FREE_CLAIM + stored * MAX_COMPRESSION:
    raise CorruptCheckpointError(
      f"{where}: claims {claimed / 1e9:.0f} GB of arrays in files of {stored / 1e6:.3f} MB; no compression "
      "gives as much"
    )
