"""OCDBT databases of a step: are their nodes readable, and which file holds which leaf."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epath

from ckpt_jax.errors import StorageError
from ckpt_jax.failures import is_unreachable, root_cause
from ckpt_jax.orbax.format import MANIFEST, VALUES, is_process_database, process_database
from ckpt_jax.storage import look
from ckpt_jax.storage.clients import kvstore_spec
from ckpt_jax.storage.urls import is_object_store

_PATIENCE_S = 60.0  # for what another host wrote: NFS may answer from a cache of a directory for so long


def check_written(item: epath.Path, processes: Sequence[int]) -> None:
  """Sees to it that what processes wrote lies in the item, before it is merged and committed: Orbax merges the
  databases that it finds, none too, and takes that for success.

  Args:
    item: the item, not committed yet.
    processes: those that wrote arrays.

  Raises:
    StorageError: naming what is missing.
  """
  deadline = time.monotonic() + (_PATIENCE_S if len(processes) > 1 else 0.0)
  while missing := [name for name in map(process_database, processes) if not _has_data(item / name)]:
    if time.monotonic() >= deadline:
      raise StorageError(
        f"{item}: {', '.join(missing[:5])} {'is' if len(missing) == 1 else 'are'} not where TensorStore was to write "
        f"{'it' if len(missing) == 1 else 'them'}; nothing was committed. If the directory's name holds unusual "
        "characters, use another one; else the storage loses files"
      )
    time.sleep(0.2)


def check_merged(item: epath.Path) -> None:
  """Sees to it that the databases of the processes were merged into the item's own.

  Raises:
    StorageError: if they were not.
  """
  if not (item / MANIFEST).exists():
    raise StorageError(f"{item / MANIFEST}: is missing after the save; nothing was committed")


def _has_data(database: epath.Path) -> bool:
  if is_object_store(database):
    return database.is_dir()  # one request; a bucket does not lose what it has confirmed
  try:
    with os.scandir(database / VALUES) as values:
      return next(values, None) is not None and (database / MANIFEST).exists()
  except (FileNotFoundError, NotADirectoryError):
    return False


def directories(item: epath.Path) -> list[epath.Path]:
  """The item itself, if it is a database, and those of the processes that wrote it, which it refers to."""
  parts = sorted(item / name for name in look.names(item) if is_process_database(name))
  return [item, *parts] if look.exists(item / MANIFEST) else parts


def unreadable(database: epath.Path) -> str | None:
  """Why the keys of a database cannot be listed; its manifest and nodes carry checksums. None if they can.

  Raises:
    StorageError: if storage does not answer, or does not let us in.
  """
  import tensorstore as ts

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
  """The files, relative to the item, that hold the chunks of a leaf; empty where that cannot be told.

  Args:
    item: the item's directory.
    name: the leaf as it is stored: names with dots between.
  """
  if not (item / MANIFEST).exists():
    return [name] if (item / name).exists() else []
  prefix = (name if name.endswith("/") else f"{name}/").encode()
  try:
    return sorted({file for key, file in _values(item) if key.startswith(prefix)})
  except Exception:  # whatever damage hides it
    return []


def _values(item: epath.Path) -> Iterator[tuple[bytes, str]]:
  """The keys of a database whose values lie outside its nodes, and in which file."""
  import tensorstore as ts

  base = ts.KvStore.open(_base(item)).result()
  versions = ts.ocdbt.dump(base).result()["versions"]
  yield from _below(base, versions[-1]["root"]["location"], b"")


def _below(base: Any, location: str, prefix: bytes) -> Iterator[tuple[bytes, str]]:
  import tensorstore as ts

  node = ts.ocdbt.dump(base, location).result()
  for entry in node["entries"]:
    key = prefix + bytes(entry.get("key", b""))
    if "indirect_value" in entry:
      match = re.fullmatch(r"value:(.*?):(.*):\d+:\d+", str(entry["indirect_value"]))
      if match:
        yield key, match[1] + match[2]
    elif "location" in entry:
      common = int(entry.get("subtree_common_prefix_length", 0))
      yield from _below(base, entry["location"], prefix + bytes(entry.get("key", b""))[:common])


def _base(directory: epath.Path) -> dict[str, Any]:
  return kvstore_spec(str(directory).rstrip("/") + "/")
