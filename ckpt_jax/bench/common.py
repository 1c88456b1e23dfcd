"""What the suites share: conditions, the order of turns, medians, and programs in processes of their own."""

from __future__ import annotations

import contextlib
import datetime
import inspect
import itertools
import json
import os
import queue
import signal
import statistics
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from ckpt_jax.errors import CheckpointError
from ckpt_jax.multihost import Job

CPU = {"JAX_PLATFORMS": "cpu"}
_LIMIT_S = 240.0  # for a worker, which takes seconds on an idle machine
_T = TypeVar("_T")


def conditions(**more: Any) -> dict[str, Any]:
  """When and on how many CPUs results were measured, and what else is to be noted of them."""
  return {"measured": datetime.date.today().isoformat(), "cpus": os.cpu_count(), **more}


def rotated(sides: Iterable[_T], turn: int) -> list[_T]:
  """The order of sides in a turn. Each turn begins with the next side, so that none always follows the same one."""
  order = list(sides)
  shift = turn % max(1, len(order))
  return order[shift:] + order[:shift]


def timed(action: Callable[[], Any]) -> float:
  """Seconds of a call."""
  started = time.perf_counter()
  action()
  return time.perf_counter() - started


def medians(rows: Sequence[Mapping[str, float]], digits: int = 4) -> dict[str, float]:
  """The median of each column."""
  return {key: round(statistics.median(row[key] for row in rows), digits) for key in rows[0]}


def public_functions(module: Mapping[str, Any]) -> dict[str, Callable[..., Any]]:
  """The public functions that a module, given by its `globals()`, has defined so far."""
  return {
    name: value
    for name, value in module.items()
    if inspect.isfunction(value) and value.__module__ == module["__name__"] and not name.startswith("_")
  }


# -- programs in processes of their own


def emit(**facts: Any) -> None:
  """Prints facts as a line of JSON, for the process that started this one."""
  sys.stdout.write(json.dumps(facts) + "\n")  # at once, so that no other output comes between the line and its end
  sys.stdout.flush()


def facts_of(line: str) -> dict[str, Any]:
  """The facts that `emit` printed on a line; none if the line is something else, or was cut short by a kill."""
  try:
    said = json.loads(line)
  except ValueError:
    return {}
  return said if isinstance(said, dict) else {}


def quiet() -> None:
  """Leaves only errors in the log of Orbax and others that use absl."""
  with contextlib.suppress(ImportError):  # torch's own environment
    from absl import logging

    logging.set_verbosity("error")


def output(what: str, command: Sequence[str], env: Mapping[str, str] = CPU, timeout: float = 1500.0) -> str:
  """Runs `python -m COMMAND`, with `env` on top of this process's. Returns what it prints.

  Raises:
    CheckpointError: if it fails, or takes longer than `timeout` seconds.
  """
  argv, full = [sys.executable, "-m", *command], {**os.environ, **env}
  try:
    done = subprocess.run(argv, env=full, capture_output=True, text=True, timeout=timeout, check=False)
  except subprocess.TimeoutExpired as e:
    raise CheckpointError(f"{what}: took longer than {timeout:.0f} s") from e
  if done.returncode:
    raise CheckpointError(f"{what}: exit code {done.returncode}: {done.stderr[-2000:].strip()}")
  return done.stdout


def answer(what: str, command: Sequence[str], env: Mapping[str, str] = CPU, timeout: float = 1500.0) -> Any:
  """The JSON on the last line that `python -m COMMAND` prints. See `output`."""
  return json.loads(output(what, command, env, timeout).splitlines()[-1])


def job_events(
  what: str, command: Sequence[str], *, processes: int = 1, devices: int = 1, timeout: float = 900.0
) -> list[dict[str, Any]]:
  """Runs `python -m COMMAND` as a job, and returns what its processes have emitted, process after process.

  Raises:
    CheckpointError: if a process fails.
    TimeoutError: after `timeout` seconds.
  """
  heard: list[list[dict[str, Any]]] = [[] for _ in range(processes)]

  def hear(process: int, line: str) -> None:
    heard[process] += [facts] if (facts := facts_of(line)) else []

  job = Job(["-m", *command], processes=processes, devices=devices, on_line=hear)
  try:
    results = job.wait(timeout)
  finally:
    job.stop(grace=0)
  if bad := [r for r in results if r.returncode]:
    raise CheckpointError(f"{what}: {bad[0].log[-2000:]}")
  return list(itertools.chain(*heard))


