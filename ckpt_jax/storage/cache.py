"""What was measured on this host, kept for later processes in $XDG_CACHE_HOME/ckpt_jax (default: ~/.cache/ckpt_jax)."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pathlib
from collections.abc import Mapping
from typing import Any

_log = logging.getLogger(__name__)


def recall(kind: str, key: str) -> dict[str, Any] | None:
  """The measurement of this kind that `remember` stored on this host under `key`, or None."""
  try:
    found = json.loads(_file(kind, key).read_text())
  except (OSError, ValueError):
    return None
  return found if isinstance(found, dict) else None


def remember(kind: str, key: str, measured: Mapping[str, Any]) -> None:
  """Stores a measurement for later processes on this host; a read-only home directory only costs the memory of it."""
  try:
    file = _file(kind, key)
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_suffix(f".{os.getpid()}.tmp")
    new.write_text(json.dumps(measured))
    new.replace(file)
  except OSError as e:
    _log.info("the measurement of the %s is not kept for later processes: %s", kind, e)


def boot_id() -> str:
  """The running kernel, the same in all containers of a host; the host's name where there is no such id."""
  try:
    return pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
  except OSError:
    return os.uname().nodename


def _file(kind: str, key: str) -> pathlib.Path:
  root = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
  digest = hashlib.sha256(f"{os.uname().nodename}\n{key}".encode()).hexdigest()[:20]
  return root / "ckpt_jax" / "profiles" / f"{kind}-{digest}.json"
