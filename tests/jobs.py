"""Jobs of several jax processes that outlive a test, since starting one costs two seconds of CPU for each process.

`together` runs a program of tests/programs like `ckpt_jax.multihost.launch`, in processes that then wait for the next
program. Programs that kill, hang or signal their processes, or need fresh ones, use `launch` instead.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import os
import pathlib
import runpy
import shutil
import sys
import tempfile
import time
from multiprocessing.connection import Connection, Listener, wait
from unittest import mock

import jax

from ckpt_jax.multihost import Job, Result

PROGRAMS = pathlib.Path(__file__).parent / "programs"
_START_S = 180.0
_GRACE_S = 20.0  # for the other processes, once one has failed
_pools: dict[tuple[int, int], Pool] = {}


def together(
  program: str, *arguments: object, processes: int, devices: int | None = None, timeout: float = 300.0
) -> list[Result]:
  """Runs a program of tests/programs in all processes of a job, with this process's current environment.

  Fails with their output unless all of them succeed. A job of one process with two devices is the test process itself.

  Args:
    program, arguments: the program's file name and arguments.
    processes: how many; prefer 1, 2 or 4, whose jobs other tests use too.
    devices: of each process; default: two, or one in jobs of more than two processes, since collectives need a thread
      for each device.
    timeout: seconds.

  Raises:
    TimeoutError: naming the processes that still ran; they are killed.
  """
  devices = devices or (2 if processes <= 2 else 1)
  argv = [str(PROGRAMS / program), *map(str, arguments)]
  shape = (processes, devices)
  if shape == (1, jax.device_count()):
    results = [_alone(argv)]
  else:
    if shape not in _pools:
      _pools[shape] = Pool(*shape)
    try:
      results = _pools[shape].run(argv, timeout)
    except BaseException:
      _pools.pop(shape).close()
      raise
    if any(r.returncode for r in results):  # their state is unknown: do not reuse them
      _pools.pop(shape).close()
  wrote = "\n".join(f"-- process {r.process}:\n{r.log[-5000:]}" for r in results if r.returncode)
  assert not any(r.returncode for r in results), f"exit codes {[r.returncode for r in results]}\n{wrote}"
  return results


def _alone(argv: list[str]) -> Result:
  out = io.StringIO()
  with contextlib.redirect_stdout(out), mock.patch.object(sys, "argv", argv):
    runpy.run_path(argv[0], run_name="__main__")
  return Result(0, 0, out.getvalue())


class Pool:
  """Processes that run one program after the other; tests/programs/pool.py is their side."""

  def __init__(self, processes: int, devices: int):
    self._lines: list[list[str]] = [[] for _ in range(processes)]
    meeting = pathlib.Path(tempfile.mkdtemp(prefix="pool-"))
    with Listener(str(meeting / "socket"), "AF_UNIX", backlog=processes) as listener:
      self._job = Job(
        [str(PROGRAMS / "pool.py"), str(meeting / "socket")],
        processes=processes,
        devices=devices,
        on_line=lambda index, line: self._lines[index].append(line),
      )
      try:
        found = self._accepted(listener, processes)
      except BaseException:
        self._job.stop(grace=0)
        raise
    shutil.rmtree(meeting)
    self._processes = [found[i] for i in range(processes)]
    self._runs = 0

  def _accepted(self, listener: Listener, processes: int) -> dict[int, Connection]:
    listener._listener._socket.settimeout(0.5)  # accept has no timeout of its own
    deadline = time.monotonic() + _START_S
    found: dict[int, Connection] = {}
    while len(found) < processes:
      try:
        connection = listener.accept()
      except TimeoutError:
        ended = any(child.poll() is not None for child in self._job.children)
        assert not ended and time.monotonic() < deadline, "\n".join(map(self._job.log, range(processes)))
        continue
      found[connection.recv()] = connection
    return found

  def run(self, argv: list[str], timeout: float) -> list[Result]:
    self._runs += 1
    end = f"== end of {self._runs}\n"
    for lines in self._lines:
      lines.clear()
    for process in self._processes:
      process.send((argv, dict(os.environ), os.getcwd(), end))
    codes: dict[int, int] = {}
    deadline = time.monotonic() + timeout
    while len(codes) < len(self._processes):
      running = [i for i in range(len(self._processes)) if i not in codes]
      ready = wait([self._processes[i] for i in running], max(0.0, deadline - time.monotonic()))
      for i in running:
        if self._processes[i] in ready:
          try:
            codes[i] = self._processes[i].recv()
          except EOFError:
            codes[i] = self._job.children[i].wait(30)
          if codes[i]:
            deadline = min(deadline, time.monotonic() + _GRACE_S)
      if not ready:
        if not any(codes.values()):
          raise TimeoutError(f"waited {timeout:.0f} s for processes {running}:\n{self._text(running[0], end)}")
        codes |= dict.fromkeys(running, -9)
    return [Result(i, code, self._text(i, end if code != -9 else None)) for i, code in sorted(codes.items())]

  def _text(self, index: int, end: str | None) -> str:
    deadline = time.monotonic() + 5
    while end not in (lines := list(self._lines[index])) and end is not None and time.monotonic() < deadline:
      time.sleep(0.005)  # the last lines are still on their way
    return "".join(line for line in lines if line != end)

  def close(self) -> None:
    for process in self._processes:
      process.close()
    self._job.stop(grace=0)


@atexit.register
def close_all() -> None:
  while _pools:
    _pools.popitem()[1].close()
