"""Where the runs of faults are: a directory, a file system of its own, or an emulated bucket."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import re
import shutil
import subprocess
import tempfile
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from ckpt_jax.bench.buckets import gcs_server, s3_server, server_pid
from ckpt_jax.errors import CheckpointError
from ckpt_jax.layout.keys import UNCHANGED
from ckpt_jax.orbax.format import COMMIT_MARKER, TEMPORARY

_HOME = f"/{UNCHANGED}"  # in the path of a file that several steps may have


@dataclasses.dataclass
class Place:
  """Where runs are.

  Attributes:
    url: a directory, or a bucket.
    shared: how many files steps have taken over from steps before them so far, instead of writing them.
    server: the process of the bucket's server; None if it is no bucket.
  """

  url: str
  shared: Callable[[], int]
  server: int | None = None


@contextlib.contextmanager
def directory(disk: str | None = None) -> Iterator[Place]:
  """An empty directory: on a file system of its own if `disk` is `tmpfs` or `ext4` (in a file), both of 64 MiB."""
  work = pathlib.Path(tempfile.mkdtemp(prefix="ckpt-jax-faults-"))
  try:
    with contextlib.ExitStack() as stack:
      place = stack.enter_context(_mounted(work, disk)) if disk else work
      yield Place(str(place), lambda: _links(place))
  finally:
    shutil.rmtree(work, ignore_errors=True)


@contextlib.contextmanager
def _mounted(work: pathlib.Path, kind: str) -> Iterator[pathlib.Path]:
  if os.geteuid() != 0:
    raise CheckpointError(f"{kind}: mounting a file system needs root")
  disk = work / "disk"
  disk.mkdir()
  if kind == "ext4":
    image = work / "image"
    with open(image, "wb") as file:
      file.truncate(64 << 20)
    # Without blocks that only root may use: what is full is full for all.
    subprocess.run(["mkfs.ext4", "-q", "-F", "-m", "0", str(image)], check=True, capture_output=True)
    command = ["mount", "-o", "loop", str(image), str(disk)]
  else:
    command = ["mount", "-t", kind, "-o", "size=64m", kind, str(disk)]
  mounted = subprocess.run(command, capture_output=True, text=True)
  if mounted.returncode:
    raise CheckpointError(f"{kind}: cannot mount here: {mounted.stderr.strip()}")
  try:
    yield disk
  finally:
    subprocess.run(["fsfreeze", "-u", disk], capture_output=True)  # as the fault `hang` may have left it
    subprocess.run(["umount", "-l", disk], check=True)


def _links(place: pathlib.Path) -> int:
  """Names of files that have other names too. What is deleted meanwhile does not count."""
  count = 0
  for folder, _, names in os.walk(place):
    for name in names:
      with contextlib.suppress(FileNotFoundError):
        count += os.lstat(os.path.join(folder, name)).st_nlink > 1
  return count


@contextlib.contextmanager
def emulated(scheme: str) -> Iterator[Place]:
  """An empty bucket of `gs` or `s3`; this process and those that it starts find it."""
  with tempfile.TemporaryDirectory(prefix="ckpt-jax-faults-") as objects, contextlib.ExitStack() as stack:
    made = stack.enter_context(gcs_server(objects) if scheme == "gs" else s3_server())
    stack.enter_context(mock.patch.dict(os.environ, made.env))
    yield Place(made.url, lambda: made.proxy.requests["copy"], server_pid(made))


def at(place: str | None) -> Any:
  """The place of a fault: `tmpfs`, `ext4`, `gs`, `s3`, or a directory."""
  return emulated(place) if place in ("gs", "s3") else directory(place)


def unfinished(run: str) -> list[str]:
  """What saves that never committed have left in a run: temporary directories; in a bucket steps without a marker."""
  if "://" not in run:
    place = pathlib.Path(run)
    return [p.name for p in place.glob(f"*{TEMPORARY}*")] if place.is_dir() else []
  names = _objects(run)
  steps = {name.split("/")[0] for name in names if re.match(r"\d+(\.|/)", name)}
  return sorted(step for step in steps if f"{step}/{COMMIT_MARKER}" not in names)


def unfinished_homes(run: str) -> bool:
  """Whether one of them has a database of unchanged leaves already."""
  if "://" not in run:
    return any(_HOME in str(p) for name in unfinished(run) for p in pathlib.Path(run, name).rglob("*"))
  names = _objects(run)
  return any(_HOME in name and name.startswith(f"{step}/") for step in unfinished(run) for name in names)


def _objects(run: str) -> list[str]:
  """The objects of a run in an emulated bucket, at most the thousand that one answer has, as the server lists them."""
  scheme, _, path = run.partition("://")
  bucket, _, prefix = path.partition("/")
  if scheme == "gs":
    url = f"{os.environ['STORAGE_EMULATOR_HOST']}/storage/v1/b/{bucket}/o?prefix={prefix}/"
    found = r'"name": ?"([^"]*)"'
  else:
    url, found = f"{os.environ['AWS_ENDPOINT_URL']}/{bucket}?list-type=2&prefix={prefix}/", "<Key>([^<]*)</Key>"
  with urllib.request.urlopen(url, timeout=60) as answer:
    return [name.removeprefix(f"{prefix}/") for name in re.findall(found, answer.read().decode())]
