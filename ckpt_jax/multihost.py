"""Starts several jax processes on one machine, and reports what each of them wrote.

    python -m ckpt_jax.multihost --processes 4 --devices 2 train.py --steps 100

starts four processes with two virtual CPU devices each. The script joins them by calling `initialize()`, which also
works under `mpirun` and `srun`, and does nothing in a single process: a trainer needs no change between the three.
"""

from __future__ import annotations

import argparse
import atexit
import collections
import contextlib
import dataclasses
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ckpt_jax.errors import CheckpointError, NoCheckpointError

_COORDINATOR, _COUNT, _INDEX = "CKPT_JAX_COORDINATOR", "CKPT_JAX_PROCESS_COUNT", "CKPT_JAX_PROCESS_INDEX"
_LOG_LINES = 200
_POLL_S = 0.02


def initialize(timeout: float = 120.0) -> None:
  """Joins the processes of this job. Call it before anything touches a jax device; a second call does nothing.

  Works under the launcher below, Open MPI and SLURM (whose variables `jax.distributed.initialize()` reads). Without
  any of them the job has one process, and nothing is done.

  Args:
    timeout: seconds to wait for the other processes.

  Raises:
    CheckpointError: if not all of them arrive in time.
  """
  import jax

  explicit: dict[str, Any] = {}
  if _COORDINATOR in os.environ:
    explicit = {
      "coordinator_address": os.environ[_COORDINATOR],
      "num_processes": int(os.environ[_COUNT]),
      "process_id": int(os.environ[_INDEX]),
    }
    count = explicit["num_processes"]
  else:
    count = max(int(os.environ.get(name) or 1) for name in ("OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"))
  if count == 1 or jax.distributed.is_initialized():
    return
  if os.environ.get("JAX_PLATFORMS", "") == "cpu":
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
  try:
    jax.distributed.initialize(initialization_timeout=int(timeout), **explicit)
  except Exception as e:
    where = explicit.get("coordinator_address", "the launcher's coordinator")
    raise CheckpointError(
      f"waited {timeout:.0f} s at {where} for {count} processes to start: {e}", topic="starting-processes"
    ) from e
  _leave_at_once_after_an_exception()


def _leave_at_once_after_an_exception() -> None:
  """Spares a process that failed jax's shutdown barrier, which waits 5 minutes for processes that wait for this one.

  Only jax's own exit handler is skipped: `with` blocks have been left by then, and the last background write is over.
  `sys.exit` is an orderly end, and goes through the barrier.
  """
  failed: list[bool] = []
  previous = sys.excepthook
  process = os.getpid()  # a forked child has no barrier to wait at

  def note(*exception: Any) -> None:
    failed.append(True)
    previous(*exception)

  def leave() -> None:
    if failed and os.getpid() == process:
      sys.stdout.flush()
      sys.stderr.flush()
      os._exit(1)

  sys.excepthook = note
  atexit.register(leave)  # after jax's own, so it runs before it


@dataclasses.dataclass(frozen=True)
class Result:
  """How a process ended: its index, exit code (negative: the signal that killed it), and the last lines it wrote."""

  process: int
  returncode: int
  log: str


