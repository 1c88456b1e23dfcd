"""A network link of fixed bandwidth on this machine: a network namespace behind a veth pair that `tc` limits.

Needs root and Debian's iproute2. With it a benchmark can compare a measurement with the known bandwidth.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import subprocess
import uuid
from collections.abc import Iterator

from ckpt_jax.errors import CheckpointError


@dataclasses.dataclass(frozen=True)
class Link:
  """A namespace: commands that start with `prefix` run in it; its address, and that of this side as it sees it."""

  prefix: tuple[str, ...]
  address: str
  here: str


def available() -> bool:
  """Whether this process may make links."""
  return os.geteuid() == 0 and shutil.which("ip") is not None and shutil.which("tc") is not None


@contextlib.contextmanager
def limited_link(mbit: float) -> Iterator[Link]:
  """A link of `mbit` * 10**6 bits per second in each direction while the block runs.

  Raises:
    CheckpointError: if this process may not make one.
  """
  if not available():
    raise CheckpointError("a limited link needs root and iproute2 (ip, tc)")
  name = f"ck{uuid.uuid4().hex[:8]}"
  subnet = f"10.{100 + os.getpid() % 100}.{int(name[-2:], 16)}"
  limit = ["root", "tbf", "rate", f"{mbit}mbit", "burst", "256kb", "latency", "200ms"]
  try:
    _run("ip", "netns", "add", name)
    _run("ip", "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name)
    _run("ip", "addr", "add", f"{subnet}.1/24", "dev", name)
    _run("ip", "link", "set", name, "up")
    _run("ip", "-n", name, "addr", "add", f"{subnet}.2/24", "dev", "eth0")
    _run("ip", "-n", name, "link", "set", "eth0", "up")
    _run("ip", "-n", name, "link", "set", "lo", "up")
    _run("ip", "netns", "exec", name, "tc", "qdisc", "add", "dev", "eth0", *limit)
    _run("tc", "qdisc", "add", "dev", name, *limit)
    yield Link(("ip", "netns", "exec", name), f"{subnet}.2", f"{subnet}.1")
  finally:
    subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
    subprocess.run(["ip", "link", "del", name], capture_output=True, check=False)


def _run(*args: str) -> None:
  done = subprocess.run(args, capture_output=True, text=True, check=False, timeout=30)
  if done.returncode:
    raise CheckpointError(f"{' '.join(args)}: {done.stderr.strip()}")
