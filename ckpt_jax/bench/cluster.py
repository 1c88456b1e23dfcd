"""Several hosts and a storage host on this machine: network namespaces on a bridge, the storage's link limited by `tc`.

Needs root and Debian's iproute2. Each host has an address and a hostname of its own, so that jobs find each other as
they do on a cluster; all share this machine's cores and memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import shutil
import subprocess
import uuid
from collections.abc import Iterator

from ckpt_jax.bench.link import available, command, limit, namespace
from ckpt_jax.errors import CheckpointError

__all__ = ["Cluster", "Host", "available", "cluster"]


@dataclasses.dataclass(frozen=True)
class Host:
  """A namespace: its address, and the prefix of commands that run in it."""

  name: str
  address: str
  prefix: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Cluster:
  """Hosts and their storage.

  Attributes:
    hosts: where jobs run.
    storage: where a bucket server runs; its link is limited, hosts reach each other without a limit.
  """

  hosts: tuple[Host, ...]
  storage: Host

  def storage_nbytes(self) -> tuple[int, int]:
    """Bytes that storage has sent and received so far, by the counters of its interface, headers included."""
    counters = pathlib.Path("/sys/class/net") / self.storage.name / "statistics"
    # The other end of the pair: what arrives here was sent by the storage host.
    return int((counters / "rx_bytes").read_text()), int((counters / "tx_bytes").read_text())


@contextlib.contextmanager
def cluster(hosts: int, mbit: float) -> Iterator[Cluster]:
  """A cluster that exists while the block runs.

  Args:
    hosts: how many, at most 200.
    mbit: 10**6 bits per second that storage sends and receives.

  Raises:
    CheckpointError: if this process may not make one.
  """
  if not available():
    raise CheckpointError("hosts of their own need root and iproute2 (ip, tc): apt-get install iproute2")
  if not 1 <= hosts <= 200:
    raise CheckpointError(f"{hosts} hosts: between 1 and 200 fit into one network")
  tag = uuid.uuid4().hex[:5]
  subnet = f"10.{180 + os.getpid() % 60}.{int(tag[:2], 16)}"
  bridge = f"ck{tag}br"
  with contextlib.ExitStack() as stack:
    stack.callback(subprocess.run, ["ip", "link", "del", bridge], capture_output=True, check=False)
    command("ip", "link", "add", bridge, "type", "bridge")
    command("ip", "addr", "add", f"{subnet}.1/24", "dev", bridge)
    command("ip", "link", "set", bridge, "up")
    storage = stack.enter_context(_host(f"ck{tag}st", f"{subnet}.2", bridge))
    limit(storage.name, mbit, "1mb")
    made = [stack.enter_context(_host(f"ck{tag}h{i}", f"{subnet}.{10 + i}", bridge)) for i in range(hosts)]
    yield Cluster(tuple(made), storage)


@contextlib.contextmanager
def _host(name: str, address: str, bridge: str) -> Iterator[Host]:
  # gloo listens where the host's name resolves to.
  etc = pathlib.Path("/etc/netns") / name
  try:
    etc.mkdir(parents=True)
    (etc / "hosts").write_text(f"127.0.0.1 localhost\n{address} {name}\n")
    with namespace(name, address):
      command("ip", "link", "set", name, "master", bridge, "up")
      on_it = ("ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c", 'hostname "$0"; exec "$@"', name)
      yield Host(name, address, on_it)
  finally:
    shutil.rmtree(etc, ignore_errors=True)
