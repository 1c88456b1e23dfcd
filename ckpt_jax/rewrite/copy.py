"""Copies leaves of a saved state bit for bit, chunk by chunk, without decoding them.

Works on the OCDBT databases that Orbax writes by default, in memory for a few chunks. What several steps share stays
shared.
"""

from __future__ import annotations

import base64
import collections
import concurrent.futures
import contextlib
import json
import zlib
from collections.abc import Callable, Collection
from typing import Any

from etils import epath

from ckpt_jax.errors import CheckpointError, CorruptCheckpointError
from ckpt_jax.integrity.databases import files_by_key
from ckpt_jax.layout import text
from ckpt_jax.layout.keys import UNCHANGED, bounds, owner
from ckpt_jax.layout.stored import tree_entries
from ckpt_jax.orbax import format as fmt
from ckpt_jax.storage import look
from ckpt_jax.storage.clients import kvstore_spec
from ckpt_jax.storage.clone import CloneError, clone, stamp
from ckpt_jax.storage.page_cache import write_behind

_AT_ONCE = 4
_BATCH_NBYTES = 256 * 2**20  # of a transaction, which holds what it writes


def leaf_names(item: epath.Path) -> list[tuple[str, ...]]:
  """The leaves of a saved tree, each as the keys that lead to it.

  Raises:
    CorruptCheckpointError: if the item's metadata cannot be read.
  """
  return list(map(fmt.key_path, tree_entries(item)[1]))


def copy_leaves(
  source: epath.Path,
  target: epath.Path,
  names: Collection[tuple[str, ...]],
  *,
  pause: Callable[[], None],
  chunks_of: Collection[tuple[str, ...]] | None = None,
) -> None:
  """Makes `target`, which does not exist, an item with the leaves `names` of the item `source`.

  `pause` is called between chunks, and may wait, or raise to give up. `chunks_of` are the leaves whose values are
  copied too; default: all.

  Raises:
    CheckpointError: if `source` is not an OCDBT database.
    CorruptCheckpointError: if a chunk read back differs from what was copied.
  """
  if not (source / fmt.MANIFEST).exists():
    raise CheckpointError(
      f"{source}: not saved through OCDBT; only such steps can be copied in part", topic="rewriting-steps"
    )
  target.mkdir(parents=True)
  stored = {".".join(name) for name in names}
  _copy_descriptions(source, target, set(names), stored)
  with write_behind(target / fmt.VALUES):
    _copy_chunks(source, target, stored if chunks_of is None else {".".join(name) for name in chunks_of}, pause)
  if (source / fmt.COMMIT_MARKER).exists():
    (source / fmt.COMMIT_MARKER).copy(target / fmt.COMMIT_MARKER)


def _copy_descriptions(source: epath.Path, target: epath.Path, names: set[tuple[str, ...]], stored: set[str]) -> None:
  """Copies the files beside the database, reduced to some leaves."""
  data, _ = tree_entries(source)
  data[fmt.TREE] = {key: entry for key, entry in data[fmt.TREE].items() if fmt.key_path(entry) in names}
  (target / fmt.ITEM_METADATA).write_text(json.dumps(data))

  def shardings(found: Any) -> Any:
    return {k: v for k, v in found.items() if base64.urlsafe_b64decode(k).decode() in stored}

  def array_metadatas(found: Any) -> Any:
    kept = [m for m in found[fmt.ARRAY_METADATAS] if m["array_metadata"]["param_name"] in stored]
    return found | {fmt.ARRAY_METADATAS: kept}

  reduced = {fmt.SHARDINGS: shardings, fmt.TEXTS: lambda found: text.select(found, stored)}
  for name in look.names(source / fmt.ARRAY_METADATAS):
    (target / fmt.ARRAY_METADATAS).mkdir(exist_ok=True)
    reduced[f"{fmt.ARRAY_METADATAS}/{name}"] = array_metadatas
  for file, reduce in reduced.items():
    if (source / file).exists():
      (target / file).write_text(json.dumps(reduce(json.loads((source / file).read_text()))))


def _copy_chunks(source: epath.Path, target: epath.Path, stored: set[str], pause: Callable[[], None]) -> None:
  import tensorstore as ts

  def database(item: epath.Path, context: Any = None) -> ts.KvStore:
    spec = {"driver": "ocdbt", "base": kvstore_spec(str(item).rstrip("/") + "/")}
    # As Orbax configures its databases.
    config = {"max_inline_value_bytes": 1024, "max_decoded_node_bytes": 100_000_000}
    context = context or ts.Context({"file_io_mode": {"mode": "direct"}})  # of reads; see `description.ONCE`
    return ts.KvStore.open(spec if item is source else spec | {"config": config}, context=context).result()

  old, new = database(source), database(target)
  linked = _link_homes(source, target, stored, database)
  keys = [key for key in old.list().result() if key not in linked and owner(key.decode(), stored) is not None]
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


def _link_homes(
  source: epath.Path, target: epath.Path, stored: set[str], database: Callable[[epath.Path, Any], Any]
) -> set[bytes]:
  """Takes over leaves that do not change (see `layout.unchanged`) with the files of their homes; returns their keys.

  Their bytes are in other steps too, so that a copy would take more room than the step that it replaces. A home of
  which fewer than half of the leaves are wanted is left out.
  """
  import tensorstore as ts

  homes: dict[str, dict[str, str | None]] = collections.defaultdict(dict)  # directory -> key -> leaf
  for key, file in files_by_key(source).items():
    parts = file.split("/")
    if (at := next((i for i, part in enumerate(parts) if part.startswith(UNCHANGED)), None)) is not None:
      homes["/".join(parts[: at + 1])][key] = owner(key, stored)
  found: set[bytes] = set()
  for number, (directory, keys) in enumerate(homes.items(), 1):
    leaves = {leaf for leaf in keys.values() if leaf}
    if 2 * sum(leaf is not None for leaf in keys.values()) < len(keys):
      continue
    home, there = source / directory, target / f"{UNCHANGED}{number}"
    try:
      clone(home, there, {str(file.relative_to(home)): stamp(file) for file in look.files_below(home)})
    except CloneError:
      with contextlib.suppress(FileNotFoundError):
        there.rmtree()
      continue
    context = ts.Context()  # references are taken over within one alone
    for leaf in sorted(leaves):
      only = ts.KvStore.KeyRange(*bounds(leaf))
      database(there, context).experimental_copy_range_to(database(target, context), source_range=only).result()
    found |= {key.encode() for key, leaf in keys.items() if leaf}
  return found