class Job:
  """N processes that run the same command on this machine's CPU.

  Args:
    argv: the command after the interpreter: a script and its arguments, or `-m`, a module and its arguments.
    processes, devices: how many processes, and virtual CPU devices in each.
    env: variables on top of this process's.
    python: the interpreter; default: this one.
    prefixes: for each process the command that it runs under, e.g. `ip netns exec HOST`.
    stdin: standard input of each process, as `subprocess.Popen` takes it; by default nothing.
    on_line: called with (process index, line) for each line that a process writes, as it comes.

  Attributes:
    children: the processes, by process index.
    first_failed: after `wait`, the index of the process that failed first and so ended the others; None if none failed.
  """

  def __init__(
    self,
    argv: Sequence[str],
    *,
    processes: int,
    devices: int = 1,
    env: Mapping[str, str] | None = None,
    python: str = sys.executable,
    prefixes: Sequence[Sequence[str]] | None = None,
    stdin: int = subprocess.DEVNULL,
    on_line: Callable[[int, str], None] = lambda process, line: None,
  ):
    shared = {
      **os.environ,
      "JAX_PLATFORMS": "cpu",
      "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}".strip(),
      "PYTHONUNBUFFERED": "1",
      _COORDINATOR: f"127.0.0.1:{free_port()}",
      _COUNT: str(processes),
      **(env or {}),
    }
    self.first_failed: int | None = None
    self.children = [
      subprocess.Popen(
        [*(prefixes[index] if prefixes else ()), python, *argv],
        env={**shared, _INDEX: str(index)},
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # so that a process and what it started can be ended together, by pid
      )
      for index in range(processes)
    ]
    self._logs = [collections.deque[str](maxlen=_LOG_LINES) for _ in self.children]
    self._readers = [
      threading.Thread(target=self._read, args=(i, on_line), daemon=True) for i, _ in enumerate(self.children)
    ]
    for reader in self._readers:
      reader.start()

  def _read(self, index: int, on_line: Callable[[int, str], None]) -> None:
    stream = self.children[index].stdout
    assert stream is not None
    with stream:
      for line in stream:
        self._logs[index].append(line)
        on_line(index, line)

  def log(self, process: int) -> str:
    """The last lines that a process wrote so far."""
    return "".join(list(self._logs[process]))

  def kill(self, process: int, sig: int = signal.SIGKILL) -> None:
    """Sends a signal to one process; does nothing if it has ended."""
    if self._code(process) is None:
      self.children[process].send_signal(sig)

  def wait(self, timeout: float, grace: float = 10.0) -> list[Result]:
    """Waits for all processes. When one fails, the others get SIGTERM, and SIGKILL after `grace` seconds.

    Raises:
      TimeoutError: after `timeout` seconds, naming the processes that still ran; they are killed.
    """
    deadline = time.monotonic() + timeout
    while None in (codes := self._codes()) and not any(codes):
      if time.monotonic() > deadline:
        running = [i for i, code in enumerate(codes) if code is None]
        self.stop(grace=0)
        raise TimeoutError(
          f"waited {timeout:.0f} s for processes {running} of {len(codes)} to end; killed. "
          f"Process {running[0]} wrote last:\n{self.log(running[0])}"
        )
      time.sleep(_POLL_S)
    self.first_failed = next((i for i, code in enumerate(codes) if code), None)
    if self.first_failed is not None:
      self.stop(grace)
    for reader in self._readers:
      reader.join(5)
    return [Result(i, code or 0, self.log(i)) for i, code in enumerate(self._codes())]

  def stop(self, grace: float = 10.0) -> None:
    """Ends the processes that still run, and what they started: SIGTERM, and SIGKILL after `grace` seconds."""
    for sig, patience in ((signal.SIGTERM, grace), (signal.SIGKILL, 10.0)):
      if patience <= 0:
        continue
      for child in self.children:
        # The whole group, even if its leader has ended: what the leader started may still run. Not once the leader is
        # reaped: another process may have its number by then.
        if child.returncode is None:
          with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, sig)
      deadline = time.monotonic() + patience
      while None in self._codes() and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    for child in self.children:
      child.poll()

  def _codes(self) -> list[int | None]:
    return [self._code(process) for process in range(len(self.children))]

  def _code(self, process: int) -> int | None:
    """The exit code of a process that has ended. It is not reaped: its number stays its own until `stop`."""
    child = self.children[process]
    if child.returncode is not None or not hasattr(os, "waitid"):
      return child.poll()
    try:
      ended = os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:  # reaped by somebody else
      return child.poll()
    if ended is None:
      return None
    return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status


def launch(
  argv: Sequence[str],
  *,
  processes: int,
  devices: int = 1,
  timeout: float = 600.0,
  grace: float = 10.0,
  env: Mapping[str, str] | None = None,
) -> list[Result]:
  """Runs a Job to its end. See `Job` for the arguments."""
  job = Job(argv, processes=processes, devices=devices, env=env)
  try:
    return job.wait(timeout, grace)
  finally:
    job.stop(grace=0)


