"""Buckets: how long a save blocks and commits, how long a restore takes, and how many requests they make.

gs:// beside raw Orbax, which has no s3://; s3:// beside boto3 with the same bytes: one multipart upload (s3transfer),
and a PUT for each leaf, 32 at a time, as s5cmd does. Each side has a process of its own, since ckpt_jax changes how
Orbax reaches buckets for the whole process; they take turns, so that what else the machine does meets all of them.
Servers are emulators on this machine, with and without a link before them that has bandwidth and latency of a real one.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import io
import itertools
import pathlib
import sys
import tempfile
import time
import urllib.parse
from collections.abc import Callable, Iterator
from typing import Any

from ckpt_jax.bench.buckets import gcs_process, s3_bucket_at, s3_process
from ckpt_jax.bench.common import RemoteWorker, conditions, medians, quiet, serve
from ckpt_jax.bench.link import distant
from ckpt_jax.bench.object_stores import make_side
from ckpt_jax.bench.variants import same_bits
from ckpt_jax.errors import CheckpointError
from ckpt_jax.multihost import free_port

MBIT, ROUND_TRIP_S = 400.0, 0.03
OURS, ORBAX, MULTIPART, PUTS = "ckpt_jax", "orbax", "boto3 multipart", "parallel PUTs"
SIDES = {"gs": (ORBAX, OURS), "s3": (MULTIPART, PUTS, OURS)}
PARTS, PLACES = tuple(SIDES), ("near", "far")
_SETTLE_S = 0.5  # for deletions that follow a commit, whose requests count too
_PUTS_AT_A_TIME = 32
_WHOLE_NBYTES = 2**28  # of a state that is saved whole in the first turn as well


@dataclasses.dataclass(frozen=True)
class Shape:
  """A state to save, and how often, without and behind the link.

  Attributes:
    leaves: how many arrays.
    nbytes: of each.
    rounds, far_rounds: that count, after one that does not.
  """

  leaves: int
  nbytes: int
  rounds: int
  far_rounds: int

  def __str__(self) -> str:
    each = f"{self.nbytes / 1e6:g} MB" if self.nbytes >= 10**6 else f"{self.nbytes // 1000} kB"
    return f"{self.leaves:,} x {each}"


SHAPES = {
  # The saves after the 2nd, 4th, 8th ... plan anew, by how well the state then compressed: not to be the median.
  "gs": (Shape(64, 10**6, 9, 5), Shape(600, 16 * 10**5, 3, 3), Shape(5000, 40_000, 3, 3)),
  "s3": (Shape(64, 10**6, 9, 5), Shape(600, 16 * 10**5, 3, 1), Shape(5000, 40_000, 3, 3)),
}


def run(scheme: str, progress: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
  """Runs all measurements of gs or s3. Returns JSON-able data: medians by place, shape and side."""
  found = conditions(link={"mbit": MBIT, "round_trip_s": ROUND_TRIP_S})
  for place in PLACES:
    for shape in SHAPES[scheme]:
      progress(f"{scheme}:// {place}: {shape}")
      found.setdefault(place, {})[str(shape)] = _compare(scheme, place == "far", shape)
  return found


def table(found: dict[str, Any]) -> list[tuple[str, ...]]:
  """Rows: bucket and state, side, seconds of blocking, commit and restore, requests of save and restore."""
  rows = []
  for scheme, place in itertools.product(PARTS, PLACES):
    for shape, sides in found.get(scheme, {}).get(place, {}).items():
      for side, figures in sides.items():
        cells = [f"{figures[k]:.3g}" if k in figures else "" for k in ("blocking_s", "commit_s", "restore_s")]
        counts = [str(figures.get(k, "")) for k in ("save_requests", "restore_requests")]
        rows.append((f"{scheme}:// {place}, {shape}", side, *cells, *counts))
  return rows


def _compare(scheme: str, far: bool, shape: Shape) -> dict[str, dict[str, Any]]:
  rounds = shape.far_rounds if far else shape.rounds
  turns: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES[scheme]}
  with _server(scheme, far) as server, contextlib.ExitStack() as stack:
    workers = {side: _worker(side, scheme, server, shape) for side in turns}
    for worker in workers.values():
      stack.callback(worker.stop)
      worker.receive("start")
    for turn in range(rounds + 1):
      figures: dict[str, dict[str, Any]] = {side: {} for side in turns}
      for what in ("save", "restore"):
        for side in sorted(turns, reverse=bool(turn % 2)):
          before = server.requests()
          figures[side] |= workers[side].ask(what, step=turn)[0]
          time.sleep(_SETTLE_S)
          figures[side][f"{what}_requests"] = server.requests() - before
      for side, of_turn in figures.items():
        turns[side] += [of_turn] if turn else []
  return {side: medians(of) for side, of in turns.items()}


def _worker(side: str, scheme: str, server: _Server, shape: Shape) -> RemoteWorker:
  url = f"{scheme}://bucket/{side.replace(' ', '-')}"
  return RemoteWorker(side, [__name__, side, url, str(shape.leaves), str(shape.nbytes)], env=server.env)


@dataclasses.dataclass(frozen=True)
class _Server:
  """An emulated bucket: the variables that lead clients to it, and its log, which has a line for each request."""

  env: dict[str, str]
  log: pathlib.Path

  def requests(self) -> int:
    return sum(b" HTTP/1.1" in line for line in self.log.read_bytes().splitlines())


@contextlib.contextmanager
def _server(scheme: str, far: bool) -> Iterator[_Server]:
  with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
    log = pathlib.Path(directory, "log")
    if scheme == "s3":
      own = stack.enter_context(s3_process(log))
      public = stack.enter_context(_address(own, far))
      yield _Server(s3_bucket_at(own, public), log)
      return
    own = f"http://127.0.0.1:{free_port()}"
    public = stack.enter_context(_address(own, far))
    port = urllib.parse.urlsplit(own).port
    assert port is not None
    env = stack.enter_context(gcs_process(f"{directory}/objects", "bucket", "127.0.0.1", port, public=public, log=log))
    yield _Server(env, log)


@contextlib.contextmanager
def _address(own: str, far: bool) -> Iterator[str]:
  if not far:
    yield own
    return
  parts = urllib.parse.urlsplit(own)
  assert parts.hostname is not None and parts.port is not None
  with distant((parts.hostname, parts.port), MBIT, ROUND_TRIP_S) as (host, port):
    yield f"http://{host}:{port}"


# -- in the process of a side


class _Multipart:
  """One object of all bytes, by boto3's own multipart upload and its defaults: 8 MB parts, 10 at a time."""

  def __init__(self, url: str):
    import boto3

    self._client: Any = boto3.client("s3")
    self._bucket, _, self._prefix = url.removeprefix("s3://").partition("/")

  def save(self, step: int, state: dict[str, Any]) -> None:
    """Uploads."""
    content = io.BytesIO(b"".join(memoryview(x).cast("B") for x in state.values()))
    self._client.upload_fileobj(content, self._bucket, f"{self._prefix}/{step}")


