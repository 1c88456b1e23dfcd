"""The record of an export: what it was made from, and a hash of each piece of its files, by which it is checked.

`ckpt_jax_export.json` is written last of all. A directory without it is no export: in a bucket one that is unfinished.
The hashes are XXH3 of bytes, since an export is read on other machines, by other programs, in one form only.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator
from typing import Any

import pydantic
import xxhash
from etils import epath

from ckpt_jax.errors import CorruptCheckpointError
from ckpt_jax.run import untrusted
from ckpt_jax.run.checksums import is_intact_file, with_file_digest
from ckpt_jax.run.steps import EXPORT
from ckpt_jax.storage.ranges import Ranges

_BLOCK_NBYTES = 4 << 20
_THREADS = 4
Hashed = tuple[int, str, str]  # bytes of a piece, its hash, and the array that it is of; in the order of the file


@dataclasses.dataclass(frozen=True)
class ExportRecord:
  """What is known of an export.

  Attributes:
    about: run, step, format, dtype, quantize, ...
    tree: containers of JSON with the names of the leaves in their places.
    leaves: by name; `path` in the step, and of quantised ones `bits`, `axis`, `group` and `shape`.
    files: the pieces of each file, by name below the export's directory.
  """

  about: dict[str, Any]
  tree: Any
  leaves: dict[str, dict[str, Any]]
  files: dict[str, list[Hashed]]

  def to_bytes(self) -> bytes:
    """The content of the record's file."""
    return with_file_digest(json.dumps({"format": 1, **dataclasses.asdict(self)}))

  @property
  def nbytes(self) -> int:
    """Bytes of all files but the record's own."""
    return sum(nbytes for pieces in self.files.values() for nbytes, _, _ in pieces)


_record = pydantic.TypeAdapter(ExportRecord)


def read_export(directory: epath.Path) -> ExportRecord | None:
  """The record of an export; None if the directory is none.

  Raises:
    CorruptCheckpointError: if it is damaged.
  """
  file = directory / EXPORT
  try:
    return _record.validate_python(untrusted.read_json(file, is_intact_file))
  except FileNotFoundError:
    return None
  except pydantic.ValidationError as e:
    first = e.errors()[0]
    raise CorruptCheckpointError(f"{file}: damaged ({'.'.join(map(str, first['loc']))}: {first['msg']})") from e


def wrong_files(
  directory: epath.Path, files: dict[str, list[Hashed]], progress: Callable[[int], None] = lambda nbytes: None
) -> Iterator[tuple[str, str, str]]:
  """Reads files of an export and compares them with their hashes: name, array and problem of each piece that differs.

  `progress` is called with the bytes of each file once it is read.

  Raises:
    StorageError: if storage does not answer.
  """
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    ranges = Ranges(directory)
    checks = {name: pool.submit(_wrong_pieces, ranges, name, pieces) for name, pieces in files.items()}
    for name, check in checks.items():
      for tensor, problem in check.result():
        yield name, tensor, problem
      progress(sum(nbytes for nbytes, _, _ in files[name]))


def _wrong_pieces(ranges: Ranges, file: str, pieces: list[Hashed]) -> list[tuple[str, str]]:
  wrong, at = [], 0
  try:
    for nbytes, expected, tensor in pieces:
      found = xxhash.xxh3_64()
      for start in range(at, at + nbytes, _BLOCK_NBYTES):
        found.update(ranges.read(file, start, min(_BLOCK_NBYTES, at + nbytes - start)))
      at += nbytes
      if found.hexdigest() != expected:
        wrong.append((tensor, "its bits are not those that were exported"))
  except FileNotFoundError:
    return [(pieces[0][2], "missing")]
  except EOFError:
    return [*wrong, (tensor, "is cut short")]
  with contextlib.suppress(EOFError):
    ranges.read(file, at, 1)
    wrong.append(("", "is longer than what was exported"))
  return wrong