def free_port() -> int:
  """A free TCP port of this machine, outside the range that the kernel takes ports of outgoing connections from.

  A job's coordinator listens only seconds later: a port of that range could be taken until then.
  """
  try:
    low, high = map(int, pathlib.Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
  except (OSError, ValueError):
    low, high = 32768, 60999
  outside = [port for port in range(10_000, 65_536) if not low <= port <= high]
  for port in [*random.sample(outside, min(100, len(outside))), 0]:
    with socket.socket() as s, contextlib.suppress(OSError):
      s.bind(("127.0.0.1", port))
      return s.getsockname()[1]
  raise CheckpointError("no TCP port is free on 127.0.0.1", topic="starting-processes")


@dataclasses.dataclass(frozen=True)
class ProcessWrites:
  """What a step has of one process: its index, the number of chunks, and their bytes as stored.

  Of these bytes `unchanged_nbytes` were not written, since an earlier step has them already.
  """

  process: int
  chunks: int
  nbytes: int
  unchanged_nbytes: int = 0


@dataclasses.dataclass(frozen=True)
class WriteReport:
  """Which process wrote how much of one step.

  Attributes:
    processes: one entry for each process that has an OCDBT database in the step.
    overlaps: `{chunk: processes that wrote it}` for the chunks that more than one process wrote.
  """

  processes: list[ProcessWrites]
  overlaps: dict[str, list[int]]

  @property
  def nbytes(self) -> int:
    """Bytes of all processes together."""
    return sum(p.nbytes for p in self.processes)

  def table(self) -> str:
    """The report as plain text."""
    linked = any(p.unchanged_nbytes for p in self.processes)
    lines = [f"{'process':>8} {'chunks':>8} {'MB':>10} {'share':>7}" + (f" {'unchanged':>10}" if linked else "")]
    for p in self.processes:
      share = p.nbytes / max(1, self.nbytes)
      lines.append(f"{p.process:>8} {p.chunks:>8} {p.nbytes / 1e6:>10.2f} {share:>7.1%}")
      lines[-1] += f" {p.unchanged_nbytes / 1e6:>10.2f}" if linked else ""
    return "\n".join([*lines, f"chunks written by more than one process: {len(self.overlaps)}"])


def who_wrote(run: str | os.PathLike[str], step: int) -> WriteReport:
  """Counts the bytes and chunks that each process wrote, from the OCDBT database that each leaves in a step.

  Raises:
    NoCheckpointError: if there is no such step, or if it holds no such database (it was saved without OCDBT).
  """
  from ckpt_jax.integrity import databases
  from ckpt_jax.layout import contents
  from ckpt_jax.orbax.format import process_database
  from ckpt_jax.run.steps import run_directory, step_directory

  item = contents.item_directory(step_directory(run_directory(run), step))
  writers: dict[str, list[int]] = collections.defaultdict(list)
  writes = []
  for process, chunks in databases.written(item):
    linked = databases.linked_keys(item / process_database(process))
    unchanged = sum(chunks[key] for key in linked & chunks.keys())
    writes.append(ProcessWrites(process, len(chunks), sum(chunks.values()), unchanged))
    for key in chunks:
      writers[key].append(process)
  if not writes:
    raise NoCheckpointError(
      f"{item}: no ocdbt.process_* in it: the step was saved without OCDBT, or was rewritten (repack, thinning)",
      topic="no-records",
    )
  return WriteReport(writes, {key: processes for key, processes in writers.items() if len(processes) > 1})


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the command line. Returns the exit code of the first process that failed; 124 after the timeout."""
  parser = argparse.ArgumentParser(
    prog="python -m ckpt_jax.multihost", description="Run a script as several jax processes on this machine's CPU."
  )
  parser.add_argument("--processes", type=int, default=2, help="number of processes (default: 2)")
  parser.add_argument("--devices", type=int, default=1, help="virtual CPU devices in each (default: 1)")
  parser.add_argument("--timeout", type=float, default=86400.0, help="seconds for the whole job (default: a day)")
  parser.add_argument("--grace", type=float, default=10.0, help="seconds between SIGTERM and SIGKILL (default: 10)")
  parser.add_argument("-m", dest="module", nargs=argparse.REMAINDER, metavar="MODULE ARGS...", help="run a module")
  parser.add_argument("command", nargs=argparse.REMAINDER, metavar="SCRIPT ARGS...", help="run a script")
  options = parser.parse_args(arguments)
  if options.processes < 1 or options.devices < 1:
    parser.error("--processes and --devices must be at least 1")
  command = ["-m", *options.module] if options.module else options.command
  if not command:
    parser.error("which script? python -m ckpt_jax.multihost --processes 4 train.py")
  if not options.module and not pathlib.Path(command[0]).is_file():
    parser.error(f"no such script: {command[0]}")

  job = Job(
    command,
    processes=options.processes,
    devices=options.devices,
    on_line=lambda process, line: print(f"[{process}] {line}", end="", flush=True),
  )

  def forward(signum: int, _: Any) -> None:
    for index in range(len(job.children)):
      job.kill(index, signum)

  for signum in (signal.SIGTERM, signal.SIGINT):
    signal.signal(signum, forward)
  try:
    results = job.wait(options.timeout, options.grace)
  except TimeoutError as e:
    print(e, file=sys.stderr)
    return 124
  finally:
    job.stop(grace=0)
  if job.first_failed is None:
    return 0
  first = results[job.first_failed]
  if first.returncode == 143:  # preemption.exit_code: an error message would mislead
    print(f"process {first.process} received SIGTERM, saved and exited with 143", file=sys.stderr)
    return 143
  tail = "".join(first.log.splitlines(keepends=True)[-30:])
  print(f"process {first.process} failed with exit code {first.returncode}; it wrote last:\n{tail}", file=sys.stderr)
  return first.returncode if first.returncode > 0 else 128 - first.returncode


if __name__ == "__main__":
  sys.exit(main())
