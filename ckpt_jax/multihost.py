"""Several jax processes on one machine, and the account of what each wrote.

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
from ckpt_jax.orbax.format import is_process_database

_COORDINATOR, _COUNT, _INDEX = "CKPT_JAX_COORDINATOR", "CKPT_JAX_PROCESS_COUNT", "CKPT_JAX_PROCESS_INDEX"
_LOG_LINES = 200


def initialize(timeout: float = 120.0) -> None:
  """Joins the processes of this job; call it before anything touches a jax device. Harmless to call twice.

  Understands the launcher below, Open MPI and SLURM (whose variables `jax.distributed.initialize()` reads); without
  any of them the job has one process and nothing is done.

  Args:
    timeout: seconds to wait for the other processes.

  Raises:
    CheckpointError: if they do not all arrive in time.
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
    raise CheckpointError(f"waited {timeout:.0f} s at {where} for {count} processes to start: {e}") from e
  _leave_at_once_after_an_exception()


def _leave_at_once_after_an_exception() -> None:
  """Spares a process that failed jax's shutdown barrier, which waits 5 minutes for processes that wait for this one.

  Only jax's own exit is skipped: `with` blocks have been left by then, and what ends before `atexit` (the last
  background write among it) has ended. `sys.exit` is an orderly end, and goes through the barrier.
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
    prefixes: for each process what its command runs under, e.g. `ip netns exec HOST`.
    on_line: called with (process index, line) for each line that a process writes, as it comes.

  Attributes:
    first_failed: after `wait`, the index of the process that failed first: the others end because of it. None if
      none failed.
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
    on_line: Callable[[int, str], None] | None = None,
  ):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}".strip()
    shared = {
      **os.environ,
      "JAX_PLATFORMS": "cpu",
      "XLA_FLAGS": flags,
      "PYTHONUNBUFFERED": "1",
      _COORDINATOR: f"127.0.0.1:{free_port()}",
      _COUNT: str(processes),
      **(env or {}),
    }
    self.first_failed: int | None = None
    self._on_line = on_line
    self._logs: list[collections.deque[str]] = []
    self._readers: list[threading.Thread] = []
    self.children: list[subprocess.Popen[str]] = []
    for index in range(processes):
      child = subprocess.Popen(
        [*(prefixes[index] if prefixes else ()), python, *argv],
        env={**shared, _INDEX: str(index)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # so that a process and what it started can be ended together, by pid
      )
      self.children.append(child)
      self._logs.append(collections.deque(maxlen=_LOG_LINES))
      reader = threading.Thread(target=self._read, args=(index,), daemon=True)
      reader.start()
      self._readers.append(reader)

  def _read(self, index: int) -> None:
    stream = self.children[index].stdout
    assert stream is not None
    with stream:
      for line in stream:
        self._logs[index].append(line)
        if self._on_line is not None:
          self._on_line(index, line)

  @property
  def pids(self) -> list[int]:
    """Process ids by process index."""
    return [child.pid for child in self.children]

  def log(self, process: int) -> str:
    """The last lines that a process wrote so far."""
    return "".join(list(self._logs[process]))

  def kill(self, process: int, sig: int = signal.SIGKILL) -> None:
    """Sends a signal to one process; nothing if it has ended."""
    if self._code(process) is None:
      self.children[process].send_signal(sig)

  def wait(self, timeout: float, grace: float = 10.0) -> list[Result]:
    """Waits for all processes; the first that fails takes the others with it (SIGTERM, SIGKILL after `grace` seconds).

    Raises:
      TimeoutError: after `timeout` seconds, naming the processes that still ran; they are killed.
    """
    deadline = time.monotonic() + timeout
    while True:
      codes = self._codes()
      self.first_failed = next((i for i, code in enumerate(codes) if code), None)
      if self.first_failed is not None or None not in codes:
        break
      if time.monotonic() > deadline:
        running = [i for i, code in enumerate(self._codes()) if code is None]
        self.stop(grace=0)
        raise TimeoutError(
          f"waited {timeout:.0f} s for processes {running} of {len(self.children)} to end; killed. "
          f"Process {running[0]} wrote last:\n{self.log(running[0])}"
        )
      time.sleep(0.02)
    if self.first_failed is not None:
      self.stop(grace)
    for reader in self._readers:
      reader.join(5)
    return [Result(i, code or 0, self.log(i)) for i, code in enumerate(self._codes())]

  def stop(self, grace: float = 10.0) -> None:
    """Ends what still runs, by pid: SIGTERM, and SIGKILL after `grace` seconds."""
    for sig, patience in ((signal.SIGTERM, grace), (signal.SIGKILL, 10.0)):
      if patience <= 0:
        continue
      for child in self.children:
        # The group, also after its leader has ended: what the leader started may still run. Not once the leader has
        # been reaped: its number may be another process's by then.
        if child.returncode is None:
          with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, sig)
      deadline = time.monotonic() + patience
      while any(code is None for code in self._codes()) and time.monotonic() < deadline:
        time.sleep(0.02)
    for child in self.children:
      child.poll()

  def _codes(self) -> list[int | None]:
    return [self._code(process) for process in range(len(self.children))]

  def _code(self, process: int) -> int | None:
    """The exit code of a process that has ended, which is not reaped: until `stop`, its number stays its own."""
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
  """A TCP port that nobody listens on now, and that no outgoing connection takes before it is listened on.

  The kernel takes the ports of outgoing connections from a range of its own, also the one that it just gave to somebody
  who asked for any; a job's coordinator listens seconds later.
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
  raise CheckpointError("no TCP port is free on 127.0.0.1")


