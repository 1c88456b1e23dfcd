"""OCDBT databases of a step: whether their nodes are readable, and which file holds which leaf."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Sequence
from typing import Any

import tensorstore as ts
from etils import epath

from ckpt_jax.errors import CorruptCheckpointError, StorageError
from ckpt_jax.failures import is_unreachable, root_cause
from ckpt_jax.layout.homes import read_homes
from ckpt_jax.layout.keys import ARRAY_FILES
from ckpt_jax.orbax.format import ARRAY_METADATAS, MANIFEST, VALUES, is_process_database, process_database
from ckpt_jax.storage import look
from ckpt_jax.storage.clients import kvstore_spec
from ckpt_jax.storage.urls import is_object_store


def check_written(item: epath.Path, processes: Sequence[int]) -> None:
  """Checks that what these processes wrote is in an item, before it is merged and committed.

  Orbax merges whatever databases it finds, even none, and reports success.

  Raises:
    StorageError: naming what is missing.
  """
  deadline = time.monotonic() + (look.PATIENCE_S if len(processes) > 1 else 0.0)
  while missing := [name for name in map(process_database, processes) if not _has_data(item / name)]:
    if time.monotonic() >= deadline:
      verb, it = ("is", "it") if len(missing) == 1 else ("are", "them")
      raise StorageError(
        f"{item}: {', '.join(missing[:5])} {verb} not where TensorStore was to write {it}; nothing was committed. "
        "If the directory's name holds unusual characters, use another one; else the storage loses files"
      )
    time.sleep(0.2)


def check_merged(item: epath.Path) -> None:
  """Checks that the databases of the processes were merged into the item's own.

  Raises:
    StorageError: if they were not.
  """
  if not (item / MANIFEST).exists():
    raise StorageError(f"{item / MANIFEST}: missing after the save; nothing was committed")


def _has_data(database: epath.Path) -> bool:
  if is_object_store(database):
    return database.is_dir()  # one request; a bucket does not lose what it has confirmed
  try:
    with os.scandir(database / VALUES) as values:
      return next(values, None) is not None and (database / MANIFEST).exists()
  except (FileNotFoundError, NotADirectoryError):
    return False


def directories(item: epath.Path) -> list[epath.Path]:
  """The item itself, if it is a database, and the databases of the processes that wrote it, to which it refers."""
  parts = sorted(item / name for name in look.names(item) if is_process_database(name))
  return [item, *parts] if look.exists(item / MANIFEST) else parts


def written(item: epath.Path) -> Iterator[tuple[int, dict[str, int]]]:
  """Each process that wrote into an item: its number, and the bytes of each of its chunks as stored, by key.

  Empty if the step was saved without OCDBT, or was rewritten since.
  """
  parts = {int(name.rpartition("_")[2]): item / name for name in look.names(item) if is_process_database(name)}
  if not parts and is_object_store(item) and look.names(item / ARRAY_METADATAS) == ["process_0"]:
    parts = {0: item}  # the one process of a job writes there what has nothing to be merged with
  for process, path in sorted(parts.items()):
    found = ((key.decode(), nbytes) for key, _, nbytes in _database(path))
    yield process, {key: nbytes for key, nbytes in found if key.rpartition("/")[2] not in ARRAY_FILES}


def unreadable(database: epath.Path) -> str | None:
  """Why the keys of a database, whose manifest and nodes carry checksums, cannot be listed; None if they can.

  Raises:
    StorageError: if storage does not answer, or refuses access.
  """
  if not look.exists(database / MANIFEST):
    return f"{MANIFEST} is missing"  # TensorStore would take it for an empty database
  try:
    ts.KvStore.open({"driver": "ocdbt", "base": _base(database)}).result().list().result()
  except Exception as e:
    if is_unreachable(e):
      raise StorageError(f"{database}: {root_cause(e)}") from e
    return root_cause(e)
  return None


def files_of(item: epath.Path, name: str) -> list[str]:
  """The files, relative to the item, that hold the chunks of a leaf; empty if that cannot be found out.

  `name` is the leaf as it is stored: names separated by dots.
  """
  if not (item / MANIFEST).exists():
    return [name] if (item / name).exists() else []
  prefix = name if name.endswith("/") else f"{name}/"
  try:
    return sorted({file for key, file in files_by_key(item).items() if key.startswith(prefix)})
  except Exception:  # any damage that hides it
    return []


def files_by_key(item: epath.Path) -> dict[str, str]:
  """The file, relative to the item, of each key of its database but for small values, which are in its nodes."""
  return {key.decode(): file for key, file, _ in _database(item) if file}


def linked_keys(database: epath.Path) -> set[str]:
  """The keys in the database of a process that it did not write, since an earlier step had them already."""
  linked = tuple(f"{name}/" for name, home in read_homes(database).items() if home.saves > 1)
  return {key for key, file in files_by_key(database).items() if file.startswith(linked)} if linked else set()


def _database(directory: epath.Path) -> Iterator[tuple[bytes, str, int]]:
  """The keys of a database, each with the file and the bytes of its value; no file for a value within a node.

  Raises:
    CorruptCheckpointError: if a part of it is missing, or cannot be decoded.
    StorageError: if storage does not answer, or refuses access.
  """
  if not look.exists(directory / MANIFEST):  # to TensorStore's readers an empty one
    return
  try:
    base = ts.KvStore.open(_base(directory)).result()
    yield from _values(base, ts.ocdbt.dump(base).result()["versions"][-1]["root"]["location"], b"")
  except Exception as e:
    kind = StorageError if is_unreachable(e) else CorruptCheckpointError
    raise kind(f"{directory}: its keys cannot be listed: {root_cause(e)}") from e


def _values(base: Any, location: str, prefix: bytes) -> Iterator[tuple[bytes, str, int]]:
  for entry in ts.ocdbt.dump(base, location).result()["entries"]:
    key = bytes(entry.get("key", b""))
    if "indirect_value" in entry:
      match = re.fullmatch(r"value:(.*?):(.*):\d+:(\d+)", str(entry["indirect_value"]))
      if match:
        yield prefix + key, match[1] + match[2], int(match[3])
    elif "inline_value" in entry:
      yield prefix + key, "", len(entry["inline_value"])
    elif "location" in entry:
      common = int(entry.get("subtree_common_prefix_length", 0))
      yield from _values(base, entry["location"], prefix + key[:common])


def _base(directory: epath.Path) -> dict[str, Any]:
  return kvstore_spec(str(directory).rstrip("/") + "/")
