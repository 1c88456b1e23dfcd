"""Copies some leaves of a saved state as they lie in storage: chunk by chunk, undecoded, so bit for bit.

Works on the OCDBT databases that Orbax writes by default. Memory is bounded by a few chunks, whatever the state's size.
"""

from __future__ import annotations

import base64
import collections
import concurrent.futures
import json
import zlib
from collections.abc import Callable, Collection
from typing import Any

from etils import epath

from ckpt_jax.errors import CheckpointError, CorruptCheckpointError
from ckpt_jax.layout import text
from ckpt_jax.layout.keys import belongs
from ckpt_jax.orbax.format import (
  ARRAY_METADATAS,
  COMMIT_MARKER,
  ITEM_METADATA,
  MANIFEST,
  SHARDINGS,
  TEXTS,
  TREE,
  key_path,
)
from ckpt_jax.storage import look
from ckpt_jax.storage.clients import kvstore_spec

_AT_ONCE = 4
_BATCH_NBYTES = 256 * 2**20  # of a transaction, which holds what it writes


def leaf_names(item: epath.Path) -> list[tuple[str, ...]]:
  """The leaves of a saved tree, each as the names on the way to it.

  Raises:
    CorruptCheckpointError: if the item's metadata cannot be read.
  """
  return [key_path(entry) for entry in item_metadata(item)[TREE].values()]


def under(names: Collection[tuple[str, ...]], keep: Collection[str]) -> list[tuple[str, ...]]:
  """Those of `names` that lie under one of the paths `keep` (`params`, or `model/params`)."""
  prefixes = [path.strip("/") + "/" for path in keep]
  return [name for name in names if any(f"{'/'.join(name)}/".startswith(p) for p in prefixes)]


def copy_leaves(
  source: epath.Path,
  target: epath.Path,
  names: Collection[tuple[str, ...]],
  *,
  pause: Callable[[], None],
  chunks_of: Collection[tuple[str, ...]] | None = None,
) -> None:
  """Makes `target` an item with the leaves `names` of the item `source`.

  Args:
    source: an item directory, e.g. RUN/STEP/default.
    target: a directory that does not exist.
    names: leaves, as `leaf_names` gives them.
    pause: called between chunks; may wait, or raise to give up.
    chunks_of: those of the leaves whose values are copied; default: all. The others are described only.

  Raises:
    CheckpointError: if `source` is not an OCDBT database.
    CorruptCheckpointError: if a chunk read back differs from what was copied.
  """
  if not (source / MANIFEST).exists():
    raise CheckpointError(f"{source}: not saved through OCDBT; only such steps can be copied in part")
  target.mkdir(parents=True)
  stored = {".".join(name) for name in names}
  _copy_descriptions(source, target, set(names), stored)
  _copy_chunks(source, target, stored if chunks_of is None else {".".join(name) for name in chunks_of}, pause)
  for file in (COMMIT_MARKER,):
    if (source / file).exists():
      (source / file).copy(target / file)


def item_metadata(item: epath.Path) -> dict[str, Any]:
  """The JSON of an item's tree.

  Raises:
    CorruptCheckpointError: if it cannot be read.
  """
  file = item / ITEM_METADATA
  try:
    data = json.loads(look.read_bytes(file))
    if not isinstance(data[TREE], dict):
      raise TypeError("tree_metadata is no object")
  except (ValueError, KeyError, TypeError) as e:
    raise CorruptCheckpointError(f"{file}: cannot be read: {e}") from e
  return data


def _copy_descriptions(source: epath.Path, target: epath.Path, names: set[tuple[str, ...]], stored: set[str]) -> None:
  data = item_metadata(source)
  data[TREE] = {key: entry for key, entry in data[TREE].items() if key_path(entry) in names}
  (target / ITEM_METADATA).write_text(json.dumps(data))
  if (source / SHARDINGS).exists():
    found = json.loads((source / SHARDINGS).read_text())
    (target / SHARDINGS).write_text(json.dumps({k: v for k, v in found.items() if _decoded(k) in stored}))
  if (source / TEXTS).exists():
    (target / TEXTS).write_text(json.dumps(text.select(json.loads((source / TEXTS).read_text()), stored)))
  if (source / ARRAY_METADATAS).exists():
    (target / ARRAY_METADATAS).mkdir()
    for path in (source / ARRAY_METADATAS).iterdir():
      found = json.loads(path.read_text())
      found[ARRAY_METADATAS] = [m for m in found[ARRAY_METADATAS] if m["array_metadata"]["param_name"] in stored]
      (target / ARRAY_METADATAS / path.name).write_text(json.dumps(found))


def _decoded(name: str) -> str:
  return base64.urlsafe_b64decode(name).decode()


def _copy_chunks(source: epath.Path, target: epath.Path, stored: set[str], pause: Callable[[], None]) -> None:
  import tensorstore as ts

  def database(item: epath.Path) -> ts.KvStore:
    spec = {"driver": "ocdbt", "base": kvstore_spec(str(item).rstrip("/") + "/")}
    # What Orbax gives its own databases.
    config = {"max_inline_value_bytes": 1024, "max_decoded_node_bytes": 100_000_000}
    return ts.KvStore.open(spec if item is source else spec | {"config": config}).result()

  old, new = database(source), database(target)
  keys = [key for key in old.list().result() if belongs(key.decode(), stored)]
  sums: dict[bytes, tuple[int, int]] = {}
  written = ts.Transaction()
  held = 0
  pending: collections.deque[tuple[bytes, Any]] = collections.deque()
  for i, key in enumerate(keys):
    pause()
    while len(pending) < _AT_ONCE and i + len(pending) < len(keys):
      ahead = keys[i + len(pending)]
      pending.append((ahead, old.read(ahead)))
    _, read = pending.popleft()
    value = read.result().value
    sums[key] = (len(value), zlib.crc32(value))
    new.with_transaction(written).write(key, value).result()
    held += len(value)
    if held >= _BATCH_NBYTES:
      written.commit_async().result()
      written, held = ts.Transaction(), 0
  written.commit_async().result()

  def check(key: bytes) -> bytes | None:
    value = again.read(key).result().value
    return None if (len(value), zlib.crc32(value)) == sums[key] else key

  again = database(target)
  with concurrent.futures.ThreadPoolExecutor(_AT_ONCE) as pool:
    for bad in pool.map(check, keys):
      pause()
      if bad is not None:
        raise CorruptCheckpointError(f"{target}: {bad.decode()} reads back differently from what was copied")