@dataclasses.dataclass(frozen=True)
class ProcessWrites:
  """What one process wrote: its index, the number of chunks, and their bytes as stored."""

  process: int
  chunks: int
  nbytes: int


@dataclasses.dataclass(frozen=True)
class WriteReport:
  """Who wrote what in one step.

  Attributes:
    processes: one entry a process that has an OCDBT database of its own.
    overlaps: `{chunk: processes that wrote it}` for chunks that more than one wrote.
  """

  processes: list[ProcessWrites]
  overlaps: dict[str, list[int]]

  @property
  def nbytes(self) -> int:
    """Bytes of all processes together."""
    return sum(p.nbytes for p in self.processes)

  def table(self) -> str:
    """The report as plain text."""
    lines = [f"{'process':>8} {'chunks':>8} {'MB':>10} {'share':>7}"]
    for p in self.processes:
      lines.append(f"{p.process:>8} {p.chunks:>8} {p.nbytes / 1e6:>10.2f} {p.nbytes / max(1, self.nbytes):>7.1%}")
    lines.append(f"chunks written by more than one process: {len(self.overlaps)}")
    return "\n".join(lines)


def who_wrote(run: str | os.PathLike[str], step: int) -> WriteReport:
  """Bytes and chunks that each process wrote, read from the OCDBT databases that each keeps in a step.

  Raises:
    NoCheckpointError: if the step is not there, or no process left a database (saved without OCDBT).
  """
  import tensorstore as ts

  from ckpt_jax.layout import contents
  from ckpt_jax.run.steps import run_directory, step_directory
  from ckpt_jax.storage.clients import kvstore_spec

  item = contents.item_directory(step_directory(run_directory(run), step))
  parts = sorted((p for p in item.iterdir() if is_process_database(p.name)), key=lambda p: _process_of(p.name))
  if not parts:
    raise NoCheckpointError(
      f"{item}: no ocdbt.process_* in it: the step was saved without OCDBT, or was rewritten (repack, thinning)"
    )
  writers: dict[str, list[int]] = collections.defaultdict(list)
  processes = []
  for part in parts:
    text = str(part)
    store = ts.KvStore.open({"driver": "ocdbt", "base": kvstore_spec(text.rstrip("/") + "/")}).result()
    chunks = [key.decode() for key in store.list().result() if not _is_array_metadata(key)]
    nbytes = sum(len(store.read(key).result().value) for key in chunks)
    for key in chunks:
      writers[key].append(_process_of(part.name))
    processes.append(ProcessWrites(_process_of(part.name), len(chunks), nbytes))
  return WriteReport(processes, {key: who for key, who in writers.items() if len(who) > 1})


def _process_of(name: str) -> int:
  return int(name.rsplit("_", 1)[1])


def _is_array_metadata(key: bytes) -> bool:
  return key.rsplit(b"/", 1)[-1] in (b".zarray", b".zattrs", b".zgroup", b"zarr.json")


def main(arguments: Sequence[str] | None = None) -> int:
  """The command line; returns the exit code of the first process that failed."""
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

  def show(process: int, line: str) -> None:
    sys.stdout.write(f"[{process}] {line}")
    sys.stdout.flush()

  job = Job(command, processes=options.processes, devices=options.devices, on_line=show)

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
  if first.returncode == 143:  # preemption.exit_code: a message of an error would mislead
    print(f"process {first.process} was told to end (SIGTERM), saved and exited with 143", file=sys.stderr)
    return 143
  tail = "".join(first.log.splitlines(keepends=True)[-30:])
  print(f"process {first.process} failed with exit code {first.returncode}; it wrote last:\n{tail}", file=sys.stderr)
  return first.returncode if first.returncode > 0 else 128 - first.returncode


if __name__ == "__main__":
  sys.exit(main())
