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

from ckpt_jax.bench.link import available
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
  names: list[str] = []
  try:
    _run("ip", "link", "add", bridge, "type", "bridge")
    _run("ip", "addr", "add", f"{subnet}.1/24", "dev", bridge)
    _run("ip", "link", "set", bridge, "up")
    limit = ("root", "tbf", "rate", f"{mbit}mbit", "burst", "1mb", "latency", "200ms")

    def host(label: str, address: str) -> Host:
      name = f"ck{tag}{label}"
      names.append(name)
      _run("ip", "netns", "add", name)
      _run("ip", "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name)
      _run("ip", "link", "set", name, "master", bridge, "up")
      _run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
      _run("ip", "-n", name, "link", "set", "eth0", "up")
      _run("ip", "-n", name, "link", "set", "lo", "up")
      # gloo listens where the host's name resolves to.
      etc = pathlib.Path("/etc/netns") / name
      etc.mkdir(parents=True)
      (etc / "hosts").write_text(f"127.0.0.1 localhost\n{address} {name}\n")
      on_it = ("ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c", 'hostname "$0"; exec "$@"', name)
      return Host(name, address, on_it)

    storage = host("st", f"{subnet}.2")
    _run("ip", "netns", "exec", storage.name, "tc", "qdisc", "add", "dev", "eth0", *limit)
    _run("tc", "qdisc", "add", "dev", storage.name, *limit)
    yield Cluster(tuple(host(f"h{i}", f"{subnet}.{10 + i}") for i in range(hosts)), storage)
  finally:
    for name in names:
      subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
      subprocess.run(["ip", "link", "del", name], capture_output=True, check=False)
      shutil.rmtree(pathlib.Path("/etc/netns") / name, ignore_errors=True)
    subprocess.run(["ip", "link", "del", bridge], capture_output=True, check=False)


def _run(*args: str) -> None:
  done = subprocess.run(args, capture_output=True, text=True, check=False, timeout=30)
  if done.returncode:
    raise CheckpointError(f"{' '.join(args)}: {done.stderr.strip()}")
