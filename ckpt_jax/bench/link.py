"""Network links of known speed on this machine, with which a benchmark can compare what it measures.

`limited_link` is a network namespace behind a veth pair that `tc` limits; it needs root and Debian's iproute2.
`distant` is a forwarder of this process with bandwidth and latency, for kernels without `tc netem`; it needs nothing.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import os
import shutil
import subprocess
import threading
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
  with namespace(name, f"{subnet}.2"):
    command("ip", "addr", "add", f"{subnet}.1/24", "dev", name)
    command("ip", "link", "set", name, "up")
    limit(name, mbit, "256kb")
    yield Link(("ip", "netns", "exec", name), f"{subnet}.2", f"{subnet}.1")


@contextlib.contextmanager
def namespace(name: str, address: str) -> Iterator[None]:
  """A network namespace while the block runs: `eth0` in it has the address, and the interface NAME here is its peer."""
  try:
    command("ip", "netns", "add", name)
    command("ip", "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name)
    command("ip", "-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
    for device in ("eth0", "lo"):
      command("ip", "-n", name, "link", "set", device, "up")
    yield
  finally:
    subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
    subprocess.run(["ip", "link", "del", name], capture_output=True, check=False)


def limit(name: str, mbit: float, burst: str) -> None:
  """Limits both directions of a namespace's link to `mbit` * 10**6 bits per second."""
  bucket = ("root", "tbf", "rate", f"{mbit}mbit", "burst", burst, "latency", "200ms")
  command("ip", "netns", "exec", name, "tc", "qdisc", "add", "dev", "eth0", *bucket)
  command("tc", "qdisc", "add", "dev", name, *bucket)


def command(*args: str) -> None:
  """Runs a command of the system.

  Raises:
    CheckpointError: if it fails.
  """
  done = subprocess.run(args, capture_output=True, text=True, check=False, timeout=30)
  if done.returncode:
    raise CheckpointError(f"{' '.join(args)}: {done.stderr.strip()}")


@contextlib.contextmanager
def distant(target: tuple[str, int], mbit: float, round_trip_s: float) -> Iterator[tuple[str, int]]:
  """Host and port that lead to `target` over a link, while the block runs.

  All connections share `mbit` * 10**6 bits per second in each direction. Each byte arrives half a round trip after it
  was sent, and a connection takes a round trip to open. TCP's slow start and losses are not imitated.
  """
  loop = asyncio.new_event_loop()
  thread = threading.Thread(target=loop.run_forever, name="distant-link", daemon=True)
  thread.start()

  async def start() -> asyncio.Server:
    up, down = (_Direction(mbit, round_trip_s / 2) for _ in range(2))

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
      with contextlib.suppress(OSError, asyncio.CancelledError):  # one side is gone, or the block has ended
        await asyncio.sleep(round_trip_s)
        far_reader, far_writer = await asyncio.open_connection(*target, limit=_BLOCK)
        await asyncio.gather(up.carry(reader, far_writer), down.carry(far_reader, writer))

    return await asyncio.start_server(connected, "127.0.0.1", 0, limit=_BLOCK)

  async def stop() -> None:
    server.close()
    carrying = asyncio.all_tasks() - {asyncio.current_task()}
    for task in carrying:
      task.cancel()
    await asyncio.gather(*carrying, return_exceptions=True)

  server = asyncio.run_coroutine_threadsafe(start(), loop).result(30)
  try:
    yield server.sockets[0].getsockname()[:2]
  finally:
    asyncio.run_coroutine_threadsafe(stop(), loop).result(30)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)
    loop.close()


_BLOCK, _UNDER_WAY = 2**18, 2**22  # bytes read at a time; bytes of a connection that its sender may be ahead


class _Direction:
  """One way of a link: bytes leave one after the other at the link's speed, and arrive later."""

  def __init__(self, mbit: float, delay: float):
    self._bytes_per_s = mbit * 1e6 / 8
    self._delay = delay
    self._free_at = 0.0

  async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Forwards until the end of the stream."""
    loop = asyncio.get_running_loop()
    waiting: collections.deque[tuple[float, bytes]] = collections.deque()
    some, room = asyncio.Event(), asyncio.Event()

    async def deliver() -> None:
      while True:
        while not waiting:
          some.clear()
          await some.wait()
        arrives, data = waiting[0]
        await asyncio.sleep(max(0.0, arrives - loop.time()))
        waiting.popleft()
        room.set()
        if not data:
          writer.close()
          return
        writer.write(data)
        await writer.drain()

    delivery = asyncio.ensure_future(deliver())
    try:
      while True:
        data = await reader.read(_BLOCK)
        self._free_at = max(self._free_at, loop.time()) + len(data) / self._bytes_per_s
        waiting.append((self._free_at + self._delay, data))
        some.set()
        while sum(len(d) for _, d in waiting) > _UNDER_WAY:
          room.clear()
          await room.wait()
        if not data:
          break
      await delivery
    except ConnectionError:
      delivery.cancel()
      writer.close()
