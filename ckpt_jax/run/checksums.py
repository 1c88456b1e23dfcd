"""Checksums in the JSON that we write: over our part of a step's metadata, which Orbax writes, and over whole files."""

from __future__ import annotations

import hashlib
import json
from typing import Any

_KEY = "digest"
FILE_KEY = "seal"
_FILE_SEAL = f', "{FILE_KEY}": '.encode()


def sealed(data: dict[str, Any]) -> dict[str, Any]:
  """`data`, JSON-able, with a digest of everything in it."""
  return data | {_KEY: _digest(data)}


def is_intact(data: dict[str, Any]) -> bool:
  """Whether sealed data is as it was; data without a seal counts as intact (older versions wrote none)."""
  return _KEY not in data or data[_KEY] == _digest(data)


def sealed_file(text: str) -> bytes:
  """The text of a JSON object that is not empty, with a digest of it as its last entry, without writing it twice."""
  body = text[:-1].encode()
  return body + _FILE_SEAL + _file_digest(body)


def is_intact_file(content: bytes) -> bool:
  """Whether a sealed file is as it was written; one without a seal counts as intact (older versions wrote none)."""
  body, found, digest = content.rpartition(_FILE_SEAL)
  return not found or digest == _file_digest(body)


def _digest(data: dict[str, Any]) -> str:
  rest = {k: v for k, v in data.items() if k != _KEY}
  return _of(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode())


def _file_digest(body: bytes) -> bytes:
  return f'"{_of(body)}"}}'.encode()


def _of(content: bytes) -> str:
  return hashlib.blake2b(content, digest_size=8).hexdigest()