class _Puts(_Multipart):
  """An object for each leaf."""

  def __init__(self, url: str):
    import botocore.config

    super().__init__(url)
    import boto3

    self._client = boto3.client("s3", config=botocore.config.Config(max_pool_connections=_PUTS_AT_A_TIME))

  def save(self, step: int, state: dict[str, Any]) -> None:
    """Uploads."""

    def put(item: tuple[str, Any]) -> None:
      key = f"{self._prefix}/{step}/{item[0]}"
      self._client.put_object(Bucket=self._bucket, Key=key, Body=bytes(memoryview(item[1]).cast("B")))

    with concurrent.futures.ThreadPoolExecutor(_PUTS_AT_A_TIME) as pool:
      list(pool.map(put, state.items()))


class _Uploads:
  """Saves of boto3, timed."""

  def __init__(self, target: _Multipart, state: Callable[[int], dict[str, Any]]):
    self._target, self._state = target, state

  def save(self, step: int) -> dict[str, float]:
    """Seconds."""
    now = self._state(step)
    cpu, started = time.process_time(), time.perf_counter()
    self._target.save(step, now)
    return {"commit_s": time.perf_counter() - started, "save_cpu_s": time.process_time() - cpu}

  def restore(self, step: int) -> dict[str, float]:
    """Nothing: objects that were uploaded are not compared."""
    return {}


class _Checkpoints:
  """Saves and restores of ckpt_jax and Orbax, timed. Each restore is compared with what was saved, bit for bit."""

  def __init__(self, target: Any, state: Callable[[int], dict[str, Any]]):
    self._target, self._state = target, state

  def _on_device(self, step: int) -> dict[str, Any]:
    import jax

    return jax.block_until_ready({k: jax.numpy.asarray(v) for k, v in self._state(step).items()})

  def save(self, step: int) -> dict[str, float]:
    """Seconds."""
    now = self._on_device(step)
    cpu, started = time.process_time(), time.perf_counter()
    self._target.save(step, now)
    blocking = time.perf_counter() - started
    self._target.wait()
    commit = time.perf_counter() - started
    return {"blocking_s": blocking, "commit_s": commit, "save_cpu_s": time.process_time() - cpu}

  def restore(self, step: int) -> dict[str, float]:
    """Seconds."""
    import jax
    import numpy as np

    now = self._on_device(step)
    cpu, started = time.process_time(), time.perf_counter()
    got = jax.block_until_ready(self._target.restore(now))
    figures = {"restore_s": time.perf_counter() - started, "restore_cpu_s": time.process_time() - cpu}
    wrong = [k for k, v in now.items() if not same_bits(np.asarray(got[k]), np.asarray(v))]
    if wrong:
      raise CheckpointError(f"restored wrong: {wrong[:5]}")
    return figures


def _begin(side: str, url: str, leaves: int, nbytes: int) -> tuple[_Uploads | _Checkpoints, None]:
  import numpy as np

  rng = np.random.default_rng(0)
  base = {f"leaf{i}": rng.standard_normal(nbytes // 4, dtype=np.float32) for i in range(leaves)}

  def state(step: int) -> dict[str, Any]:
    """Other bytes in each step; the first one, which pays for imports, connections and plan, is cut if it is large."""
    whole = step or leaves * nbytes <= _WHOLE_NBYTES
    return {k: (v if whole else v[: len(v) // 16]) + np.float32(step) for k, v in base.items()}

  if side in (MULTIPART, PUTS):
    return _Uploads((_Multipart if side == MULTIPART else _Puts)(url), state), None
  return _Checkpoints(make_side(side, url, 2), state), None


if __name__ == "__main__":
  quiet()
  serve(lambda: _begin(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