class Worker:
  """`python -m COMMAND` in a process of its own, and the facts that it emits.

  Args:
    command: the module and its arguments.
    under: the command that it runs under.

  Attributes:
    child: the process; `end` closes its standard input.
    facts: all facts so far; a later one replaces an earlier one of the same name.
  """

  def __init__(self, *command: str, under: Sequence[str] = ()):
    self.facts: dict[str, Any] = {}
    self.child = subprocess.Popen(
      [*under, sys.executable, "-m", *command],
      env={**os.environ, **CPU, "PYTHONUNBUFFERED": "1", "PYTHONWARNINGS": "ignore"},
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.DEVNULL,
      text=True,
      start_new_session=True,  # a Ctrl-C here is not one there
    )
    self._reader = threading.Thread(target=self._read, daemon=True)
    self._reader.start()

  def _read(self) -> None:
    assert self.child.stdout is not None
    with self.child.stdout:
      for line in self.child.stdout:
        self.facts.update(facts_of(line))

  def until(self, key: str, timeout: float = _LIMIT_S) -> bool:
    """Waits for a fact. Returns False if the process ends, or the time is over, without it."""
    deadline = time.monotonic() + timeout
    while key not in self.facts and self._reader.is_alive() and time.monotonic() < deadline:
      time.sleep(0.02)
    return key in self.facts

  def end(self, timeout: float = _LIMIT_S) -> int | None:
    """Waits for the end. Returns the exit code; None if the process had to be killed."""
    with contextlib.suppress(OSError):
      assert self.child.stdin is not None
      self.child.stdin.close()
    try:
      code: int | None = self.child.wait(timeout)
    except subprocess.TimeoutExpired:
      os.killpg(self.child.pid, signal.SIGKILL)
      self.child.wait(30)
      code = None
    self._reader.join(10)
    return code


class RemoteWorker:
  """An object in each process of a job, whose methods are called from here. Its program calls `serve`.

  Args:
    what: for messages.
    command: the module and its arguments.
    processes: how many.
    settings: of `multihost.Job`.
  """

  def __init__(self, what: str, command: Sequence[str], processes: int = 1, **settings: Any):
    self.what = what
    self._heard: queue.Queue[tuple[int, dict[str, Any]]] = queue.Queue()
    self._job = Job(["-m", *command], processes=processes, stdin=subprocess.PIPE, on_line=self._hear, **settings)

  def _hear(self, process: int, line: str) -> None:
    facts = facts_of(line)
    if "answer" in facts or "error" in facts:
      self._heard.put((process, facts))

  def send(self, do: str, **arguments: Any) -> None:
    """Calls a method in every process; `receive` returns what it returns."""
    for child in self._job.children:
      assert child.stdin is not None
      with contextlib.suppress(OSError):  # `receive` reports a process that has ended
        child.stdin.write(json.dumps({"do": do, "with": arguments}) + "\n")
        child.stdin.flush()

  def receive(self, what: str, timeout: float = 600.0) -> list[Any]:
    """The answers of all processes to the last call.

    Raises:
      CheckpointError: if one failed, ended, or took longer than `timeout` seconds.
    """
    answers: dict[int, Any] = {}
    children, deadline = self._job.children, time.monotonic() + timeout
    while len(answers) < len(children):
      ended = any(child.poll() is not None for i, child in enumerate(children) if i not in answers)
      try:
        process, facts = self._heard.get(timeout=0.5)
      except queue.Empty:
        if ended:
          raise self._failure(f"ended while asked to {what}") from None
        if time.monotonic() > deadline:
          raise self._failure(f"waited {timeout:.0f} s for it to {what}") from None
        continue
      if "error" in facts:
        raise CheckpointError(f"bench: {self.what}: cannot {what}: {facts['error']}\n{facts['trace']}")
      answers[process] = facts["answer"]
    return [answer for _, answer in sorted(answers.items())]

  def ask(self, do: str, **arguments: Any) -> list[Any]:
    """Calls a method in every process. Returns the answers."""
    self.send(do, **arguments)
    return self.receive(do)

  def _failure(self, what: str) -> CheckpointError:
    return CheckpointError(f"bench: {self.what}: {what}; it wrote last:\n{self._job.log(0)[-2000:]}")

  def stop(self) -> None:
    """Ends the processes."""
    for child in self._job.children:
      assert child.stdin is not None
      with contextlib.suppress(OSError):
        child.stdin.close()
    self._job.stop(grace=5)


def serve(begin: Callable[[], tuple[Any, Any]]) -> None:
  """Answers a `RemoteWorker` until its end; `begin` returns the object that it calls, and what is answered first."""
  try:
    worker, first = begin()
    emit(answer=first)
    for line in sys.stdin:
      call = json.loads(line)
      emit(answer=getattr(worker, call["do"])(**call["with"]))
  except Exception as e:
    emit(error=f"{type(e).__name__}: {e}", trace=traceback.format_exc())
    raise
