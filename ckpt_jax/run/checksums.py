"""Digests in the JSON that ckpt_jax writes: of its part of a step's metadata, and of whole files.

Data and files without a digest count as intact, since older versions wrote none.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

_KEY = "digest"
FILE_KEY = "seal"
_FILE_DIGEST = f', "{FILE_KEY}": '.encode()


def with_digest(data: dict[str, Any]) -> dict[str, Any]:
  """`data`, which JSON can hold, and a digest of everything in it."""
  return data | {_KEY: _digest(data)}


def is_intact(data: dict[str, Any]) -> bool:
  """Whether data fits its digest."""
  return _KEY not in data or data[_KEY] == _digest(data)


def with_file_digest(text: str) -> bytes:
  """The text of a JSON object that is not empty, with a digest of the text as its last entry."""
  body = text[:-1].encode()
  return body + _FILE_DIGEST + _file_digest(body)


def is_intact_file(content: bytes) -> bool:
  """Whether the content of a file fits its digest."""
  body, found, digest = content.rpartition(_FILE_DIGEST)
  return not found or digest == _file_digest(body)


def _digest(data: dict[str, Any]) -> str:
  rest = {k: v for k, v in data.items() if k != _KEY}
  return _of(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode())


def _file_digest(body: bytes) -> bytes:
  return f'"{_of(body)}"}}'.encode()


def _of(content: bytes) -> str:
  return hashlib.blake2b(content, digest_size=8).hexdigest()
