"""A checksum over our part of a step's JSON: Orbax's metadata files carry none."""

from __future__ import annotations

import hashlib
import json
from typing import Any

_KEY = "digest"


def sealed(data: dict[str, Any]) -> dict[str, Any]:
  """`data`, JSON-able, with a digest of everything in it."""
  return data | {_KEY: _digest(data)}


def is_intact(data: dict[str, Any]) -> bool:
  """Whether sealed data is as it was; data without a seal counts as intact (older versions wrote none)."""
  return _KEY not in data or data[_KEY] == _digest(data)


def _digest(data: dict[str, Any]) -> str:
  rest = {k: v for k, v in data.items() if k != _KEY}
  text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
  return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
